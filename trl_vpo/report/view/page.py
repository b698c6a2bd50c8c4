"""Preference data as one HTML page that needs no server, no network and no other file.

The rows lie in the page as JSON, sixteen to a block, and their thumbnails in a block beside it. The script builds one
page of rows at a time and parses only the thumbnails that it shows. Blocks are written as rows come, so neither this
process nor the page's script ever holds all pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trl_vpo.data.columns import another_layout
from trl_vpo.data.paths import check_output_file
from trl_vpo.data.rows import SIDES
from trl_vpo.errors import DatasetError, UserError
from trl_vpo.media.video import usable_cores
from trl_vpo.report.html import write_html
from trl_vpo.report.view.data import Unreadable, read_examples, read_rejected, read_summary
from trl_vpo.report.view.row import IMAGE_FACTOR, THUMB_PIXELS, Look, show_row

BLOCK = 16  # rows
REJECTED_BLOCK = 500
TEMPLATE = Path(__file__).parent / "page.html.j2"


@dataclass
class PageCounts:
    """The contents of a page, counted."""

    rows: int = 0
    problem_rows: int = 0  # break the contract, cannot be read, or have media that cannot
    media: int = 0  # clips, images and image lists
    media_failures: int = 0  # media that cannot be shown
    pictures: int = 0  # thumbnails
    rejected: int = 0  # entries of rejected.jsonl
    limited: bool = False  # the dataset has more rows
    file_bytes: int = 0

    def add(self, record: dict, urls: list[str]) -> None:
        media = record.get("media", ())
        failures = sum("error" in group for group in media)
        self.rows += 1
        self.problem_rows += bool(record["problems"] or failures)
        self.media += len(media)
        self.media_failures += failures
        self.pictures += len(urls)

    def __str__(self) -> str:
        failures = f", {self.media_failures} of which cannot be shown" if self.media_failures else ""
        limited = " (the dataset has more)" if self.limited else ""
        rejected = f"{self.rejected} left out by the run; " if self.rejected else ""
        return (
            f"{self.rows} rows{limited}; {self.problem_rows} with problems; {self.media} media{failures}; "
            f"{self.pictures} pictures; {rejected}{self.file_bytes / 1e6:.1f} MB"
        )


def write_page(
    dataset: str | Path, out: str | Path, *, split: str = "train", limit: int | None = None, **look: Any
) -> PageCounts:
    """Write the page of a dataset, whole or not at all, and count what is in it. The same data give the same bytes.

    The dataset is as `read_examples` takes it, `look` the fields of `Look`. Raises UserError.
    """
    out = Path(out)
    options = Look(**look)
    for name, value in (("limit", limit), ("num_frames", options.num_frames)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give a whole number of at least 1.")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out}: the page is HTML. Let its name end in .html or .htm.")
    check_output_file(out)
    examples = read_examples(dataset, split)
    counts = PageCounts()
    write_html(
        out,
        TEMPLATE,
        styles=["page.css"],
        scripts=["page_elements.js", "page.js"],
        name=str(dataset),
        split=split,
        look=options,
        thumb_pixels=THUMB_PIXELS,
        image_factor=IMAGE_FACTOR,
        blocks=_blocks(dataset, examples, limit, options, counts),
        counts=lambda: asdict(counts),  # called behind the blocks
    )
    counts.file_bytes = out.stat().st_size
    return counts


def _blocks(
    dataset: str | Path, examples: Iterator[dict | Unreadable], limit: int | None, look: Look, counts: PageCounts
) -> Iterator[tuple[str, int, Any]]:
    """Yield (kind, number, content) of each block: rows and their pictures, what was rejected, the summary.

    Raises DatasetError if no row is one of preference data.
    """
    from tqdm import tqdm

    layout, paired = "", False
    bar = tqdm(islice(examples, limit), desc="Rows", unit="row", leave=False, disable=None)  # on a terminal only
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        for number, batch in enumerate(_batched(enumerate(bar), BLOCK)):
            block = list(pool.map(lambda item: show_row(*item, look), batch))
            for (_, example), (record, urls) in zip(batch, block):
                counts.add(record, urls)
                if isinstance(example, dict):
                    layout = layout or another_layout(example)
                    paired = paired or any(example.get(side) is not None for side in SIDES)
            yield "rows", number, [record for record, _ in block]
            if pictures := {record["n"]: urls for record, urls in block if urls}:
                yield "pictures", number, pictures
    counts.limited = limit is not None and next(examples, None) is not None
    if layout and not paired:
        where = f"of its {'first ' if counts.limited else ''}{counts.rows} rows"
        raise DatasetError(f"{dataset} holds no preference data: {where}, none has `chosen` or `rejected`. {layout}")
    for number, block in enumerate(_batched(read_rejected(dataset), REJECTED_BLOCK)):
        counts.rejected += len(block)
        yield "rejected", number, block
    if summary := read_summary(dataset):
        yield "summary", 0, summary


def _batched(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch
