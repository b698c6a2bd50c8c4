"""The driver of runs: an interrupt that Python drops."""

from types import SimpleNamespace

import pytest

from trl_vpo.runs.driver import ctrl_c_says_how_to_continue, work_through
from trl_vpo.runs.outcome import Outcome
from trl_vpo.runs.store import read_outcomes


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
