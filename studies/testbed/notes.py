"""Explanations of the study's figures by other figures of it: sentences with their numbers."""

from __future__ import annotations

from collections.abc import Callable

from studies.testbed.measures import Study
from studies.testbed.plan import SMOOTHED, Scale, noisy
from studies.testbed.tables import number
from studies.testbed.verdicts import FAILS, HOLDS, decide
from trl_vpo.evaluate.measures import Measure

FLOOR = 0.02  # a rate below it leaves a method nothing to be better by


def likelihood(study: Study, scale: Scale) -> list[str]:
    """Say which pairs, and which term, move the chosen response."""
    notes, moved = [], study.of("dpo", "displacement/chosen")
    wrongly, rightly = (study.of("dpo", f"displacement/chosen_base_{side}") for side in ("wrong", "right"))
    if decide(moved, "below") != HOLDS and decide(wrongly, "above") == HOLDS:
        notes.append(
            "DPO does not push the chosen responses down as a mean, because the base is wrong about many: where it "
            f"ranked the pair wrongly they gain {_signed(wrongly, 'nats')} nats, where it ranked it "
            f"rightly they move by {_signed(rightly, 'nats')}."
        )
    if study.has("simpo", "leanpo_plain"):
        found = study.difference("leanpo_plain", "simpo", "displacement/chosen")
        notes.append(
            "LeanPO without smoothing differs from SimPO by the NLL term, and moves the chosen log-prob by "
            f"{_signed(found, 'nats')} nats more."
        )
    return notes + _at_the_floor(study, ("dpo", "leanpo"), "captions/wrong", "wrong captions")


def smoothing(study: Study, scale: Scale) -> list[str]:
    """Say how many pairs the smoothing reaches."""
    key, most = list(SMOOTHED)[1], scale.noise[-1]
    shares = [study.of(noisy(key, noise), "smoothed") for noise in (0.0, most)]
    return [
        f"Over all steps, {number(shares[0], 'share')} of the training pairs were ranked wrongly and smoothed without "
        f"label noise, {number(shares[1], 'share')} with {most:.0%} flipped. Once a flipped pair is learnt, it is "
        "ranked as labelled and smoothed no more."
    ]


def regularised(study: Study, scale: Scale) -> list[str]:
    """Say what phrases and KL each change against DPO."""
    notes = []
    if study.has("rrpo_no_kl", "dpo_kl"):
        for measure, name, unit in (("grad_norm", "gradient norm", ""), ("kl/chosen", "KL", "nats")):
            phrases, penalty = (study.difference(run, "dpo", measure) for run in ("rrpo_no_kl", "dpo_kl"))
            notes.append(
                f"Against DPO, the phrases alone change the {name} by {_signed(phrases, unit)}, the KL "
                f"penalty alone by {_signed(penalty, unit)}."
            )
    sides = [study.difference("rrpo", "dpo", f"kl/chosen_base_{side}") for side in ("right", "wrong")]
    notes.append(
        f"RRPO's KL differs from DPO's by {_signed(sides[0], 'nats')} nats at pairs that the base ranked "
        f"rightly, and by {_signed(sides[1], 'nats')} at those that it ranked wrongly, where a distance to "
        "it is wanted."
    )
    return notes + _at_the_floor(study, ("dpo", "rrpo"), "captions/hallucinated", "hallucinated captions")


def listwise(study: Study, scale: Scale) -> list[str]:
    """Say if there was room above DPO, and what the list costs."""
    notes = _at_the_floor(study, ("dpo_scenes", "lpoi_5"), "chair/s", "captions with a hallucinated object")
    norms = [study.of(run, "grad_norm") for run in ("dpo_scenes", "lpoi_5")]
    worse = decide(study.difference("lpoi_5", "dpo_scenes", "chair/s"), "below") == FAILS
    if worse and norms[1].low > 2 * norms[0].high:
        notes.append(
            f"A likely reason: LPOI's gradient norm at N = 5 is {number(norms[1], '')}, DPO's {number(norms[0], '')}. "
            "What it has beyond DPO's term comes from list and anchor, and AdamW's steps are about as long whatever "
            "the norm, so less of each goes into the pair."
        )
    if study.has("lpoi_5_bare"):
        found = study.difference("lpoi_5_bare", "lpoi_5", "chair/s")
        notes.append(
            f"Without the red ellipse CHAIRs differs by {_signed(found, 'points')} points. For tau the "
            "ellipse is drawn in all lists."
        )
    found = study.difference("lpoi_5", "dpo_scenes", "captions/unparsed")
    if decide(found, "at most", FLOOR) == FAILS:
        notes.append(
            "LPOI's captions are outside the world's grammar more often than DPO's: "
            f"{_signed(found, 'points')} points. CHAIR counts what such a caption mentions all the same."
        )
    return notes


def self_made(study: Study, scale: Scale) -> list[str]:
    """Name the runs that are missing."""
    return [
        f"{name} is not in the tables: with some seeds there were no rows to train on, or training diverged."
        for name in dict.fromkeys(study.left_out)
    ]


def _signed(found: Measure, unit: str) -> str:
    return number(found, unit, signed=True)


def _at_the_floor(study: Study, runs: tuple[str, ...], measure: str, name: str) -> list[str]:
    found = [study.of(run, measure) for run in runs]
    if any(one.value >= FLOOR for one in found):
        return []
    rates = " and ".join(number(one, "share") for one in found)
    return [f"Both are at the floor ({name}: {rates}): this world leaves no room to tell them apart by it."]


NOTES: dict[str, Callable[[Study, Scale], list[str]]] = {
    "a": likelihood,
    "b": smoothing,
    "c": regularised,
    "d": listwise,
    "e": self_made,
}
