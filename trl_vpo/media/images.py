"""Sources of media, and images: every accepted source becomes an RGB ``PIL.Image`` or a :class:`MediaError`.

Nothing here imports torch, transformers or trl, so a data-loader worker or a checking tool starts quickly.
"""

from __future__ import annotations

import io
import math
import re
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps

from trl_vpo.errors import MediaError

BYTES = (bytes, bytearray, memoryview)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DECIMAL = re.compile(r"[0-9]+(\.[0-9]+)?")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_IMAGE_SUFFIXES |= {".pnm", ".jp2", ".avif", ".tga"}
_VIDEO_SUFFIXES = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts"}


def describe(source: Any) -> str:
    """Return a short name of a media source for messages: its path, or its kind and size."""
    if isinstance(source, dict):
        named = next((source[key] for key in ("path", "video", "image", "bytes") if source.get(key) is not None), None)
        return "<dict without a source>" if named is None else describe(named)
    if isinstance(source, (str, Path)):
        text = str(source)
        return text if len(text) <= 300 else f"{text[:200]}... ({len(text)} characters)"
    if isinstance(source, BYTES):
        return f"<bytes, {len(source)} long>"
    if isinstance(source, np.ndarray):
        return f"<array {source.shape} {source.dtype}>"
    if isinstance(source, Image.Image):
        return f"<PIL image {source.width}x{source.height}>"
    if isinstance(source, (list, tuple)):
        first = f", the first {describe(source[0])}" if source and not isinstance(source[0], (list, tuple)) else ""
        return f"<list of {len(source)} frames{first}>"
    return f"<{type(source).__name__}>"


def check_media_root(media_root: str | Path | None) -> None:
    """Raise MediaError for a `media_root` that is no folder."""
    if not Path(media_root or ".").is_dir():
        raise MediaError(f"media_root {media_root} is not a folder: point it at the folder that holds the media.")


def resolve_path(source: str | Path, media_root: str | Path | None = None) -> Path:
    """Return the absolute path of an existing, non-empty file, named by a path or a ``file://`` URL.

    A relative one starts at ``media_root`` when that is given, else at the working directory. With ``media_root``, a
    path that leaves it - by ``..``, as an absolute path or through a symbolic link - is refused with MediaError.
    """
    name = describe(source)
    path = _parse_path(source, name)
    try:
        check_media_root(media_root)
        root = Path(media_root or ".").resolve()
        full = (root / path).resolve()
        if media_root is not None and not full.is_relative_to(root):
            raise MediaError(
                f"{name} lies outside of media_root {root} (it resolves to {full}): move the file into media_root, or "
                "point media_root at a folder that holds all media."
            )
        if full.is_dir():
            raise MediaError(f"{name} is a folder, not a file: name the media file itself.")
        if not full.exists():
            start = "the working directory; set media_root if they start elsewhere"
            start = start if media_root is None else f"media_root ({media_root}), which the path must not repeat"
            hint = "check the path" if path.is_absolute() else f"relative paths start at {start}"
            raise MediaError(f"{name} does not exist (looked for {full}): {hint}.")
        if full.stat().st_size == 0:
            raise MediaError(f"{name} is empty (0 bytes): fetch or write the file again.")
    except MediaError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # no permission, a NUL in the path, a loop of links
        raise MediaError(f"{name} cannot be reached ({error}): check the path and its permissions.") from error
    return full


def frame_folder(source: Any, media_root: str | Path | None = None) -> list[Path] | None:
    """Return the images of a folder, in the order of their numbers; None if ``source`` names no folder below the root.

    Where all names are decimal numbers ("0.25.png", "0.5.png"), those count; else the digits of a name, run by run.
    Raises :class:`MediaError` for a folder without images.
    """
    if not isinstance(source, (str, Path)):
        return None
    name, root = describe(source), Path(media_root or ".")
    path = _parse_path(source, name)
    try:
        folder = (root / path).resolve()
        if not folder.is_dir() or (media_root is not None and not folder.is_relative_to(root.resolve())):
            return None
    except (OSError, ValueError, RuntimeError):  # as `resolve_path` says
        return None
    if folder == root.resolve() and (media_root is not None or not path.is_absolute()):
        raise MediaError(f"{name} is the folder {folder} itself, where media paths start: name a video in it.")
    # macOS leaves "._frame1.png" beside "frame1.png"
    frames = [p for p in folder.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES and not p.name.startswith(".")]
    if not frames:
        raise MediaError(f"{name} is a folder without images: name a video file, or a folder that holds its frames.")
    seconds = all(_DECIMAL.fullmatch(path.stem) for path in frames)
    parts = {p: [(0, int(n), "") if n.isdigit() else (1, 0, n) for n in re.split(r"(\d+)", p.name)] for p in frames}
    frames.sort(key=lambda path: (Decimal(path.stem) if seconds else 0, parts[path]))
    return [path.resolve() for path in frames]


def _parse_path(source: str | Path, name: str) -> Path:
    """Return the path of a source or of its ``file://`` URL. `Path` takes an empty one for the working directory."""
    text = str(source)
    if not text.strip():
        raise MediaError(f"the path is empty ({text!r}): name the media file, or drop the row.")
    if not _URL.match(text):
        if text.startswith("data:"):
            raise MediaError(f"{name} is a data: URL: decode it and pass the bytes.")
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme.lower() != "file":
        raise MediaError(f"{name} is a {parts.scheme}:// URL: nothing is fetched here, download it and pass the path.")
    if parts.netloc not in ("", "localhost"):
        raise MediaError(f"{name} names the host {parts.netloc!r}: a file URL looks like file:///folder/name.")
    return Path(unquote(parts.path))


def read_source(source: str | Path | bytes, media_root: str | Path | None = None) -> Path | bytes:
    """Return a checked path, or non-empty bytes. Raises :class:`MediaError`."""
    if isinstance(source, (str, Path)):
        return resolve_path(source, media_root)
    data = bytes(source)
    if not data:
        raise MediaError(f"{describe(source)} is empty: the row holds no data, write it again.")
    return data


def fit_pixels(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """Return the largest (width, height) of that shape with at most ``max_pixels`` pixels, not above the given."""
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = math.sqrt(max_pixels / (width * height))
    new_width = min(max(1, int(width * scale)), max_pixels)
    new_height = max(1, int(height * scale))
    return new_width, min(new_height, max_pixels // new_width)  # the second bound matters for strips one pixel thin


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    return resized(image, fit_pixels(*image.size, max_pixels))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def load_image(
    source: Any, *, max_pixels: int | None = None, media_root: str | Path | None = None, limit: bool = True
) -> Image.Image:
    """Return an image as RGB, turned upright by its EXIF orientation, at most ``max_pixels`` large (aspect kept).

    ``source``: a path, ``file://`` URL, bytes, ``PIL.Image``, uint8 array (H, W), (H, W, 3) or (H, W, 4), or a dict
    with ``path`` (or ``image``) and/or ``bytes``, as ``datasets.Image(decode=False)`` gives it; bytes come before the
    path. Transparent pixels are laid on white, an animation gives its first image. Greys up to 255 stay as they are,
    up to 65535 they lose their lower 8 bits, beyond that they are refused, as floats are. With ``limit``, an image of
    more pixels than `PIL.Image.MAX_IMAGE_PIXELS` is refused unless ``max_pixels`` scales it down.
    """
    if max_pixels is not None and max_pixels < 1:
        raise MediaError(f"max_pixels is {max_pixels}: give at least 1, or None for no limit.")
    name = describe(source)
    source = _unpack_image(source, name)
    if not isinstance(source, Image.Image):
        source = read_source(source, media_root)
    most = Image.MAX_IMAGE_PIXELS if limit and max_pixels is None else None
    try:
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            if most is not None and (pixels := image.width * image.height) > most:
                raise MediaError(
                    f"{name} has {image.width}x{image.height} pixels ({pixels / 1e6:.0f} million), more than "
                    f"{most / 1e6:.0f} million: set max_pixels, which scales it down, or scale it down first."
                )
            image = _to_rgb(image)
        return shrink(image, max_pixels)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins let any error of their parsers through
        if isinstance(error, OSError) and error.errno:  # of the file system; Pillow's own have no number
            raise MediaError(f"{name} cannot be read ({error}): check its permissions and the disk.") from error
        raise MediaError(f"{name} is not a readable image ({error}): {_image_remedy(source, error)}.") from error


def _unpack_image(source: Any, name: str) -> Path | str | bytes | Image.Image:
    """Take dicts and arrays apart, and refuse all else."""
    if isinstance(source, dict):
        source = next((source[key] for key in ("bytes", "path", "image") if source.get(key) is not None), None)
        if source is None:
            raise MediaError(f"{name} names no image: give `path` or `bytes`.")
    if isinstance(source, np.ndarray):
        shaped = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if not (shaped and source.dtype == np.uint8 and source.size):
            raise MediaError(f"{name} is not an image: give a uint8 array of shape (H, W), (H, W, 3) or (H, W, 4).")
        return Image.fromarray(np.ascontiguousarray(source))
    if not isinstance(source, (str, Path, *BYTES, Image.Image)):
        raise MediaError(f"{name} is not an image: give a path, bytes, a PIL image or a uint8 array (H, W, 3).")
    return source


def _image_remedy(source: Any, error: Exception) -> str:
    if isinstance(source, Path) and source.suffix.lower() in _VIDEO_SUFFIXES:
        return "put a video into `videos`; inside a list it is taken for one frame"
    if isinstance(error, Image.DecompressionBombError):
        return "scale it down first"
    if "truncated" in str(error):
        return "the file was cut short, fetch it again"
    return "check that it is a picture in a format that Pillow reads, and complete"


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)  # always a copy; reads the pixels, or raises on a broken file
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range, save it with 8 bits")
    if image.mode.startswith("I"):
        # Greyscale of 16 or 32 bits: arrays of 0 to 255 are often stored so, by `datasets.Image` for one.
        pixels = np.asarray(image)
        least, most = int(pixels.min()), int(pixels.max())
        if least < 0 or most > 65535:
            raise ValueError(f"its greys reach from {least} to {most}, beyond 0 to 65535, save it with 8 bits")
        return Image.fromarray((pixels if most <= 255 else pixels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.upper())
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
