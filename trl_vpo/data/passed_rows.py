"""Rows that passed their check before, remembered in the cache of `datasets`."""

import uuid
import warnings
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageFile

from trl_vpo.data.collator import PreferenceCollator
from trl_vpo.data.columns import ROW_INDEX
from trl_vpo.data.identity import cache_folder, processor_identity, source_identity, versions
from trl_vpo.data.row_media import MEDIA
from trl_vpo.errors import MediaError
from trl_vpo.files import bytes_digest, json_digest

FORMAT = 4  # of the remembered rows; raise it with a change to what is checked
OWN = ("processing_class", "frame_cache", "pixel_dtype")  # attributes that its settings are not told by


class PassedRows:
    """Keys of all that the check of a row depends on.

    A folder for each set of settings; each process writes a file of its own, a line for each row, so that many may
    share it and an interrupted check goes on where it stopped. It may be deleted at any time.
    """

    def __init__(self, args: Any, collator: PreferenceCollator):
        self._root = collator.media_root
        settings = {name: repr(value) for name, value in vars(collator).items() if name not in OWN}
        libraries = [versions(), av.__version__, av.library_versions, PIL.__version__]
        pillow = [PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES]
        parts = [FORMAT, args.check_media, type(collator).__qualname__, settings, libraries, pillow]
        parts.append(processor_identity(collator.processing_class))
        self._folder = cache_folder() / "checks" / json_digest(parts)
        files = [path.read_text(encoding="ascii", errors="replace") for path in self._folder.glob("*.txt")]
        self._known = {line for text in files for line in text.split("\n")}
        self._path = self._folder / f"{uuid.uuid4().hex}.txt"

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def key(self, example: dict) -> str | None:
        """Return the key of the row's texts and media, or None for what cannot be recognised."""
        filled = {name: value for name, value in example.items() if value is not None}
        texts = {k: v for k, v in filled.items() if k not in (*MEDIA, "id", "source", ROW_INDEX)}
        try:
            media = {k: source_identity(filled[k], self._root) for k in MEDIA if k in filled}
            return json_digest([texts, media], default=_hashable)
        except (MediaError, OSError, TypeError, ValueError):
            return None

    def add(self, keys: list[str]) -> None:
        """Remember rows; where nothing can be written, warn and go on."""
        try:
            if keys:
                self._folder.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="ascii") as file:
                    file.writelines(key + "\n" for key in keys)
        except OSError as error:
            warnings.warn(f"checked rows cannot be remembered in {self._folder} ({error}).", stacklevel=2)


def _hashable(value: Any) -> Any:
    if isinstance(value, bytes):
        return bytes_digest(value)
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else repr(value)
