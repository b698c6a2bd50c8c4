"""The check of a dataset before the first step: every row as the collator will take it, every media file.

Each rank checks its share of the rows. Rows that passed are remembered (`trl_vpo.data.passed_rows`), so that a later
start only looks at whether row, files and settings are the same.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.blank import blank_clip, blank_encoder, blank_image
from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.columns import COLUMNS, ROW_INDEX, nearest_column
from trl_vpo.data.passed_rows import PassedRows
from trl_vpo.data.raw_rows import CHUNK, number_rows, number_stream, raw_rows
from trl_vpo.data.row_media import Sources
from trl_vpo.data.rows import Row, read_row
from trl_vpo.errors import MediaError, RowError, UserError
from trl_vpo.files import atomic_write
from trl_vpo.media.budget import PixelBudget, video_budget
from trl_vpo.media.corruptions import check_contrast, kept_frames
from trl_vpo.media.load import Media, check_video, frame_size, load_image, load_video
from trl_vpo.media.masking import check_box, check_span

SHOWN = 5


class Problem(NamedTuple):
    """A row that cannot be trained on, and the reason. Only media problems can be skipped."""

    index: int
    message: str
    media: bool = False


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    args: Any,
    *,
    name: str,
    processing_class: Any,
    phrases: bool,
    collator: PreferenceCollator | None = None,
) -> Dataset | IterableDataset:
    """Number the rows of a dataset and check them; leave out rows with bad media if `args.on_bad_media` is "skip".

    Of an `IterableDataset` only the first row is checked here; the others are when they are collated. All ranks call
    this. Without a `collator`, which encodes each row with blank media, lengths and what template and processor refuse
    go unchecked. Raises RowError, which names up to five rows and says how many there are.
    """
    encode = blank_encoder(collator) if collator is not None else None
    check = partial(check_row, args=args, processing_class=processing_class, encode=encode, phrases=phrases)
    if isinstance(dataset, IterableDataset):
        if args.on_bad_media == "skip":
            raise UserError("on_bad_media='skip' needs a dataset that can be read up front, not an IterableDataset.")
        dataset = number_stream(dataset, args)
        first = next(iter(dataset), None)
        if first is None:
            raise RowError(f"the {name} dataset has no rows.")
        _refuse([p for p in [check(first)] if p], 1, name)
        return dataset
    if len(dataset) == 0:
        raise RowError(f"the {name} dataset has no rows.")
    for column in dataset.column_names:  # the trainer would drop it
        meant = None if column in COLUMNS else nearest_column(column)
        if meant and dataset.data.column(column).null_count < len(dataset.data):
            raise RowError(
                f"the {name} dataset has a column `{column}`, which is not read. Did you mean `{meant}`? Rename it, "
                "or drop it."
            )
    dataset = number_rows(dataset, args)
    passed = PassedRows(args, collator) if collator is not None else None
    workers = args.dataset_num_proc or args.dataloader_num_workers
    problems = check_rows(dataset, check, f"Checking {name} rows", workers=workers, passed=passed)
    if args.on_bad_media == "skip":
        dataset = _skip(dataset, [p for p in problems if p.media], Path(args.output_dir), name)
        problems = [p for p in problems if not p.media]
    _refuse(problems, len(dataset), name)
    return dataset


def _refuse(problems: list[Problem], rows: int, name: str) -> None:
    if not problems:
        return
    lines = [f"{len(problems)} of {rows} {name} rows cannot be trained on:"]
    lines += [f"  - {problem.message}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    if any(problem.media for problem in problems):
        lines.append("on_bad_media: skip leaves rows with unreadable media out and lists them.")
    raise RowError("\n".join(lines))


def _skip(dataset: Dataset, problems: list[Problem], output_dir: Path, name: str) -> Dataset:
    """Return the dataset without the rows of `problems`, and list these in `skipped_rows.jsonl`. None are added."""
    if not problems:
        return dataset
    bad = {p.index for p in problems}
    if len(bad) == len(dataset):
        raise RowError(f"no row of the {name} dataset has readable media; the first: {problems[0].message}")
    if PartialState().is_main_process:
        path = output_dir / "skipped_rows.jsonl"
        # In the place of the lines that an earlier start wrote.
        others = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        lines = [line for line in others if json.loads(line)["dataset"] != name]
        lines += [json.dumps({"dataset": name, "row": p.index, "reason": p.message}) for p in problems]
        with atomic_write(path) as part:
            part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        print(f"Skipped {len(bad)} of {len(dataset)} {name} rows with unreadable media; see {path}.")
    return dataset.select([i for i in range(len(dataset)) if i not in bad])


def check_rows(
    dataset: Dataset,
    check: Callable[[dict], Problem | None],
    desc: str,
    *,
    workers: int = 0,
    passed: PassedRows | None = None,
) -> list[Problem]:
    """Return the problems of all rows, in their order. All ranks call this, each with `workers` processes."""
    state = PartialState()
    starts = list(range(0, len(dataset), CHUNK))[state.process_index :: state.num_processes]
    loader = DataLoader(
        starts,
        num_workers=min(workers, len(starts)),
        collate_fn=partial(_check_chunk, dataset, check, passed),
        generator=torch.Generator(),  # the global one stays as it is
    )
    problems: list[Problem] = []
    disable = None if state.is_main_process else True  # None: a bar on terminals only
    with tqdm(total=len(starts) * CHUNK, desc=desc, disable=disable, leave=False) as bar:
        for bad, good in loader:
            problems += bad
            if passed is not None:
                passed.add(good)
            bar.update(CHUNK)
    if state.num_processes > 1:
        problems = gather_object(problems)
    return sorted(problems, key=lambda problem: problem.index)


def _check_chunk(
    dataset: Dataset, check: Callable[[dict], Problem | None], passed: PassedRows | None, starts: list[int]
) -> tuple[list[Problem], list[str]]:
    """Return the problems of the rows from `starts[0]` on, and the keys of those that newly passed."""
    problems, good = [], []
    # No threads: workers that are forked later might wait for them.
    for row in raw_rows(dataset, starts[0], min(starts[0] + CHUNK, len(dataset))):
        key = passed.key(row) if passed is not None else None
        if key and key in passed:
            continue
        if problem := check(row):
            problems.append(problem)
        elif key:
            good.append(key)
    return problems, good


def check_row(
    example: dict,
    *,
    args: Any,
    processing_class: Any,
    phrases: bool,
    encode: Callable[[Row], Any] | None = None,
) -> Problem | None:
    """Return the first problem of a row, or None; `encode` encodes a row with blank media."""
    index = example[ROW_INDEX]
    try:
        how = {"media_form": args.media_form, "drawn": args.media_contrast is not None, "scores": args.scores}
        row = read_row(example, phrases=phrases, **how)
        if processing_class is not None:
            check_accepted(row, processing_class)
        try:
            blank = check_media(row, args, video_budget(processing_class, args.max_pixels))
        except (MediaError, RowError) as error:
            return Problem(index, f"{row.name}: {error}", media=isinstance(error, MediaError))
        if encode is not None and (blank is not row or not (row.images or row.videos)):
            encode(blank)
    except RowError as error:
        return Problem(index, str(error))
    return None


def check_media(row: Row, args: Any, budget: PixelBudget | None = None) -> Row:
    """Look at all media of a row. Return it with blank media of the same shapes; itself where nothing is looked at.

    Raises MediaError or, for a box, span or corruption that does not fit the media, RowError.
    """
    if args.check_media == "off":
        return row
    given = [_blank(row, sources, args, budget) for sources in row.media_list or [(row.images, row.videos)]]
    own = given[0]
    if row.critical_box is not None:
        size = own.images[0].size if row.images else frame_size(row.videos[0], media_root=args.media_root)
        check_box(row.critical_box, size)
        given *= args.num_images
    elif row.critical_span is not None:
        check_span(row.critical_span, own.videos[0])
        given *= args.num_images
    elif args.media_contrast is not None and row.media_list is None and (row.images or row.videos):
        check_contrast(own, args.media_contrast)
        given.append(kept_frames(own, args.media_contrast))
    listed = [(list(media.images), list(media.videos)) for media in given]
    blank = {"images": listed[0][0], "videos": listed[0][1], "media_list": listed if len(listed) > 1 else None}
    return replace(row, **blank, critical_box=None, critical_span=None)


def _blank(row: Row, sources: Sources, args: Any, budget: PixelBudget | None) -> Media:
    """Open images and videos, and return blank ones of the same shapes."""
    images, videos = sources
    root, options = args.media_root, args.video_options()
    decode = partial(load_video, cache=args.frame_cache) if args.check_media == "decode" else check_video
    budget = budget and budget.shared(len(videos))
    clips = [decode(source, options, budget=budget, media_root=root) for source in videos]
    boxed = row.critical_box is not None  # the box is in pixels of the image as it is stored
    how = {"max_pixels": None if boxed else args.max_pixels, "limit": args.max_pixels is None, "media_root": root}
    return Media(tuple(blank_image(load_image(s, **how).size) for s in images), tuple(map(blank_clip, clips)))
