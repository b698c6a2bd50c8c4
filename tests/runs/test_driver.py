"""The driver of runs: an interrupt that Python drops, and inputs that have changed."""

import re
from types import SimpleNamespace

import pytest

from trl_vpo.data.inputs import InputRow
from trl_vpo.errors import RunError
from trl_vpo.files import json_digest
from trl_vpo.runs.digests import row_digest
from trl_vpo.runs.driver import check_unchanged, ctrl_c_says_how_to_continue, work_through
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import Run, read_outcomes


class Interrupted:
    """Ctrl-C comes while this is taken apart; Python prints that it ignores it."""

    def __del__(self):
        raise KeyboardInterrupt


def test_an_interrupt_within_a_finalizer_is_not_lost(tmp_path, capsys):
    def make(places):
        for place in places:
            if place == 1:
                Interrupted()
            yield Outcome(f"r{place}", rows=[{}])

    with pytest.raises(SystemExit, match="130"), ctrl_c_says_how_to_continue("the folder"):
        work_through(
            tmp_path, {}, [f"r{i}" for i in range(4)],
            load=lambda place: place, make=make, identity=str, report=SimpleNamespace(), batch_size=2,
        )  # fmt: skip
    assert [outcome.id for outcome in read_outcomes(tmp_path)] == ["r0", "r1"]
    assert capsys.readouterr().err.endswith(
        "Stopped. The same command continues with what is finished in the folder.\n"
    )


def test_media_are_compared_where_they_are_present(tmp_path):
    """Repaired media of a rejected row pass, and missing ones of a finished row. Others, and changed rows, do not."""
    rows = [{"id": "a", "video": {"path": "a.mp4", "type": "video"}}, {"id": "b", "video": "b.mp4"}]
    rows += [{"id": "c", "images": ["c.png", "d.png"], "question": "Why?"}]
    for name in ("a.mp4", "b.mp4", "c.png"):
        (tmp_path / name).write_bytes(b"first")

    def identity(place):
        return row_digest(InputRow(rows[place]["id"], rows[place]), str(tmp_path))

    def changed():
        try:
            return check_unchanged(tmp_path / "run", ["a", "b", "c"], identity) and None
        except RunError as error:
            return re.search(r"\d rows.* the first is '.'", str(error))[0]

    outcomes = [Outcome("a", rows=[{"id": "a"}]), Outcome("b", reason="damaged", kind="unreadable media")]
    outcomes.append(Outcome("c", reason="c.png is missing", kind="unreadable media"))
    work_through(
        tmp_path / "run", {}, ["a", "b", "c"], load=outcomes.__getitem__, make=list, identity=identity,
        report=SimpleNamespace(select=list, summarize=lambda outcomes: {}), batch_size=1,
    )  # fmt: skip
    assert changed() is None
    (tmp_path / "b.mp4").write_bytes(b"repaired")
    (tmp_path / "d.png").write_bytes(b"downloaded")
    (tmp_path / "a.mp4").unlink()
    assert changed() is None
    (tmp_path / "a.mp4").write_bytes(b"other")
    assert changed() == "1 rows, or their media, have changed after they were finished, the first is 'a'"
    rows[2]["question"] = "When?"
    (tmp_path / "a.mp4").unlink()
    assert changed().endswith("the first is 'c'")


@pytest.mark.parametrize("noted", [False, True])
def test_notes_of_earlier_versions_are_known(noted, tmp_path):
    """Folders begun without a note of the row, or with one of the row alone."""
    row = {"id": "a", "video": "a.mp4"}
    (tmp_path / "a.mp4").write_bytes(b"first")
    notes = {"row": json_digest(["a", row])} if noted else {}
    with Run(tmp_path / "run", {}) as run:
        run.write(Outcome("a", rows=[{}], notes=notes))
    identity = lambda place: row_digest(InputRow("a", row), str(tmp_path))  # noqa: E731
    assert [done.id for done in check_unchanged(tmp_path / "run", ["a"], identity)] == ["a"]
    row["question"] = "Why?"
    if noted:
        with pytest.raises(RunError, match="1 rows"):
            check_unchanged(tmp_path / "run", ["a"], identity)
