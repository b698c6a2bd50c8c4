"""Short rows of each kind, for the proof of a model (see `trl_vpo.forward.proof`).

A kind is what media a row has. Model, processor and collator treat the rows of one kind alike, so one short row of it
shows what they do: a few small frames in the place of a film.
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from trl_vpo.data.messages import KINDS
from trl_vpo.data.raw_rows import CHUNK, raw_rows, transform_of
from trl_vpo.data.row_media import LISTS, own_sources
from trl_vpo.forward.proof import ProofRow

FRAMES, PIXELS = 4, 224 * 224  # at most, of a proof row


def kind_of(images: int, videos: int) -> str:
    """Return the kind of a row in words, by how many images and videos it has."""
    parts = {"an image": images == 1, "images": images > 1, "a video": videos == 1, "videos": videos > 1}
    return "rows with " + (" and ".join(part for part, has in parts.items() if has) or "text alone")


def kind_of_row(example: dict) -> str:
    """Return the kind of an example; the media that it is compared on are as many, and of the same kinds."""
    return kind_of(*map(len, own_sources(example)))


def first_of_kinds(dataset: Dataset, collator: Any) -> list[dict] | None:
    """Return the first row of each kind in a dataset; None if it transforms its rows, and only reading would tell."""
    if transform_of(dataset):
        return None
    names = [name for name in ("images", "image", "videos", "video", *LISTS) if name in dataset.column_names]
    first: dict[tuple, int] = {}
    if names:
        for start, batch in enumerate(dataset.select_columns(names).with_format("arrow").iter(CHUNK)):
            for i, key in enumerate(zip(*(_counts(batch.column(name), many=name not in KINDS) for name in names))):
                first.setdefault(key, start * CHUNK + i)
    return list(_by_kind(next(raw_rows(dataset, i, i + 1)) for i in first.values() or (0,)).values())


def _by_kind(examples: Iterable[dict]) -> dict[str, dict]:
    kinds: dict[str, dict] = {}
    for example in examples:
        kinds.setdefault(kind_of_row(example), example)
    return kinds


def _counts(column: pa.ChunkedArray, *, many: bool) -> list[int]:
    """Return how many media each row has in a column. Embedded ones are not read."""
    if many and isinstance(column.type, pa.BaseExtensionType):  # JSON text, where paths and dictionaries mix
        return [len(json.loads(text) or ()) if text else 0 for text in column.to_pylist()]
    listed = many and not pa.types.is_null(column.type)
    counts = pc.list_value_length(column) if listed else pc.cast(pc.is_valid(column), "int32")
    return pc.fill_null(counts, 0).to_pylist()


def proof_rows(collator: Any, examples: Iterable[dict]) -> list[ProofRow]:
    """Return a proof row of each kind in `examples` that the collator has not given before."""
    new = {kind: row for kind, row in _by_kind(examples).items() if kind not in collator.proven}
    collator.proven |= set(new)
    return [_proof_row(kind, example, collator) for kind, example in new.items()]


def _proof_row(kind: str, example: dict, collator: Any) -> ProofRow:
    short = replace(collator, max_length=None, phrases=False, scores=None)
    row = short.read(example)
    if collator.frame_cache is None:  # else a video is read as it lies there: its file may be gone
        video = replace(collator.video, num_frames=min(collator.video.num_frames or FRAMES, FRAMES), fps=None)
        short = replace(short, video=video, max_pixels=min(collator.max_pixels or PIXELS, PIXELS))
    tree = short.encode_row(row)
    trunk, (chosen, rejected, *_) = tree.trunks[0], tree.branches
    rejected = replace(rejected, trunk=0)
    inputs = short.whole(row)
    ids = inputs["input_ids"][0].tolist()
    if ids[: len(trunk.ids)] == trunk.ids and len(ids) > len(trunk.ids):
        chosen = replace(chosen, ids=ids[len(trunk.ids) :])
    else:  # tokens merge across the end of the prompt, where the collator keeps them apart
        inputs = None
    return ProofRow(kind, replace(tree, trunks=[trunk], branches=[chosen, rejected], ref_sums=None), inputs)
