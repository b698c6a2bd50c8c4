"""The study's plan, data, intervals, verdicts; a tiny study from end to end, interrupted and continued."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from studies.testbed import data as study_data
from studies.testbed import measures as study_measures
from studies.testbed import plan as study_plan
from studies.testbed import runs as study_runs
from studies.testbed import study
from studies.testbed.measures import over_seeds
from studies.testbed.plan import FULL, Scale
from studies.testbed.verdicts import FAILS, HOLDS, UNKNOWN, decide, together
from trl_vpo.errors import NonFiniteLossError
from trl_vpo.evaluate.intervals import clustered_bootstrap, paired_difference
from trl_vpo.evaluate.measures import Measure
from trl_vpo.testbed import language

TINY = Scale(
    seeds=1, rows=16, steps=2, batch=8, validation=4, test=6, more=4, watched=4, watch_steps=1, rates=(1e-3,),
    variants=("dpo", "leanpo"), noise=(), self_made=False,
)  # fmt: skip
RATES = dict.fromkeys(study_plan.VARIANTS, 1e-3)


# --- the plan -----------------------------------------------------------------------------------------------------


def jobs(scale=FULL, base="base", rates=RATES):
    return [*study_plan.tuning_jobs(scale, base), *study_plan.final_jobs(scale, base, rates)]


def test_a_result_is_kept_by_what_it_depends_on():
    place = {job.name: job.stem for job in jobs()}["seed0/dpo"]
    for other in (
        {"base": "another"},
        {"rates": RATES | {"dpo": 3e-3}},
        *({"scale": replace(FULL, **{name: value})} for name, value in (("steps", 41), ("rows", 300), ("test", 100))),
    ):
        assert {job.name: job.stem for job in jobs(**other)}["seed0/dpo"] != place, other
    more = {job.name: job.stem for job in jobs(replace(FULL, seeds=7, noise=(0.3,)), rates=RATES | {"sft": 3e-3})}
    same = {job.name for job in jobs() if more.get(job.name) == job.stem}
    assert {"tune/dpo/0.001", "base/clip", "seed0/dpo", "seed4/rrpo-made-again"} <= same and "seed0/sft" not in same


def test_all_are_tuned_with_one_budget_off_the_test_split():
    tuning = study_plan.tuning_jobs(FULL, "base")
    assert len(tuning) == len(FULL.variants) * len(FULL.rates)
    assert {job.settings["held_out"]["seed"] for job in tuning} == {study_plan.VALIDATION_SEED}
    seeds = {job.settings["train"]["data"]["seed"] for job in jobs() if job.settings["train"]}
    held_out = {study_plan.TEST_SEED + stream for stream in study_data.STREAMS.values()}
    assert not seeds & (held_out | {study_plan.VALIDATION_SEED}) and study_plan.VALIDATION_SEED not in held_out


def test_the_rate_with_the_fewest_wrong_captions_is_taken():
    tuned = {  # rate: (wrong captions, preference accuracy)
        "dpo": {1e-4: (0.2, 1.0), 1e-3: (0.1, 0.5)},
        "rrpo": {1e-4: (0.1, 0.8), 1e-3: (0.1, 0.9)},
        "sft": {1e-3: (0.1, 0.9), 1e-4: (0.1, 0.9)},
    }
    names = ("captions/wrong", "preference/accuracy")
    tuned = {key: {rate: dict(zip(names, pair)) for rate, pair in rates.items()} for key, rates in tuned.items()}
    assert study_measures.best_rates(tuned) == {"dpo": 1e-3, "rrpo": 1e-3, "sft": 1e-4}


# --- data ---------------------------------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flipped_pairs_are_a_share_and_more_noise_adds_to_them(tmp_path):
    data = study_plan.training_data("clip", 1000, replace(TINY, rows=20))
    clean = read(study_data.training_rows(data, tmp_path))
    flipped = {}
    for noise in (0.2, 0.4):
        rows = read(study_data.training_rows(data | {"noise": noise}, tmp_path))
        flipped[noise] = {row["id"] for row, true in zip(rows, clean) if row["chosen"] == true["rejected"]}
        assert all(row["rejected"] == true["chosen"] for row, true in zip(rows, clean) if row["id"] in flipped[noise])
    assert len(flipped[0.2]) == 4 and len(flipped[0.4]) == 8 and flipped[0.2] < flipped[0.4]


@pytest.mark.parametrize("kind", ["clip", "scene"])
def test_held_out_parts_know_their_answers(kind, tmp_path):
    path, facts_path = study_data.held_out_rows(study_plan.test_split(kind, TINY), tmp_path)
    rows, facts = read(path), json.loads(facts_path.read_text())
    assert {name: sum(facts[row["id"]]["part"] == name for row in rows) for name in study_plan.EVERYTHING} == {
        "balanced": 6, "biased": 4, "questions": 4, "yes_no": 8, "other": 4,
    }  # fmt: skip
    for row in rows:
        known = facts[row["id"]]
        things = study_data.things_of(known)
        if row["task"] == "yes_no":
            assert row["answer"] == known["answer"]
            continue
        chosen, rejected = (row[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        assert chosen == known["answer"] != rejected
        if known["part"] != "questions":
            assert language.check_caption(chosen, things).exact
            assert language.check_caption(rejected, things).hallucinated
    ranked = {facts[row["id"]]["part"] for row in rows if "critical_box" in row}
    assert ranked == ({"balanced"} if kind == "scene" else set())


# --- intervals and verdicts ---------------------------------------------------------------------------------------


def test_one_seed_is_a_cluster_bootstrap():
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 200))
    clusters = [f"clip {row // 2}" for row in range(200)]
    for measured, expected in (
        (over_seeds([first], clusters), clustered_bootstrap(first, clusters)),
        (over_seeds([first], clusters, [second]), paired_difference(second, first, clusters)),
    ):
        assert measured.value == pytest.approx(expected.value)
        assert (measured.low, measured.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_an_interval_covers_seeds_and_samples():
    rows = [np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 4.0], [3.0, 4.0]])]
    ratio = over_seeds(rows, ["a", "b"])
    assert ratio.value == pytest.approx(5 / 10) and ratio.n == 3  # of sums
    # Rows that differ by seed alone: an interval over samples would have no width.
    by_seed = [np.full(50, float(seed)) for seed in range(5)]
    mean = over_seeds(by_seed, [str(row) for row in range(50)])
    assert mean.value == 2 and mean.low < 1.2 and mean.high > 2.8
    paired = over_seeds(by_seed, [str(row) for row in range(50)], [rows - 1 for rows in by_seed])
    assert (paired.value, paired.low, paired.high) == pytest.approx((1, 1, 1))
    assert math.isnan(over_seeds([np.ones(1)], ["a"]).low)  # one row of one seed


@pytest.mark.parametrize(
    ("low", "high", "rule", "margin", "verdict"),
    [
        (0.1, 0.3, "above", 0, HOLDS), (-0.1, 0.3, "above", 0, UNKNOWN), (-0.3, -0.1, "above", 0, FAILS),
        (-0.3, -0.1, "below", 0, HOLDS), (0.1, 0.3, "below", 0, FAILS), (0.0, 0.0, "below", 0, UNKNOWN),
        (-0.01, 0.3, "at least", 0.02, HOLDS), (-0.03, 0.3, "at least", 0.02, UNKNOWN),
        (-0.3, -0.03, "at least", 0.02, FAILS), (0.0, 0.1, "at least", 0, HOLDS), (-0.2, -0.1, "at least", 0, FAILS),
        (-0.3, 0.01, "at most", 0.02, HOLDS), (0.03, 0.3, "at most", 0.02, FAILS),
        (math.nan, math.nan, "at most", 0.02, UNKNOWN),
    ],
)  # fmt: skip
def test_an_interval_decides(low, high, rule, margin, verdict):
    assert decide(Measure((low + high) / 2, low, high, 10), rule, margin) == verdict
    assert together([HOLDS, verdict]) == verdict and together([FAILS, verdict]) == FAILS  # one that fails is enough


# --- a tiny study -------------------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process(monkeypatch):
    """Importing TRL takes long: the jobs are done here. Gives the names of those that were trained."""
    trained, train = [], study_runs.run_training

    def counted(job, data, out):
        trained.append(job.name)
        return train(job, data, out)

    def run_jobs(jobs, out, *args):
        for job in jobs:
            if not job.result(out).is_file():
                study_runs.run_job(job, out)

    monkeypatch.setattr(study_runs, "run_training", counted)
    monkeypatch.setattr(study, "run_jobs", run_jobs)
    threads = torch.get_num_threads()
    yield trained
    torch.set_num_threads(threads)


def records(out):
    results = [json.loads(path.read_text()) for path in (out / "results").glob("*.json")]
    return {result["name"]: (result["settings"], result["records"]) for result in results}


def test_an_interrupted_study_ends_with_the_same_results(tmp_path, monkeypatch, in_this_process):
    evaluate = study_runs.evaluate

    def interrupted(job, out):
        if job.name == "seed0/leanpo":
            raise KeyboardInterrupt
        return evaluate(job, out)

    with monkeypatch.context() as patch:
        patch.setattr(study_runs, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.run_study(TINY, tmp_path / "cut", tmp_path / "report")
    assert in_this_process == ["seed0/dpo", "seed0/leanpo"] and len(records(tmp_path / "cut")) == 2
    report = study.run_study(TINY, tmp_path / "cut", tmp_path / "report", command="make study")
    assert in_this_process == ["seed0/dpo", "seed0/leanpo", "seed0/leanpo"]  # what was finished is not done again
    (job,) = (job for job in jobs(TINY, study_plan.base_digest()) if job.name == "seed0/leanpo")
    study_runs.run_job(job, tmp_path / "whole")
    assert records(tmp_path / "whole")[job.name] == records(tmp_path / "cut")[job.name]
    check_report(report)


def test_a_rate_at_which_training_diverges_is_not_taken(tmp_path, monkeypatch):
    def diverging(job, data, out):
        raise NonFiniteLossError("the loss is nan")

    tuning = study_plan.tuning_jobs(replace(TINY, rates=(1e-3, 1e9), variants=("dpo",)), "base")
    monkeypatch.setattr(study_runs, "run_training", diverging)
    study_runs.run_job(tuning[1], tmp_path)
    result = {"records": [], "history": []}
    monkeypatch.setattr(study_measures, "measure_rows", lambda *_: {
        name: (np.array([0.5]), ["a"]) for name in ("captions/wrong", "preference/accuracy")
    })  # fmt: skip
    tuning[0].result(tmp_path).write_text(json.dumps(result))
    tuned = study_measures.read_tuning(tuning, tmp_path)
    assert tuned["dpo"][1e9]["captions/wrong"] == 1 and study_measures.best_rates(tuned) == {"dpo": 1e-3}


def check_report(report):
    text = report.read_text()
    assert "## (a)" in text and "## (b)" not in text and "![" in text and "make study" in text
    assert str(report.parent) not in text  # no paths of this machine
    assert (report.parent / "displacement.svg").is_file()
    claims = json.loads((report.parent / "study.json").read_text())["claims"]
    assert [claim["question"] for claim in claims] == ["a"] * 4
    for claim in claims:
        measured = Measure(**{key: math.nan if value is None else value for key, value in claim["found"].items()})
        assert claim["verdict"] == decide(measured, claim["rule"], claim["margin"])
