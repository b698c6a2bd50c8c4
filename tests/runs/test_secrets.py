"""No secret in records, pickles or messages, however it is written and wherever it stands."""

import base64
import json
import pickle
from urllib.parse import quote, quote_plus

import pytest

from trl_vpo import VisualDPOConfig, cli
from trl_vpo.runs.secrets import scrub

KEY = "s3cr3t+key/with=signs&ünd\nlines"
WAYS = {
    "as it is": KEY,
    "percent-encoded": quote(KEY),
    "percent-encoded, slashes too": quote(KEY, safe="").lower(),
    "in a form": quote_plus(KEY),
    "repr": repr(KEY),
    "repr of bytes": repr(f"Bearer {KEY}".encode()),
    "JSON": json.dumps({"a": [KEY]}),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 in an address": base64.urlsafe_b64encode(KEY.encode()).decode(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "MY_DB_PASSWORD"])
def test_a_secret_of_the_environment_is_found_in_any_form(name, way, monkeypatch):
    monkeypatch.setenv(name, KEY)
    text = f"status 401: {WAYS[way]} is not known"
    cleaned = scrub({"a": [{"b": (text,)}]})["a"][0]["b"][0]
    assert "***" in cleaned and cleaned.startswith("status 401: ") and cleaned.endswith("is not known")
    for part in ("s3cr3t", quote(KEY)[8:20], WAYS["base64"][8:20]):
        assert part not in cleaned


@pytest.mark.parametrize(
    "text, clean",
    [
        ("get https://me:pa.ss@host:80/rows?a=1", "get https://***@host:80/rows?a=1"),
        ("proxy me:pass@host:3128", "proxy me:***@host:3128"),
        ("git+ssh://ghp_0123456789@host/x", "git+ssh://***@host/x"),
        ("next=https%3A%2F%2Fme%3Apass%40host%2Frows", "next=https%3A%2F%2F***%40host%2Frows"),
        ("/v1?api_key=abc&n=2&X-Amz-Signature=f00", "/v1?api_key=***&n=2&X-Amz-Signature=***"),
        ("/v1?access_token=abc#top", "/v1?access_token=***#top"),
        ("{'authorization': 'Basic bWU6cGFzcw=='}", "{'authorization': '***'}"),
        ("authorization=Basic bWU6cGFzcw==", "authorization=Basic ***"),
        ("Authorization: Bearer abc.def.ghi-jkl\n", "Authorization: Bearer ***\n"),
        ("b'Bearer abcdefgh'", "b'Bearer ***'"),
        ('{"hub_token": "abc", "pad_token": "<pad>"}', '{"hub_token": "***", "pad_token": "<pad>"}'),
        ("{'proxies': {'password': 'abc'}}", "{'proxies': {'password': '***'}}"),
        ("hf_AbCdEfGhIjKlMnOpQr sk-proj-0123456789abcdef", "*** ***"),
        ("Args(hub_token='abc', eos_token='</s>')", "Args(hub_token='***', eos_token='</s>')"),
        *[(text, text) for text in ("there is no token. Log in", "max_new_tokens=16", "me@host.org", "a://b/c@d")],
    ],
)
def test_secrets_that_nobody_named(text, clean):
    assert scrub(text) == clean


def test_entries_that_hold_secrets_are_left_out():
    record = {"token": 1, "X-Api-Key": "a", "proxy-authorization": "b"}
    record["nested"] = [{"db_password": "c", "dtype": "auto"}]
    kept = {"pad_token": "<pad>", "image_token": "<image>", "max_new_tokens": 3, "api_key_env": "OPENAI_API_KEY"}
    assert scrub(record | kept) == {"nested": [{"dtype": "auto"}]} | kept


def test_a_proxy_password_is_in_no_pickle_and_no_log(tmp_path):
    proxies = {"https": "http://me:pa55word@proxy:3128"}
    args = VisualDPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, model_init_kwargs={"proxies": proxies, "token": "t0ken"}
    )
    assert args.model_init_kwargs["proxies"] == proxies  # it loads with them
    for shown in (pickle.dumps(args), str(args.to_dict()), args.to_json_string(), repr(args)):
        assert "pa55word" not in str(shown) and "t0ken" not in str(shown) and "proxy:3128" in str(shown)


@pytest.mark.parametrize(
    "url", ["me:pa55word@host:8000/v1", "host:8000/v1?api_key=pa55word", "ftp://me:pa55word@host/v1"]
)
def test_an_address_that_is_none_is_shown_without_its_key(url, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Is it red?", "answer": "no", "image": "a.png"}\n')
    argv = ["generate", "rrpo", "--dataset_name", rows, "--output_dir", tmp_path / "run", "--server_url", url]
    assert cli.main([*map(str, argv), "--model_name_or_path", "m"]) == 1
    message = capsys.readouterr().err
    assert "pa55word" not in message and "host" in message and "is not the address of a server" in message


def test_an_option_that_is_unknown_is_named_without_its_value(capsys):
    with pytest.raises(SystemExit):
        cli.main(["merge", "a", "--out", "b", "--hub_token=hf_AbCdEfGhIjKlMnOpQr"])
    assert "hf_AbC" not in capsys.readouterr().err
