"""Runs of `trl-vpo generate` that are killed, stopped, shared by two or lose their server: the rows are the same."""

import base64
import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from chat_server import Reply, chat_servers, said
from forks import Server as Processes
from run_kit import generate, lines, options, write_inputs, written

from trl_vpo.data.rows import read_row
from trl_vpo.errors import ModelError
from trl_vpo.generate.config import GenerateConfig
from trl_vpo.generate.run import make_models
from trl_vpo.models import server as server_module
from trl_vpo.models.requests import Request
from trl_vpo.runs.store import read_outcomes
from trl_vpo.testbed import rows as testbed_rows
from trl_vpo.testbed.tiny_vlm import BASE


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """18 questions about clips, and between them three inputs that are rejected without a model."""
    folder = tmp_path_factory.mktemp("inputs")
    good = lines(write_inputs(folder, clips=6, scenes=1)["clip"])
    (folder / "broken.mp4").write_bytes(b"no video at all")
    bad = [
        {**good[0], "id": "broken", "video": str(folder / "broken.mp4")},
        {**good[0], "id": "gone", "video": "gone.mp4"},
        {**good[0], "id": "silent", "answer": ""},
    ]
    return testbed_rows.write_jsonl([*good[:9], bad[0], *good[9:16], bad[1], *good[16:], bad[2]], folder / "in.jsonl")


class Runs(Processes):
    """Starts and awaits the commands of `generation_runs.py`."""

    def __init__(self, inputs):
        super().__init__("generation_runs.py", BASE)
        self.inputs = inputs

    def start(self, folder, **env) -> int:
        argv = ["generate", "rrpo", *options("rrpo", self.inputs, folder, "--batch_size", 1, "--max_new_tokens", 12)]
        return self.ask({"argv": argv, "log": f"{folder}{env.get('RANK', '')}.log", "env": env})


@pytest.fixture(scope="module")
def runs(inputs):
    server = Runs(inputs)
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """The results of an uninterrupted run, and its seconds."""
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    assert runs.wait(runs.start(folder)) == 0
    seconds = time.monotonic() - began
    kinds = [row["kind"] for row in lines(folder / "rejected.jsonl")]
    assert (kinds.count("unreadable media"), kinds.count("unusable input")) == (2, 1)
    assert len(lines(folder / "rows.jsonl")) + len(kinds) == 21
    return written(folder), seconds


def finished(folder) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("shards/*.jsonl"))


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random(count, runs, whole, tmp_path):
    """Each run is killed and started again until it ends by itself; then the next one."""
    (results, seconds), rng = whole, random.Random(0)
    folder, done, ended, halfway = tmp_path / "0", 0, 0, 0
    kills = 0
    while kills < count:
        pid = runs.start(folder)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        status = runs.wait(pid)
        if status == 0:  # it was quicker
            assert written(folder) == results, folder
            ended += 1
            folder, done = tmp_path / str(ended), 0
            continue
        assert status == -signal.SIGKILL, Path(f"{folder}.log").read_text()
        kills += 1
        before, done = done, finished(folder)
        assert done >= before
        halfway += 0 < done < 21
    assert runs.wait(runs.start(folder)) == 0
    assert written(folder) == results
    assert halfway >= count // 6  # the others died before the first input or behind the last one


def test_ctrl_c(runs, whole, tmp_path):
    """Exit code 130 and one line that says how to go on."""
    folder = tmp_path / "run"
    pid = runs.start(folder)
    while finished(folder) < 2:  # one line at most is cut off, that which is being written
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    assert runs.wait(pid) == 130
    log = Path(f"{folder}.log").read_text().splitlines()
    assert log[-1] == f"Stopped. The same command continues with what is finished in {folder}."
    for line in log[:-1]:  # no traceback, no warning
        assert re.match(r"Loading .* \.\.\.$| *\d+/21 inputs \[| *$", line), line
    assert 0 < finished(folder) < 21
    assert runs.wait(runs.start(folder)) == 0
    assert written(folder) == whole[0]


def test_two_workers_at_once(runs, whole, tmp_path):
    folder = tmp_path / "run"
    pids = [runs.start(folder, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [runs.wait(pid) for pid in pids] == [0, 0]
    assert written(folder) == whole[0]
    shares = [[o["id"] for o in lines(path)] for path in sorted((folder / "shards").glob("*.jsonl"))]
    ids = [row["id"] for row in lines(runs.inputs)]
    assert [sorted(share) for share in shares] == [sorted(ids[0::2]), sorted(ids[1::2])]
    assert sum("rows to train on" in Path(f"{folder}{rank}.log").read_text() for rank in range(2)) == 1


# --- behind a server ----------------------------------------------------------------------------------------------


def behave(number, body):
    """A model that gets everything wrong, and a judge that finds and copies the mistake."""
    text = body["messages"][0]["content"]
    if body["model"] == "judge":
        truth = re.search("Ground truth: (.*)", text)[1]
        if text.startswith("Compare"):
            difference = {"kind": "attribute", "truth": truth.split()[:2][-1], "answer": "pink"}
            return said(json.dumps({"correct": False, "differences": [difference]}))
        return said(json.dumps({"rewritten": re.sub(r"^the \w+", "the pink", truth)}))
    question = text[-1]["text"].split("\n")[0]
    assert text[0]["type"] == "video_url"
    return said(
        "a pink star moves up." if question == "Describe the video." else "yes." if "Is " in question else "nine."
    )


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setattr(server_module, "LONGEST_PAUSE", 0.02)
    with chat_servers() as start:
        yield lambda behave=behave: start(behave=behave)


def generate_behind(server, inputs, folder, *more, method="rrpo"):
    judged = ["--open_check", "judge", "--judge_model", "judge", "--judge_url", server.url] if method == "rrpo" else []
    who = ["--model_name_or_path", "tiny", "--server_url", server.url, "--max_retries", 1, *judged]
    return generate(method, inputs, folder, *who, "--batch_size", 3, *more)


def test_a_server_and_a_judge(serve, inputs, tmp_path):
    summary = generate_behind(serve(), inputs, tmp_path / "run")
    rows = lines(tmp_path / "run/rows.jsonl")
    kinds = [row["answer_kind"] for row in rows]
    assert (kinds.count("open"), kinds.count("short")) == (6, 6) and summary["rows"] == len(rows)
    asked = {row["id"]: row for row in lines(inputs)}
    for row in rows:
        assert read_row(row, phrases=True)
        who = {key: value for key, value in row["generated_by"].items() if key != "settings"}
        assert who == {"pipeline": "rrpo", "model": "tiny", "adapter": None, "revision": None, "judge": "judge"}
        truth = asked[row["id"]]["answer"]
        rejected = row["rejected"][0]["content"][0]["text"]
        assert row["chosen"][0]["content"][0]["text"] == truth
        if row["answer_kind"] == "open":
            assert rejected == re.sub(r"^the \w+", "the pink", truth)
            (start, end), (other_start, other_end) = row["chosen_phrases"][0], row["rejected_phrases"][0]
            assert (truth[start:end], rejected[other_start:other_end]) == (truth.split()[1], "pink")


def test_model_and_judge_share_a_budget(serve, monkeypatch):
    server = serve(lambda number, body: said("fine"))
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    config = GenerateConfig(
        model_name_or_path="tiny",
        server_url=server.url,
        judge_url=server.url.replace("://", "://user:word@"),
        judge_model="wise",
        max_requests=2,
    )
    model, judge = make_models(config)
    assert judge.record()["server"] == server.url  # a password in the address stays in it
    question = [Request([{"role": "user", "content": [{"type": "text", "text": "How?"}]}])]
    assert model.answer(question, config.sampling()) == judge.answer(question, config.sampling()) == ["fine"]
    assert [body["model"] for body in server.bodies] == ["tiny", "wise"] and not judge.can_score
    user = base64.b64encode(b"user:word").decode()
    assert [seen[2]["authorization"] for seen in server.seen] == ["Bearer key", f"Basic {user}"]
    with pytest.raises(ModelError, match="max_requests is 2"):
        judge.answer(question, config.sampling())
    assert make_models(GenerateConfig(), with_model=False) == (None, None)


@pytest.mark.parametrize("trouble", ["the server dies", "the budget ends"])
def test_a_run_that_lost_its_server_goes_on(trouble, serve, inputs, tmp_path):
    good = serve()
    generate_behind(good, inputs, tmp_path / "whole")
    if trouble == "the server dies":
        first = serve(lambda number, body: behave(number, body) if number < 20 else Reply(hang_up=True))
        with pytest.raises(ModelError, match=r"gives no answer from .*the same command continues the run"):
            generate_behind(first, inputs, tmp_path / "run")
    else:
        first = serve()
        with pytest.raises(ModelError, match=r"max_requests is 20.*The same command continues the run"):
            generate_behind(first, inputs, tmp_path / "run", "--max_requests", 20)
        assert len(first.seen) == 20
    done = {outcome.id for outcome in read_outcomes(tmp_path / "run")}
    assert 6 <= len(done) < 21 and not (tmp_path / "run/rows.jsonl").exists()
    second = serve()  # another port: where a server listens is no setting of the run
    generate_behind(second, inputs, tmp_path / "run")
    assert written(tmp_path / "run") == written(tmp_path / "whole")
    assert len(second.seen) < len(good.seen)  # nothing that was finished is asked again
