"""The real command of the study: killed and started again, and its quick mode with what it is held to."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
import sys
from pathlib import Path
from studies.testbed import study
from studies.testbed.plan import Scale
tiny = Scale(seeds=1, rows=16, steps=2, batch=8, validation=4, test=6, more=4, watched=4, watch_steps=1,
             rates=(1e-3,), variants=("dpo", "leanpo", "rrpo"), noise=(), self_made=False)
study.run_study(tiny, Path(sys.argv[1]), Path(sys.argv[1]) / "report", workers=1)
"""


def started(out):
    return subprocess.Popen([sys.executable, "-c", TINY, str(out)], cwd=ROOT, start_new_session=True)


def finished_jobs(out):
    """Return the jobs that the workers' logs report as done."""
    lines = [line for log in (out / "logs").glob("*.log") for line in log.read_text(errors="replace").splitlines()]
    return [line.split(":")[0] for line in lines if " s of CPU)" in line]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["command", "everything"])
def test_a_killed_study_continues_and_does_nothing_twice(whom, tmp_path):
    """The worker of a killed command may live on for a job: the next command waits for it."""
    first = started(tmp_path)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "results").glob("seed0-dpo-*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL) if whom == "command" else os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = {path: path.read_bytes() for path in (tmp_path / "results").glob("*.json")}
    assert before
    assert started(tmp_path).wait(timeout=300) == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sorted(finished_jobs(tmp_path)) == ["base/clip", "seed0/dpo", "seed0/leanpo", "seed0/rrpo"]
    assert (tmp_path / "report" / "RESULTS.md").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_study_shows_the_direction_of_its_claims(tmp_path):
    """With margins that one seed may miss by; what does not hold in this world (RESULTS.md) is not asserted."""
    command = [sys.executable, "-m", "studies.testbed.study", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    report = json.loads((tmp_path / "study.json").read_text())
    assert {claim["question"] for claim in report["claims"]} == {"a", "c", "d"}
    of = report["values"]
    base, dpo, leanpo, rrpo = (of[run] for run in ("base/clip", "dpo", "leanpo", "rrpo"))
    scenes, dpo_scenes, lpoi = (of[run] for run in ("base/scene", "dpo_scenes", "lpoi_5"))
    for trained in (dpo, leanpo, rrpo):
        assert trained["captions/wrong"] < base["captions/wrong"] - 0.1
    # (a) the rejected response falls under DPO, the chosen one does not under LeanPO
    assert dpo["displacement/rejected"] < -1 and leanpo["displacement/chosen"] > 0
    assert leanpo["preference/accuracy"] > dpo["preference/accuracy"] - 0.05
    # (c) smaller gradients, no more hallucinations, nothing forgotten; its KL is not below DPO's here
    assert rrpo["grad_norm"] < dpo["grad_norm"]
    assert rrpo["captions/hallucinated"] < dpo["captions/hallucinated"] + 0.05
    assert rrpo["kept/right"] > dpo["kept/right"] - 0.1 and rrpo["kept/right"] > base["kept/right"] - 0.05
    assert rrpo["kl/chosen"] < 2 * dpo["kl/chosen"]
    # (d) fewer hallucinated objects and a better ranking than the base; not better than DPO here
    assert lpoi["chair/s"] < scenes["chair/s"] - 0.1 and lpoi["chair/i"] < scenes["chair/i"] - 0.05
    assert lpoi["visibility/tau"] > scenes["visibility/tau"] + 0.03
    assert lpoi["visibility/tau"] > dpo_scenes["visibility/tau"] - 0.1
