"""Whether a write-ahead log still holds all that was committed to it. Only reads.

SQLite takes the first frame with a wrong checksum for the end of the log, and begins with what is
before it: a log that was damaged or cut loses what was acknowledged, and no check of SQLite's says
so. But the index beside it (`-shm`) outlives a killed process, and says how far the log went.

Good for a log whose last user died in this very boot. After a loss of power the end of the log may
rightly be gone, and the index with it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct(">8I")
_FRAME = struct.Struct(">6I")
_INDEX = struct.Struct("=3I2BH4I8s2I")
_MAGIC = 0x377F0682
_VERSION = 3007000
_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class _Index:
    """How far the log went."""

    frames: int
    checksum: tuple[int, int]
    salt: bytes
    moved: int
    """So many of its frames are in the database file already."""


def problem(database: Path) -> str:
    """What of the log is missing, as a sentence; empty where it is whole."""
    log = database.with_name(database.name + "-wal")
    index = _read_index(database.with_name(database.name + "-shm"))
    try:
        data = log.read_bytes()
    except FileNotFoundError:
        data = b""
    if index is None:
        return _problem_without_index(log, data)
    if index.moved >= index.frames:
        return ""
    checksum, whole = (0, 0), 0
    header = _read_header(data)
    if header is not None and header.salt == index.salt:
        checksum, whole = _follow(data, header, index.frames)
    if whole == index.frames and checksum == index.checksum:
        return ""
    return f"{log.name} is damaged: of {index.frames} pages written to it {whole} are left"


def _problem_without_index(log: Path, data: bytes) -> str:
    """Whole frames behind a broken one show that something was in its place."""
    if len(data) <= _HEADER.size:
        return ""
    header = _read_header(data)
    if header is None:
        return f"{log.name} is damaged: it has no header"
    size = _FRAME.size + header.page
    most = (len(data) - _HEADER.size) // size
    _, whole = _follow(data, header, most)
    for number in range(whole + 1, most):
        at = _HEADER.size + number * size
        if data[at + 8 : at + 16] == header.salt:
            return f"{log.name} is damaged: page {whole + 1} in it is broken, and others follow"
    return ""


@dataclass(frozen=True)
class _Header:
    page: int
    salt: bytes
    order: str
    checksum: tuple[int, int]


def _read_header(data: bytes) -> _Header | None:
    if len(data) < _HEADER.size:
        return None
    magic, version, page, _, _, _, *checksum = _HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    found = _checksum((0, 0), data[: _HEADER.size - 8], order)
    if magic & ~1 != _MAGIC or version != _VERSION or list(found) != checksum:
        return None
    return _Header(page, data[16:24], order, found)


def _follow(data: bytes, header: _Header, most: int) -> tuple[tuple[int, int], int]:
    """The checksum behind the last whole frame, and how many are whole; at most so many."""
    checksum, size = header.checksum, _FRAME.size + header.page
    for number in range(most):
        at = _HEADER.size + number * size
        frame = data[at : at + size]
        if len(frame) < size or frame[8:16] != header.salt:
            return checksum, number
        found = _checksum(checksum, frame[:8] + frame[_FRAME.size :], header.order)
        if frame[16:24] != struct.pack(">2I", *found):
            return checksum, number
        checksum = found
    return checksum, most


def _checksum(start: tuple[int, int], data: bytes, order: str) -> tuple[int, int]:
    first, second = start
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2], strict=True):
        first = (first + even + second) & _MASK
        second = (second + odd + first) & _MASK
    return first, second


def _read_index(path: Path) -> _Index | None:
    """None where there is none, or none that is whole."""
    try:
        with open(path, "rb") as file:
            data = file.read(2 * _INDEX.size + 4)
    except FileNotFoundError:
        return None
    one, two = data[: _INDEX.size], data[_INDEX.size : 2 * _INDEX.size]
    if len(data) < 2 * _INDEX.size + 4 or one != two:
        return None
    version, _, _, is_init, _, _, frames, _, *rest = _INDEX.unpack(one)
    frame_checksum, salt, checksum = (rest[0], rest[1]), rest[2], (rest[3], rest[4])
    if version != _VERSION or not is_init or _checksum((0, 0), one[:-8], "=") != checksum:
        return None
    (moved,) = struct.unpack_from("=I", data, 2 * _INDEX.size)
    return _Index(frames, frame_checksum, salt, moved)
