"""One look for all figures: told apart in colour, by the colour-blind, and in black and white."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_vpo.files import whole

# Okabe and Ito's palette: told apart with every common kind of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GUIDE = {"color": "0.75", "linewidth": 0.8, "zorder": 0}
FORMATS = (".png", ".svg", ".pdf")
METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same data give the same bytes
RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9,
    "axes.labelcolor": "0.25",
    "axes.edgecolor": "0.4",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "xtick.color": "0.4",
    "ytick.color": "0.4",
    "xtick.labelcolor": "0.25",
    "ytick.labelcolor": "0.25",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "trl-vpo",
}


@contextmanager
def drawing() -> Iterator[None]:
    """The settings in which a figure is made and saved; matplotlib's own are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(RC):
        yield


def look(index: int) -> dict[str, Any]:
    """Colour, line style and marker of the run at a position; no two of the first 28 runs share colour and style."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def literal(text: str) -> str:
    """A name as it is: matplotlib would take what stands between two dollar signs for a formula."""
    return text.replace("$", r"\$")


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure, whole or not at all; the suffix chooses the format.

    Raises:
        ValueError: a suffix other than those of `FORMATS`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: a figure is written as {', '.join(FORMATS)}; name a file that ends so.")
    kind = path.suffix.lower()
    with whole(path) as part, drawing():
        figure.savefig(part, format=kind[1:], dpi=150, metadata=METADATA[kind])
    return path
