"""The critical object's box: known boxes are read and matched with what the text names, and one is chosen.

Boxes are (x0, y0, x1, y1) in whole pixels of the upright image, x1 and y1 exclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trl_vpo.data.rows import drop_none
from trl_vpo.errors import InputError
from trl_vpo.generate.objects.nouns import Candidate
from trl_vpo.text.inflection import singular

Box = tuple[int, int, int, int]
SAME_INSTANCE = 0.5  # boxes of one label that overlap more (intersection over union) show one instance
SLACK = 0.02  # of the image's side: how far an annotated box may reach out of the image before it is refused
# Names in texts -> other names for the same thing in annotations.
_PEOPLE = "man woman boy girl child kid lady guy baby player skier surfer rider pedestrian"
OTHER_NAMES = {
    **dict.fromkeys(_PEOPLE.split(), "person"), "puppy": "dog", "kitten": "cat", "bike": "bicycle", "bicycle": "bike",
    "motorbike": "motorcycle", "motorcycle": "motorbike", "plane": "airplane", "airplane": "plane", "jet": "airplane",
    "sofa": "couch", "couch": "sofa", "tv": "television", "television": "tv", "phone": "cell phone",
    "cellphone": "cell phone", "smartphone": "cell phone", "fridge": "refrigerator", "refrigerator": "fridge",
}  # fmt: skip


@dataclass(frozen=True)
class Detection:
    """A box with its label; score from 0 to 1, None for an annotation."""

    label: str
    box: Box
    score: float | None = None


@dataclass(frozen=True)
class Choice:
    label: str
    box: Box
    score: float | None
    where: str  # the part of the row that names it, or "any"
    instances: int  # separate boxes of its label; if only the best is hidden, the others stay visible


def choices(
    detections: Sequence[Detection], candidates: Sequence[Candidate], size: tuple[int, int], config: Any
) -> list[Choice]:
    """Return the critical object, followed by those to try next: candidates with a usable detection, in their order.

    If no candidate has one: any other label, that with the best score (of annotations, the largest box) first. A
    detection is usable if its score and its share of the image are within the settings.
    """
    by_label: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=_rank, reverse=True):
        scores_enough = detection.score is None or detection.score >= (config.box_threshold or 0)
        if scores_enough and _fits(detection, size, config):
            by_label.setdefault(detection.label, []).append(detection)
    named = [_choice(by_label.pop(c.text), c.where, config) for c in candidates if c.text in by_label]
    others = [_choice(usable, "any", config) for usable in by_label.values()]
    named, others = ([choice for choice in some if _fits(choice, size, config)] for some in (named, others))
    return named or sorted(others, key=_rank, reverse=True)


def _choice(usable: Sequence[Detection], where: str, config: Any) -> Choice:
    """Choose among detections of one label, the best first."""
    instances: list[Detection] = []
    for detection in usable:
        if all(_overlap(detection.box, other.box) <= SAME_INSTANCE for other in instances):
            instances.append(detection)
    best = instances[0]
    x0, y0, x1, y1 = zip(*(detection.box for detection in instances))
    box = (min(x0), min(y0), max(x1), max(y1)) if config.instances == "union" else best.box
    return Choice(best.label, box, best.score, where, len(instances))


def _rank(item: Detection | Choice) -> tuple:
    """Sort by score, then by area; the box itself decides what would be a tie."""
    return item.score or 0, _area(item.box), item.box


def _fits(item: Detection | Choice, size: tuple[int, int], config: Any) -> bool:
    share = area_share(item.box, size)
    return share > 0 and config.min_box_area <= share <= config.max_box_area


def area_share(box: Sequence[float], size: tuple[int, int]) -> float:
    """Return the share of the image that a box covers."""
    return _area(box) / (size[0] * size[1])


def clip_box(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Return the whole pixels that a box touches, inside of the image. A box outside of it comes back empty."""
    x0, y0 = (min(max(0, math.floor(v)), side) for v, side in zip(box[:2], size))
    x1, y1 = (min(max(0, math.ceil(v)), side) for v, side in zip(box[2:], size))
    return x0, y0, max(x0, x1), max(y0, y1)


def _area(box: Sequence[float]) -> float:
    return max(0, box[2] - box[0]) * max(0, box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes that are not empty."""
    inside = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return inside / (_area(a) + _area(b) - inside)


# --- known boxes ------------------------------------------------------------------------------------------------


def annotated(objects: Any, size: tuple[int, int], categories: Sequence[str] | None = None) -> list[Detection]:
    """Read the boxes of a row's annotation column. A list of these, or a dict with a list for each key:

    - {"label", "box": [x0, y0, x1, y1]}: ours.
    - {"category": name or number, "bbox": [x, y, w, h]}: COCO. A number is a place in `categories`, counted from 0.
    - {"names": [...], "x", "y", "w", "h"}: Visual Genome; a box with several names counts under each.

    `size` is the image's (width, height). What is none of these, or does not fit the image, is an InputError.
    """
    detections = []
    for at, item in enumerate(_items(objects)):
        names, corners = _read_item(drop_none(item), at, categories or ())
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise InputError(f"annotation {at} is called {names}: every box needs a name.")
        x0, y0, x1, y1 = corners
        if x1 < x0 or y1 < y0:
            raise InputError(f"annotation {at} has the corners {corners}: they are inverted.")
        slack = [max(2, SLACK * side) for side in size]
        if min(x0 + slack[0], y0 + slack[1], size[0] + slack[0] - x1, size[1] + slack[1] - y1) < 0:
            raise InputError(
                f"annotation {at} has the corners {corners} in an image of {size[0]}x{size[1]} pixels: it was "
                "measured on another size, or is in another form than its key says."
            )
        detections += [Detection(_normal(name), clip_box(corners, size)) for name in dict.fromkeys(names)]
    return detections


def match(detections: Sequence[Detection], candidates: Sequence[Candidate]) -> list[Detection]:
    """Return annotated boxes under the texts of the candidates that mean them; the others keep their label.

    A label means a candidate if they are equal up to case, plural and article. If no label does: if one is the end
    of the other ("dog" and "brown dog"), or the label is another name for the candidate's head ("person" for "young
    man").
    """
    matched, used = [], set()
    for candidate in candidates:
        text = _normal(candidate.text)
        matches = [at for at, d in enumerate(detections) if d.label == text]
        matches = matches or [at for at, d in enumerate(detections) if _means(d.label, text)]
        matched += [replace(detections[at], label=candidate.text) for at in matches]
        used.update(matches)
    return matched + [detection for at, detection in enumerate(detections) if at not in used]


def _means(label: str, text: str) -> bool:
    within = f" {text}".endswith(f" {label}") or f" {label}".endswith(f" {text}")
    return bool(label and text) and (within or label == OTHER_NAMES.get(text.split()[-1]))


def _normal(name: str) -> str:
    words = name.lower().replace("_", " ").split()
    words = words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words
    last = ["glass" if word == "glasses" else singular(word) for word in words[-1:]]
    return " ".join(words[:-1] + last)


def _items(objects: Any) -> list[dict]:
    if isinstance(objects, dict):
        columns = {key: value for key, value in objects.items() if isinstance(value, (list, tuple))}
        if len({len(value) for value in columns.values()}) > 1:
            raise InputError("the annotations have lists of different lengths: give a value for every box.")
        objects = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if not isinstance(objects, (list, tuple)) or not all(isinstance(item, dict) for item in objects):
        raise InputError(f"the annotations are {str(objects)[:80]!r}, not a list of boxes with names.")
    return list(objects)


def _read_item(item: dict, at: int, categories: Sequence[str]) -> tuple[list[Any], list[float]]:
    """Return names and corners [x0, y0, x1, y1]."""
    names, box = [item.get("label")], item.get("box")
    if box is None and "bbox" in item:
        name, box = item.get("category"), item["bbox"]
        if isinstance(name, int):
            if not 0 <= name < len(categories):
                names = f"`categories` has {len(categories)} names: give those of all categories, in order"
                raise InputError(f"annotation {at} has the category number {name}, and {names}.")
            name = categories[name]
        names = [name]
    elif box is None and {"x", "y", "w", "h"} <= set(item):
        names, box = item.get("names") or [item.get("name")], [item[key] for key in "xywh"]
    elif box is None:
        raise InputError(f"annotation {at} has the keys {sorted(item)}: give `box`, `bbox`, or `x`, `y`, `w` and `h`.")
    finite = [isinstance(v, (int, float)) and math.isfinite(v) for v in box] if isinstance(box, (list, tuple)) else []
    if finite != [True] * 4:
        raise InputError(f"annotation {at} has the box {box!r}: it needs four finite numbers.")
    x, y, *rest = box
    return names, [x, y, *rest] if "box" in item else [x, y, x + rest[0], y + rest[1]]
