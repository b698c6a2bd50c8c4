"""Figures of training curves: what they draw and say is what the logs say."""

import math
from itertools import pairwise

import pytest
from PIL import Image

from trl_vpo.errors import PlotError
from trl_vpo.report.plot import curves, style

LOG = [
    {"step": 5, "loss": 0.7, "rewards/margins": 0.1, "logps/chosen": -8.0, "logps/rejected": -6.0, "grad_norm": 2.0},
    {"step": 10, "loss": 0.5, "rewards/margins": 0.6, "logps/chosen": -7.0, "logps/rejected": -9.0, "grad_norm": 1.0},
    {"step": 12, "train_runtime": 3.0, "logps/chosen": -1.0},
]
WITH_REFERENCE = [{**entry, "displacement/chosen": 1.0, "displacement/rejected": -entry["step"]} for entry in LOG[:2]]
EVALUATED = [
    {"step": 0, "eval_loss": 0.8, "eval_logps/chosen": -9.0, "eval_logps/rejected": -7.0},
    *LOG,
    {"step": 10, "eval_loss": 0.6, "eval_logps/chosen": -8.5, "eval_logps/rejected": -9.5},
]


def drawn(**runs):
    """(panels by title, their lines' points by title, notes, figure)."""
    figure, notes = curves.training_figure(runs)
    panels = {axes.get_title("left"): axes for axes in figure.get_axes() if axes.axison}
    lines = {t: [list(zip(li.get_xdata(), li.get_ydata())) for li in axes.get_lines()] for t, axes in panels.items()}
    return panels, lines, "\n".join(notes), figure


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_series_skips_entries_without_it_and_the_summary():
    assert curves.series(LOG, "logps/chosen") == ([5, 10], [-8.0, -7.0])
    assert curves.series(LOG, "kl/chosen") == ([], [])


def test_smoothing_weighs_by_steps():
    steps, means = curves.smooth(([0, 1, 3], [1.0, 3.0, 0.0]), half_life=1)
    assert steps == [0, 1, 3]
    # weights 1; 1/2 and 1; 1/8, 1/4 and 1
    assert means == pytest.approx([1.0, 3.5 / 1.5, (1 / 8 + 3 / 4) / (1 / 8 + 1 / 4 + 1)])


def test_many_points_are_smoothed_over_a_fortieth_of_the_run():
    short, long = ([{"step": step, "loss": 1.0} for step in range(10, end, 10)] for end in (410, 4010))
    assert curves.default_half_life({"short": short}) == 0
    assert curves.default_half_life({"short": short, "long": long}) == 100


def test_a_run_keeps_its_curve_beside_those_without_reference():
    panels, lines, notes, _ = drawn(DPO=WITH_REFERENCE, LeanPO=LOG)
    assert lines["Δ log-prob of rejected"][:2] == [[(5, -5.0), (10, -10.0)], []]
    assert lines["Log-prob of rejected"] == [[(5, -6.0), (10, -9.0)]] * 2
    own, loss = (panels[title].get_lines()[1] for title in ("Log-prob of rejected", "Loss"))
    assert own.get_color() == loss.get_color()
    assert "Δ log-prob of rejected: not logged by LeanPO." in notes


def test_a_run_shorter_than_its_first_window_is_drawn():
    """Its only averages are in the summary at the end."""
    _, lines, _, _ = drawn(Short=[{"step": 4, "train_runtime": 3.0, "train_loss": 0.7, "loss": 0.6}])
    assert lines["Loss"] == [[(4, 0.6)]]


def test_evaluations_are_hollow_and_start_before_training():
    panels, lines, _, figure = drawn(LeanPO=EVALUATED)
    assert lines["Log-prob of rejected"] == [[(5, -6.0), (10, -9.0)], [(0, -7.0), (10, -9.5)]]
    line, marks = panels["Loss"].get_lines()[:2]
    assert marks.get_linestyle() == "None" and marks.get_markerfacecolor() == "white"
    assert marks.get_color() == line.get_color()
    assert legend(figure) == ["LeanPO", "hollow: evaluation set"]


def test_one_of_several_evaluation_sets_is_drawn():
    _, lines, notes, _ = drawn(LeanPO=[*LOG[:2], {"step": 5, "eval_b_loss": 3.0}, {"step": 5, "eval_a_loss": 2.0}])
    assert lines["Loss"][1] == [(5, 3.0)] and "LeanPO: the evaluation set drawn is b, one of 2." in notes


def test_missing_and_broken_values_are_named():
    broken = {"step": 15, "loss": math.nan, "grad_norm": math.inf}
    _, lines, notes, _ = drawn(DPO=[*LOG[:2], broken], RRPO=[{**LOG[0], "kl/chosen": 0.5}])
    assert list(lines) == [
        "Loss", "Reward margin", "Log-prob of chosen", "Log-prob of rejected", "KL from the reference, chosen",
        "Gradient norm, before clipping",
    ]  # fmt: skip
    assert lines["KL from the reference, chosen"][1] == [(5, 0.5)]
    assert "KL from the reference, chosen: not logged by DPO." in notes
    assert "Preference accuracy: not logged by any run." in notes
    assert lines["Loss"][0] == [(5, 0.7), (10, 0.5)]
    assert "Loss: nan or infinite, so not drawn: 1 of DPO's 3 values." in notes


def test_measures_that_are_undefined_are_not_drawn():
    none, some = dict.fromkeys(("value", "low", "high")), {"value": 0.5, "low": 0.25, "high": 0.75}
    for base, count in ((none, 2), (some, 3)):
        held_out = {"CHAIRi": {"DPO": none, "RRPO": some, "base": base}}
        figure, _ = curves.training_figure({"DPO": LOG, "RRPO": LOG}, held_out=held_out)
        assert len(figure.get_axes()[-1].get_lines()) == count


def test_the_numbers_below_measures_stand_apart():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    spans = ((-0.21, 0.01), (-0.00021, 0.00004), (-0.0006, -0.0004), (0.00014, 0.00026), (-0.0087, 0.0044))
    measures = [{"value": low, "low": low, "high": high} for low, high in spans]
    held_out = {f"measure {n}": {"DPO": measure, "base": measure} for n, measure in enumerate(measures)}
    for keys in (("loss", "rewards/margins"), LOG[0]):
        figure, _ = curves.training_figure({"DPO": [{"step": 5} | {k: LOG[0][k] for k in keys}]}, held_out=held_out)
        canvas = FigureCanvasAgg(figure)
        with style.drawing():
            canvas.draw()
        for axes in figure.get_axes()[-len(spans) :]:
            low, high = axes.get_xlim()
            ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
            boxes = [tick.get_window_extent(canvas.get_renderer()) for tick in ticks]
            gaps = [after.x0 - before.x1 for before, after in pairwise(boxes)]
            assert gaps and min(gaps) > 2, [tick.get_text() for tick in ticks]


def test_smoothed_curves_show_what_was_logged_and_say_so():
    panels, lines, notes, figure = drawn(DPO=[{"step": step, "loss": float(step % 2)} for step in range(1, 81)])
    faint, thick = lines["Loss"]
    assert faint[:2] == [(1, 1.0), (2, 0.0)] and thick[:2] == [(1, 1.0), (2, pytest.approx(0.5**0.5 / (0.5**0.5 + 1)))]
    assert panels["Loss"].get_lines()[0].get_alpha() < 0.5
    assert notes.startswith("Faint: as logged. Thick: exponential moving average, half-life 2 steps.\n")
    assert figure._supxlabel.get_text().startswith("Faint: as logged. Thick:")


def test_few_points_stay_exact_beside_a_long_run():
    long = [{"step": step, "loss": step % 7} for step in range(10, 1010, 10)]
    _, lines, _, _ = drawn(LeanPO=long, DPO=LOG)
    faint, _, short = lines["Loss"]
    assert len(faint) == 100 and short == [(5, 0.7), (10, 0.5)]


def test_whole_steps_stand_below_every_panel():
    panels, _, _, figure = drawn(DPO=WITH_REFERENCE, LeanPO=[{**entry, "step": entry["step"] // 5} for entry in LOG])
    figure.draw_without_rendering()
    assert len(panels) > 4
    for axes in panels.values():
        assert axes.get_xlabel() == "optimizer step" and axes.xaxis.get_tick_params()["labelbottom"]
        assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert panels["Reward margin"].get_ylabel() == "reward margin"


def test_every_run_has_a_look_of_its_own():
    assert len({(look["color"], look["linestyle"]) for look in map(style.look, range(28))}) == 28
    for key in ("color", "linestyle", "marker"):  # told apart by each alone
        assert len({style.look(k)[key] for k in range(4)}) == 4


def test_names_are_not_taken_for_formulas(tmp_path):
    figure, _ = curves.training_figure({"$x^2$ and $\\frac$": LOG, "_hidden": LOG, "<b>&": LOG})
    assert legend(figure) == [r"\$x^2\$ and \$\frac\$", "_hidden", "<b>&"]
    assert Image.open(style.save(figure, tmp_path / "figure.png")).size[0] > 600


def test_the_same_picture_comes_again(tmp_path):
    paths = [style.save(drawn(DPO=LOG, RRPO=LOG[:1])[-1], tmp_path / name) for name in ("one.svg", "two.svg")]
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize(
    ("runs", "message"), [({}, "no run to plot"), ({"DPO": [{"step": 1, "epoch": 1.0}]}, "DPO: no metric")]
)
def test_nothing_to_plot_is_an_error(runs, message):
    with pytest.raises(PlotError, match=message):
        drawn(**runs)
