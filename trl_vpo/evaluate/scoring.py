"""The model side of log-prob measures: what is scored for a row, with which media, and the numbers that come of it.

A row becomes probes: a prompt with its media and the responses behind it. A preference row has one with both
responses, one with the chosen response for each kind of damaged media, and one for each image of its list. Whoever
runs them (`contestants` on the command line, `callback` in training) gives two functions, `encode` and `score`, or
`answer` for probes without responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.data.chat import SeamError
from trl_vpo.data.inputs import InputRow
from trl_vpo.data.rows import Row
from trl_vpo.errors import InputError, MediaError, RowError
from trl_vpo.forward.tree import Tree
from trl_vpo.media.corruptions import PerturbSettings, perturb
from trl_vpo.media.images import load_image
from trl_vpo.media.load import Media
from trl_vpo.media.masking import masked_image_list
from trl_vpo.models.requests import stream_seed

PAIR = "pair"  # the probe of both responses; the one whose KL is wanted


@dataclass(frozen=True)
class Probe:
    """A prompt with its media, and the attributes of `row` that hold responses; without any: the model answers.

    An `optional` one is left out where the chat template has no place for a response.
    """

    name: str
    row: Row
    sides: tuple[str, ...] = ()
    optional: bool = False


@dataclass(frozen=True)
class Scored:
    """A response under one model: summed log-prob and KL(base || model), nats, and the tokens summed over."""

    logp: float
    tokens: int
    kl: float = 0.0


Found = dict[str, dict[str, Any]]  # contestant -> probe -> list[Scored], or the answer


def run_probes(
    rows: Sequence[Sequence[Probe]],
    encode: Callable[[Row, tuple[str, ...]], Tree],
    score: Callable[[list[Tree], bool], dict[str, list[list[Scored]]]],
    answer: Callable[[list[Tree]], dict[str, list]] | None = None,
) -> list[Found | RowError]:
    """All probes of a batch of rows, those of one name together: their prompts are alike, and so are their lengths.

    Args:
        rows: the probes of each row.
        encode: a row with some of its responses as a tree. Raises RowError for a row that cannot be used.
        score: trees, and whether the KL is wanted -> contestant -> for each tree its branches' scores.
        answer: trees without branches -> contestant -> an answer for each.

    Returns:
        for each row what was found, or why it cannot be used.
    """
    results: list[Found | RowError] = [{} for _ in rows]
    for name in dict.fromkeys(probe.name for probes in rows for probe in probes):
        trees, owners, scored = [], [], True
        for place, probes in enumerate(rows):
            for probe in probes:
                if probe.name != name or isinstance(results[place], RowError):
                    continue
                try:
                    trees.append(encode(probe.row, probe.sides))
                except RowError as error:
                    if not (probe.optional and isinstance(error.__cause__, SeamError)):
                        results[place] = error
                    continue
                owners.append(place)
                scored = bool(probe.sides)
        if not trees:
            continue
        for contestant, values in (score(trees, name == PAIR) if scored else answer(trees)).items():
            for place, value in zip(owners, values, strict=True):
                results[place].setdefault(contestant, {})[name] = value
    return results


# --- preference rows ----------------------------------------------------------------------------------------------


def preference_probes(
    row: Row,
    media: Media,
    *,
    seed: int,
    damages: Sequence[str],
    images: Sequence[Image.Image] = (),
    answered: bool = False,
) -> list[Probe]:
    """The probes of a preference row.

    Args:
        row: as it was read; its media are taken from `media`.
        seed: of the row, for masks and shuffling; see `row_seed`.
        damages: kinds of damaged media, of `config.DAMAGES`. What cannot be damaged so is left out.
        images: its image list, most visible first.
        answered: also let the model answer the prompt.
    """
    row = _with_media(row, media)
    probes = [Probe(PAIR, row, ("chosen", "rejected"))]
    for kind in damages:
        changed = damaged(media, kind, seed)
        if changed is not None:
            probes.append(Probe(kind, _with_media(row, changed), ("chosen",)))
    for place, image in enumerate(images):
        probes.append(Probe(f"image {place}", replace(row, images=[image]), ("chosen",)))
    return [*probes, Probe("answer", row)] if answered else probes


def preference_numbers(found: dict[str, Any]) -> dict[str, Any]:
    """What `rows.jsonl` holds of a preference row under one model, from its probes' scores."""
    chosen, rejected = found[PAIR]
    numbers = {
        "chosen_logp": chosen.logp,
        "rejected_logp": rejected.logp,
        "chosen_tokens": chosen.tokens,
        "rejected_tokens": rejected.tokens,
        "chosen_kl": chosen.kl,
    }
    images = [found[name][0].logp for name in found if name.startswith("image ")]
    damaged_logps = {
        name: found[name][0].logp for name in found if name not in (PAIR, "answer") and not name.startswith("image ")
    }
    return numbers | {"damaged_logps": damaged_logps or None, "image_logps": images or None}


def _with_media(row: Row, media: Media) -> Row:
    return replace(row, images=list(media.images), videos=list(media.videos))


def row_seed(seed: int, row_id: str) -> int:
    """The seed of a row's damages: the same for every contestant, batch and worker."""
    return stream_seed(seed, row_id, "sensitivity")


def damaged(media: Media, kind: str, seed: int) -> Media | None:
    """Damaged copies of all media; sizes, frame counts and timestamps stay. None: they cannot be damaged so.

    shuffled: the frames of every clip change places over its whole length, none stays (RRPO's global shuffling).
    Images, single frames and clips that stand still cannot be. masked: a light grey square over 25-50 % of each image
    and clip (RRPO's mask). blank: black.

    Raises:
        ValueError: another kind.
    """
    if not media.images and not media.videos:
        return None
    if kind == "blank":
        images = tuple(Image.new("RGB", image.size) for image in media.images)
        return Media(images, tuple(replace(clip, frames=np.zeros_like(clip.frames)) for clip in media.videos))
    modes = {"shuffled": "global", "masked": "mask"}
    if kind not in modes:
        raise ValueError(f"media cannot be {kind!r}: one of shuffled, masked, blank.")
    try:
        return perturb(media, seed, PerturbSettings(mode=modes[kind]))
    except InputError:  # only of shuffling: nothing moves
        return None


def with_first_image(row: Row, media: Media, media_root: str | None) -> Media:
    """The media of a row; one that has only an `image_list` is asked about the first of it. Raises RowError."""
    if row.image_list is None or media.images:
        return media
    try:
        return replace(media, images=(load_image(row.image_list[0], media_root=media_root, limit=False),))
    except MediaError as error:
        raise RowError(f"{row.name}: {error}") from error


def image_list(
    row: Row, input_row: InputRow, *, num_images: int, visual_prompt: bool, media_root: str | None
) -> list[Image.Image]:
    """The images of a row's list, the one with the whole object first, as LPOI trains on them; empty without one.

    Raises:
        RowError: an image cannot be read, or the box does not lie in it; names the row.
    """
    try:
        if row.image_list is not None:
            return [load_image(source, media_root=media_root, limit=False) for source in row.image_list]
        if row.critical_box is None:
            return []
        image = load_image(input_row.images[0], limit=False)  # as stored: the box is in its pixels
        return masked_image_list(image, row.critical_box, num_images, visual_prompt=visual_prompt)
    except (MediaError, ValueError) as error:
        raise RowError(f"{row.name}: {error}") from error
