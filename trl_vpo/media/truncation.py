"""Media files that end before their own structure says, found without decoding any of it.

An MPEG-TS, a live WebM or a fragmented mp4 that was cut between two of its units is a shorter healthy one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"styp", b"sidx", b"meta"}
_PADDING = {b"free", b"skip", b"wide"}
_ELEMENTS = {0x1A45DFA3, 0x18538067, 0x1F43B675}  # header, segment, cluster; then what a segment and a cluster hold
_ELEMENTS |= {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1043A770, 0x1941A469, 0x1254C367, 0xBF}
_ELEMENTS |= {0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0x5854, 0xEC}
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the object with the file's size
_HEAD = 16  # bytes that say what a unit is and how long
_UNKNOWN = 0xFFFFFFFF

Unit = tuple[str, int] | None  # what it is ("" for padding) and its length; None where the structure ends


def find_truncation(file: BinaryIO, size: int) -> str | None:
    """Say what is missing of a file of ``size`` bytes; None where nothing is, or the format does not tell."""
    head = _read(file, 0, _HEAD)
    by_magic = (unit for magic, unit in _UNITS.items() if head.startswith(magic))
    if unit_of := _mp4 if head[4:8] in _BOXES else next(by_magic, None):
        return _walk(file, size, unit_of)
    if head.startswith(b"GIF8"):
        return _gif(_read(file, 0, size))
    return _asf(_read(file, 0, 1 << 16), size) if head.startswith(_ASF) else _transport_stream(file, size)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _walk(file: BinaryIO, size: int, unit_of: Callable[[bytes], Unit]) -> str | None:
    """Hop from unit to unit, to the end of the last one."""
    what, at = "", 0
    while at < size:
        unit = unit_of(_read(file, at, _HEAD))
        if unit is None:
            return None
        what, length = unit
        at += length
    return f"{what} extends to byte {at}, but the file ends at {size}" if what and at > size else None


def _mp4(head: bytes) -> Unit:
    length, kind = int.from_bytes(head[:4], "big"), head[4:8]
    if length == 1 and len(head) == _HEAD:
        length = int.from_bytes(head[8:], "big")
    if length < 8 or kind not in _BOXES:  # 0: to the end, wherever that is
        return None
    return "" if kind in _PADDING else f"its {kind.decode()} box", length


def _matroska(head: bytes) -> Unit:
    """Hop over elements, and into those of unknown length: live recordings do not know that of their clusters."""
    width = 9 - head[0].bit_length()  # of the name; then of the length
    if len(head) >= width and int.from_bytes(head[:width], "big") not in _ELEMENTS:
        return None  # something behind the end
    rest = head[width:]
    count = 9 - rest[0].bit_length() if rest else 1
    if len(rest) < count:
        return "its last element", width + count
    unknown = (1 << 7 * count) - 1
    length = int.from_bytes(rest[:count], "big") & unknown
    return "its last element", width + count + (0 if length == unknown else length)


def _riff(head: bytes) -> Unit:
    length = int.from_bytes(head[4:8], "little")
    if head[:4] != b"RIFF" or len(head) < 8 or length in (0, _UNKNOWN):  # something behind the end; written to a pipe
        return None
    return "it", 8 + length


def _flv(head: bytes) -> Unit:
    is_header = head.startswith(b"FLV")
    return "its last tag", int.from_bytes(head[5:9], "big") + 4 if is_header else 15 + int.from_bytes(head[1:4], "big")


def _program_stream(head: bytes) -> Unit:
    if head[:3] != b"\0\0\1" or len(head) < 4 or head[3] < 0xB9:
        return None
    if head[3] == 0xB9:  # the end
        return "its last packet", 4
    if head[3] != 0xBA:
        return "its last packet", 6 + int.from_bytes(head[4:6], "big")
    if len(head) < 14:
        return "its last pack", 14
    return "its last pack", 14 + (head[13] & 7) if head[4] & 0xC0 else 12  # MPEG-2, MPEG-1


_UNITS = {b"\x1aE\xdf\xa3": _matroska, b"RIFF": _riff, b"FLV": _flv, b"\0\0\1\xba": _program_stream}


def _gif(data: bytes) -> str | None:
    def colours(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    size, at = len(data), 13 + colours(data[10])
    while at < size and data[at] in b"!,":
        if data[at] == ord("!"):
            at += 2  # an extension and its kind
        else:
            at += 11 + (colours(data[at + 9]) if at + 9 < size else 0)  # a picture: place, colours, width of codes
        while at < size and data[at]:
            at += 1 + data[at]
        at += 1
    return "the mark of its end is missing" if at >= size else None


def _asf(head: bytes, size: int) -> str | None:
    at = head.find(_ASF_FILE)
    if at < 0 or len(head) < at + 92 or head[at + 88] & 1:  # 1: a broadcast
        return None
    end = int.from_bytes(head[at + 40 : at + 48], "little")
    return f"it extends to byte {end}, but the file ends at {size}" if end > size else None


def _transport_stream(file: BinaryIO, size: int) -> str | None:
    """Packets of one length, each with the same first byte; some devices put 4 bytes before it, or 16 behind."""
    head = _read(file, 0, 4 * 204)
    for length, first in ((188, 0), (192, 4), (204, 0)):
        if len(head) >= 4 * length and all(head[first + k * length] == 0x47 for k in range(4)):
            return f"its last packet has {size % length} of {length} bytes" if size % length else None
    return None
