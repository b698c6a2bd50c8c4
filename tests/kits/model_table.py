"""Write the table of families in docs/models.md from the tiny models of the tests.

python tests/kits/model_table.py
"""

import re
from pathlib import Path

import families
import families_newer

from trl_vpo.data.accepted import check_accepted
from trl_vpo.data.rows import Row
from trl_vpo.errors import RowError
from trl_vpo.forward.families import padded_layout_reason

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = """\
| family | `model_type` | videos | with images in a prompt | rows |
| --- | --- | --- | --- | --- |
"""
VARIANTS = ("Gemma 3, short windows", "Llama 4, short chunks")  # of families that have a line


def built():
    """Give name, model and processor of every family."""
    for name in families.FAMILIES:
        yield name, *families.build(name)
    for name in families_newer.NEWER.keys() - {*VARIANTS}:
        yield name, *families_newer.build(name)


def line(name, model, processor) -> str:
    """A family's line of the table."""
    videos = {**families.FAMILIES, **families_newer.NEWER}[name][1]
    mixed = ("yes" if takes_both(processor) else "no") if videos else ""
    reason = padded_layout_reason(model)
    rows = f"padded: {re.sub(r' [(].*?[)]', '', reason)}" if reason else "packed"
    return f"| {name} | `{model.config.model_type}` | {'yes' if videos else 'no'} | {mixed} | {rows} |\n"


def takes_both(processor) -> bool:
    try:
        check_accepted(Row("row", [], [], [], images=["a.png"], videos=["a.mp4"]), processor)
    except RowError:
        return False
    return True


def page_with(lines) -> str:
    """The page with these lines as its table."""
    text = HEAD + "".join(sorted(lines, key=str.lower))
    return re.sub(r"\| family \|.*?\n(?!\|)", lambda _: text, PAGE.read_text(encoding="utf-8"), count=1, flags=re.S)


if __name__ == "__main__":
    PAGE.write_text(page_with([line(*family) for family in built()]), encoding="utf-8")
