"""Training that pushes to a Hub on this machine: what arrives, what does not, and what happens when the Hub fails."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from families import LANGUAGE_MODEL, build, write_model
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import _http
from local_hub import Commit, Fault, LocalHub, Repo

from trl_vpo.errors import HubError
from trl_vpo.testbed.rows import write_jsonl
from trl_vpo.training import checkpoints, hub, hub_repo
from trl_vpo.training.run import parse, run_training

TOKEN = "hf_TheTokenThatNobodyMayEverSee0123456"
READ_TOKEN = "hf_ThisOneMayReadButNotWrite0123456789"
LOADING_TOKEN = "hf_ThisOneWasForTheBaseModel0123456789"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of a tiny model and text-only rows; it does not say where the result goes."""
    folder = tmp_path_factory.mktemp("hub")
    base = write_model(folder / "base", *build("Qwen2-VL"))
    rows = [{"prompt": "What moves?", "chosen": f"a red square {i}.", "rejected": f"a blue circle {i}."} for i in "ab"]
    settings = {"model_name_or_path": base, "dataset_name": str(write_jsonl(rows, folder / "train.jsonl"))}
    settings |= {"use_peft": True, "lora_r": 2, "lora_target_modules": LANGUAGE_MODEL, "gradient_checkpointing": False}
    settings |= {"per_device_train_batch_size": 1, "save_steps": 1, "report_to": "none", "disable_tqdm": True}
    settings |= {"bf16": False, "use_cpu": True, "push_to_hub": True, "hub_model_id": "me/vpo"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return folder / "recipe.yaml"


@pytest.fixture
def local(monkeypatch, tmp_path):
    """The local Hub, in place of the real one."""
    with LocalHub() as server:
        server.tokens = {TOKEN: ("me", ("read", "write")), READ_TOKEN: ("me", ("read",))}
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is no part of the local one
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(hub, "RETRY_WAITS", (0, 0))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        set_client_factory(_http.default_client_factory)


def argv_of(recipe, output_dir, **options):
    options = {"config": recipe, "output_dir": output_dir} | options
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def train(recipe, output_dir, **options):
    return run_training("rrpo", argv_of(recipe, output_dir, **options))


def model_files(folder, *more):
    """What a repo's root is to hold: loading needs it, or it tells about the run."""
    names = ["adapter_config.json", "adapter_model.safetensors", "processor_config.json", "chat_template.jinja"]
    names += ["tokenizer.json", "tokenizer_config.json", "README.md", *more]
    return {name: (folder / name).read_bytes() for name in names}


def below(folder, prefix):
    return {f"{prefix}/{p.relative_to(folder)}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_not_in(tokens, folder, server, output):
    """In no file of the run, nothing that was pushed, no line that was printed."""
    places = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, repo in server.repos.items():
        places |= {f"{name}:{path}": content for commit in repo.commits for path, content in commit.files.items()}
    places |= {"printed": output.encode()} | {c: c.encode() for repo in server.repos.values() for c in repo.messages()}
    assert any(str(place).endswith("training_args.bin") for place in places)
    assert [place for place, content in places.items() for token in tokens if token.encode() in content] == []


def test_pushes_in_the_background_hold_up_nothing(recipe, local, tmp_path, capfd, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "model.safetensors").write_text("of another run")
    monkeypatch.delenv("HF_TOKEN")
    seen = {}

    def slow():  # the first push does not end before training has gone on to the third save
        until = time.monotonic() + 120
        while not (out / "checkpoint-3" / checkpoints.MARKER).exists() and time.monotonic() < until:
            time.sleep(0.01)
        seen.update(model_files(out / "checkpoint-1"))

    local.faults = [Fault(r"POST .*/commit/main", slow, times=1)]
    options = {"hub_token": TOKEN, "hub_private_repo": True, "model_init_kwargs": json.dumps({"token": LOADING_TOKEN})}
    train(recipe, out, max_steps=3, learning_rate=0.01, **options)

    repo = local.repos["me/vpo"]
    assert repo.private
    assert repo.messages() == ["Training in progress, step 1", "End of training"]
    cards = [commit.files["README.md"].decode() for commit in repo.commits]
    assert repo.commits[0].files == seen | {"README.md": cards[0].encode()}
    assert repo.files == model_files(out, "run.json")
    assert [commit.lfs for commit in repo.commits] == [["adapter_model.safetensors"]] * 2
    weights = [commit.files["adapter_model.safetensors"] for commit in repo.commits]
    assert weights[0] != weights[1]
    assert all('PeftModel.from_pretrained(model, "me/vpo")' in card and "**RRPO** on" in card for card in cards)
    assert json.loads(repo.files["run.json"])["steps"] == 3
    printed = capfd.readouterr()
    assert f"trl-vpo: pushed to {local.url}/me/vpo." in printed.out and ", pushed to me/vpo\n" in printed.out
    assert_not_in([TOKEN, LOADING_TOKEN], out, local, printed.out + printed.err)


def test_the_last_checkpoint_arrives_although_the_hub_fails(recipe, local, tmp_path, capfd, caplog):
    left = {"last-checkpoint/rng_state_7.pth": b"old", "last-checkpoint/scheduler.pt": b"old", "mine.txt": b"mine"}
    local.repos["me/vpo"] = Repo(private=False)
    local.repos["me/vpo"].branches["main"].append(Commit("before", [], [], left))
    local.faults = [
        Fault(r"POST .*/commit/", 500, times=1),  # the push of step 1
        Fault(r"PUT /storage/", "drop", times=1),  # an upload of it; huggingface_hub tries it again
        Fault(r"POST .*/commit/", 502, times=1),  # the first try at the end
    ]
    out = tmp_path / "out"
    train(recipe, out, max_steps=1, save_total_limit=1, hub_strategy="checkpoint")

    repo = local.repos["me/vpo"]
    assert repo.messages() == ["before", "End of training"]
    assert repo.commits[1].deleted == ["last-checkpoint/rng_state_7.pth"]
    kept = below(out / "checkpoint-1", "last-checkpoint")
    assert {"last-checkpoint/optimizer.pt", f"last-checkpoint/{checkpoints.MARKER}"} < set(kept)
    assert repo.files == model_files(out, "run.json") | kept | {"mine.txt": b"mine"}
    for name, content in repo.files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    assert checkpoints.find_problems(tmp_path / "copy" / "last-checkpoint") == []
    printed = capfd.readouterr()
    failed = "HTTP {} to POST /api/models/me/vpo/commit/main: no luck with ***."
    assert f"trl-vpo: step 1 was not pushed to the Hub: {failed.format(500)} Training continues" in printed.out
    assert f"trl-vpo: pushing to the Hub failed: {failed.format(502)} Again in 0 s." in printed.out
    assert f"thrown while requesting PUT {local.url}/storage/" in caplog.text
    assert_not_in([TOKEN], out, local, printed.out + printed.err + caplog.text)


def test_the_printed_command_pushes_what_was_not_pushed(recipe, local, tmp_path, capfd):
    local.faults = [Fault("", "drop")]  # of every request
    out = tmp_path / "the result"
    more = {"save_total_limit": 2, "hub_strategy": "all_checkpoints", "hub_private_repo": True}
    trainer = train(recipe, out, max_steps=3, **more)
    assert trainer.state.global_step == 3
    assert local.repos == {}
    assert set(local.requests) == {"POST /api/repos/create"}  # and nothing is uploaded without it
    printed = capfd.readouterr().out
    assert "trl-vpo: the Hub cannot be reached: Server disconnected without sending a response. Training" in printed
    assert f"NOT PUSHED to {local.url}/me/vpo: the result in {out}, checkpoint-2, checkpoint-3. Server" in printed
    assert "trl-vpo: checkpoint-1 was not pushed, and save_total_limit has deleted it meanwhile." in printed

    local.faults = []
    program, *options = shlex.split(printed.split("HF_TOKEN, and:\n")[1].splitlines()[0])
    environment = os.environ | {"HF_ENDPOINT": local.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [str(Path(sys.executable).with_name(program)), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    repo = local.repos["me/vpo"]
    assert repo.private
    steps = below(out / "checkpoint-2", "checkpoint-2") | below(out / "checkpoint-3", "checkpoint-3")
    assert repo.files == model_files(out, "run.json") | steps


def test_checkpoints_of_an_earlier_part_arrive(recipe, local, tmp_path, capfd):
    """The Hub refused them then; one that it has is not pushed again."""
    local.faults = [Fault(r"POST .*/commit/", 503)]
    out, more = tmp_path / "out", {"hub_strategy": "all_checkpoints", "resume_from_checkpoint": True}
    train(recipe, out, max_steps=2, **more)
    assert f"to {local.url}/me/vpo: the result in {out}, checkpoint-1, checkpoint-2." in capfd.readouterr().out
    local.faults = []
    local.repos["me/vpo"].branches["main"].append(Commit("by hand", [], [], {"checkpoint-1/file": b"a"}))
    train(recipe, out, max_steps=3, **more)
    steps = below(out / "checkpoint-2", "checkpoint-2") | below(out / "checkpoint-3", "checkpoint-3")
    assert local.repos["me/vpo"].files == model_files(out, "run.json") | steps | {"checkpoint-1/file": b"a"}


def test_a_whole_model_goes_to_a_branch_once_at_the_end(recipe, local, tmp_path):
    more = {"use_peft": False, "max_steps": 1, "save_strategy": "no", "hub_strategy": "end", "hub_revision": "dev"}
    train(recipe, tmp_path / "qwen2-vl.rrpo", hub_model_id="qwen2-vl.rrpo", **more)
    repo = local.repos["me/qwen2-vl.rrpo"]
    assert repo.messages() == []
    assert [commit.message for commit in repo.branches["dev"][1:]] == ["End of training"]
    files = repo.branches["dev"][-1].files
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "run.json"} < set(files)
    assert "training_args.bin" not in files
    assert files["model.safetensors"] == (tmp_path / "qwen2-vl.rrpo" / "model.safetensors").read_bytes()
    assert '.from_pretrained("me/qwen2-vl.rrpo"' in files["README.md"].decode()


# --- before training ----------------------------------------------------------------------------------------------


def arguments(*args, **options):
    return parse("rrpo", argv_of(*args, **options))[1]


def test_a_bad_token_ends_the_run_before_anything_is_loaded(recipe, local, tmp_path):
    with pytest.raises(HubError, match=r"the Hub refuses me/vpo: HTTP 401 .* Log in with `hf auth login`"):
        train(recipe, tmp_path / "out", hub_token="hf_wrong", dataset_name=tmp_path / "not-there.jsonl")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".training.lock"]


@pytest.mark.parametrize(
    ("options", "message", "requests"),
    [
        ({"hub_token": ""}, "there is no token. Log in", 0),
        ({"hub_model_id": "me/my vpo"}, "hub_model_id, .*'my vpo'|hub_model_id, .*'me/my vpo'", 0),
        ({"hub_model_id": "you/vpo"}, "refuses you/vpo: HTTP 403 .*: You may not create you/vpo", 2),
        ({"hub_token": READ_TOKEN, "hub_model_id": "me/new"}, "HTTP 403 .*: You may not create me/new", 2),
        ({"hub_token": READ_TOKEN}, "HTTP 403 .*: You may not write to me/vpo", 2),
        ({"hub_private_repo": True}, "hub_private_repo: me/vpo exists already, and it is public", 2),
    ],
)
def test_what_the_user_must_mend_is_told_at_once(recipe, local, tmp_path, monkeypatch, options, message, requests):
    local.repos["me/vpo"] = Repo(private=False)
    if options.get("hub_token") == "":
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=message) as raised:
        hub.connect(arguments(recipe, tmp_path, **options))
    assert len(local.requests) == requests
    assert "hf_" not in str(raised.value)


@pytest.mark.parametrize("what", [503, "drop", "hang"])
def test_what_may_pass_is_told_and_training_goes_on(recipe, local, tmp_path, capfd, monkeypatch, what):
    monkeypatch.setattr(hub_repo, "TIMEOUT", 0.3)
    local.faults = [Fault("POST /api/repos/create", what, times=1)]
    started = time.monotonic()
    push = hub.connect(arguments(recipe, tmp_path))
    assert time.monotonic() - started < 10
    assert "trl-vpo: the Hub cannot be reached: " in capfd.readouterr().out
    file = tmp_path / "file"
    file.write_text("a")
    push.repo.commit({"file": file}, "later")
    assert local.repos["me/vpo"].messages() == ["later"]


def test_a_checkpoint_waits_for_the_push_before_it(recipe, local, tmp_path, capfd):
    """It must not be deleted meanwhile, unless the Hub is down; the next push brings it."""
    push = hub.connect(arguments(recipe, tmp_path, hub_strategy="all_checkpoints"))
    folders = [tmp_path / f"checkpoint-{step}" for step in (1, 2)]
    for folder in folders:
        folder.mkdir()
        (folder / "file").write_text("a")
    push._missing = {folder.name: folder for folder in folders}
    push._reading = {folders[0]}
    assert push.in_use() == set(folders)
    push._push(1, {}, {"checkpoint-1": folders[0]})
    assert push.in_use() == {folders[1]} and push._missing == {"checkpoint-2": folders[1]}
    local.faults = [Fault(r"POST .*/commit/", 500)]
    push._push(2, {}, dict(push._missing))
    assert not push.in_use() and list(push._missing) == ["checkpoint-2"]
    assert "step 2 was not pushed to the Hub: HTTP 500" in capfd.readouterr().out


def test_nothing_is_asked_offline_or_without_push_to_hub(recipe, local, tmp_path, capfd, monkeypatch):
    args = arguments(recipe, tmp_path, push_to_hub=False, hub_token=TOKEN)
    assert hub.connect(args) is None and args.hub_token is None  # training_args.bin would hold it
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.connect(arguments(recipe, tmp_path)) is not None
    assert "unset the `HF_HUB_OFFLINE`" in capfd.readouterr().out
    assert local.requests == []
