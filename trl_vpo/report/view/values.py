"""Values of any kind as JSON that a browser reads without loss."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from PIL import Image

from trl_vpo.media.images import describe

LONGEST = 20_000  # characters
EXACT = 2**53  # larger integers lose digits in a browser


def is_scalar(value: Any) -> bool:
    return not isinstance(value, (dict, list, tuple, np.ndarray))


def plain(value: Any) -> Any:
    """Return a value that JSON can hold. What is neither text nor number is described."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value if abs(value) <= EXACT else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, (bytes, bytearray, memoryview, np.ndarray, Image.Image)):
        return describe(value)
    return str(value)  # dates, decimals


def as_json(value: Any) -> str:
    """Return readable JSON: a flat list on one line, and very long text cut with a note of its length."""
    flat = isinstance(value, (list, tuple)) and all(map(is_scalar, value))
    text = json.dumps(plain(value), ensure_ascii=False, indent=None if flat else 1)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters in all)"
