"""Names of columns: those that are read, those that were probably meant, and the layouts of other projects."""

import re
from difflib import get_close_matches
from functools import lru_cache

from trl_vpo.data.import_formats import FORMATS

NUMBERS = ("weight", "chosen_score", "rejected_score", "chosen_trust", "rejected_trust")
COLUMNS = (
    "prompt", "chosen", "rejected", "videos", "video", "images", "image", "chosen_phrases", "rejected_phrases",
    "critical_box", "critical_span", "image_list", "video_list", "rejected_images", "rejected_videos", "other_images",
    "other_videos", "other_chosen", *NUMBERS,
    "id", "source", "tools", "chat_template_kwargs",
)  # fmt: skip
ROW_INDEX = "_row_index"  # added by the trainer, so that a message can name a row that has no id
REF_SUMS = "_ref_sums"  # added by the trainer: precomputed reference log-probs, one for each branch of the row
ASKING = ("question", "instruction", "query", "input", "problem", "conversations", "conversation", "messages")


def misspelt(example: dict) -> dict[str, str]:
    """Return the filled columns whose names nearly are those of columns that are read, with the names meant."""
    unread = [name for name, value in example.items() if value is not None and name not in COLUMNS]
    return {name: meant for name in unread if (meant := nearest_column(name))}


@lru_cache(maxsize=1000)
def nearest_column(name: str, meant: tuple[str, ...] = COLUMNS) -> str | None:
    """Return the column that a name is a slip of the pen of: other capitals, number or joints, or a letter or two."""
    plain = _plain(name)
    # Of `videos` and `video` the first; `id` and `source` only label.
    columns = {_plain(column): column for column in reversed(meant) if column not in ("id", "source")}
    close = get_close_matches(plain, columns, n=1, cutoff=0.8)
    if close == ["weight"] and plain != "weight":  # images have a height
        return None
    return columns[close[0]] if close and abs(len(close[0]) - len(plain)) <= 1 else None


def another_layout(example: dict) -> str:
    """Say what to do with a row that lacks the columns of the contract: which are not read, and who reads them."""
    filled = {name for name, value in example.items() if value is not None}
    unread = sorted(filled - {*COLUMNS, ROW_INDEX, REF_SUMS})
    unpaired = not filled & {"chosen", "rejected"}
    kinds = ("pairs", "questions", "held-out rows") if unpaired else ("pairs",)
    layouts = [(name, layout) for name, layout in FORMATS.items() if layout.makes in kinds]
    marked = {marks: name for name, layout in layouts for marks in layout.marks if marks <= filled}
    known = marked[max(marked, key=len)] if marked else None  # the marks of one may be among another's
    makes = FORMATS[known].makes if known else None
    question = "It looks like a question with its answer, and no pair: `trl-vpo generate` makes pairs of"
    if {"contestant", "task"} <= filled:
        remedy = "It is a result of `trl-vpo evaluate`, and no row: results.json beside it holds the measures."
    elif {"task", "question"} <= filled:
        remedy = "It looks like a held-out row: `trl-vpo evaluate --data FILE` measures a model on it."
    elif makes == "questions":
        remedy = f"{question} rows with `question` and `answer`, which `trl-vpo import {known} IN OUT` writes."
    elif known:
        rows = "rows for `trl-vpo evaluate`" if makes == "held-out rows" else "the rows that are read here"
        remedy = f"It looks like {known}'s layout: `trl-vpo import {known} IN OUT` writes {rows}."
    elif unpaired and {"question", "answer"} <= filled:
        remedy = f"{question} such rows."
    else:
        remedy = (
            "Rename columns, or write rows with `prompt` (what is asked), `chosen` (the better response), `rejected` "
            "(the worse one), and `images` or `videos` (lists of paths)."
        )
    return (f"The columns {', '.join(f'`{name}`' for name in unread)} are not read. " if unread else "") + remedy


def _plain(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    return "".join(re.sub(r"(?<=x)es$|(?<=eo)es$|s$", "", word) for word in re.split(r"[\W_]+", words))
