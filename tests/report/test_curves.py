"""The picture of training curves: what it draws is what the history says."""

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from trl_vpo.report import curves

HISTORY = [
    {"step": 5, "loss": 0.7, "rewards/margins": 0.1, "logps/chosen": -8.0, "logps/rejected": -6.0},
    {"step": 10, "loss": 0.5, "rewards/margins": 0.6, "logps/chosen": -7.0, "logps/rejected": -9.0},
    {"step": 12, "train_runtime": 3.0, "logps/chosen": -1.0},
]


def test_series_skips_entries_without_the_metric_and_the_summary():
    assert curves.series(HISTORY, "loss") == ([5, 10], [0.7, 0.5])
    assert curves.series(HISTORY, "logps/chosen") == ([5, 10], [-8.0, -7.0])
    assert curves.series(HISTORY, "kl/chosen") == ([], [])


def test_every_run_has_its_column_and_log_probs_start_at_zero(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    path = curves.plot_curves({"DPO": HISTORY, "RRPO": HISTORY[:1]}, tmp_path / "new" / "curves.png")
    assert Image.open(path).size[0] > 600
    (figure,) = figures
    axes = figure.get_axes()
    assert [axis.get_title() for axis in axes[:2]] == ["DPO", "RRPO"]
    lines = {line.get_label(): line.get_ydata() for axis in axes for line in axis.get_lines()}
    assert list(lines["DPO, chosen"]) == [0.0, 1.0]
    assert list(lines["DPO, rejected"]) == [0.0, -3.0]
    legends = [text.get_text() for axis in axes for text in axis.get_legend().get_texts()]
    assert legends.count("DPO") == 2 and "RRPO, rejected" in legends


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run to plot"):
        curves.plot_curves({}, tmp_path / "curves.png")
