"""The study's report from made-up results: what decides a claim, and that every question has its tables."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from studies.testbed import data as study_data
from studies.testbed import measures as study_measures
from studies.testbed import plan as study_plan
from studies.testbed import report as study_report
from studies.testbed.plan import FULL, VARIANTS

SMALL = replace(FULL, seeds=2, rows=4, validation=2, test=6, more=4, watched=2, rates=(3e-4, 1e-3))
RATES = dict.fromkeys(VARIANTS, 1e-3)


def made_up(job, out, better):
    """A result without a model: a run is right where `better` says so, the base on every other row."""
    path, _ = study_data.held_out_rows(job.settings["held_out"], out / "data")
    train = job.settings["train"]
    random = np.random.default_rng(int(job.digest, 16) % 2**32)
    records = []
    for place, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        right = random.random() < better(job) if train else place % 2 == 0
        record = {"id": row["id"], "task": row["task"]}
        if row["task"] == "yes_no":
            answer = row["answer"] if right else {"yes": "no", "no": "yes"}[row["answer"]]
            record |= {"pair": row["pair"], "expected": row["answer"]}
        else:
            answer = row["chosen" if right else "rejected"][0]["content"][0]["text"]
            logps = {"chosen_logp": -1.0 if right else -4.0, "rejected_logp": -3.0 - bool(train)}
            tokens = {"chosen_tokens": 6, "rejected_tokens": 6}
            record |= logps | tokens | {"chosen_kl": 0.5 * bool(train), "image_logps": None}
            if "critical_box" in row:
                record["image_logps"] = [-1.0, -2.0, -3.0, -4.0, -4.5 if right else 0.0]
        records.append(record | {"response": answer, "response_tokens": 6, "response_ended": True})
    logged = {"loss": 1.0, "grad_norm": 0.5, "loss/smoothing": 0.02, "logps/chosen": -1.0, "logps/rejected": -2.0}
    evaluated = {"eval_loss": 1.0, "eval_logps/chosen": -1.0}
    history = [{"step": step, **logged} for step in (1, 2)]
    history += [{"step": step, **evaluated, "eval_logps/rejected": -step} for step in (0, 1, 2)]
    generated = None
    if train and "made_by" in train["data"]:
        generated = {"inputs": 4, "rows": 3, "figures": {"chosen_right": 1.0, "rejected_right": 0.25}}
    seconds = {"training": 1.0, "evaluation": 2.0}
    result = {"name": job.name, "settings": job.settings, "history": history if train else [], "generated": generated}
    result |= {"records": records, "seconds": seconds, "cpu_seconds": seconds, "commit": "abc1234 with changes"}
    study_data.write_text(job.result(out), json.dumps(result))


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The report of a study in which LPOI is always right, DPO on scenes seldom, and all else mostly."""
    out = tmp_path_factory.mktemp("study")
    better = lambda job: {"lpoi_5": 1.0, "dpo_scenes": 0.1}.get(job.name.split("/")[1], 0.8)  # noqa: E731
    tuning, final = study_plan.tuning_jobs(SMALL, "base"), study_plan.final_jobs(SMALL, "base", RATES)
    for job in (*tuning, *final):
        made_up(job, out, better)
    tuned = study_measures.read_tuning(tuning, out)
    about = study_report.About("make study", SMALL, RATES, tuned, "abc1234", 60.0, 2)
    path = study_report.write_report(about, tuning, final, out, out / "report")
    return path.read_text(), json.loads((path.parent / "study.json").read_text()), path.parent


def test_every_question_has_a_verdict_and_its_figure(reported):
    text, _, folder = reported
    for key in "abcde":
        for line in (rf"^## \({key}\)", rf"^\| \({key}\) .*\*\*(holds|does not hold|inconclusive)\*\*"):
            assert len(re.findall(line, text, re.MULTILINE)) == 1
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert shown == ["displacement.svg", "noise.svg", "lists.svg"]
    assert all((folder / name).is_file() for name in shown)


def test_claims_follow_from_the_figures(reported):
    claims = {claim["text"]: claim for claim in reported[1]["claims"]}
    chair = claims["LPOI (N = 5) has a lower CHAIRs than DPO"]
    assert chair["verdict"] == "holds" and chair["found"]["high"] < 0
    assert claims["RRPO's gradient norm is below DPO's"]["verdict"] == "inconclusive"  # they are equal
    assert claims["under DPO the rejected one's falls"]["found"]["value"] == pytest.approx(-1)
    values = reported[1]["values"]
    assert values["lpoi_5"]["chair/s"] == 0 and values["base/scene"]["captions/hallucinated"] == 0.5
    assert values["leanpo"]["smoothed"] == pytest.approx(0.2)


def test_the_report_names_its_origin_and_has_whole_tables(reported):
    text, _, folder = reported
    assert "abc1234 with changes" in text and "torch " in text and "make study" in text
    assert str(folder.parent) not in text and "/" + "tmp" not in text
    assert "\n\n\n" not in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in table.splitlines()}) == 1, table
        assert "nan" not in table
