"""The run's folder: real workers killed at every point, several at once, damaged files, full disks."""

import errno
import fcntl
import io
import json
import os
import signal
import time
from pathlib import Path

import pytest
from forks import Server
from workers import Sum, outcome, work

from trl_vpo.errors import RunError
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.results import RESULTS
from trl_vpo.runs.store import Run, _read_shard, read_outcomes

COUNT = 12
IDS = [f"r{i}" for i in range(COUNT)]


class Workers(Server):
    """Starts, kills and awaits the workers of `workers.py`."""

    def start(self, folder, **job) -> int:
        return self.ask({"folder": folder, "count": COUNT, **job})

    def run(self, folder, **job) -> int:
        return self.wait(self.start(folder, **job))


@pytest.fixture(scope="module")
def workers():
    server = Workers("workers.py")
    yield server
    server.close()


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
        data = shard(folder).read_bytes()
        torn += bool(data) and not data.endswith(b"\n")
        unfinished += data.count(b"\n") == COUNT and not all((folder / name).exists() for name in RESULTS)
        assert workers.run(folder) == 0
        assert results(folder) == whole, point
        assert not list(folder.glob(".*.part"))
    assert point == 2 * (2 + COUNT + 3 * 2)  # settings, lines, results; two calls put a file in place
    assert (torn, unfinished) == (COUNT, 12)  # 12: from the last line to the summary


# --- several workers ----------------------------------------------------------------------------------------------


def test_a_line_that_grows_while_it_is_read(tmp_path, monkeypatch):
    """Another worker writes its line in two parts, and a reader meets the end of the file in between."""

    class Growing(io.BytesIO):
        def __next__(self):
            return self.readline(5)

    with Run(tmp_path, {"seed": 0}, rank=0, world_size=2) as run:
        run.write(outcome("r0"))
        text = run._path.read_bytes()
        monkeypatch.setattr(Path, "open", lambda *_: Growing(text))
        assert list(_read_shard(run._path)) == []


def test_three_workers_at_once(tmp_path, workers, whole):
    folder = tmp_path / "run"
    pids = [workers.start(folder, rank=rank, world_size=3, slow=True) for rank in range(3)]
    statuses = [workers.wait(pid) for pid in pids]
    assert set(statuses) <= {0, 1} and 0 in statuses  # whoever came last wrote the results
    assert results(folder) == whole
    for rank in range(3):
        share = shard(folder, f"0000{rank}-of-00003").read_text().splitlines()
        assert [json.loads(line)["id"] for line in share] == IDS[rank::3]


def test_of_workers_that_end_together_one_writes(tmp_path, whole):
    """Both have finished every input before either asks for the results."""
    folder = tmp_path / "run"
    first, second = (Run(folder, {"seed": 0}, rank=rank, world_size=2) for rank in range(2))
    with first, second:
        for run in (first, second):
            for i in run.remaining(IDS):
                run.write(outcome(IDS[i]))
        assert first.finish(IDS, Sum()) is None
        assert not any((folder / name).exists() for name in RESULTS)
        assert second.finish(IDS, Sum())["inputs"] == COUNT
    assert results(folder) == whole


def test_another_number_of_workers_continues(tmp_path, workers, whole):
    """Two of three workers die with torn lines; one continues alone, then four: every input is done once."""
    folder = tmp_path / "run"
    for rank, point in enumerate((6, 4)):  # the first writes the settings, too
        assert workers.run(folder, rank=rank, world_size=3, die_at=point) == -signal.SIGKILL
    assert all(path.read_bytes()[-1:] not in (b"", b"\n") for path in folder.glob("shards/*.jsonl"))
    done = [o.id for o in read_outcomes(folder)]
    assert done == ["r0", "r1", "r4"]
    with Run(folder, {"seed": 0}) as run:
        todo = run.remaining(IDS)
        assert todo == [i for i in range(COUNT) if IDS[i] not in done]
        run.write(outcome(IDS[todo[0]]))
    statuses = [workers.run(folder, rank=rank, world_size=4) for rank in range(4)]
    assert statuses == [1, 1, 1, 0]  # the results are not written while others have work
    assert results(folder) == whole
    assert workers.run(folder, rank=1, world_size=3) == 0  # what was torn is cut off, and not done again
    assert results(folder) == whole


def test_refused_next_to_a_living_worker(tmp_path, workers, whole):
    """Its lock holds while it lives, ends when it is killed, and is not inherited by the process it forked."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    pid = workers.start(folder, hold=True, rank=1, world_size=2, errors=errors)
    while not errors.exists() or not errors.read_text():
        time.sleep(0.01)
    orphan = int(errors.read_text())
    try:
        assert workers.run(folder, rank=1, world_size=2, errors=errors) == 2
        assert f"{folder}: worker 1 of 2 is already at work (`fuser {folder}/shards/" in errors.read_text()
        with pytest.raises(RunError, match=r"worker 1 of 2 is still at work .*among 3\. Stop"):
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


# --- refusals -----------------------------------------------------------------------------------------------------


def test_ranks_and_file_systems_without_locks(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.raises(RunError, match="worker 2 of 2: ranks go from 0 to 1"):
        Run(tmp_path, {}, rank=2, world_size=2)
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunError, match=r"no file locks \(.*No locks available\).*NFS: without nolock"):
        Run(tmp_path / "run", {})


def test_changed_settings(tmp_path):
    settings = {"seed": 0, "temperature": 1.0, "model": {"name": "a", "revision": "main"}}
    Run(tmp_path / "run", settings).close()
    Run(tmp_path / "run", dict(reversed(settings.items()))).close()
    changed = {"seed": 1, "temperature": 1.0, "model": {"name": "a", "revision": None}, "top_p": 0.5, "new": None}
    with pytest.raises(RunError) as error:
        Run(tmp_path / "run", changed)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'run'} was started with other settings; rows of both would be mixed:",
        '  model.revision: was "main", is null',
        "  seed: was 0, is 1",
        "  top_p: was not set, is 0.5",
        "Name another output_dir, or delete the folder to start over.",
    ]
    Run(tmp_path / "run", settings).close()  # the refused one holds no lock


def test_what_killed_workers_leave_is_cut_off_or_removed(tmp_path, whole):
    folder = tmp_path / "run"
    (folder / "media").mkdir(parents=True)
    for name in ("a.png", ".a.png.1234.part"):
        (folder / "media" / name).touch()
    work(folder, 5)
    assert [path.name for path in folder.glob("media/*")] == ["a.png"]
    data = shard(folder).read_bytes()
    for tail in (b'{"id": "r5", "rows": [', b'{"id": "r5"\n', b'{"id": "r5"}\n', b"\0\0\0\n", b'"r5"\n'):
        shard(folder).write_bytes(data + tail)
        assert len(list(read_outcomes(folder))) == 5
        with Run(folder, {"seed": 0}) as run:
            assert run.remaining(["r4", "r5"]) == [1]
        assert shard(folder).read_bytes() == data
    work(folder, COUNT)
    assert results(folder) == whole


def test_lines_that_are_damaged_or_there_twice(tmp_path, whole):
    folder = tmp_path / "run"
    work(folder, COUNT)
    data = shard(folder).read_bytes().splitlines(keepends=True)
    shard(folder).write_bytes(b"".join([*data[:4], data[4][:50] + b"\n", *data[5:]]))
    with pytest.raises(RunError, match=r"00000-of-00001\.jsonl, line 5 is damaged: .*\"r4\".*Delete this line"):
        Run(folder, {"seed": 0})
    shard(folder).write_bytes(b"".join([*data[:4], *data[5:]]))  # the remedy
    work(folder, COUNT)
    assert results(folder) == whole
    shard(folder, "00001-of-00002").write_bytes(data[1])
    with pytest.raises(RunError, match=r"'r1' was finished twice in .*/shards: .*Delete one"):
        work(folder, COUNT)


def test_folders_that_are_not_runs(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match=r"holds rows\.jsonl but no settings\.json"):
        Run(tmp_path, {})
    assert (tmp_path / "rows.jsonl").read_text() == "{}\n" and not (tmp_path / "settings.json").exists()
    with pytest.raises(RunError, match=r"cannot hold a run .*Name another output_dir"):
        Run(tmp_path / "rows.jsonl", {})
    with pytest.raises(RunError, match=r"is not a run .* settings\.json is missing"):
        read_outcomes(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(RunError, match=r"settings\.json is missing or damaged"):
        Run(tmp_path, {})


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"x", "\ud83d"])
def test_values_that_json_cannot_hold(tmp_path, value):
    with Run(tmp_path / "run", {}) as run:
        with pytest.raises(RunError, match=r"input 'r1' holds a value that JSON cannot represent \("):
            run.write(Outcome("r1", rows=({"scores": [0.5, {"a": 1, "b": value}]},)))
        run.write(outcome("r0"))  # the run is as it was
    assert [o.id for o in read_outcomes(tmp_path / "run")] == ["r0"]


# --- full disk ----------------------------------------------------------------------------------------------------


def test_no_space_for_a_line(tmp_path, workers, whole):
    folder, errors = tmp_path / "run", tmp_path / "errors"
    assert workers.run(folder, file_size=3000, errors=errors) == 2
    data = shard(folder).read_bytes()
    done = data.count(b"\n")
    assert 2 < done < COUNT and len(data) == 3000  # the last line is torn
    error = f"00000-of-00001.jsonl: input 'r{done}' cannot be written (File too large). Free space"
    assert error in errors.read_text()
    assert workers.run(folder) == 0
    assert results(folder) == whole


def test_no_space_for_the_results(tmp_path, workers, whole):
    """Each shard fits, all rows together do not."""
    folder, errors = tmp_path / "run", tmp_path / "errors"
    for rank in range(2):
        assert workers.run(folder, rank=rank, world_size=3) == 1
    size = max(path.stat().st_size for path in folder.glob("shards/*.jsonl"))
    assert workers.run(folder, rank=2, world_size=3, file_size=size + 500, errors=errors) == 2
    assert "rows.jsonl cannot be written (File too large)" in errors.read_text()
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "settings.json", "shards"]
    assert workers.run(folder, rank=2, world_size=3) == 0
    assert results(folder) == whole
