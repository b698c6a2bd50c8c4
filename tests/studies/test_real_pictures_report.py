"""The report about the pictures, from made-up results."""

import re

import numpy as np
import pytest

from studies.real.pictures import report, runs

HELD_OUT = [
    {"kind": kind, "question": f"What {kind}?", "answer": word, "blind": "red"}
    for kind, word in [
        ("colour", "red"),
        ("colour", "blue"),
        ("colour", "teal"),
        ("colour", "red"),
        ("shape", "circle"),
    ]
]
PAIRS = {"train": HELD_OUT * 2, "held-out": HELD_OUT}


def made_up(method, steps, seed=0, *, chosen=-1.0, right=(1, 1, 0, 0, 1)):
    flags = [bool(value) for value in right]
    numbers = {
        "chosen": [chosen + place for place in range(5)],
        "rejected": [chosen - 4.0] * 5,
        "logp/chosen": [-2.0] * 5,
        "logp/rejected": [-1.0, -3.0, -3.0, -3.0, -3.0],
        "logp/other": [-4.0, -2.0, -3.0, -3.0, -7.0],
        "kl": [0.5] * 5,
        "right": flags,
        "readable": [True] * 5,
        "picked/chosen": flags,
        "picked/other": [False] * 5,
        "picked/none": [True] + [False] * 4,
        "said": [f"said by {method}"] * 5,
    }
    spent = {} if method == "base" else {"cpu_seconds": {"training": 60.0, "measuring": 40.0}}
    return {"method": method, "rate": 1e-3, "seed": seed, "steps": steps, **numbers, **spent}


def results():
    found = [made_up("base", 0, right=(0, 1, 0, 0, 1))]
    for steps in runs.CHECKPOINTS:
        found += [made_up("DPO", steps, seed, chosen=-20.0 - seed) for seed in runs.SEEDS]
        found += [made_up("mDPO", steps, chosen=2.0, right=(1, 1, 1, 0, 1))]
    return found


@pytest.fixture(scope="module")
def study():
    return report.Study(results(), HELD_OUT)


def test_measures_are_means_of_a_kind_over_seeds(study):
    value = lambda measure, method, kind=None: study.of(measure, study.found(method, 16), kind).value  # noqa: E731
    assert value("right", "mDPO", "colour") == 75.0 and value("right", "mDPO", "shape") == 100.0
    assert value("preferred", "DPO") == 80.0
    assert value("sensitivity", "DPO", "colour") == pytest.approx(1.0) and value("sensitivity", "DPO", "shape") == 5.0
    assert value("chosen", "DPO") == pytest.approx(-18.5)  # both seeds
    assert value("chosen fell", "DPO") == 100.0 and value("chosen fell", "mDPO") == 0.0
    assert value("margin", "mDPO") == pytest.approx(6.0)
    assert value("picked, no picture", "mDPO", "colour") == 25.0


def test_differences_are_paired_by_picture(study):
    found = study.difference("right", "mDPO", "DPO", 16)
    assert found.value == 20.0 and found.low == 0.0
    assert study.difference("chosen", "mDPO", "DPO", 16).value == pytest.approx(22.0)  # the seed that both have
    assert study.difference("right", "DPO", "base", 8).value == 20.0
    assert study.difference("right", "RRPO", "DPO", 16) is None


def test_the_blind_baseline_knows_the_question_only():
    assert "colour 50 %, shape 0 %" in report.blind(HELD_OUT)


def test_the_report_shows_what_is_there_and_what_is_missing(tmp_path):
    text = report.write_report(results(), PAIRS, tmp_path).read_text()
    missing = "LeanPO (seed 0), RRPO (seed 0), LeanPO (seed 1), RRPO (seed 1), mDPO (seed 1)."
    assert f"3 of 8. Missing: {missing}" in text and "200 s a run" in text
    row = re.search(r"\| mDPO \| 16 \| 1 \|(.*)", text.partition("## Changes")[2])[1]
    assert [cell.split()[0] for cell in row.strip(" |").split(" | ")] == ["4.0", "0.0", "−2.0", "6.0", "0.5", "100.0"]
    assert "- base, 0: said by base" in text and np.all([f"- mDPO, {s}: said by mDPO" in text for s in (8, 16)])
    alone = report.write_report(results()[:1], PAIRS, tmp_path).read_text()
    assert "| base | 0 | 1 |" in alone and "## Changes" not in alone
    empty = report.write_report([], PAIRS, tmp_path).read_text()
    assert "Runs at 0.001: 0 of 8." in empty and "## Answers" not in empty
