"""`RESULTS.md` of the study: verdicts, tables and figures from the results of its runs; `study.json` beside it."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.testbed import figures as study_figures
from studies.testbed import notes as study_notes
from studies.testbed import tables as study_tables
from studies.testbed import verdicts as study_verdicts
from studies.testbed.data import write_text
from studies.testbed.measures import Study, read_study
from studies.testbed.plan import (
    SECOND_ROUND_SEED,
    TEST_SEED,
    TRAIN_SEED,
    TUNING_SEED,
    VALIDATION_SEED,
    VARIANTS,
    Job,
    Scale,
)
from studies.testbed.tables import markdown, number
from studies.testbed.verdicts import FAILS, HOLDS, MARGIN, QUESTIONS, UNKNOWN, Claim, together

COUNTED = {HOLDS: "hold", FAILS: "do not", UNKNOWN: "inconclusive"}


@dataclass(frozen=True)
class About:
    """The circumstances of a study.

    Attributes:
        command: that makes it again.
        rates, tuned: of `measures.best_rates` and `read_tuning`.
        commit: of the working tree when the command began.
        seconds: that this call took; an interrupted study needed others before it.
    """

    command: str
    scale: Scale
    rates: Mapping[str, float]
    tuned: Mapping[str, Mapping[float, Mapping[str, float]]]
    commit: str
    seconds: float
    workers: int


def write_report(about: About, tuning: Sequence[Job], final: Sequence[Job], out: Path, folder: Path) -> Path:
    """Write the report and its figures into a folder; gives the path of RESULTS.md."""
    study = read_study(final, out)
    claims = study_verdicts.all_claims(study, about.scale)
    figures = study_figures.draw(study, about.scale, folder)
    facts = _facts(about, [*tuning, *final], out)
    sections = [
        "# Results on the testbed",
        _opening(about, facts),
        *_verdicts(claims),
        *_training(about),
        *_bases(study),
        *(line for key in QUESTIONS for line in _question(key, study, about.scale, claims, figures)),
        *_reading(about.scale),
        *_made_with(about, facts),
    ]
    write_text(folder / "study.json", json.dumps(_as_json(claims, facts, study), indent=1) + "\n")
    return write_text(folder / "RESULTS.md", "\n\n".join(sections) + "\n")


# --- sections -----------------------------------------------------------------------------------------------------


def _opening(about: About, facts: Mapping[str, Any]) -> str:
    return (
        "The base of the small world (587,424 parameters) trained by every method, on clips and scenes that were "
        f"drawn for it. `{about.command}` wrote this file at commit {facts['commits']}; nothing in it was typed by "
        "hand. It says what the methods do to this model in this world, and nothing about a 7B model."
    )


def _verdicts(claims: Sequence[Claim]) -> list[str]:
    """One line for each question."""
    lines = []
    for key, title in QUESTIONS.items():
        own = [claim for claim in claims if claim.question == key]
        if own:
            count = Counter(claim.verdict for claim in own)
            parts = ", ".join(f"{count[verdict]} {word}" for verdict, word in COUNTED.items() if count[verdict])
            lines.append([f"({key})", title, f"**{together([c.verdict for c in own])}**", parts])
    return [markdown(["", "question", "verdict", "of its claims"], lines)]


def _training(about: About) -> list[str]:
    scale = about.scale
    heads = ["on", "method", "learning rate", *(f"at {rate:g}" for rate in scale.rates if about.tuned)]
    rows = []
    for key in scale.variants:
        variant, tried = VARIANTS[key], about.tuned.get(key, {})
        cells = [f"{100 * found['captions/wrong']:.1f} %" for found in tried.values()]
        rows.append([f"{variant.kind}s", variant.name, f"{about.rates[key]:g}", *cells])
    how = (
        "Not tuned: the quickstart's learning rate."
        if not about.tuned
        else f"Learning rates: each method tried the same {len(scale.rates)}, around the quickstart's, on training "
        f"rows of their own; taken is the one with the fewest wrong captions on {scale.validation} validation samples "
        "(shown; wrong: something false is said, or it is no sentence of the world). Of equal ones that with the "
        "higher preference accuracy, then the smaller one. The test split was not looked at."
    )
    recipe = (
        f"Recipes: `recipes/quickstart/`, with {scale.steps} steps of {scale.batch} pairs, from {scale.rows} "
        "ground-truth pairs without habits."
    )
    notes = [f"- {VARIANTS[key].name}: {VARIANTS[key].note}" for key in scale.variants if VARIANTS[key].note]
    return ["## What was trained", f"{recipe} {how}", markdown(heads, rows), *(["\n".join(notes)] if notes else [])]


def _bases(study: Study) -> list[str]:
    text = (
        "Biased: squares mostly red and circles mostly moving left, the world that the base learnt its captions in, "
        "from texts that often say what is usual. Balanced: every colour, shape and motion equally often. The base "
        "says what it usually saw, and the difference is what there is to mend."
    )
    return ["## The base", text, study_tables.bases(study)]


def _question(key: str, study: Study, scale: Scale, claims: Sequence[Claim], figures: Mapping[str, str]) -> list[str]:
    own = [claim for claim in claims if claim.question == key]
    if not own:
        return []
    lines = [f"## ({key}) {QUESTIONS[key]}", f"Verdict: **{together([c.verdict for c in own])}**."]
    lines.append(markdown(["claim", "found", "needed", "verdict"], [_claim(claim) for claim in own]))
    if key in figures:
        lines.append(figures[key])
    return lines + study_tables.TABLES[key](study, scale) + study_notes.NOTES[key](study, scale)


def _claim(claim: Claim) -> list[str]:
    unit = {"points": " points", "": "", "nats": " nats"}[claim.unit]
    edge = {"above": "above 0", "below": "below 0"}.get(claim.rule)
    if edge is None:
        sign = "−" if claim.rule == "at least" and claim.margin else ""
        edge = f"{claim.rule} {sign}{100 * claim.margin:g} points" if claim.margin else f"{claim.rule} 0"
    return [claim.text, number(claim.found, claim.unit, signed=True) + unit, edge, f"**{claim.verdict}**"]


def _reading(scale: Scale) -> list[str]:
    seeds = (
        "Brackets are 95 % intervals over seeds and held-out samples: all seeds are measured on the same samples, and "
        "both are drawn with replacement, independently of each other (pigeonhole bootstrap, 2,000 draws, percentile "
        "limits; rows of one clip or scene stay together). Differences are paired by seed and sample. With "
        f"{scale.seeds} seeds the part of the seeds is estimated somewhat too small."
        if scale.seeds > 1
        else "Brackets are 95 % intervals over held-out samples (cluster bootstrap, 2,000 draws); one seed says "
        "nothing about others."
    )
    rules = (
        "A claim holds where its whole interval lies on its side of the line that it needs, does not hold where the "
        'whole interval lies on the other side, and is inconclusive otherwise. "At least as good" allows '
        f"{100 * MARGIN:g} points. A question holds where all of its claims do, and does not where one does not. "
        "Methods are compared at their own learning rates. Intervals are not widened for the number of claims, and "
        "have no width where all rows agree, as with 0 of N."
    )
    words = (
        "Log-probs and KL are in nats per response, KL(base ‖ model) along the chosen response. Wrong captions: "
        "hallucinated (a false colour, shape or motion) or outside of the world's grammar. Kept: right answers to "
        "short questions and yes/no questions, and exact captions of the kind of samples that was not trained on. "
        "Gradient norms are before clipping at 1, the mean over all steps; their clusters are steps."
    )
    return ["## How to read the numbers", seeds, rules, words]


def _made_with(about: About, facts: Mapping[str, Any]) -> list[str]:
    scale = about.scale
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    spent, cpu = facts["seconds"], facts["cpu_seconds"]
    counts = (
        f"test {scale.test} samples (and {scale.more} of each further part), validation {scale.validation}, training "
        f"{scale.rows} per run"
    )
    lines = [
        f"- Command: `{about.command}`; commit {facts['commits']}.",
        f"- Machine: {facts['machine']}; {about.workers} processes of one thread.",
        f"- {versions}.",
        f"- Time: {facts['runs']} runs, {spent / 60:.0f} minutes together ({cpu / 60:.0f} of CPU time); the last call "
        f"of the command took {about.seconds / 60:.0f} minutes.",
        f"- Seeds: runs 0 to {scale.seeds - 1}; draws of the world {TRAIN_SEED} + seed for training, "
        f"{SECOND_ROUND_SEED} + seed for second rounds, {TUNING_SEED} for tuning, {VALIDATION_SEED} for validation, "
        f"{TEST_SEED} and up for the test split.",
        f"- Samples: {counts}; clips and scenes each.",
    ]
    return ["## What it was made with", "\n".join(lines)]


# --- facts --------------------------------------------------------------------------------------------------------


def _facts(about: About, jobs: Sequence[Job], out: Path) -> dict[str, Any]:
    import trl_vpo

    results = [json.loads(job.result(out).read_text(encoding="utf-8")) for job in jobs]
    commits = dict.fromkeys(result["commit"] or about.commit for result in results)
    return {
        "commits": ", ".join(commits),
        "machine": f"{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": trl_vpo.versions(),
        "runs": len(results),
        "seconds": sum(sum(result["seconds"].values()) for result in results),
        "cpu_seconds": sum(sum(result["cpu_seconds"].values()) for result in results),
        "rates": dict(about.rates),
    }


def cpu_model() -> str:
    """As Linux names it; elsewhere the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _as_json(claims: Sequence[Claim], facts: Mapping[str, Any], study: Study) -> dict[str, Any]:
    """Claims with their figures, and the values of all measures; what is undefined becomes None."""
    finite = lambda value: value if not isinstance(value, float) or math.isfinite(value) else None  # noqa: E731
    found: list[dict[str, Any]] = []
    for claim in claims:
        one = asdict(claim) | {"verdict": claim.verdict}
        one["found"] = {key: finite(value) for key, value in one["found"].items()}
        found.append(one)
    values = {run: {name: finite(value) for name, value in of.items()} for run, of in study.values().items()}
    return {"facts": dict(facts), "claims": found, "values": values}
