"""Preference data as one HTML page that needs nothing else: no server, no network, no other file.

The rows lie in the page as JSON, sixteen to a block, their thumbnails in a block beside it; the script makes elements
of one page of rows at a time and parses only the thumbnails that it shows. Blocks are written as rows come, so neither
this process nor the page's script ever holds all pictures.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from trl_vpo.files import whole
from trl_vpo.media.video import usable_cores
from trl_vpo.report.view.data import Unreadable, read_examples, read_rejected, read_summary
from trl_vpo.report.view.row import IMAGE_FACTOR, Look, show_row

CHUNK = 16  # rows of a block
REJECTED_CHUNK = 500
FOLDER = Path(__file__).parent


@dataclass
class PageCounts:
    """What a page holds.

    Attributes:
        rows: rows shown; `limited` where the dataset has more.
        problem_rows: rows that break the contract, cannot be read, or have media that cannot.
        media: clips, images and image lists; `media_failures` of them cannot be shown.
        pictures: thumbnails.
        rejected: entries of `rejected.jsonl`.
        file_bytes: size of the page.
    """

    rows: int = 0
    problem_rows: int = 0
    media: int = 0
    media_failures: int = 0
    pictures: int = 0
    rejected: int = 0
    limited: bool = False
    file_bytes: int = 0

    def __str__(self) -> str:
        lines = [
            f"{self.rows} rows" + (" (the dataset has more)" if self.limited else ""),
            f"{self.problem_rows} with problems",
            f"{self.media} media"
            + (f", {self.media_failures} of which cannot be shown" if self.media_failures else ""),
            f"{self.pictures} pictures",
            *([f"{self.rejected} left out by the run"] if self.rejected else []),
            f"{self.file_bytes / 1e6:.1f} MB",
        ]
        return "; ".join(lines)


def write_page(
    dataset: str | Path,
    out: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    media_root: str | Path | None = None,
    num_frames: int = Look.num_frames,
    thumb_pixels: int = Look.thumb_pixels,
    num_images: int = Look.num_images,
    visual_prompt: bool = Look.visual_prompt,
    workers: int | None = None,
) -> PageCounts:
    """Write the page of a dataset, whole or not at all. The same data give the same bytes.

    Args:
        dataset: a generation run's folder (`rows.jsonl`, `rejected.jsonl`, `summary.json`), a Hub dataset, or a local
            file or folder as in training.
        out: the .html file; replaced if it exists.
        split, config: of a dataset with several.
        limit: show only the first so many rows.
        media_root, num_frames, thumb_pixels, num_images, visual_prompt: see `page_row.Look`.
        workers: threads that decode media; by default one per processor core that it may use, at
            most 8.

    Raises:
        DatasetError: the dataset or the split does not exist.
        ValueError: an option that makes no sense.
    """
    out = Path(out)
    _check_options(dataset, out, limit, num_frames, thumb_pixels, num_images)
    look = Look(media_root, num_frames, thumb_pixels, num_images, visual_prompt)
    examples = read_examples(dataset, split, config)
    counts = PageCounts()
    parts = _template().generate(
        name=str(dataset),
        split=split,
        look=look,
        image_factor=IMAGE_FACTOR,
        blocks=_blocks(dataset, examples, limit, look, workers or min(8, usable_cores()), counts),
        counts=lambda: _script_json(asdict(counts)),  # called behind the blocks
        **_assets(),
    )
    # Half a surrogate pair is in JSON, but in no UTF-8; backslashreplace writes JSON's own escape for it.
    with whole(out) as part, part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(parts)
    counts.file_bytes = out.stat().st_size
    return counts


def _check_options(dataset: str | Path, out: Path, limit: int | None, *sizes: int) -> None:
    for name, value, least in zip(
        ("limit", "num_frames", "thumb_pixels", "num_images"), (limit, *sizes), (1, 1, 64, 2)
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}: give a whole number of at least {least}.")
    if out.is_dir():
        raise ValueError(f"{out} is a folder: name the .html file to write.")
    if out.exists() and Path(dataset).exists() and out.samefile(dataset):
        raise ValueError(f"{out} is the dataset itself: name another file for the page.")


# --- the data in the page -----------------------------------------------------------------------------------------


def _blocks(
    dataset: str | Path,
    examples: Iterator[dict | Unreadable],
    limit: int | None,
    look: Look,
    workers: int,
    counts: PageCounts,
) -> Iterator[tuple[str, int, Any]]:
    """(kind, number, JSON) of each block: rows and their pictures, then what was rejected, then the summary."""
    from tqdm import tqdm

    bar = tqdm(islice(examples, limit), desc="Rows", unit="row", leave=False, disable=None)  # on a terminal only
    shown = _in_order(partial(_show, look=look), enumerate(bar), workers)
    for number, chunk in enumerate(_chunks(shown, CHUNK)):
        for record, urls in chunk:
            _count(record, urls, counts)
        yield "rows", number, _script_json([record for record, _ in chunk])
        pictures = {record["n"]: urls for record, urls in chunk if urls}
        if pictures:
            yield "pictures", number, _script_json(pictures)
    counts.limited = limit is not None and next(examples, None) is not None
    for number, chunk in enumerate(_chunks(read_rejected(dataset), REJECTED_CHUNK)):
        counts.rejected += len(chunk)
        yield "rejected", number, _script_json(chunk)
    summary = read_summary(dataset)
    if summary:
        yield "summary", 0, _script_json(summary)


def _show(item: tuple[int, dict | Unreadable], look: Look) -> tuple[dict, list[str]]:
    index, example = item
    if isinstance(example, Unreadable):
        problems = [example.reason]
        return {"n": index, "problems": problems, "notes": [], "columns": [], "more": [], "raw": example.text}, []
    return show_row(example, index, look)


def _count(record: dict, urls: list[str], counts: PageCounts) -> None:
    media = record.get("media", ())
    failures = sum("error" in group for group in media)
    counts.rows += 1
    counts.problem_rows += bool(record["problems"] or failures)
    counts.media += len(media)
    counts.media_failures += failures
    counts.pictures += len(urls)


def _in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """The results of a thread pool in the order of the items; few are ahead, since each holds pictures."""
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _chunks(items: Iterator, size: int) -> Iterator[list]:
    while chunk := list(islice(items, size)):
        yield chunk


def _script_json(value: Any) -> Any:
    """JSON for a <script> element. Without `<` nothing in it can end the element or begin a comment."""
    from markupsafe import Markup

    return Markup(json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


# --- the page around it -------------------------------------------------------------------------------------------


def _template():
    import jinja2

    loader = jinja2.FileSystemLoader(FOLDER)
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "page.html.j2"
    )


def _assets() -> dict[str, Any]:
    """The page's own style and script, and their hashes: its security policy lets nothing else in."""
    from markupsafe import Markup

    assets: dict[str, Any] = {}
    for name, files in (("css", ["page.css"]), ("js", ["page_elements.js", "page.js"])):
        text = "\n" + "\n".join((FOLDER / file).read_text(encoding="utf-8") for file in files)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assets |= {name: Markup(text), f"{name}_hash": f"sha256-{digest}"}
    return assets
