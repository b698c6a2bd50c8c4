"""Figures of training curves: what they draw and say is what the logs say."""

import math

import pytest
from PIL import Image

from trl_vpo.errors import PlotError
from trl_vpo.report.plot import curves, history, style

LOG = [
    {"step": 5, "loss": 0.7, "rewards/margins": 0.1, "logps/chosen": -8.0, "logps/rejected": -6.0, "grad_norm": 2.0},
    {"step": 10, "loss": 0.5, "rewards/margins": 0.6, "logps/chosen": -7.0, "logps/rejected": -9.0, "grad_norm": 1.0},
    {"step": 12, "train_runtime": 3.0, "logps/chosen": -1.0},
]
WITH_REFERENCE = [
    {**entry, "displacement/chosen": 0.25 * entry["step"], "displacement/rejected": -1.0 * entry["step"]}
    for entry in LOG[:2]
]
EVALUATED = [
    {"step": 0, "eval_loss": 0.8, "eval_logps/chosen": -9.0, "eval_logps/rejected": -7.0},
    *LOG,
    {"step": 10, "eval_loss": 0.6, "eval_logps/chosen": -8.5, "eval_logps/rejected": -9.5},
]


def panels(figure):
    return {axes.get_title("left"): axes for axes in figure.get_axes() if axes.axison}


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata()))


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_series_skips_entries_without_it_and_the_summary():
    assert history.series(LOG, "loss") == ([5, 10], [0.7, 0.5])
    assert history.series(LOG, "logps/chosen") == ([5, 10], [-8.0, -7.0])
    assert history.series(LOG, "kl/chosen") == ([], [])


def test_smoothing_weighs_by_steps():
    steps, means = history.smooth(([0, 1, 3], [1.0, 3.0, 0.0]), half_life=1)
    assert steps == [0, 1, 3]
    # weights 1; 1/2 and 1; 1/8, 1/4 and 1
    assert means == pytest.approx([1.0, 3.5 / 1.5, (1 / 8 + 3 / 4) / (1 / 8 + 1 / 4 + 1)])


def test_many_points_are_smoothed_over_a_fortieth_of_the_run():
    short = [{"step": step, "loss": 1.0} for step in range(10, 410, 10)]
    long = [{"step": step, "loss": 1.0} for step in range(10, 4010, 10)]
    assert history.default_half_life({"short": short}) == 0
    assert history.default_half_life({"short": short, "long": long}) == 100


def test_a_run_keeps_its_curve_beside_those_without_reference():
    figure, notes = curves.training_figure({"DPO": WITH_REFERENCE})
    alone = points(panels(figure)["Δ log-prob of rejected"].get_lines()[0])
    assert alone == [(5, -5.0), (10, -10.0)]
    assert any("against the reference" in note for note in notes)
    figure, notes = curves.training_figure({"DPO": WITH_REFERENCE, "LeanPO": LOG})
    against, since = (panels(figure)[t] for t in ("Δ log-prob of rejected", "Δ rejected since first window"))
    assert [points(line) for line in against.get_lines()[:2]] == [alone, []]
    assert [points(line) for line in since.get_lines()[:2]] == [[], [(5, 0.0), (10, -3.0)]]
    assert since.get_lines()[1].get_color() == panels(figure)["Loss"].get_lines()[1].get_color()
    assert any("of LeanPO, since the first logging window, whose rows were others" in note for note in notes)
    assert not [note for note in notes if note.startswith("Δ log-prob of")]


def test_runs_without_reference_need_no_other_panel():
    figure, notes = curves.training_figure({"LeanPO": LOG, "SimPO": LOG})
    assert [title for title in panels(figure) if "window" in title] == []
    assert points(panels(figure)["Δ log-prob of rejected"].get_lines()[1]) == [(5, 0.0), (10, -3.0)]
    assert any(note.startswith("Δ log-prob: since the first logging window") for note in notes)


def test_evaluations_are_hollow_and_start_before_training():
    figure, _ = curves.training_figure({"LeanPO": EVALUATED})
    line, marks = panels(figure)["Δ log-prob of rejected"].get_lines()[:2]
    assert points(line) == [(5, 0.0), (10, -3.0)]
    assert points(marks) == [(0, 0.0), (10, -2.5)]
    assert marks.get_linestyle() == "None" and marks.get_markerfacecolor() == "white"
    assert marks.get_color() == line.get_color()
    assert legend(figure) == ["LeanPO", "hollow: evaluation set"]


def test_log_probs_need_an_evaluation_before_training():
    figure, notes = curves.training_figure({"LeanPO": EVALUATED[1:]})
    assert points(panels(figure)["Δ log-prob of chosen"].get_lines()[1]) == []
    assert points(panels(figure)["Loss"].get_lines()[1]) == [(10, 0.6)]
    assert any("not evaluated before the first step" in note for note in notes)


def test_one_of_several_evaluation_sets_is_drawn():
    log = [*LOG[:2], {"step": 5, "eval_b_loss": 3.0}, {"step": 5, "eval_a_loss": 2.0}]
    figure, notes = curves.training_figure({"LeanPO": log})
    assert points(panels(figure)["Loss"].get_lines()[1]) == [(5, 3.0)]
    assert "LeanPO: the evaluation set drawn is b, one of 2." in notes


def test_missing_metrics_leave_no_panel_and_a_note():
    figure, notes = curves.training_figure({"DPO": LOG, "RRPO": [{**LOG[0], "kl/chosen": 0.5}]})
    shown = panels(figure)
    assert list(shown) == [
        "Loss", "Reward margin", "Δ log-prob of chosen", "Δ log-prob of rejected", "KL from the reference, chosen",
        "Gradient norm, before clipping",
    ]  # fmt: skip
    assert points(shown["KL from the reference, chosen"].get_lines()[1]) == [(5, 0.5)]
    assert "KL from the reference, chosen: not logged by DPO." in notes
    assert "Preference accuracy: not logged by any run." in notes
    assert shown["Δ log-prob of chosen"].get_ylabel() == "nats per response"


def test_values_that_are_not_finite_are_left_out_and_counted():
    log = [*LOG[:2], {"step": 15, "loss": math.nan, "grad_norm": math.inf}]
    figure, notes = curves.training_figure({"DPO": log})
    assert points(panels(figure)["Loss"].get_lines()[0]) == [(5, 0.7), (10, 0.5)]
    assert "Loss: 1 values of DPO are nan or infinite and not drawn." in notes


def test_smoothed_curves_show_what_was_logged_and_say_so():
    figure, notes = curves.training_figure({"DPO": LOG}, half_life=5)
    faint, thick = panels(figure)["Loss"].get_lines()
    assert points(faint) == [(5, 0.7), (10, 0.5)] and faint.get_alpha() < 0.5
    assert points(thick) == [(5, 0.7), (10, pytest.approx((0.35 + 0.5) / 1.5))]
    assert notes[0] == "Faint: as logged. Thick: exponential moving average, half-life 5 steps."
    assert figure._supxlabel.get_text().startswith(notes[0])


def test_every_run_has_a_look_of_its_own():
    assert len({(look["color"], look["linestyle"]) for look in map(style.look, range(28))}) == 28
    looks = [style.look(k) for k in range(4)]
    for key in ("color", "linestyle", "marker"):  # told apart by each alone
        assert len({look[key] for look in looks}) == 4


def test_names_are_shown_as_they_are(tmp_path):
    figure, _ = curves.training_figure({"$x^2$ and $\\frac$": LOG, "_hidden": LOG, "<b>&": LOG})
    assert legend(figure) == [r"\$x^2\$ and \$\frac\$", "_hidden", "<b>&"]
    assert Image.open(style.save(figure, tmp_path / "figure.png")).size[0] > 600  # no name is taken for a formula


def test_plot_curves_writes_a_picture_and_the_same_one_again(tmp_path):
    first, second = (
        curves.plot_curves({"DPO": LOG, "RRPO": LOG[:1]}, tmp_path / name / "curves.svg").read_bytes()
        for name in ("one", "two")
    )
    assert first == second and first.startswith(b"<?xml")
    assert Image.open(curves.plot_curves({"DPO": LOG}, tmp_path / "curves.png")).size[0] > 600


def test_nothing_to_plot_is_an_error(tmp_path):
    for runs, name, message in (
        ({}, "curves.png", "no run to plot"),
        ({"DPO": [{"step": 1, "epoch": 1.0}]}, "curves.png", "DPO: no metric"),
        ({"DPO": LOG}, "curves.jpg", "curves.jpg: a figure is written as .png"),
    ):
        with pytest.raises(PlotError, match=message):
            curves.plot_curves(runs, tmp_path / name)
    assert not list(tmp_path.iterdir())
