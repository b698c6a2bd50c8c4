"""Names of columns: those that are read, those that were probably meant, and the layouts of other projects."""

import re
from functools import lru_cache

from trl_vpo.data.import_formats import FORMATS

COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "videos",
    "video",
    "images",
    "image",
    "chosen_phrases",
    "rejected_phrases",
    "critical_box",
    "image_list",
    "id",
    "source",
    "tools",
    "chat_template_kwargs",
)
ROW_INDEX = "_row_index"  # added by the trainer, so that a message can name a row that has no id
REF_SUMS = "_ref_sums"  # added by the trainer: precomputed reference log-probs, one for each branch of the row
ASKING = ("question", "instruction", "query", "input", "problem", "conversations", "conversation", "messages")


def misspelt(example: dict) -> dict[str, str]:
    """The filled columns whose names nearly are those of columns that are read, with the names that were meant."""
    found = {
        name: nearest_column(name) for name, value in example.items() if value is not None and name not in COLUMNS
    }
    return {name: meant for name, meant in found.items() if meant}


@lru_cache(maxsize=1000)
def nearest_column(name: str) -> str | None:
    """The column that a name is a slip of the pen of: other capitals, number or joints, or a letter or two."""
    plain = _plain(name)
    for column in COLUMNS:
        # `id` and `source` only label; long names have no neighbours that mean something else
        slips = 0 if len(column) < 5 else 1 if len(column) < 11 else 2
        if column not in ("id", "source") and (_plain(column) == plain or _distance(_plain(column), plain, slips)):
            return column
    return None


def another_layout(example: dict) -> str:
    """What to do with a row that lacks the columns of the contract: which are not read, and who reads them."""
    given = {name for name, value in example.items() if value is not None}
    unread = sorted(given - {*COLUMNS, ROW_INDEX, REF_SUMS})
    known = next((fmt for fmt, layout in FORMATS.items() if any(marks <= given for marks in layout.marks)), None)
    if known:
        remedy = f"It looks like {known}'s layout: `trl-vpo import {known} IN OUT` writes the rows that are read here."
    else:
        remedy = (
            "Rename columns, or write rows with `prompt` (what is asked), `chosen` (the better response), `rejected` "
            "(the worse one), and `images` or `videos` (lists of paths)."
        )
    return (f"The columns {', '.join(f'`{name}`' for name in unread)} are not read. " if unread else "") + remedy


def _plain(name: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    return "".join(re.sub(r"(?<=x)es$|(?<=eo)es$|s$", "", word) for word in re.split(r"[\W_]+", words))


def _distance(a: str, b: str, limit: int) -> bool:
    """Whether at most `limit` letters are missing, too many, others or swapped."""
    if limit == 0 or abs(len(a) - len(b)) > limit:
        return a == b
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            a, b = a[i:], b[i:]
            swapped = a[:2] == b[1::-1] and _distance(a[2:], b[2:], limit - 1)
            pairs = ((a[1:], b), (a, b[1:]), (a[1:], b[1:]))
            return swapped or any(_distance(left, right, limit - 1) for left, right in pairs)
    return True
