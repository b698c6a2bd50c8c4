"""The study's tables, in Markdown: figures with their intervals, runs down and measures across."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from studies.testbed.measures import Study
from studies.testbed.plan import MORE_SMOOTHING, SMOOTHED, VARIANTS, Scale, noisy
from trl_vpo.evaluate.measures import Measure

Column = tuple[str, str, str]  # heading, measure, unit
SHARE, NATS, PLAIN = "share", "nats", ""

CAPTIONS: list[Column] = [
    ("wrong captions", "captions/wrong", SHARE),
    ("hallucinated", "captions/hallucinated", SHARE),
    ("no sentence of the world", "captions/unparsed", SHARE),
]
ACCURACY: Column = ("preference accuracy", "preference/accuracy", SHARE)
KL: Column = ("KL from the base", "kl/chosen", NATS)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(found: Measure, unit: str, *, signed: bool = False) -> str:
    """`12.3 % [10.1, 14.5]`; shares and points times 100. Without limits the value alone."""
    if not math.isfinite(found.value):
        return "–"
    scale, digits = (100, 1) if unit in (SHARE, "points") else (1, 3 if unit == PLAIN else 2)
    show = lambda value: f"{scale * value:{'+' if signed else ''}.{digits}f}".replace("-", "−")  # noqa: E731
    text = show(found.value) + (" %" if unit == SHARE else "")
    if math.isfinite(found.low) and math.isfinite(found.high):
        text += f" [{show(found.low)}, {show(found.high)}]"
    return text


def bases(study: Study) -> str:
    """The base on both splits, and its further abilities."""
    columns = [
        ("wrong captions", "captions/wrong"),
        ("short questions", "questions/right"),
        ('yes/no, "yes" is right', "yes_no/basic"),
        ('"no" is right', "yes_no/hallucinated"),
    ]
    rows = []
    for kind in study.bases:
        for part in ("biased", "balanced"):
            cells = []
            for _, measure in columns:
                name = f"biased/{measure}" if part == "biased" else measure
                known = name in study.bases[kind]
                cells.append(number(study.base(kind, name), SHARE) if known else "")
            rows.append([f"{kind}s, {part}", *cells])
    return markdown(["base on", *(head for head, _ in columns)], rows)


def table(study: Study, runs: Sequence[tuple[str, str]], columns: Sequence[Column], kind: str | None = None) -> str:
    """Measures of runs (label, run); the base of a kind of samples in front."""
    rows = []
    if kind is not None:
        own = study.bases[kind]
        cells = [number(study.base(kind, name), unit) if name in own else "" for _, name, unit in columns]
        rows.append(["base", *cells])
    for label, run in runs:
        known = study.runs[run][0]
        rows.append(
            [label, *(number(study.of(run, name), unit) if name in known else "" for _, name, unit in columns)]
        )
    return markdown(["", *(head for head, *_ in columns)], rows)


def _runs(study: Study, kind: str) -> list[tuple[str, str]]:
    return [(v.name, key) for key, v in VARIANTS.items() if v.kind == kind and study.has(key)]


# --- the questions ------------------------------------------------------------------------------------------------


def likelihood(study: Study, scale: Scale) -> list[str]:
    columns: list[Column] = [
        ("Δ log-prob, chosen", "displacement/chosen", NATS),
        ("Δ log-prob, rejected", "displacement/rejected", NATS),
        ("pairs where both fell", "displacement/both_fall", SHARE),
        ACCURACY,
        ("the same per token", "preference/accuracy_average", SHARE),
        CAPTIONS[0],
    ]
    ranked: list[Column] = [
        ("Δ chosen, pairs that the base ranked rightly", "displacement/chosen_base_right", NATS),
        ("wrongly", "displacement/chosen_base_wrong", NATS),
    ]
    runs = _runs(study, "clip")
    return [
        "Δ: after training minus before, balanced test clips.",
        table(study, runs, columns, "clip"),
        "Where the chosen response's log-prob went, by what the base made of the pair:",
        table(study, [(label, run) for label, run in runs if run in ("sft", "dpo", "simpo", "leanpo")], ranked),
    ]


def smoothing(study: Study, scale: Scale) -> list[str]:
    columns: list[Column] = [CAPTIONS[0], ACCURACY, ("Δ log-prob, chosen", "displacement/chosen", NATS), KL]
    columns.append(("training pairs smoothed", "smoothed", SHARE))
    runs = []
    for noise in (0.0, *scale.noise):
        for key, weight in SMOOTHED.items():
            label = f"{noise:.0%} flipped, smoothing {weight:g}"
            runs.append((label, noisy(key, noise)))
    text = (
        "Flipped: chosen and rejected responses of so many training pairs changed places. All at LeanPO's and SimPO's "
        f"settings but for the smoothing; {MORE_SMOOTHING.options['label_smoothing']:g} has 0.1's learning rate. "
        "Smoothing acts on pairs that the policy ranks wrongly at that moment, true or flipped."
    )
    return [text, table(study, [(label, run) for label, run in runs if study.has(run)], columns)]


def regularised(study: Study, scale: Scale) -> list[str]:
    runs = _runs(study, "clip")
    first: list[Column] = [("gradient norm", "grad_norm", PLAIN), KL, *CAPTIONS]
    kept: list[Column] = [
        ("kept, all", "kept/right", SHARE),
        ("short questions", "questions/right", SHARE),
        ('"yes" is right', "yes_no/basic", SHARE),
        ('"no" is right', "yes_no/hallucinated", SHARE),
        ("captions of scenes", "other/right", SHARE),
        ("KL on those", "other/kl/chosen", NATS),
        ("biased clips, wrong captions", "biased/captions/wrong", SHARE),
    ]
    return [
        table(study, runs, first, "clip"),
        "What is left of abilities that were not trained:",
        table(study, runs, kept, "clip"),
    ]


def listwise(study: Study, scale: Scale) -> list[str]:
    runs = _runs(study, "scene")
    first: list[Column] = [
        ("CHAIRs", "chair/s", SHARE),
        ("CHAIRi", "chair/i", SHARE),
        ("Cover", "chair/cover", SHARE),
        CAPTIONS[2],
        ACCURACY,
    ]
    second: list[Column] = [
        ("visibility, tau", "visibility/tau", PLAIN),
        ("lists in order", "visibility/ordered", SHARE),
        KL,
        ("kept, all", "kept/right", SHARE),
        ("biased scenes, wrong captions", "biased/captions/wrong", SHARE),
        ("gradient norm", "grad_norm", PLAIN),
    ]
    text = (
        "Scenes. An object is a colour and a shape, so a red square where there is a green one is hallucinated. "
        "Visibility: whether the log-prob of the true caption falls as its critical object is hidden in four steps "
        "(Kendall's tau, 1: always)."
    )
    return [text, table(study, runs, first, "scene"), table(study, runs, second, "scene")]


def self_made(study: Study, scale: Scale) -> list[str]:
    columns: list[Column] = [*CAPTIONS, ACCURACY, KL]
    lines = [
        "Self-made: the base makes the pairs by the method's pipeline (`recipes/quickstart/*-generate.yaml`) from the "
        "same clips or scenes and their annotations; RRPO's makes pairs of questions, too, LPOI's pairs are given and "
        "get their boxes. Second round: the adapter of the first makes pairs from further clips, and a fresh adapter "
        "is trained on them, for as many steps."
    ]
    for kind, keys in (("clip", ("leanpo", "rrpo")), ("scene", ("lpoi_5",))):
        runs = []
        for key in keys:
            name = VARIANTS[key].name
            labels = {key: "ground truth", f"{key}-made": "self-made", f"{key}-made-again": "second round"}
            runs += [(f"{name}, {label}", run) for run, label in labels.items() if study.has(run)]
        if runs:
            lines.append(table(study, runs, columns, kind))
    return [*lines, _generated(study)]


def _generated(study: Study) -> str:
    """The pipelines' own figures about their rows: means over the seeds."""
    names = {"chosen_right": "chosen is right", "rejected_right": "rejected is right", "plain_right": "plain answers"}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    rows = []
    for run, made in study.generated.items():
        found = [one["figures"] for one in made]
        known = [[one[key] for one in found if one.get(key) is not None] for key in names]
        shares = [f"{100 * mean(values):.1f} %" if values else "" for values in known]
        count, total = mean([one["rows"] for one in made]), mean([one["inputs"] for one in made])
        label = f"{VARIANTS[run.split('-')[0]].name}, {'second round' if run.endswith('again') else 'self-made'}"
        rows.append([label, f"{count:.0f} of {total:.0f}", *shares])
    return markdown(["data", "rows made of inputs", *names.values()], rows)


TABLES: dict[str, Callable[[Study, Scale], list[str]]] = {
    "a": likelihood,
    "b": smoothing,
    "c": regularised,
    "d": listwise,
    "e": self_made,
}
