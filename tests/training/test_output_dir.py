"""The folder of a run: who may write to it, and whether it can be written."""

import fcntl
import multiprocessing
import os

import pytest

from trl_vpo.errors import OutputDirError
from trl_vpo.training.output_dir import LOCK, check_space, hold_output_dir, remedy


def lock_elsewhere(path, locked, done):
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        file.write("pid 77 on node-3")
        file.flush()
        locked.set()
        done.wait(60)


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    """Also by one that was killed: nothing is left to clean up."""
    folder, context = str(tmp_path / "run"), multiprocessing.get_context("fork")
    with hold_output_dir(folder):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"pid {os.getpid()} on ")
    locked, done = context.Event(), context.Event()
    other = context.Process(target=lock_elsewhere, args=(tmp_path / "run" / LOCK, locked, done))
    other.start()
    assert locked.wait(60)
    message = f"another training writes to output_dir {tmp_path}/run: pid 77 on node-3"
    with pytest.raises(OutputDirError, match=message), hold_output_dir(folder):
        pass
    other.kill()
    other.join()
    with hold_output_dir(folder):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, message in (
        (tmp_path / "file" / "run", r"file/run cannot be written: Not a directory\. Name another output_dir"),
        ("/sys/kernel/run", r"cannot be written: .*Give user \d+ the right to write there"),  # not even root may
    ):
        with pytest.raises(OutputDirError, match=message), hold_output_dir(str(folder)):
            pass


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (PermissionError(13, "Permission denied"), "Give user"),
        (OSError(30, "Read-only file system"), "Give user"),
        (OSError(28, "No space"), "MiB are free there. Free some space on that disk"),
        (OSError(122, "Disk quota exceeded"), "(or its quota), or keep fewer"),
        (RuntimeError("PytorchStreamWriter failed writing file"), "MiB are free there"),
    ],
)
def test_what_to_do_is_told_by_what_failed(tmp_path, error, what):
    assert what in remedy(tmp_path, error)


def test_a_result_that_would_not_fit_is_told_before_training(tmp_path):
    check_space(str(tmp_path), 1 << 20)
    with pytest.raises(OutputDirError, match=r"no room for what is trained \(1125899906842624\.0 MiB\): No space"):
        check_space(str(tmp_path), 1 << 70)
    assert not list(tmp_path.iterdir())
