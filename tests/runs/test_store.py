"""The run's folder: real workers killed at every point, several at once, damaged files, full disks."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_dataset
from helpers import KITS
from workers import Sum, outcome, work

from trl_vpo.data.rows import read_row
from trl_vpo.errors import GenerateError
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import RESULTS
from trl_vpo.runs.shards import read_outcomes, read_settings
from trl_vpo.runs.store import Run

COUNT = 12


class Workers:
    """Starts, kills and awaits the workers of `workers.py`."""

    def __init__(self):
        script = str(KITS / "workers.py")
        self.process = subprocess.Popen([sys.executable, script], stdin=-1, stdout=-1, text=True)

    def ask(self, job) -> int:
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder, count=COUNT, **job) -> int:
        return self.ask({"folder": folder, "count": count, **job})

    def wait(self, pid) -> int:
        return self.ask({"wait": pid})

    def run(self, folder, count=COUNT, **job) -> int:
        return self.wait(self.start(folder, count, **job))


@pytest.fixture(scope="module")
def workers():
    made = Workers()
    yield made
    made.process.stdin.close()
    made.process.wait()


def results(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert work(folder, COUNT)["kept"] == 9
    return results(folder)


def shard(folder, name="00000-of-00001") -> Path:
    return folder / "shards" / f"{name}.jsonl"


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- results ------------------------------------------------------------------------------------------------------


def test_results(tmp_path, whole):
    summary = work(tmp_path / "run", COUNT)
    assert summary == {
        "inputs": 12,
        "kept": 9,
        "rows": 12,
        "rejected": 3,
        "rejected_by_kind": {"answered correctly": 3},
        "figures": {"sum": 66},
    }
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    rows = read_lines(tmp_path / "run/rows.jsonl")
    front = ["r0-0", "r6-0"]  # the first to show the plain columns, and images
    behind = ["r0-1", "r1-0", "r2-0", "r4-0", "r5-0", "r5-1", "r8-0", "r9-0", "r10-0", "r10-1"]
    assert [r["id"] for r in rows] == front + behind
    assert {tuple(row) for row in rows} == {("id", "prompt", "chosen", "rejected", "images")}
    assert [r["images"] for r in rows[:3]] == [None, ["/media/r6.png"], None]
    assert read_lines(tmp_path / "run/rejected.jsonl") == [
        {"id": f"r{i}", "kind": "answered correctly", "reason": f"the answer {i} is right"} for i in (3, 7, 11)
    ]
    assert [o.id for o in read_outcomes(tmp_path / "run")] == [f"r{i}" for i in range(12)]
    assert next(read_outcomes(tmp_path / "run")) == outcome("r0")
    assert read_settings(tmp_path / "run") == {"seed": 0}


def test_rows_train(tmp_path):
    work(tmp_path / "run", COUNT)
    loaded = load_dataset("json", data_files=str(tmp_path / "run/rows.jsonl"), split="train", cache_dir=tmp_path / "c")
    rows = [read_row(example | {"images": None}) for example in loaded]  # r6 has no placeholder for its image
    assert len(rows) == 12
    assert rows[0].chosen == [{"role": "assistant", "content": [{"type": "text", "text": "0"}]}]


def test_columns_and_types_that_come_late_load(tmp_path):
    """`load_dataset` takes the types from the first 10 MB; here only the last row has a box, a fraction, ..."""
    text = "x" * 60_000

    def made(i):
        last = i == 199
        row = {"id": f"r{i}", "prompt": text, "chosen": "a", "rejected": "b", "score": 0.5 if last else 1}
        row["critical_box"] = [0, 1, 2, 3] if last else None
        row["videos"] = [{"path": "/v.mp4", "video_start": 1.5}] if last else ["/v.mp4"]
        return Outcome(f"r{i}", rows=(row | ({"late": "yes"} if last else {}),))

    ids = [f"r{i}" for i in range(200)]
    with Run(tmp_path / "run", {}) as run:
        for name in ids:
            run.write(made(int(name[1:])))
        pipeline = Sum()
        pipeline.summarize = lambda outcomes: {}
        run.finish(ids, pipeline)
    assert (tmp_path / "run/rows.jsonl").stat().st_size > 11e6
    loaded = load_dataset("json", data_files=str(tmp_path / "run/rows.jsonl"), split="train", cache_dir=tmp_path / "c")
    assert [row["id"] for row in loaded.select(range(3))] == ["r0", "r199", "r1"]
    assert loaded[1]["critical_box"] == [0, 1, 2, 3]
    assert (loaded[1]["score"], loaded[1]["late"]) == (0.5, "yes")
    assert loaded[1]["videos"][0]["video_start"] == 1.5
    assert loaded[150]["videos"] == ["/v.mp4"]


def test_the_pipeline_has_the_last_word(tmp_path):
    pipeline = Sum()

    def select(outcomes):
        return [Outcome(o.id, reason="too long", kind="outside keep_top") if o.id == "r2" else o for o in outcomes]

    pipeline.select = select
    pipeline.summarize = lambda outcomes: {"rejected": [o.id for o in outcomes if o.reason]}
    ids = [f"r{i}" for i in range(4)]
    with Run(tmp_path / "run", {}) as run:
        for name in ids:
            run.write(outcome(name))
        summary = run.finish(ids, pipeline)
        assert summary["figures"] == {"rejected": ["r2", "r3"]}
        assert summary["rejected_by_kind"] == {"answered correctly": 1, "outside keep_top": 1}
        assert [row["id"] for row in read_lines(tmp_path / "run/rows.jsonl")] == ["r0-0", "r0-1", "r1-0"]
        pipeline.select = lambda outcomes: list(outcomes)[1:]
        with pytest.raises(ValueError, match=r"Sum\.select must give one outcome for each"):
            run.finish(ids, pipeline)


def test_more_inputs_later(tmp_path, whole):
    """A run over the first five inputs goes on to all of them, and back."""
    assert work(tmp_path / "run", 5)["inputs"] == 5
    assert work(tmp_path / "run", COUNT)["inputs"] == 12
    assert results(tmp_path / "run") == whole
    assert work(tmp_path / "run", 5)["rejected"] == 1


# --- killed -------------------------------------------------------------------------------------------------------


def test_killed_at_every_point(tmp_path, workers, whole):
    """Before and after every call that changes the disk, and with half a line written; then resumed."""
    torn = unfinished = 0
    for point in range(200):
        folder = tmp_path / str(point)
        status = workers.run(folder, die_at=point)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        data = shard(folder).read_bytes() if shard(folder).exists() else b""
        torn += bool(data) and not data.endswith(b"\n")
        unfinished += data.count(b"\n") == COUNT and not all((folder / name).exists() for name in RESULTS)
        assert workers.run(folder) == 0
        assert results(folder) == whole, point
        assert not list(folder.glob(".*.part"))
    assert point == 2 * (1 + 2 + COUNT + 1 + 3 * 2 + 1)  # the lock, settings, lines, a sync, the results, a last sync
    assert (torn, unfinished) == (COUNT, 14)  # 14: from the last line to the summary


def test_killed_twenty_times_at_random(tmp_path, workers):
    count, folder, rng = 300, tmp_path / "run", random.Random(0)
    work(tmp_path / "whole", count)
    grown, torn = [], 0
    for _ in range(20):
        pid = workers.start(folder, count, slow=True)
        time.sleep(rng.uniform(0.01, 0.08))
        os.kill(pid, signal.SIGKILL)
        workers.wait(pid)
        data = shard(folder).read_bytes() if shard(folder).exists() else b""
        grown.append(data.count(b"\n"))
        torn += bool(data) and not data.endswith(b"\n")
    assert grown == sorted(grown) and grown[9] > 0 and torn
    assert workers.run(folder, count) == 0
    assert results(folder) == results(tmp_path / "whole")


# --- several workers ----------------------------------------------------------------------------------------------


def test_three_workers_at_once(tmp_path, workers, whole):
    folder = tmp_path / "run"
    pids = [workers.start(folder, rank=rank, world_size=3, slow=True) for rank in range(3)]
    statuses = [workers.wait(pid) for pid in pids]
    assert set(statuses) <= {0, 1} and 0 in statuses  # whoever came last wrote the results
    assert results(folder) == whole
    shares = [[o["id"] for o in read_lines(shard(folder, f"0000{rank}-of-00003"))] for rank in range(3)]
    assert shares == [[f"r{i}" for i in range(rank, COUNT, 3)] for rank in range(3)]


def test_not_finished_while_others_have_work(tmp_path, workers, whole):
    folder = tmp_path / "run"
    assert workers.run(folder, rank=0, world_size=2) == 1
    assert not (folder / "rows.jsonl").exists()
    assert workers.run(folder, rank=1, world_size=2) == 0
    assert results(folder) == whole


def test_of_workers_that_end_together_one_writes_the_results(tmp_path, whole):
    """Both have finished every input before either asks for the results."""
    folder, ids = tmp_path / "run", [f"r{i}" for i in range(COUNT)]
    with (
        Run(folder, {"seed": 0}, rank=0, world_size=2) as first,
        Run(folder, {"seed": 0}, rank=1, world_size=2) as second,
    ):
        for run in (first, second):
            for i in run.remaining(ids):
                run.write(outcome(ids[i]))
        assert first.finish(ids, Sum()) is None
        assert not any((folder / name).exists() for name in RESULTS)
        assert second.finish(ids, Sum())["inputs"] == COUNT
    assert results(folder) == whole


def test_another_number_of_workers_goes_on(tmp_path, workers, whole):
    """Two of three workers die with torn lines; one goes on alone, then four: every input is done once."""
    folder = tmp_path / "run"
    statuses = [workers.run(folder, rank=rank, world_size=3, die_at=6) for rank in range(2)]
    assert statuses == [-signal.SIGKILL] * 2
    assert all(path.read_bytes()[-1:] not in (b"", b"\n") for path in folder.glob("shards/*.jsonl"))
    done = [o.id for o in read_outcomes(folder)]
    assert done == ["r1", "r4"]  # the first worker wrote the settings and half a line
    with Run(folder, {"seed": 0}) as run:
        todo = run.remaining([f"r{i}" for i in range(COUNT)])
        assert todo == [i for i in range(COUNT) if f"r{i}" not in done]
        run.write(outcome(f"r{todo[0]}"))
    statuses = [workers.run(folder, rank=rank, world_size=4) for rank in range(4)]
    assert statuses == [1, 1, 1, 0]
    assert results(folder) == whole
    assert workers.run(folder, rank=1, world_size=3) == 0  # what was torn is cut off, and not done again
    assert results(folder) == whole


def test_refused_beside_a_living_worker(tmp_path, workers, whole):
    """Its lock holds while it lives, is gone when it is killed, and is not inherited by the process it forked."""
    folder, told = tmp_path / "run", tmp_path / "told"
    pid = workers.start(folder, hold=True, rank=1, world_size=2, errors=told)
    while not told.exists() or not told.read_text():
        time.sleep(0.01)
    orphan = int(told.read_text())
    try:
        assert workers.run(folder, rank=1, world_size=2, errors=told) == 2
        error = told.read_text()
        assert f"{folder}: worker 1 of 2 is already at work, pid {pid} on " in error and "output_dir" in error
        with pytest.raises(GenerateError, match=rf"worker 1 of 2 is still at work, pid {pid} on .*among 3\. Stop"):
            Run(folder, {"seed": 0}, world_size=3)
        assert workers.run(folder, rank=0, world_size=2) == 1
        os.kill(pid, signal.SIGKILL)
        workers.wait(pid)
        os.kill(orphan, 0)  # still there
        assert workers.run(folder, rank=0, world_size=3) == 1
        assert workers.run(folder) == 0
    finally:
        os.kill(orphan, signal.SIGKILL)
    assert results(folder) == whole


def test_what_killed_workers_left_beside_media_goes(tmp_path):
    media = tmp_path / "run/media"
    media.mkdir(parents=True)
    for name in ("a.png", ".a.png.1234.part"):
        (media / name).touch()
    work(tmp_path / "run", 1)
    assert [path.name for path in media.iterdir()] == ["a.png"]


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(GenerateError, match=r"no file locks \(.*No locks available\).*NFS: without nolock"):
        Run(tmp_path / "run", {})


def test_ranks(tmp_path):
    with pytest.raises(GenerateError, match="worker 2 of 2: ranks go from 0 to 1"):
        Run(tmp_path, {}, rank=2, world_size=2)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_changed_settings(tmp_path):
    settings = {"seed": 0, "temperature": 1.0, "model": {"name": "a", "revision": "main"}}
    Run(tmp_path / "run", settings).close()
    Run(tmp_path / "run", dict(reversed(settings.items()))).close()
    changed = {"seed": 1, "temperature": 1.0, "model": {"name": "a", "revision": None}, "top_p": 0.5}
    with pytest.raises(GenerateError) as error:
        Run(tmp_path / "run", changed)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'run'} was begun with other settings; rows of both would be mixed:",
        '  model.revision: was "main", is null',
        "  seed: was 0, is 1",
        "  top_p: was not set, is 0.5",
        "Name another output_dir, or delete the folder to start anew.",
    ]
    Run(tmp_path / "run", settings).close()  # the refused one holds no lock


def test_torn_tail_is_done_again(tmp_path, whole):
    folder = tmp_path / "run"
    work(folder, 5)
    data = shard(folder).read_bytes()
    for tail in (b'{"id": "r5", "rows": [', b'{"id": "r5"\n', b"\0\0\0\n", b'"r5"\n'):
        shard(folder).write_bytes(data + tail)
        assert len(list(read_outcomes(folder))) == 5
        with Run(folder, {"seed": 0}) as run:
            assert run.remaining(["r4", "r5"]) == [1]
        assert shard(folder).read_bytes() == data
    work(folder, COUNT)
    assert results(folder) == whole


def test_damage_in_the_middle(tmp_path, whole):
    folder = tmp_path / "run"
    work(folder, COUNT)
    lines = shard(folder).read_bytes().splitlines(keepends=True)
    shard(folder).write_bytes(b"".join([*lines[:4], lines[4][:50] + b"\n", *lines[5:]]))
    with pytest.raises(GenerateError, match=r"00000-of-00001\.jsonl, line 5 is damaged: .*\"r4\".*Delete this line"):
        Run(folder, {"seed": 0})
    shard(folder).write_bytes(b"".join([*lines[:4], *lines[5:]]))  # the remedy
    work(folder, COUNT)
    assert results(folder) == whole


def test_an_input_finished_twice(tmp_path):
    folder = tmp_path / "run"
    work(folder, 3)
    line = shard(folder).read_bytes().splitlines(keepends=True)[1]
    shard(folder, "00001-of-00002").write_bytes(line)
    with pytest.raises(GenerateError, match=r"'r1' was finished twice: .*00000-of-00001.*00001-of-00002.*Delete one"):
        work(folder, 3)


def test_duplicate_ids(tmp_path):
    with Run(tmp_path / "run", {}) as run:
        for call in (run.remaining, lambda ids: run.finish(ids, Sum())):
            with pytest.raises(GenerateError, match="rows 0 and 2 of the inputs both have the id 'a'"):
                call(["a", "b", "a"])


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(GenerateError, match=r"holds rows\.jsonl but no settings\.json"):
        Run(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(GenerateError, match=r"cannot hold a run .*Name another output_dir"):
        Run(tmp_path / "rows.jsonl", {})
    with pytest.raises(GenerateError, match=r"is no run of .* no settings\.json"):
        read_outcomes(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(GenerateError, match=r"settings\.json is damaged"):
        Run(tmp_path, {})


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), r"rows\[0\]\.scores\[1\]\.b is nan"),
        (float("-inf"), r"rows\[0\]\.scores\[1\]\.b is -inf"),
        (b"x", r"rows\[0\]\.scores\[1\]\.b is a bytes"),
        ("\ud83d", r"rows\[0\]\.scores\[1\]\.b has half a surrogate pair"),
    ],
)
def test_values_that_json_cannot_hold(tmp_path, value, message):
    with Run(tmp_path / "run", {}) as run:
        with pytest.raises(GenerateError, match=f"input 'r1': {message}"):
            run.write(Outcome("r1", rows=({"scores": [0.5, {"a": 1, "b": value}]},)))
        run.write(outcome("r0"))  # the run is as it was
    assert [o.id for o in read_outcomes(tmp_path / "run")] == ["r0"]


# --- full disk ----------------------------------------------------------------------------------------------------


def test_no_space_for_a_line(tmp_path, workers, whole):
    folder, told = tmp_path / "run", tmp_path / "told"
    assert workers.run(folder, file_size=3000, errors=told) == 2
    lines = shard(folder).read_bytes().splitlines(keepends=True)
    assert 2 < len(lines) < COUNT and lines[-1].endswith(b"\n")  # nothing torn stays
    error = told.read_text()
    assert f"00000-of-00001.jsonl: input 'r{len(lines)}' cannot be written (File too large). Free space" in error
    assert workers.run(folder) == 0
    assert results(folder) == whole


def test_no_space_for_the_results(tmp_path, workers, whole):
    """Each shard fits, all rows together do not."""
    folder, told = tmp_path / "run", tmp_path / "told"
    for rank in range(2):
        assert workers.run(folder, rank=rank, world_size=3) == 1
    size = max(path.stat().st_size for path in folder.glob("shards/*.jsonl"))
    assert workers.run(folder, rank=2, world_size=3, file_size=size + 500, errors=told) == 2
    assert "rows.jsonl cannot be written (File too large)" in told.read_text()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "settings.json", "shards"]
    assert workers.run(folder, rank=2, world_size=3) == 0
    assert results(folder) == whole


def test_a_run_is_closed_after_a_failed_write(tmp_path):
    run = Run(tmp_path / "run", {"seed": 0})
    run.write(outcome("r0"))
    run.close()
    with pytest.raises(GenerateError, match="this run is closed"):
        run.write(outcome("r1"))
    run.close()
    with Run(tmp_path / "run", {"seed": 0}) as again:
        assert again.remaining(["r0", "r1"]) == [1]
