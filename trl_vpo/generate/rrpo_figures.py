"""Figures of a run of RRPO's pipeline."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_vpo.runs.outcome import Outcome
from trl_vpo.text.answers import RIGHT, UNDECIDED, WRONG
from trl_vpo.text.similarity import mean


def figures(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Return the figures of a run; None for one that has nothing to be worked out of.

    rows_by_kind, rows_by_perturbation: training rows by kind of answer, and by what was done to the media.
    perturbed_accuracy: by kind, share of right among right and wrong answers of the first attempts (the further ones
        are made only where the first was not wrong).
    perturbed_undecided: by kind, share of first answers that could not be read, or that the judge calls incorrect
        without a key difference.
    words_in_phrases: mean share of words that lie in phrases, over both responses of every row.
    left_out: by kind of answer, how many inputs gave no row and why; "unread" where the kind is unknown.
    """
    outcomes = list(outcomes)
    rows = [row for outcome in outcomes for row in outcome.rows]
    firsts: dict[str, Counter] = defaultdict(Counter)
    left_out: dict[str, Counter] = defaultdict(Counter)
    for outcome in outcomes:
        kind = outcome.notes.get("answer_kind", "unread")
        firsts[kind].update(result for _, result in outcome.notes.get("tries", [])[:1])
        if outcome.reason:
            left_out[kind][outcome.kind] += 1
    asked = [(kind, counts) for kind, counts in firsts.items() if counts]
    return {
        "rows_by_kind": dict(Counter(row["answer_kind"] for row in rows)),
        "rows_by_perturbation": dict(Counter(row["perturbation"]["mode"] for row in rows)),
        "perturbed_accuracy": {kind: _share(counts, RIGHT, [RIGHT, WRONG]) for kind, counts in asked},
        "perturbed_undecided": {kind: _share(counts, UNDECIDED, [RIGHT, WRONG, UNDECIDED]) for kind, counts in asked},
        "words_in_phrases": mean([o.notes["changed"] for o in outcomes if o.rows]),
        "left_out": {kind: dict(counts) for kind, counts in left_out.items()},
    }


def _share(counts: Mapping[str, int], part: str, whole: Sequence[str]) -> float | None:
    total = sum(counts[name] for name in whole)
    return counts[part] / total if total else None
