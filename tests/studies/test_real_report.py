"""The report of the study on real weights, from made-up results."""

import re

import numpy as np
import pytest

from studies.real import report, runs
from studies.results import over_seeds
from trl_vpo.evaluate.intervals import clustered_bootstrap

TOPICS = [f"topic {place // 2}" for place in range(12)]
PAIRS = [
    {"topic": topic, "swap": ("near", "far")[place % 2], "base": [-10.0, -9.0 if place == 0 else -12.0]}
    for place, topic in enumerate(TOPICS)
]
SAID = {"What is it?": "It is\na thing."}


def made_up(method, steps, seed=0, *, chosen=-1.0, kl=2.0, rate=1e-3):
    noise = np.random.default_rng([len(method), steps, seed]).normal(size=12)
    numbers = {
        "chosen": [chosen + value for value in noise],
        "rejected": [chosen - 4 - 2 * (place % 2) + value for place, value in enumerate(noise)],
        "kl/chosen": [kl] * 12,
        "kl/neutral": [1.0, 3.0],
        "right": [0.0, -4.0],
        "wrong": [0.0, 0.0],
        "base_logp": [-1.0, -3.0],
        "tokens": [48, 20],
        "said": {"What is it?": f"said by {method}"},
        "cpu_seconds": {"training": 60.0, "measuring": 40.0},
    }
    return {"method": method, "rate": rate, "seed": seed, "steps": steps, **numbers}


BASE = {
    "method": "base", "rate": 0.0, "seed": 0, "steps": 0, "base_logp": [-0.5, -2.0], "right": [-5.0, -5.0],
    "wrong": [-8.0, -8.0], "length/chosen": [20, 30], "said": SAID,
}  # fmt: skip


def results():
    found = [BASE]
    for steps in runs.CHECKPOINTS:
        found += [made_up("DPO", steps, seed, chosen=-20.0, kl=40.0) for seed in runs.SEEDS]
        found += [made_up("LeanPO", steps, chosen=2.0, kl=float(steps))]
    return found


@pytest.fixture(scope="module")
def study():
    return report.Study(results(), PAIRS)


def test_measures_are_means_over_held_out_rows(study):
    value = lambda measure, method: study.of(measure, study.found(method, 1e-3, 30)).value  # noqa: E731
    assert value("margin", "DPO") == pytest.approx(5.0)
    assert value("chosen fell", "DPO") == 100.0
    assert value("KL, neutral", "LeanPO") == 2.0
    assert value("rule kept", "LeanPO") == 50.0  # the second sentence fell by more than it was ahead
    assert value("garbage", "LeanPO") == 50.0  # -3 is less than all that the base says, -1 is not
    assert value("cut off", "LeanPO") == 50.0


def test_differences_are_paired_over_the_seeds_of_both(study):
    found = study.difference("KL", "LeanPO", "DPO", 1e-3, 30)
    assert found.value == found.low == found.high == pytest.approx(-10.0)
    own = np.subtract(made_up("LeanPO", 15, chosen=2.0)["chosen"], made_up("DPO", 15, chosen=-20.0)["chosen"])
    assert study.difference("chosen", "LeanPO", "DPO", 1e-3, 15).value == pytest.approx(own.mean())
    assert study.difference("KL", "SimPO", "DPO", 1e-3, 30) is None


def test_intervals_span_what_seeds_and_topics_differ_by():
    values = np.array([[0.0, 1.0, 5.0], [10.0, 11.0, 15.0]])
    found = over_seeds(values, ["a", "a", "b"])
    assert found.value == 7.0
    assert found.low == 0.5 and found.high == 15.0  # seed 0 and topic a, seed 1 and topic b are all that is drawn
    alike = over_seeds(values - [[0.0], [10.0]], ["a", "a", "b"])
    assert (alike.value, alike.low, alike.high) == (2.0, 0.5, 5.0)
    draws = [clustered_bootstrap(row, range(40)) for row in np.random.default_rng(0).normal(size=(1, 40))]
    one = over_seeds(np.random.default_rng(0).normal(size=(1, 40)), range(40))
    assert one == pytest.approx((draws[0].value, draws[0].low, draws[0].high), abs=0.03)  # a seed alone: its rows


def test_the_frontier_is_the_least_kl_with_a_margin():
    points = [(1.0, 0.5), (6.0, 9.0), (12.0, 7.0)]
    assert [report.least(points, margin) for margin in (1, 5, 10, 20)] == ["0.5", "7.0", "7.0", "–"]


def test_the_report_shows_what_is_there_and_what_is_missing(tmp_path):
    text = report.write_report(results(), {"train": PAIRS, "held-out": PAIRS}, tmp_path).read_text()
    assert (
        "Runs: 3 of 30. Missing: at 0.001, seed 0: RRPO and SimPO and RRPO, alpha 0; at 0.0005, seed 0: all;" in text
    )
    assert "at 0.001, seed 1: LeanPO and RRPO" in text
    assert "likelier in 8 % and 8 %" in text and "200 s a run" in text
    row = re.search(r"\| LeanPO \| 0\.001 \| 1 \|(.*)", text.partition("## After 30 steps")[2])[1]
    assert "| 30.0 [30.0, 30.0] |" in row and "50.0 %" in row
    row = re.search(r"\| LeanPO \| 30 \|(.*)", text.partition("## Near and far")[2])[1]
    assert [cell.strip() for cell in row.split("|")][1:4:2] == ["+4.0", "+6.0"]
    assert "- base: It is a thing." in text and "- LeanPO: said by LeanPO" in text and "- SimPO" not in text
    assert (tmp_path / "frontier.svg").read_bytes().startswith(b"<?xml")


def test_a_report_without_results_says_so(tmp_path):
    assert "Runs: 0 of 30." in report.write_report([], {"train": PAIRS, "held-out": PAIRS}, tmp_path).read_text()
