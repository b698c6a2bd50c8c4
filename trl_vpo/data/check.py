"""What is known about a dataset before the first step: every row against the contract, every media file opened."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Image, IterableDataset, List, Video
from tqdm.auto import tqdm

from trl_vpo.data.masking import check_box
from trl_vpo.data.media import MediaError, check_image, check_video, load_image, load_video
from trl_vpo.data.rows import COLUMNS, ROW_INDEX, Row, RowError, check_accepted, read_row

THREADS = 8  # opening files waits for disks more than for the processor
CHUNK = 16 * THREADS  # rows in memory at a time
SHOWN = 5


@dataclass
class Problem:
    """Why a row cannot be trained on. Only media problems can be skipped."""

    index: int
    message: str
    media: bool


def prepare_dataset(
    dataset: Dataset | IterableDataset, args: Any, *, name: str, processing_class: Any, phrases: bool, image_list: bool
) -> Dataset | IterableDataset:
    """Number the rows of a dataset and check them; leave out rows with bad media if `args.on_bad_media` is "skip".

    Of an `IterableDataset` only the first row is checked here; the others are when they are collated.

    Raises:
        RowError: rows cannot be trained on. Names up to five of them and says how many there are.
    """
    check = partial(check_row, args=args, processing_class=processing_class, phrases=phrases, image_list=image_list)
    if isinstance(dataset, IterableDataset):
        if args.on_bad_media == "skip":
            raise ValueError("on_bad_media='skip' needs a dataset that can be read up front, not an IterableDataset.")
        dataset = undecoded(dataset, args).map(_number, with_indices=True)
        first = next(iter(dataset), None)
        if first is None:
            raise RowError(f"the {name} dataset has no rows.")
        _refuse([p for p in [check(first)] if p], 1, name)
        return dataset
    if ROW_INDEX in dataset.column_names:
        return dataset
    if len(dataset) == 0:
        raise RowError(f"the {name} dataset has no rows.")
    dataset = undecoded(dataset.add_column(ROW_INDEX, np.arange(len(dataset))), args)
    problems = check_rows(dataset, check, desc=f"Checking {name} rows")
    if args.on_bad_media == "skip":
        skipped = [p for p in problems if p.media]
        problems = [p for p in problems if not p.media]
        dataset = _skip(dataset, skipped, Path(args.output_dir), name)
    _refuse(problems, len(dataset), name)
    return dataset


def check_rows(dataset: Dataset, check: Callable[[dict], Problem | None], desc: str) -> list[Problem]:
    """The problems of all rows, in their order, with a progress bar on the first process."""
    rows, problems = raw_rows(dataset), []
    quiet = not PartialState().is_main_process
    bar = tqdm(total=len(dataset), desc=desc, disable=True if quiet else None, leave=False)  # None: on terminals only
    with bar, ThreadPoolExecutor(THREADS) as pool:
        while chunk := list(islice(rows, CHUNK)):  # the pool would take in every row at once, with its media
            problems += [problem for problem in pool.map(check, chunk) if problem is not None]
            bar.update(len(chunk))
    return problems


def check_row(example: dict, *, args: Any, processing_class: Any, phrases: bool, image_list: bool) -> Problem | None:
    """The first problem of a row, or None. `args` says how videos are sampled and how closely media are looked at.

    Without a `processing_class`, rows are not checked against what the model accepts.
    """
    index = example[ROW_INDEX]
    try:
        row = read_row(example, phrases=phrases, image_list=image_list)
        if processing_class is not None:
            check_accepted(row, processing_class)
    except RowError as error:
        return Problem(index, str(error), media=False)
    try:
        _check_media(row, args)
    except MediaError as error:
        return Problem(index, f"{row.name}: {error}", media=True)
    except RowError as error:
        return Problem(index, f"{row.name}: {error}", media=False)
    return None


def _check_media(row: Row, args: Any) -> None:
    if args.check_media == "off":
        return
    root = args.media_root
    for source in row.videos:
        if args.check_media == "decode":
            load_video(source, args.video_options(), media_root=root, cache=args.frame_cache)
        else:
            check_video(source, args.video_options(), media_root=root)
    for source in row.image_list or row.images:
        check_image(source, max_pixels=args.max_pixels, media_root=root)
    if row.critical_box is not None:
        size = load_image(row.images[0], media_root=root, limit=args.max_pixels is None).size
        try:
            check_box(row.critical_box, size)
        except ValueError as error:
            raise RowError(str(error)) from error


def _refuse(problems: list[Problem], rows: int, name: str) -> None:
    if not problems:
        return
    shown = "\n".join(f"  - {p.message}" for p in problems[:SHOWN])
    more = f"\n  ... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    hint = ""
    if any(p.media for p in problems):
        hint = "\non_bad_media: skip leaves rows with unreadable media out and lists them."
    raise RowError(f"{len(problems)} of {rows} {name} rows cannot be trained on:\n{shown}{more}{hint}")


def _skip(dataset: Dataset, problems: list[Problem], output_dir: Path, name: str) -> Dataset:
    """The dataset without the rows of `problems`, which go into `skipped_rows.jsonl`. No row takes their place."""
    if not problems:
        return dataset
    bad = {p.index for p in problems}
    if len(bad) == len(dataset):
        raise RowError(f"no row of the {name} dataset has readable media; the first: {problems[0].message}")
    if PartialState().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / "skipped_rows.jsonl"
        with path.open("a", encoding="utf-8") as file:
            for p in problems:
                file.write(json.dumps({"dataset": name, "row": p.index, "reason": p.message}) + "\n")
        print(f"Skipped {len(bad)} of {len(dataset)} {name} rows with unreadable media; see {path}.")
    return dataset.select([i for i in range(len(dataset)) if i not in bad])


def _number(example: dict, index: int) -> dict:
    return {**example, ROW_INDEX: index}


def raw_rows(dataset: Dataset) -> Iterator[dict]:
    """Rows whose media stay paths and bytes. Only those columns are read raw: others may need their decoding."""
    columns = [c for c in dataset.column_names if c in (*COLUMNS, ROW_INDEX)]
    media = [c for c in columns if _holds_media(dataset.features[c])]
    table = dataset.select_columns(media).with_format("arrow") if media else None
    texts = dataset.select_columns([c for c in columns if c not in media])
    for index in range(len(dataset)):
        yield texts[index] | (table[index].to_pylist()[0] if table else {})


def _holds_media(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_media, feature.values()))
    return isinstance(feature, (Image, Video)) or (isinstance(feature, List) and _holds_media(feature.feature))


def undecoded(dataset: Dataset | IterableDataset, args: Any) -> Dataset | IterableDataset:
    """`datasets.Video` columns as {path, bytes}: we decode them (with PyAV, in the workers, sampled).

    `Image` columns too with `args.media_root`: `datasets` would take a relative path from the working directory.
    """
    kinds = (Video,) if args.media_root is None else (Video, Image)
    for column, feature in (dataset.features or {}).items():  # a stream may not know its features
        raw = _raw_media(feature, kinds)
        if raw is not feature:
            dataset = dataset.cast_column(column, raw)
    return dataset


def _raw_media(feature: Any, kinds: tuple[type, ...]) -> Any:
    if isinstance(feature, kinds):
        return replace(feature, decode=False)
    if isinstance(feature, List):
        inner = _raw_media(feature.feature, kinds)
        return feature if inner is feature.feature else List(inner, length=feature.length)
    return feature
