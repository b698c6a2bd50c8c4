"""The testbed study: what DPO, LeanPO, RRPO and LPOI do to the base of the small world, with intervals.

    python -m studies.testbed.study            five seeds, tuned learning rates; writes results/RESULTS.md
    python -m studies.testbed.study --quick    one seed at the quickstart's learning rate; writes into its own folder

Tuning first, on the validation split; then the final runs, each measured once on the test split. Runs are grouped, by
seed and kind of samples or by the variant that is tuned, and every group is a process of its own. The same command
continues after an interruption: finished runs stay (`plan` says what tells them apart).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.testbed import plan as study_plan
from studies.testbed.plan import FULL, QUICK, Job, Scale
from trl_vpo.testbed.quickstart import console

RESULTS = Path("studies/testbed/results")
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description="What the methods do to the base of the small world.")
    parser.add_argument("--quick", action="store_true", help="one seed, no tuning, no noise, no self-made data")
    parser.add_argument("--out", type=Path, help="runs and results; default: outputs/study or outputs/study-quick")
    parser.add_argument("--report", type=Path, help=f"folder of RESULTS.md; default: {RESULTS}, of --quick: --out")
    parser.add_argument(
        "--workers", type=int, default=WORKERS, help=f"processes of one thread each; default: {WORKERS}"
    )
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}: give at least 1.")
    out = args.out or Path("outputs/study-quick" if args.quick else "outputs/study")
    report = args.report or (out if args.quick else RESULTS)
    command = "make study-quick" if args.quick else "make study"
    try:
        run_study(QUICK if args.quick else FULL, out, report, workers=args.workers, command=command)
    except KeyboardInterrupt:
        print(f"Stopped. Give the same command again to continue from what is finished in {out}.", file=sys.stderr)
        raise SystemExit(130) from None


def run_study(scale: Scale, out: Path, report: Path, *, workers: int = WORKERS, command: str = "") -> Path:
    """Make what is missing of a study's results, write its report and return the report's path.

    Raises:
        SystemExit: this is not the root of the repository, or a worker failed; the message names its log.
    """
    if not study_plan.BASE.is_dir():
        raise SystemExit(f"{study_plan.BASE} is not here ({Path.cwd()}): start this from the root of the repository.")
    from studies.testbed import measures as study_measures
    from studies.testbed import report as study_report

    began, state, base = time.time(), commit(), study_plan.base_digest()
    tuning = study_plan.tuning_jobs(scale, base)
    run_jobs(tuning, out, workers, state, "tuning on the validation split")
    tuned = study_measures.read_tuning(tuning, out)
    rates = study_measures.best_rates(tuned) if tuning else dict.fromkeys(scale.variants, scale.rates[0])
    final = study_plan.final_jobs(scale, base, rates)
    run_jobs(final, out, workers, state, "final runs, measured on the test split")
    about = study_report.About(command, scale, rates, tuned, state, time.time() - began, workers)
    path = study_report.write_report(about, tuning, final, out, report)
    shutil.rmtree(out / "frames", ignore_errors=True)  # hundreds of MB that no run needs any more
    _show(json.loads((report / "study.json").read_text(encoding="utf-8"))["claims"])
    console.print(f"Report: {path}\nRuns:   {out}", highlight=False, soft_wrap=True)
    return path


def _show(claims: Sequence[Mapping[str, Any]]) -> None:
    """The verdicts; the report has the figures."""
    for claim in claims:
        text = f"({claim['question']}) {claim['verdict']:14s}  {claim['text']}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def commit() -> str:
    """The commit of the working tree, and whether there are changes; `unknown` outside of a repository."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True)  # noqa: E731
    found = git("rev-parse", "--short", "HEAD")
    if found.returncode:
        return "unknown"
    changed = git("status", "--porcelain", "--", "trl_vpo", "recipes/quickstart").stdout.strip()
    return found.stdout.strip() + (" with changes" if changed else "")


# --- workers ------------------------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], out: Path, workers: int, state: str, what: str) -> None:
    """Do the jobs that have no result yet, each group in a process of its own, so many of them at a time.

    Raises:
        SystemExit: a worker failed.
    """
    waiting = _groups(jobs, out)
    if not waiting:
        return
    _write_shared_data(jobs, out)
    missing = sum(not job.result(out).is_file() for job in jobs)
    console.print(f"{what}: {missing} of {len(jobs)} runs to do, in {len(waiting)} processes", highlight=False)
    began, running, reported = time.time(), {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                group = next(iter(waiting))
                running[group] = _start(group, waiting.pop(group), out, state)
            time.sleep(0.5)
            for group in [group for group, process in running.items() if process.poll() is not None]:
                if running.pop(group).returncode:
                    raise SystemExit(_failure(group, out))
            done = missing - sum(not job.result(out).is_file() for job in jobs)
            reported = _tell(done, missing, reported, time.time() - began)
    finally:
        for process in running.values():
            process.terminate()


def _groups(jobs: Sequence[Job], out: Path) -> dict[str, list[Job]]:
    """Group -> its jobs, where any has no result; the longest group first, so that the last ones end together."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.group, []).append(job)
    missing = {name: sum(not job.result(out).is_file() for job in group) for name, group in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=lambda name: -missing[name]) if missing[name]}


def _write_shared_data(jobs: Sequence[Job], out: Path) -> None:
    """Write what several processes read, before they start."""
    from studies.testbed import data as study_data

    with console.status("writing clips and scenes ..."):
        for job in jobs:
            study_data.held_out_rows(job.settings["held_out"], out / "data")
            train = job.settings["train"]
            if train and train["watch"]:
                study_data.held_out_rows(study_plan.watched_split(train["watch"]), out / "data")
            if train and train["data"]["seed"] == study_plan.TUNING_SEED:
                study_data.training_rows(train["data"], out / "data")


def _start(group: str, jobs: Sequence[Job], out: Path, state: str) -> subprocess.Popen:
    jobs_file = out / "jobs" / f"{group}.json"
    jobs_file.parent.mkdir(parents=True, exist_ok=True)
    jobs_file.write_text(study_plan.as_json(jobs), encoding="utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",  # everything it needs is in the repository
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "STUDY_COMMIT": state,
    }
    words = [sys.executable, "-m", "studies.testbed.runs", str(jobs_file), str(out)]
    with _log(group, out).open("a", encoding="utf-8") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _failure(group: str, out: Path) -> str:
    log = _log(group, out)
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    return f"{tail}\n\nThe runs of {group} failed, {log} says why. Give the same command again to continue."


def _log(group: str, out: Path) -> Path:
    path = out / "logs" / f"{group}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _tell(done: int, missing: int, reported: int, seconds: float) -> int:
    """Print a line for every tenth of the runs, and return how many were counted."""
    if done == reported or (done < missing and done - reported < max(1, missing // 10)):
        return reported
    left = seconds / done * (missing - done)
    console.print(
        f"  {done} of {missing} runs after {seconds / 60:.1f} min, {left / 60:.0f} min left", highlight=False
    )
    return done


if __name__ == "__main__":
    main()
