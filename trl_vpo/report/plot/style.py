"""One look for all figures: told apart in colour, by the colour-blind, and in black and white."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_vpo.files import atomic_write

# Okabe and Ito's palette: told apart with every common kind of colour blindness
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GUIDE = {"color": "0.75", "linewidth": 0.8, "zorder": 0}
METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same data give the same bytes
FORMATS = tuple(METADATA)


@contextmanager
def drawing() -> Iterator[None]:
    """Set what figures are made and saved with; matplotlib's own settings come back afterwards."""
    import matplotlib.style

    with matplotlib.style.context(Path(__file__).with_name("plot.mplstyle")):
        yield


def look(index: int) -> dict[str, Any]:
    """Return the colour, line style and marker of a run; no two of the first 28 runs share colour and style."""
    return {
        "color": PALETTE[index % len(PALETTE)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def literal(text: str) -> str:
    """Escape a name: matplotlib would read what stands between two dollar signs as a formula."""
    return text.replace("$", r"\$")


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure, whole or not at all; the suffix, one of `FORMATS`, chooses the format."""
    path = Path(path)
    kind = path.suffix.lower()
    with atomic_write(path) as part, drawing():
        figure.savefig(part, format=kind[1:], dpi=150, metadata=METADATA[kind])
    return path
