"""What is known about a dataset before the first step: every row as the collator will take it, every media file.

Each rank checks its share of the rows. Rows that passed are remembered in the cache of `datasets` (see `PassedRows`),
so that a later start only looks at whether row, files and settings are the same.
"""

import hashlib
import json
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, Image, IterableDataset, List, Video
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_vpo.data.blank import blank_clip, blank_encoder, blank_image
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.columns import COLUMNS, REF_SUMS, ROW_INDEX, nearest_column
from trl_vpo.data.identity import cache_folder, processor_identity, source_identity, versions
from trl_vpo.data.rows import MEDIA, Row, check_accepted, read_row
from trl_vpo.errors import MediaError, RowError
from trl_vpo.files import atomic_write
from trl_vpo.media.load import Clip, check_video, load_image, load_video
from trl_vpo.media.masking import check_box

CHUNK = 128  # rows in memory at a time
SHOWN = 5
FORMAT = 1  # of the remembered rows; raise it with a change to what is checked
OWN = ("processing_class", "frame_cache")  # attributes of a collator that its settings are not told by


@dataclass
class Problem:
    """Why a row cannot be trained on. Only media problems can be skipped."""

    index: int
    message: str
    media: bool


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    args: Any,
    *,
    name: str,
    processing_class: Any,
    phrases: bool,
    image_list: bool,
    collator: PreferenceCollator | None = None,
) -> Dataset | IterableDataset:
    """Number the rows of a dataset and check them; leave out rows with bad media if `args.on_bad_media` is "skip".

    Of an `IterableDataset` only the first row is checked here; the others are when they are collated. All ranks call
    this. Values come as Python's, whatever format the dataset was given, and through its own transform.

    Args:
        collator: encodes each row, with blank media, as it will in training; without it lengths, the chat template
            and the processor's own refusals are not looked at.

    Raises:
        RowError: rows cannot be trained on. Names up to five of them and says how many there are.
    """
    encode = blank_encoder(collator) if collator is not None else None
    check = partial(
        check_row,
        args=args,
        processing_class=processing_class,
        phrases=phrases,
        image_list=image_list,
        encode=encode,
    )
    if isinstance(dataset, IterableDataset):
        if args.on_bad_media == "skip":
            raise ValueError("on_bad_media='skip' needs a dataset that can be read up front, not an IterableDataset.")
        dataset = undecoded(dataset.with_format(None), args).map(_number, with_indices=True)
        first = next(iter(dataset), None)
        if first is None:
            raise RowError(f"the {name} dataset has no rows.")
        _refuse([p for p in [check(first)] if p], 1, name)
        return dataset
    if len(dataset) == 0:
        raise RowError(f"the {name} dataset has no rows.")
    _check_columns(dataset, name)
    dataset = _numbered(dataset, args)
    passed = PassedRows(args, collator) if collator is not None else None
    workers = args.dataset_num_proc or args.dataloader_num_workers
    problems = check_rows(dataset, check, f"Checking {name} rows", workers=workers, passed=passed)
    if args.on_bad_media == "skip":
        skipped = [p for p in problems if p.media]
        problems = [p for p in problems if not p.media]
        dataset = _skip(dataset, skipped, Path(args.output_dir), name)
    _refuse(problems, len(dataset), name)
    return dataset


def _check_columns(dataset: Dataset, name: str) -> None:
    """Refuse a filled column whose name is nearly that of one that is read: the trainer would drop it."""
    for column in dataset.column_names:
        meant = None if column in COLUMNS else nearest_column(column)
        if meant and dataset.data.column(column).null_count < len(dataset.data):
            raise RowError(
                f"the {name} dataset has a column `{column}`, which is not read. Did you mean `{meant}`? Rename it, "
                "or drop it."
            )


def _numbered(dataset: Dataset, args: Any) -> Dataset:
    """With the rows' numbers and raw media; columns of these names that others made are dropped."""
    dataset = dataset.remove_columns([c for c in (ROW_INDEX, REF_SUMS) if c in dataset.column_names])
    transform = _transform(dataset)
    if transform and args.remove_unused_columns:  # as the trainer will
        dataset = dataset.select_columns([c for c in dataset.column_names if c in COLUMNS])
    columns = [*dataset.format["columns"], ROW_INDEX]
    dataset = dataset.add_column(ROW_INDEX, np.arange(len(dataset)))
    if transform:
        return dataset.with_transform(_Numbering(transform, args.remove_unused_columns), columns=columns)
    return undecoded(dataset.with_format(None, columns, dataset.format["output_all_columns"]), args)


def _transform(dataset: Dataset) -> Callable | None:
    """What `with_transform` or `set_transform` was given."""
    transform = dataset.format["format_kwargs"].get("transform") if dataset.format["type"] == "custom" else None
    return transform.transform if isinstance(transform, _Numbering) else transform


@dataclass
class _Numbering:
    """A dataset's own transform, whose rows keep their numbers."""

    transform: Callable
    columns_removed: bool

    def __call__(self, batch: dict) -> dict:
        numbers = batch.get(ROW_INDEX)
        try:
            made = self.transform({name: values for name, values in batch.items() if name != ROW_INDEX})
        except Exception as error:
            hint = "Set remove_unused_columns=False, where it needs others." if self.columns_removed else ""
            where = f"rows {numbers[0]} to {numbers[-1]}: " if numbers else ""
            raise RowError(
                f"{where}the dataset's own transform fails ({type(error).__name__}: {error}). It was given "
                f"{', '.join(f'`{name}`' for name in batch if name != ROW_INDEX)}. {hint}"
            ) from error
        return made | ({ROW_INDEX: numbers} if numbers else {})


# --- all rows -----------------------------------------------------------------------------------------------------


def check_rows(
    dataset: Dataset,
    check: Callable[[dict], Problem | None],
    desc: str,
    *,
    workers: int = 0,
    passed: "PassedRows | None" = None,
) -> list[Problem]:
    """The problems of all rows, in their order, with a progress bar on the first process. All ranks call this.

    Args:
        workers: processes, on each rank.
        passed: rows that are known to be good, and need no check.
    """
    state = PartialState()
    starts = list(range(0, len(dataset), CHUNK))[state.process_index :: state.num_processes]
    loader = DataLoader(
        _Chunks(dataset, starts, check, passed),
        batch_size=None,
        num_workers=min(workers, len(starts)),
        collate_fn=_unchanged,
        generator=torch.Generator(),  # the global one stays as it is
    )
    problems: list[Problem] = []
    quiet = not state.is_main_process
    bar = tqdm(
        total=len(starts) * CHUNK, desc=desc, disable=True if quiet else None, leave=False
    )  # None: on terminals
    with bar:
        for found, good in loader:
            problems += found
            if passed is not None:
                passed.add(good)
            bar.update(CHUNK)
    if state.num_processes > 1:
        problems = gather_object(problems)
    return sorted(problems, key=lambda problem: problem.index)


@dataclass
class _Chunks(torch.utils.data.Dataset):
    """Pieces of a dataset: for each its problems, and the keys of the rows that newly passed."""

    dataset: Dataset
    starts: list[int]
    check: Callable[[dict], Problem | None]
    passed: "PassedRows | None"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[list[Problem], list[str]]:
        start = self.starts[number]
        rows = raw_rows(self.dataset, start, min(start + CHUNK, len(self.dataset)))
        results = [self._look(row) for row in rows]  # no threads: workers that are forked later might wait for them
        return [p for p, _ in results if p], [key for p, key in results if key and not p]

    def _look(self, example: dict) -> tuple[Problem | None, str | None]:
        key = self.passed.key(example) if self.passed is not None else None
        if key and key in self.passed:
            return None, None
        return self.check(example), key


def _unchanged(value: Any) -> Any:
    return value


class PassedRows:
    """Rows that passed their check before: keys of what it depends on, in the cache of `datasets`.

    A folder for each set of settings; each process writes a file of its own, a line for each row, so that many may
    share it and an interrupted check goes on where it stopped. It may be deleted at any time.
    """

    def __init__(self, args: Any, collator: PreferenceCollator):
        self._root = collator.media_root
        settings = {name: repr(value) for name, value in vars(collator).items() if name not in OWN}
        libraries = [versions(), av.__version__, av.library_versions, PIL.__version__]
        pillow = [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES]
        parts = [FORMAT, args.check_media, type(collator).__qualname__, settings, libraries, pillow]
        self._folder = cache_folder() / "checks" / _hash([*parts, processor_identity(collator.processing_class)])
        self._known = {
            line
            for path in self._folder.glob("*.txt")
            for line in path.read_text(encoding="ascii", errors="replace").split("\n")
        }
        self._path = self._folder / f"{uuid.uuid4().hex}.txt"

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def key(self, example: dict) -> str | None:
        """Of the row's texts and media, or None for what cannot be recognised."""
        given = {name: value for name, value in example.items() if value is not None}
        texts = {k: v for k, v in given.items() if k not in (*MEDIA, "id", "source", ROW_INDEX)}
        try:
            return _hash([texts, {k: source_identity(given[k], self._root) for k in MEDIA if k in given}])
        except (MediaError, OSError, TypeError, ValueError):
            return None

    def add(self, keys: list[str]) -> None:
        if not keys:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.writelines(key + "\n" for key in keys)
        except OSError as error:
            warnings.warn(f"checked rows cannot be remembered in {self._folder} ({error}).", stacklevel=2)


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_shown).encode()).hexdigest()[:32]


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else repr(value)


# --- one row ------------------------------------------------------------------------------------------------------


def check_row(
    example: dict,
    *,
    args: Any,
    processing_class: Any,
    phrases: bool,
    image_list: bool,
    encode: Callable[[Row], Any] | None = None,
) -> Problem | None:
    """The first problem of a row, or None. `args` says how videos are sampled and how closely media are looked at.

    Without a `processing_class`, rows are not checked against what the model accepts; `encode` encodes a row with
    blank media.
    """
    index = example[ROW_INDEX]
    try:
        row = read_row(example, phrases=phrases, image_list=image_list)
        if processing_class is not None:
            check_accepted(row, processing_class)
    except RowError as error:
        return Problem(index, str(error), media=False)
    try:
        row = _check_media(row, args)
    except MediaError as error:
        return Problem(index, f"{row.name}: {error}", media=True)
    except RowError as error:
        return Problem(index, f"{row.name}: {error}", media=False)
    if encode is None or (args.check_media == "off" and (row.images or row.videos)):
        return None
    try:
        encode(row)
    except RowError as error:
        return Problem(index, str(error), media=False)
    return None


def _check_media(row: Row, args: Any) -> Row:
    """The row with blank media of the same shapes, once all were looked at."""
    if args.check_media == "off":
        return row
    root, options = args.media_root, args.video_options()
    clips: list[Clip] = []
    for source in row.videos:
        if args.check_media == "decode":
            clips.append(load_video(source, options, media_root=root, cache=args.frame_cache))
        else:
            clips.append(check_video(source, options, media_root=root))
    boxed = row.critical_box is not None  # the box is in pixels of the image as it is stored
    images = [
        blank_image(
            load_image(
                source,
                max_pixels=None if boxed else args.max_pixels,
                media_root=root,
                limit=args.max_pixels is None,
            ).size
        )
        for source in row.image_list or row.images
    ]
    if boxed:
        try:
            check_box(row.critical_box, images[0].size)
        except ValueError as error:
            raise RowError(str(error)) from error
    listed = images if row.image_list else None
    return replace(
        row, videos=list(map(blank_clip, clips)), images=images[:1] if listed else images, image_list=listed
    )


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
        path = output_dir / "skipped_rows.jsonl"
        _list_skipped(path, name, problems)
        print(f"Skipped {len(bad)} of {len(dataset)} {name} rows with unreadable media; see {path}.")
    return dataset.select([i for i in range(len(dataset)) if i not in bad])


def _list_skipped(path: Path, name: str, problems: list[Problem]) -> None:
    """Write the lines of a dataset, in the place of those that an earlier start wrote."""
    lines = [json.dumps({"dataset": name, "row": p.index, "reason": p.message}) for p in problems]
    others = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in others if not line.startswith(json.dumps({"dataset": name})[:-1] + ",")] + lines
    with atomic_write(path) as part:
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _number(example: dict, index: int) -> dict:
    return {**example, ROW_INDEX: index}


def raw_rows(dataset: Dataset, start: int = 0, stop: int | None = None) -> Iterator[dict]:
    """Rows whose media stay paths and bytes; of a dataset with a transform of its own, what that makes of them.

    Columns that hold media and are not read are left out. The others tell which layout a row has.
    """
    stop = len(dataset) if stop is None else stop
    if _transform(dataset):
        for index in range(start, stop):
            yield dataset[index]
        return
    holds = {column: _holds_media(feature) for column, feature in dataset.features.items()}
    media = [c for c, held in holds.items() if held and c in COLUMNS]
    table = dataset.select_columns(media).with_format("arrow") if media else None
    texts = dataset.select_columns([c for c, held in holds.items() if not held])
    for first in range(start, stop, CHUNK):
        last = min(first + CHUNK, stop)
        columns = texts[first:last] | (table[first:last].to_pydict() if table else {})
        for i in range(last - first):
            yield {name: values[i] for name, values in columns.items()}


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
