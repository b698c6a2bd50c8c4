"""The study's figures: the log-probs of chosen and rejected beside each other, and mean logs."""

import pytest

from studies.testbed import figures
from trl_vpo.report.plot import style

LOG = [
    {"step": 5, "logps/chosen": -8.0, "logps/rejected": -6.0},
    {"step": 10, "logps/chosen": -7.0, "logps/rejected": -9.0},
]
WITH_REFERENCE = [
    {**entry, "displacement/chosen": 0.25 * entry["step"], "displacement/rejected": -1.0 * entry["step"]}
    for entry in LOG
]
EVALUATED = [
    {"step": step, "eval_loss": 0.5, "eval_logps/chosen": chosen, "eval_logps/rejected": rejected}
    for step, chosen, rejected in [(0, -9.0, -7.0), (10, -8.5, -9.5), (12, -8.0, -10.0)]
]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draw runs, and return the figure."""
    saved = []
    monkeypatch.setattr(style, "save", lambda figure, path: saved.append(figure))

    def draw(**runs):
        figures.displacement_figure(runs, tmp_path / "d.svg")
        return saved[-1]

    return draw


def points(axes):
    """The points of the lines of chosen and rejected."""
    return [list(zip(line.get_xdata(), line.get_ydata())) for line in axes.get_lines()[:2]]


def test_displacement_figure_puts_runs_side_by_side(drawn):
    figure = drawn(DPO=WITH_REFERENCE, LeanPO=LOG, RRPO=WITH_REFERENCE)
    left, right, third = figure.get_axes()
    assert left.get_ylim() == third.get_ylim() != right.get_ylim()
    assert [left.get_title("left"), right.get_title("left")] == ["DPO", "LeanPO\nsince the first window"]
    assert points(left) == [[(5, 1.25), (10, 2.5)], [(5, -5.0), (10, -10.0)]]
    assert points(right) == [[(5, 0.0), (10, 1.0)], [(5, 0.0), (10, -3.0)]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chosen", "rejected"]
    assert "nats per response" in left.get_ylabel()


def test_displacement_is_of_the_evaluation_set_if_all_have_one(drawn):
    figure = drawn(A=[*LOG, *EVALUATED], B=[*LOG, *EVALUATED])
    assert points(figure.get_axes()[0]) == [[(0, 0.0), (10, 0.5), (12, 1.0)], [(0, 0.0), (10, -2.5), (12, -3.0)]]
    assert "evaluation set" in figure._supxlabel.get_text()
    figure = drawn(A=[*LOG, *EVALUATED], B=[*LOG, *EVALUATED[:2]])  # evaluated too seldom
    assert points(figure.get_axes()[0])[0] == [(5, 0.0), (10, 1.0)]
    with pytest.raises(ValueError, match="B: there are no log-probs"):
        drawn(A=LOG, B=[{"step": 1, "loss": 1.0}])
