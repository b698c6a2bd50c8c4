"""A model behind a server, against a real HTTP server on loopback that behaves as each test says."""

import gzip
import json
import logging
import socket
import time
from email.utils import formatdate

import pytest
from chat_server import KEY, SAMPLING, Reply, model_of, refused, said, stopped
from local_kit import asked

from trl_vpo.errors import ModelError
from trl_vpo.models import server as server_module
from trl_vpo.models.server import RequestBudget, ServerModel
from trl_vpo.text.responses import Failure

WHY = asked("Why?")
BOOM = Failure("status 500: boom (3 attempts)")


def test_answers_come_in_order_and_concurrently(serve):
    def behave(number, body):
        text = body["messages"][0]["content"]
        return Reply(said(f"answer {text}").body, wait=0.3 - 0.03 * int(text))  # later ones are faster

    server = serve(behave=behave)
    requests = [asked(str(i)) for i in range(10)]
    assert model_of(server, concurrency=4).answer(requests, SAMPLING) == [f"answer {i}" for i in range(10)]
    assert server.most_active == 4
    assert model_of(server).answer([], SAMPLING) == []


TOKEN = "the answer holds {!r}, a token of templates".format
BROKEN = "the server broke the answer off: finish_reason {!r}".format
BREAKS = ("abort", "error", "insufficient_system_resource", {"type": KEY})
REFUSAL = "the server refused the request"
ANSWERS = {  # what is asked -> what the server replies, and what that is: an answer, or the reason why it is none
    "parts": (said([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]), "in parts"),
    "thinks": (said("<think>\nwell, well\n</think>\n\nyes."), "yes."),
    "no token": (said("a <b>dog</b> | <1> |>"), "a <b>dog</b> | <1> |>"),
    "cut": (said("a long sto", finish="length"), Failure("cut off after 7 tokens")),
    "empty": (said("  "), Failure("empty answer")),
    "zero width": (said("\u200b\u2060"), Failure("empty answer")),
    "none": (said(None), Failure("empty answer")),
    "thinking": (said("<think>well, well", finish="stop"), Failure("empty answer")),
    "filter": (said("", finish="content_filter"), Failure("stopped by the server's content filter")),
    "hint": (said("◁think▷I was told 2.◁/think▷It is 2.", finish=None), "It is 2."),
    "late hint": (said("It is <thinking>I was told 2."), Failure(TOKEN("<thinking>"))),
    **{
        f"{reason}": (said("a long sto", finish=reason), Failure(BROKEN(reason).replace(KEY, "<API key>")))
        for reason in BREAKS
    },
    **{f"{reason}": (said("whole.", finish=reason), "whole.") for reason in (None, "eos_token", "STOP", "tool_calls")},
    "refused": (refused(400, f"too long for {KEY}"), Failure(f"{REFUSAL} (400): too long for <API key>")),
    "large": (Reply(b"<html>too large</html>", 413), Failure(f"{REFUSAL} (413): <html>too large</html>")),
    "half": (
        Reply(b'{"choices": [{"message": {"content": "a dog \\ud83d"}, "finish_reason": "stop"}]}'),
        Failure("the answer holds half a surrogate pair, which is not valid text"),
    ),
    "half error": (Reply(b'{"error": {"message": "bad \\ud83d"}}', 422), Failure(f"{REFUSAL} (422): bad ?")),
    "image": (said("<image> a dog"), Failure(TOKEN("<image>"))),
    "pad": (said("a dog<|image_pad|>"), Failure(TOKEN("<|image_pad|>"))),
    "turn": (said("a dog<|im_end|>\n<|im_start|>user"), Failure(TOKEN("<|im_end|>"))),
}


def test_answers_that_are_none(serve, fast):
    server = serve(behave=lambda _, body: ANSWERS[body["messages"][0]["content"]][0])
    answers = model_of(server).answer([asked(text) for text in ANSWERS], SAMPLING)
    assert dict(zip(ANSWERS, answers)) == {text: answer for text, (_, answer) in ANSWERS.items()}
    assert len(server.seen) == len(ANSWERS)  # nothing of this was asked twice


@pytest.mark.parametrize("body", [b'{"choices": [', {"choices": []}, {"error": {"message": "engine"}}, b"<html>"])
def test_a_malformed_answer_is_asked_for_again_then_a_failure(serve, fast, body):
    server = serve(Reply(body), said("fine"), Reply(body), Reply(body), Reply(body), said("fine"))
    model = model_of(server, concurrency=1)
    fine, failure = model.answer([WHY] * 2, SAMPLING)
    assert fine == "fine" and failure.reason.startswith("malformed answer: ") and "(3 attempts)" in failure.reason
    # A server that gave no answer at all is none: a web page behind the URL is not ten thousand failures.
    assert "malformed answer" in stopped(model_of(serve(Reply(body))), [WHY])


def test_the_pause_that_a_server_asks_for_is_kept(serve, fast):
    server = serve(refused(429, retry_after="1"), said("fine"))
    assert model_of(server).answer([WHY], SAMPLING) == ["fine"]
    assert 1.0 <= server.gaps[0] < 1.5
    at = formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now
    server = serve(refused(503, retry_after=at), said("fine"))
    assert model_of(server).answer([WHY], SAMPLING) == ["fine"]
    assert 0.9 <= server.gaps[0] < 2.5
    server = serve(refused(429, "quota", retry_after="7200"))
    assert "asks to wait 7200 s (status 429: quota)" in stopped(model_of(server), [WHY])
    assert len(server.seen) == 1


def test_pauses_grow_and_vary(serve):
    server = serve(refused(500), refused(502), refused(529), said("fine"))
    assert model_of(server, max_retries=3).answer([WHY], SAMPLING) == ["fine"]
    for gap, least in zip(server.gaps, (0.25, 0.5, 1.0)):
        assert least <= gap < 2 * least + 0.3


def test_a_dropped_connection_and_a_slow_answer(serve, fast, caplog):
    caplog.set_level(logging.INFO, logger="trl_vpo")
    server = serve(Reply(hang_up=True), Reply(said("late").body, wait=1.2), said("fine"))
    assert model_of(server, timeout=0.5).answer([WHY], SAMPLING) == ["fine"]
    assert len(server.seen) == 3
    assert "no connection (" in caplog.text and "no answer within 0.5 s; asking again in" in caplog.text


def test_endless_answers_are_not_read(serve, fast, monkeypatch):
    monkeypatch.setattr(server_module, "LARGEST_ANSWER", 1000)
    monkeypatch.setattr(server_module, "LONGEST_ANSWER", 1)
    plain = json.dumps(said("a" * 900).body).encode()
    bomb = Reply(gzip.compress(b" " * 2**20 + plain), headers={"content_encoding": "gzip"})
    server = serve(said("a" * 2000), bomb, Reply(plain))
    assert model_of(server).answer([WHY], SAMPLING) == ["a" * 900]
    assert {headers["accept-encoding"] for _, _, headers, _ in server.seen} == {"identity"}
    for endless in (said("a" * 2000), refused(500, "a" * 2000)):
        assert "an answer of more than 1000 bytes" in stopped(model_of(serve(endless)), [WHY] * 2)
    drips = serve(Reply(plain, pauses=(0.1,) * 50))
    start = time.monotonic()
    assert "an answer that takes longer than 0.3 s" in stopped(model_of(drips, timeout=0.3, max_retries=0), [WHY])
    assert time.monotonic() - start < 3


def test_a_slow_answer_is_waited_for_while_it_comes(serve):
    server = serve(Reply(said("fine").body, pauses=(0.2,) * 5))
    assert model_of(server, timeout=0.5).answer([WHY], SAMPLING) == ["fine"]
    assert len(server.seen) == 1


@pytest.mark.parametrize("key", ["sk-0123456789\nabcdef", "sk-012 345", "sk-ключ-0123456789"])
def test_a_key_that_no_header_takes_is_named_not_shown(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ModelError, match="the API key in OPENAI_API_KEY holds a line break or another") as caught:
        ServerModel("http://127.0.0.1:9/v1", "tiny")
    assert key[:6] not in str(caught.value)


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_does_not_take_the_key_along(serve, status):
    other = serve(said("stolen"))
    server = serve(Reply(b"", status, {"location": f"{other.url}/chat/completions?key={KEY}"}))
    assert f"redirects to {other.url}/chat/completions: give the address" in stopped(model_of(server), [WHY])
    assert other.seen == [] and len(server.seen) == 1


@pytest.mark.parametrize("reply", [refused(500, "boom"), Reply(hang_up=True), refused(429, "slow down")])
def test_a_server_that_is_down_stops_the_run(serve, fast, reply):
    server = serve(reply)
    message = stopped(model_of(server), [WHY] * 40)
    assert server.url in message and "'tiny'" in message and "(3 attempts)" in message
    assert len(server.seen) <= 3 * 4  # the other 36 were never sent


def test_nobody_listens(fast):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    message = stopped(ServerModel(url, "tiny", max_retries=1), [WHY])
    assert f"{url} gives no answer from 'tiny': no connection (ConnectError" in message and "(2 attempts)" in message


@pytest.mark.parametrize("concurrency", [1, 8])
def test_requests_that_break_the_server_are_their_own_failures(serve, fast, concurrency):
    """They may give up one after the other, behind all the others, or in between."""
    bad = {"2", "3", "7"}
    breaks = Reply({"error": {"message": "boom"}}, 500, wait=0.05)  # the others are quicker
    server = serve(behave=lambda _, b: breaks if b["messages"][0]["content"] in bad else said("fine"))
    model = model_of(server, concurrency=concurrency)
    expected = [BOOM if str(i) in bad else "fine" for i in range(8)]
    assert model.answer([asked(str(i)) for i in range(8)], SAMPLING) == expected
    assert model.answer([asked("2")], SAMPLING) == model.answer([asked("3")], SAMPLING) == [BOOM]


def test_a_server_that_breaks_down_halfway_stops_the_run(serve, fast):
    server = serve(*[said("fine")] * 5, refused(500, "boom"))
    model = model_of(server, concurrency=1)
    assert "boom" in stopped(model, [WHY] * 40)
    assert len(server.seen) == 5 + 2 * 3  # one request, and one that was answered before


@pytest.mark.parametrize("status, remedy", [(401, "OPENAI_API_KEY"), (404, "check the model's name")])
def test_what_every_request_would_meet_stops_at_once(serve, caplog, status, remedy):
    caplog.set_level(logging.DEBUG)
    server = serve(refused(status, f"wrong key {KEY} or model"))
    message = stopped(model_of(server, concurrency=1), [WHY] * 5)
    assert server.url in message and "'tiny'" in message and str(status) in message and remedy in message
    assert "wrong key <API key> or model" in message and len(server.seen) == 1
    assert KEY not in caplog.text


def test_a_server_that_refuses_everything_stops_the_run(serve):
    refusal = refused(400, "video_url is not supported")
    message = stopped(model_of(serve(refusal)), [WHY] * 3)
    assert "refused all of the first 3 requests" in message and "video_url is not supported" in message
    model = model_of(serve(refusal))
    failure = Failure(f"{REFUSAL} (400): video_url is not supported")
    assert model.answer([WHY], SAMPLING) == [failure]  # it may be this one's fault
    assert "refused all of the first 2 requests" in stopped(model, [WHY])
    assert model.answer([], SAMPLING) == []


def test_refusals_of_a_server_that_answers(serve):
    model = model_of(serve(refused(400, "too long"), said("fine"), refused(400, "too long")))
    answers = [model.answer([WHY], SAMPLING)[0] for _ in range(4)]
    refusal = Failure(f"{REFUSAL} (400): too long")
    assert answers == [refusal, "fine", refusal, refusal]


def test_the_budget_counts_every_attempt(serve, fast):
    server = serve(refused(500), said("fine"))
    model = model_of(server, budget=RequestBudget(3), concurrency=1)
    assert model.answer([WHY] * 2, SAMPLING) == ["fine", "fine"]
    assert len(server.seen) == 3
    assert "request budget is used up: max_requests is 3" in stopped(model, [WHY])
    assert len(server.seen) == 3


def test_requests_in_flight_end_before_the_budgets_error(serve):
    server = serve(Reply(said("fine").body, wait=0.3))
    assert "budget" in stopped(model_of(server, budget=RequestBudget(3), concurrency=4), [WHY] * 9)
    assert len(server.seen) == 3 and server.active == 0


def test_an_address_that_is_none():
    with pytest.raises(ModelError, match=r"'localhost:8000' is not the address of a server: give it as http://"):
        ServerModel("localhost:8000", "tiny")


def test_without_the_client_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)  # what Python does for a package that is missing
    with pytest.raises(ModelError, match=r"pip install trl-vpo\[judge\]"):
        ServerModel("http://127.0.0.1:1/v1", "tiny")
