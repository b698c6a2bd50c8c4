"""Media files that end before their own structure says, found without decoding any of it.

An MPEG-TS, a live WebM or a fragmented mp4 that was cut between two of its units is a shorter healthy one.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"mfra", b"free", b"skip", b"wide", b"uuid", b"styp", b"sidx", b"meta"}
_PADDING = {b"free", b"skip", b"wide"}
_ELEMENTS = {0x1A45DFA3, 0x18538067, 0x1F43B675}  # header, segment, cluster; then what a segment and a cluster hold
_ELEMENTS |= {0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1C53BB6B, 0x1043A770, 0x1941A469, 0x1254C367, 0xBF}
_ELEMENTS |= {0xE7, 0xA7, 0xAB, 0xA3, 0xA0, 0x5854, 0xEC}
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # the object with the file's size
_UNKNOWN = 0xFFFFFFFF


def find_truncation(file: BinaryIO, size: int) -> str | None:
    """Say what is missing of a file of ``size`` bytes; None where nothing is, or the format does not tell."""
    file.seek(0)
    head = file.read(16)
    if head[4:8] in _BOXES:
        return _mp4(file, size)
    for magic, walk in _WALKS.items():
        if head.startswith(magic):
            return walk(file, size)
    return _transport_stream(file, size)


def _promised(what: str, end: int, size: int) -> str | None:
    return None if end <= size else f"{what} goes on to byte {end}, the file ends at {size}"


def _mp4(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length == 1 and at + 16 <= size:
            length = int.from_bytes(file.read(8), "big")
        if length < 8 or kind not in _BOXES:  # 0: to the end, wherever that is
            return None
        at += length
        if at > size and kind not in _PADDING:
            return _promised(f"its {kind.decode()} box", at, size)
    return None


def _matroska(file: BinaryIO, size: int) -> str | None:
    """Hops over elements, and into those of unknown length: live recordings do not know that of their clusters."""
    at = 0
    while at < size:
        file.seek(at)
        kind, length = _number(file), _number(file, length=True)
        if kind is not None and kind not in _ELEMENTS:
            return None  # something behind the end
        if kind is None or length is None:
            return f"the element at byte {at} breaks off"
        at = file.tell()
        if length >= 0:
            at += length
            if at > size:
                return _promised("its last element", at, size)
    return None


def _number(file: BinaryIO, length: bool = False) -> int | None:
    """A Matroska number, as the name or the length of an element (-1: unknown). None at the end of the file."""
    first = file.read(1)
    if not first or first == b"\0":
        return 0 if first else None
    count = 9 - first[0].bit_length()
    rest = file.read(count - 1)
    if len(rest) < count - 1:
        return None
    value = int.from_bytes(first + rest, "big")
    if not length:
        return value
    value &= (1 << 7 * count) - 1
    return -1 if value == (1 << 7 * count) - 1 else value


def _gif(file: BinaryIO, size: int) -> str | None:
    file.seek(0)
    data = file.read()
    at = 13 + _colours(data[10])
    while at < size and data[at] in b"!,":
        if data[at] == ord("!"):
            at += 2  # an extension and its kind
        else:
            at += 11 + (_colours(data[at + 9]) if at + 9 < size else 0)  # a picture: place, colours, width of codes
        while at < size and data[at]:
            at += 1 + data[at]
        at += 1
    return "the mark of its end is missing" if at >= size else None


def _colours(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _riff(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at + 8 <= size:
        file.seek(at)
        kind, length = struct.unpack("<4sI", file.read(8))
        if kind != b"RIFF" or length in (0, _UNKNOWN):  # something behind the end; written to a pipe
            return None
        at += 8 + length
        if at > size:
            return _promised("it", at, size)
        at += length % 2
    return None


def _flv(file: BinaryIO, size: int) -> str | None:
    file.seek(5)
    at = int.from_bytes(file.read(4), "big") + 4
    while at + 11 <= size:
        file.seek(at + 1)
        at += 15 + int.from_bytes(file.read(3), "big")
    return None if at == size else _promised("its last tag", max(at, size + 1), size)


def _asf(file: BinaryIO, size: int) -> str | None:
    file.seek(0)
    head = file.read(1 << 16)
    at = head.find(_ASF_FILE)
    if at < 0 or len(head) < at + 92 or head[at + 88] & 1:  # 1: a broadcast
        return None
    return _promised("it", int.from_bytes(head[at + 40 : at + 48], "little"), size)


def _program_stream(file: BinaryIO, size: int) -> str | None:
    at = 0
    while at + 4 <= size:
        file.seek(at)
        head = file.read(14)
        if head[:3] != b"\0\0\1" or head[3] < 0xB9:
            return None
        if head[3] == 0xB9:  # the end
            at += 4
        elif head[3] != 0xBA:
            at += 6 + int.from_bytes(head[4:6], "big")
        elif len(head) < 14:
            return f"the pack at byte {at} breaks off"
        else:
            at += 14 + (head[13] & 7) if head[4] & 0xC0 else 12  # MPEG-2, MPEG-1
    return _promised("its last packet", at, size)


def _transport_stream(file: BinaryIO, size: int) -> str | None:
    """Packets of one length, each with the same first byte; some devices put 4 bytes before it, or 16 behind."""
    file.seek(0)
    head = file.read(4 * 204)
    for length, first in ((188, 0), (192, 4), (204, 0)):
        if len(head) >= 4 * length and all(head[first + k * length] == 0x47 for k in range(4)):
            return f"its last packet has {size % length} of {length} bytes" if size % length else None
    return None


_WALKS = {
    b"\x1aE\xdf\xa3": _matroska,
    b"GIF8": _gif,
    b"RIFF": _riff,
    b"FLV": _flv,
    _ASF: _asf,
    b"\0\0\1\xba": _program_stream,
}
