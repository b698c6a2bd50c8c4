"""The study's claims, and how the figures decide them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from studies.testbed.measures import Study
from studies.testbed.plan import SMOOTHED, Scale, noisy
from trl_vpo.evaluate.measures import Measure

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "inconclusive"
MARGIN = 0.02  # two points: what "at least as good" may be worse by
QUESTIONS = {
    "a": "LeanPO: under DPO both log-probs fall, under LeanPO the chosen one does not, and accuracy is at least DPO's",
    "b": "Smoothing: what it does as label noise grows",
    "c": "RRPO: smaller gradients and KL than DPO's, at an equal or better hallucination rate, and less is forgotten",
    "d": "LPOI: fewer hallucinated objects than DPO, log-probs that follow visibility, and more so with a longer list",
    "e": "Self-made against ground-truth data, and a second round",
}


@dataclass(frozen=True)
class Claim:
    """A statement about one figure.

    Attributes:
        question: a key of `QUESTIONS`.
        text: what is claimed.
        found: the figure, mostly a difference.
        rule: "above" or "below" 0; "at least" -margin or "at most" margin.
        unit: "points" (of a share), "nats", or nothing.
    """

    question: str
    text: str
    found: Measure
    rule: str
    unit: str = "points"
    margin: float = 0.0

    @property
    def verdict(self) -> str:
        return decide(self.found, self.rule, self.margin)


def decide(found: Measure, rule: str, margin: float = 0.0) -> str:
    """Decide a claim by an interval.

    "above" holds where the whole interval is above 0, and does not hold where it is wholly below; "at least" holds
    where it does not reach below -margin, and does not hold where it is wholly below that. "below" and "at most" are
    the same with the signs changed. Everything else, and a figure without limits, is inconclusive.

    Raises:
        ValueError: another rule.
    """
    if rule not in ("above", "below", "at least", "at most"):
        raise ValueError(f"rule is {rule!r}: give above, below, at least or at most.")
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return UNKNOWN
    low, high = (found.low, found.high) if rule in ("above", "at least") else (-found.high, -found.low)
    if low > 0 if rule in ("above", "below") else low >= -margin:
        return HOLDS
    return FAILS if high < -margin else UNKNOWN


def together(verdicts: Sequence[str]) -> str:
    """Decide several claims together: all must hold; one that does not is enough."""
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else UNKNOWN


def all_claims(study: Study, scale: Scale) -> list[Claim]:
    """The claims about what was run."""
    found: list[Claim] = []
    if study.has("dpo", "leanpo"):
        found += _likelihood(study)
    if scale.noise and study.has("leanpo_plain", "leanpo"):
        found += _smoothing(study, scale)
    if study.has("dpo", "rrpo"):
        found += _regularised(study)
    if study.has("dpo_scenes", "lpoi_5"):
        found += _listwise(study)
    return found + _self_made(study)


def _likelihood(study: Study) -> list[Claim]:
    moved = "displacement/chosen"
    return [
        Claim("a", "under DPO the chosen response's log-prob falls", study.of("dpo", moved), "below", "nats"),
        Claim("a", "under DPO the rejected one's falls", study.of("dpo", "displacement/rejected"), "below", "nats"),
        Claim("a", "under LeanPO the chosen one's does not fall", study.of("leanpo", moved), "at least", "nats"),
        Claim(
            "a", "LeanPO's preference accuracy is at least DPO's",
            study.difference("leanpo", "dpo", "preference/accuracy"), "at least", margin=MARGIN,
        ),
    ]  # fmt: skip


def _smoothing(study: Study, scale: Scale) -> list[Claim]:
    """The paper's smoothing (0.1) against none."""
    wrong, claims = "captions/wrong", []
    plain, smoothed = list(SMOOTHED)[:2]
    claims.append(
        Claim(
            "b", "without label noise, smoothing does no harm: wrong captions",
            study.difference(smoothed, plain, wrong), "at most", margin=MARGIN,
        )
    )  # fmt: skip
    for noise in scale.noise:
        found = study.difference(noisy(smoothed, noise), noisy(plain, noise), wrong)
        claims.append(Claim("b", f"with {noise:.0%} flipped pairs, smoothing lowers wrong captions", found, "below"))
        found = study.difference(noisy(smoothed, noise), noisy(plain, noise), "preference/accuracy")
        claims.append(
            Claim("b", f"with {noise:.0%} flipped pairs, smoothing raises preference accuracy", found, "above")
        )
    return claims


def _regularised(study: Study) -> list[Claim]:
    less = lambda measure: study.difference("rrpo", "dpo", measure)  # noqa: E731
    return [
        Claim("c", "RRPO's gradient norm is below DPO's", less("grad_norm"), "below", ""),
        Claim("c", "RRPO's KL from the base is below DPO's", less("kl/chosen"), "below", "nats"),
        Claim("c", "RRPO hallucinates at most as often", less("captions/hallucinated"), "at most", margin=MARGIN),
        Claim("c", "RRPO gives at most as many wrong captions", less("captions/wrong"), "at most", margin=MARGIN),
        Claim(
            "c", "RRPO keeps at least as much of what was not trained", less("kept/right"), "at least", margin=MARGIN
        ),
    ]


def _listwise(study: Study) -> list[Claim]:
    against = lambda measure: study.difference("lpoi_5", "dpo_scenes", measure)  # noqa: E731
    claims = [
        Claim("d", "LPOI (N = 5) has a lower CHAIRs than DPO", against("chair/s"), "below"),
        Claim("d", "LPOI (N = 5) has a lower CHAIRi than DPO", against("chair/i"), "below"),
        Claim(
            "d",
            "its log-probs follow visibility more closely than DPO's (tau)",
            against("visibility/tau"),
            "above",
            "",
        ),
    ]
    if study.has("lpoi_2"):
        grown = study.difference("lpoi_5", "lpoi_2", "visibility/tau")
        claims.append(Claim("d", "and more closely with N = 5 than with N = 2 (tau)", grown, "above", ""))
    if study.has("lpoi_no_list"):
        found = study.difference("lpoi_5", "lpoi_no_list", "chair/s")
        claims.append(Claim("d", "the list itself lowers CHAIRs", found, "below"))
    return claims


def _self_made(study: Study) -> list[Claim]:
    claims = []
    for key, name in (("leanpo", "LeanPO"), ("rrpo", "RRPO"), ("lpoi_5", "LPOI")):
        made, again, wrong = f"{key}-made", f"{key}-made-again", "captions/wrong"
        if not study.has(key, made):
            continue
        found = study.difference(made, "base", wrong)
        claims.append(Claim("e", f"{name} on self-made data gives fewer wrong captions than the base", found, "below"))
        found = study.difference(made, key, wrong)
        claims.append(
            Claim("e", f"{name}: self-made data are as good as ground truth", found, "at most", margin=MARGIN)
        )
        if study.has(again):
            found = study.difference(again, made, wrong)
            claims.append(Claim("e", f"{name}: the second round gives fewer wrong captions", found, "below"))
    return claims
