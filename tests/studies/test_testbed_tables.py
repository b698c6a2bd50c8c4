"""The comparison's plan, rows and tables: what is left to do, what a row holds, and differences of known data."""

import json
import re

import numpy as np
import pytest

from studies.testbed import cells, command, plan, tables

SAMPLES, RIGHT = 40, 30


def row(method, rate, steps, seed, kl, false_mass, noise=0.0):
    """A row whose samples scatter around the given KL and false mass."""
    random = np.random.default_rng([seed, steps])
    base = of_samples(np.zeros(SAMPLES), np.zeros(SAMPLES))
    own = of_samples(kl + noise * random.normal(size=SAMPLES), false_mass + noise * random.normal(size=SAMPLES))
    own["chosen_logp"] = base["chosen_logp"] - 2 * kl * (np.arange(SAMPLES) < RIGHT)
    return (
        dict(zip(plan.KEYS, (method, "near", rate, steps, seed)))
        | cells.summary(own, base)
        | {"cpu_seconds": {}, "base": cells.digest("clip")}
    )


def of_samples(kl, false):
    zeros = np.zeros(SAMPLES)
    names = ("log_true", "true_mass", "outside_mass", "hallucination", "ungrammatical")
    logps = {"chosen_logp": zeros - 10, "rejected_logp": zeros - np.where(np.arange(SAMPLES) < RIGHT, 12, 8)}
    return dict.fromkeys(names, zeros) | logps | {"kl": kl, "false_mass": false}


def curve(method, slope, noise=0.0):
    """A method whose false mass is a line in its KL, at two rates and three checkpoints, with two seeds."""
    return [
        row(method, rate, steps, seed, kl, 0.5 - slope * kl, noise)
        for rate, steps, kl in ((1e-3, 60, 0.5), (1e-3, 120, 1.0), (1e-3, 240, 1.5), (3e-3, 60, 2.0), (3e-3, 120, 4.0))
        for seed in (0, 1)
    ]


def test_the_36_runs_and_what_is_missing():
    runs = plan.main_runs()
    assert len(runs) == 37 and len({run.method for run in runs}) == 5
    assert sum(len(run.cells()) for run in runs) == 1 + 36 * 3
    assert set(plan.main_runs()) <= set(plan.full_runs())
    rows = [dict(zip(plan.KEYS, cell)) for run in runs[:3] for cell in run.cells()]
    assert plan.missing(runs, rows) == runs[3:]
    assert plan.missing(runs, rows[:-1]) == runs[2:]  # a run with a cell too few is made again


def test_a_summary_tells_pairs_that_the_base_ranks_rightly():
    found = row("dpo", 1e-3, 60, 0, 0.5, 0.2)
    assert found["chosen_change"] == pytest.approx(-1.0 * RIGHT / SAMPLES)
    assert found["chosen_change_right"] == pytest.approx(-1.0) and found["fell_right"] == 1
    assert found["accuracy"] == pytest.approx(RIGHT / SAMPLES) and found["false_mass"] == pytest.approx(0.2)
    assert sum(found["samples"]["right"]) == RIGHT


def test_differences_at_matched_steps_and_kl_of_known_lines():
    ours, theirs = tables.Curves(curve("rrpo", 0.1)), tables.Curves(curve("dpo", 0.05))
    at = tables.difference(ours.at((3e-3, 120), "false_mass"), theirs.at((3e-3, 120), "false_mass"))
    assert at == pytest.approx((-0.2,) * 3)
    matched = tables.difference(ours.where("kl", 3.0, "false_mass"), theirs.where("kl", 3.0, "false_mass"))
    assert matched == pytest.approx((-0.15,) * 3)
    beyond = tables.difference(ours.where("kl", 9.0, "false_mass"), theirs.where("kl", 9.0, "false_mass"))
    assert np.isnan(beyond).all()


def test_intervals_hold_the_scatter_of_samples():
    ours, theirs = tables.Curves(curve("rrpo", 0.1, 0.2)), tables.Curves(curve("dpo", 0.1))
    value, low, high = tables.difference(ours.at((1e-3, 60), "false_mass"), theirs.at((1e-3, 60), "false_mass"))
    assert low < value < high and low < 0 < high
    assert high - low == pytest.approx(4 * 0.2 / np.sqrt(2 * SAMPLES), rel=0.6)


def test_the_report_has_every_method_and_what_is_not_reached(tmp_path):
    path = tmp_path / "results.jsonl"
    rows = curve("dpo", 0.05) + curve("rrpo", 0.1) + [row("dpo", 1e-3, 60, 2, 9.0, 0.1)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    command.main(["--results", str(path), "tables"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| DPO | 0.001 | 60 | 3 |" in text and "| RRPO | 0.001 | 60 | 2 |" in text
    (table,) = re.findall(r"### RRPO minus DPO\n\nSeeds: 2.\n\n(.*?)\n\n", text, re.DOTALL)  # those that both have
    lines = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert "-5.0 [-5.0, -5.0]" in lines["| rate 0.001, 120 steps"]  # false mass, points
    assert "-20.0 [-20.0, -20.0]" in lines["| kl 4"] and "| margin 16" not in lines  # 8 at most
    assert (tmp_path / "frontier.svg").read_text().count("<svg") == 1


def test_a_seed_with_a_cell_too_few_is_in_no_difference():
    rows = curve("dpo", 0.05) + curve("rrpo", 0.1)
    partial = [row("rrpo", 1e-3, 60, 2, 0.5, 0.4), row("dpo", 1e-3, 60, 2, 0.5, 0.4)]
    assert "Seeds: 2." in of_both(rows)
    assert of_both(rows + partial) == of_both(rows)
    assert of_both(partial + rows[:1] + rows[-1:]) == ""  # no seed is whole


def of_both(rows):
    return tables.differences({m: [row for row in rows if row["method"] == m] for m in ("rrpo", "dpo")})


def test_a_cell_is_drawn_once_for_all_places_on_a_curve(monkeypatch):
    ours, drawn = tables.Curves(curve("dpo", 0.05)), []
    monkeypatch.setattr(tables, "_of", lambda row, measure, of=tables._of: drawn.append(measure) or of(row, measure))
    for value in (0.75, 1.25, 3.0):
        ours.where("kl", value, "false_mass")
    assert len(drawn) == 2 * 2 * len(ours.cells)  # two measures, two seeds


def test_other_pairs_are_compared_with_near_ones():
    near, one_rate = curve("dpo", 0.1), [row for row in curve("dpo", 0.05) if row["rate"] == 1e-3]
    text = tables.report(near + [row | {"pairs": "flip40"} for row in one_rate])
    (table,) = re.findall(
        r"### DPO on flip40 pairs minus DPO on near pairs\n\nSeeds: 2.\n\n(.*?)\n\n", text, re.DOTALL
    )
    lines = {line.split(" | ")[0]: line for line in table.splitlines()}
    assert "+7.5 [+7.5, +7.5]" in lines["| rate 0.001, 240 steps"]  # (0.1 - 0.05) x 1.5 nats
    assert not any("0.003" in line for line in lines)


def test_scenes_have_their_own_columns_and_contrasts():
    found = [
        row | {"pairs": "scenes", "habit_objects": share, "absent_yes": 1.0, "visibility": 0.8125}
        | {"samples": row["samples"] | {"habit_objects": [share] * SAMPLES, "absent_yes": [1.0] * SAMPLES}}
        for method, share in (("dpo", 0.5), ("lpoi_5", 0.25)) for row in curve(method, 0.1) if row["rate"] == 1e-3
    ]  # fmt: skip
    text = tables.report(found)
    assert "| not a caption | missing companion named | yes to it | visibility τ |" in text
    assert "| 0.0 % | 50.0 % | 100.0 % | 0.812 |" in text
    (table,) = re.findall(r"### LPOI, 5 images minus DPO\n\nSeeds: 2.\n\n(.*?)\n\n", text, re.DOTALL)
    assert "| -25.0 [-25.0, -25.0] | +0.0 [+0.0, +0.0] |" in table.splitlines()[2]
