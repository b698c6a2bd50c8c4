"""LeanPO's filters, the share that is kept, and the summary."""

import json

import pytest
from leanpo_kit import TRUTH, Scripted, item, pipeline

from trl_vpo.generate.leanpo import keep_top
from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.responses import Failure


@pytest.mark.parametrize(
    ("setting", "boundary", "figure"),
    [("min_margin", 0.3, "reward margin"), ("min_trust", 0.8, "trust of"), ("min_trust_margin", 0.2, "trust margin")],
)
def test_filters_keep_what_is_exactly_at_the_boundary(setting, boundary, figure):
    # rewards -0.4 and -0.7 leave 0.29999999999999993; trusts 0.8 and 0.6
    script = {"reflection": "a red square moves up.", "damaged": "a blue square moves up."}
    model = Scripted(script, rewards={script["reflection"]: -0.4, script["damaged"]: -0.7})
    (kept,) = pipeline(model, **{setting: boundary}).make([item()])
    (dropped,) = pipeline(model, **{setting: boundary + 0.001}).make([item()])
    assert kept.rows and kept.rows[0]["chosen_trust"] == 0.8
    assert dropped.kind == f"below {setting}"
    assert figure in dropped.reason and f"{boundary:.4g}," in dropped.reason
    assert dropped.notes["answers"]["damaged"] == script["damaged"]  # it stays in the figures


def outcome_of(id, chosen, rejected):
    notes = {"chosen_trust": chosen, "rejected_trust": rejected}
    return Outcome(id, rows=(notes | {"id": id},), notes=notes)


def test_keep_top_takes_the_largest_margins_ties_by_id():
    failed = Outcome("e", reason="no", kind="no answer")
    # margins: d 0.5; b and c 0.30000000000000004, a 0.29999999999999993; f 0
    outcomes = [outcome_of("c", 0.9, 0.6), outcome_of("d", 0.5, 0.0), failed, outcome_of("b", 0.8, 0.5)]
    outcomes += [outcome_of("f", 1.0, 1.0), outcome_of("a", 0.7, 0.4)]
    for order in (outcomes, outcomes[::-1]):
        kept = keep_top(order, 0.5)  # 2.5 of 5 rows, rounded up
        assert [outcome.id for outcome in kept] == [outcome.id for outcome in order]
        assert {outcome.id for outcome in kept if outcome.rows} == {"d", "a", "b"}
        dropped = {outcome.id: outcome for outcome in kept if outcome.kind == "outside keep_top"}
        assert set(dropped) == {"c", "f"}
        assert "trust margin 0.3 is not among the 3 largest of 5" in dropped["c"].reason
        assert dropped["c"].notes == {"chosen_trust": 0.9, "rejected_trust": 0.6}
    assert next(outcome for outcome in kept if outcome.id == "e") is failed
    assert keep_top(outcomes, 1.0) == outcomes
    assert sum(bool(outcome.rows) for outcome in keep_top(outcomes, 0.6)) == 3  # exactly, not rounded up to 4
    assert keep_top([], 0.5) == [] and keep_top([failed], 0.5) == [failed]
    assert pipeline(Scripted()).select(outcomes) is outcomes
    assert pipeline(Scripted(), keep_top=0.5).select(outcomes) == keep_top(outcomes, 0.5)


def test_the_summary():
    script = {"plain": {"r0": TRUTH, "r1": "a red cross.", "r2": Failure("empty"), "r3": TRUTH}}
    script["damaged"] = {"r0": "a.", "r1": TRUTH, "r2": "a b.", "r3": Failure("empty")}
    model = Scripted(script, rewards={TRUTH: -0.5, "a.": -3.0, "a b.": -1.0})
    job = pipeline(model, min_margin=1.0)
    outcomes = job.make([item(f"r{i}") for i in range(4)])
    assert [outcome.kind for outcome in outcomes] == [None, "identical responses", "below min_margin", "no answer"]
    figures = job.summarize(outcomes)
    assert figures["pairs"] == 3 and figures["kept_pairs"] == 1
    assert figures["chosen_right"] == 1.0
    assert figures["rejected_right"] == figures["plain_right"] == pytest.approx(1 / 3)
    assert figures["rejected_reward"] == -2.0 and figures["kept_rejected_reward"] == -3.0
    assert figures["reward_accuracy"] == 1.0
    # rewards -0.5, -3, -0.5, -1 against trusts 1, 1/3, 1, 2/7: ranks 3.5, 1, 3.5, 2 and 3.5, 2, 3.5, 1
    assert figures["reward_trust_spearman"] == pytest.approx(3.5 / 4.5)
    assert figures["kept_reward_trust_spearman"] is None  # two points
    assert not any(name.startswith("kept_") for name in pipeline(model).summarize(outcomes))
    json.dumps(figures, allow_nan=False)


def test_the_summary_of_nothing():
    for outcomes in ([], [Outcome("a", reason="no file", kind="unreadable media")]):
        figures = pipeline(Scripted(), keep_top=0.5).summarize(outcomes)
        counts = {name for name in figures if name.endswith(("pairs", "plain_failures"))}
        assert len(counts) == 4 and {figures[name] for name in counts} == {0}
        assert {figures[name] for name in figures if name not in counts} == {None}
