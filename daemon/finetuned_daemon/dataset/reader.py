"""Reads data files sample by sample: the one reader, for checks, inspections and runs.

Fine-tuning: a chat a record. Pretraining: a document a record, `{"text": "..."}`, or a `.txt` file
that is one document. Records stand one a line (JSONL), or in one JSON array over any number of
lines. `formats` says what a record may be.

Files are streamed: memory holds one record, or the one document of a `.txt` file. A file of lines
can be read in stretches too, by several processes at once.
"""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetuned_daemon.dataset.formats import (
    BadRecord,
    Chat,
    DataFormat,
    Document,
    Record,
    to_chat,
    to_document,
)
from finetuned_daemon.json_file import check_extent
from finetuned_daemon.texts import NOTHING, Text

LARGEST_RECORD = 64 << 20
"""Bytes; a longer record is a bad line."""

_CHUNK = 1 << 20
_EXCERPT_CHARACTERS = 200
_BLANKS = b" \t\r\n"

_ARRAY_BEGINNING = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*(?P<bracket>\[)[ \t\r\n]*(?:\{|\Z)")
_OUTSIDE = re.compile(rb'["{}\[\],]')
_IN_STRING = re.compile(rb'["\\]')
_ARRAY_NOT_CLOSED = Text(
    "not JSON (the array is not closed: is the file whole?)",
    "不是 JSON（数组没有结束：文件是否完整？）",
)
_AFTER_ARRAY = Text(
    "not JSON (this stands behind the end of the array)", "不是 JSON（此处内容位于数组结束之后）"
)


@dataclass(frozen=True)
class BadLine:
    """A line that can't be used, and why."""

    line: int
    byte_offset: int
    reason: str
    """Stable, in capitals."""
    message: Text
    excerpt: str
    """How it begins."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.message.en}"


@dataclass(frozen=True)
class _Raw:
    """The bytes of one record, or the beginning of one that is too long."""

    line: int
    byte_offset: int
    data: bytes
    is_too_long: bool = False
    flaw: Text = NOTHING
    """What is wrong with the array at this place; empty: nothing is."""
    mark_size: int = 0
    """Bytes of the byte order mark before it."""

    @property
    def data_offset(self) -> int:
        """Where its bytes begin in the file."""
        return self.byte_offset + self.mark_size

    def bad(self, reason: str, message: Text) -> BadLine:
        """A bad line of these bytes."""
        beginning = self.data[: 4 * _EXCERPT_CHARACTERS].decode("utf-8", "replace").strip()
        return BadLine(
            self.line, self.byte_offset, reason, message, beginning[:_EXCERPT_CHARACTERS]
        )


class _AsOpened(io.FileIO):
    """A file as long as it was when it was opened: one that grows is read to there."""

    def __init__(self, path: Path) -> None:
        # A pipe that took the file's place would be waited for, and a device never ends.
        super().__init__(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        status = os.fstat(self.fileno())
        self._end = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "is no ordinary file", str(path))

    def readinto(self, buffer: Any, /) -> int:
        """Reads no further than to the end as it was."""
        left = max(0, self._end - self.tell())
        return super().readinto(memoryview(buffer)[:left])


def _open(path: Path) -> BinaryIO:
    return io.BufferedReader(_AsOpened(path), _CHUNK)


class _Shared(io.RawIOBase):
    """A file that others have open by the same descriptor: with a place of its own in it."""

    def __init__(self, descriptor: int, place: int, end: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._place = place
        self._end = end

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Reads on."""
        wanted = min(len(buffer), self._end - self._place)
        data = os.pread(self._descriptor, max(0, wanted), self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


def is_plain_text(path: Path) -> bool:
    """Whether a file of documents is read as one plain text rather than as records."""
    return path.suffix.lower() == ".txt"


def read_chats(path: Path) -> Iterator[Chat | BadLine]:
    """Yields every chat of a file in order, and every line that is none.

    Raises:
        OSError: The file can't be read.
    """
    for raw in _read_raw(path):
        try:
            kind, messages, tools = to_chat(_parse(raw))
        except BadRecord as error:
            yield raw.bad(error.reason, error.message)
        else:
            yield Chat(raw.line, messages, kind, raw.byte_offset, tools)


@dataclass(frozen=True)
class Place:
    """Where a record stands: enough to read it again, and to see that it is still the same."""

    line: int
    offset: int
    size: int
    """Both in bytes."""
    checksum: int
    """CRC-32."""


@dataclass(frozen=True)
class Stretch:
    """A part of a file of lines: the lines that begin in it. A whole file may be an array too."""

    start: int
    end: int
    """Bytes; exclusive."""
    size: int
    """Of the file: what is added to it later doesn't count."""


def open_data(path: Path) -> int:
    """A descriptor of a data file, which stays open until it is closed.

    Raises:
        OSError: It can't be opened, or is no ordinary file.
    """
    with _AsOpened(path) as file:
        return os.dup(file.fileno())


def stretches(descriptor: int, size: int, each: int) -> list[Stretch]:
    """Parts of about `each` bytes of a file of `size`; one where it can't be parted.

    Raises:
        OSError: The file can't be read.
    """
    with io.BufferedReader(_Shared(descriptor, 0, size), _CHUNK) as file:
        is_array = _array_start(file.read(_CHUNK)) is not None
    if is_array or size <= each:
        return [Stretch(0, size, size)]
    starts = range(0, size, each)
    return [Stretch(start, min(start + each, size), size) for start in starts]


def scan_chats(descriptor: int, stretch: Stretch) -> Iterator[tuple[Chat, Place] | BadLine | int]:
    """Yields the chats of a stretch, where each stands, and bad lines; last the number of lines.

    Lines are counted from the beginning of the stretch.

    Raises:
        OSError: The file can't be read.
    """
    for raw in _read_stretch(descriptor, stretch):
        if isinstance(raw, int):
            yield raw
            continue
        try:
            kind, messages, tools = to_chat(_parse(raw))
        except BadRecord as error:
            yield raw.bad(error.reason, error.message)
        else:
            place = Place(raw.line, raw.data_offset, len(raw.data), zlib.crc32(raw.data))
            yield Chat(raw.line, messages, kind, raw.byte_offset, tools), place


def scan_documents(descriptor: int, stretch: Stretch) -> Iterator[Document | BadLine | int]:
    """Yields the documents of a stretch and bad lines; last the number of lines.

    Lines are counted from the beginning of the stretch.

    Raises:
        OSError: The file can't be read.
    """
    for raw in _read_stretch(descriptor, stretch):
        if isinstance(raw, int):
            yield raw
            continue
        try:
            text = to_document(_parse(raw))
        except BadRecord as error:
            yield raw.bad(error.reason, error.message)
        else:
            yield Document(raw.line, text, byte_offset=raw.byte_offset)


def chat_at(descriptor: int, place: Place) -> Chat | None:
    """A chat that a scan has found; None: something else stands there by now.

    Raises:
        OSError: The file can't be read.
    """
    data = os.pread(descriptor, place.size, place.offset)
    if len(data) != place.size or zlib.crc32(data) != place.checksum:
        return None
    kind, messages, tools = to_chat(_parse(_Raw(place.line, place.offset, data)))
    return Chat(place.line, messages, kind, place.offset, tools)


def read_documents(path: Path) -> Iterator[Document | BadLine]:
    """Yields every document of a file in order, and every line that is none.

    Raises:
        OSError: The file can't be read.
    """
    if is_plain_text(path):
        yield from _read_plain_text(path)
        return
    for raw in _read_raw(path):
        try:
            text = to_document(_parse(raw))
        except BadRecord as error:
            yield raw.bad(error.reason, error.message)
        else:
            yield Document(raw.line, text, byte_offset=raw.byte_offset)


def read_plain_text(path: Path) -> Iterator[str | BadLine]:
    """Yields a text in pieces, and last the line that is not UTF-8, where there is one.

    Raises:
        OSError: The file can't be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line, line_start, offset = 1, 0, 0
    with _open(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # What was decoded ends with the chunk, but may begin before it or behind a BOM.
                at = offset + len(chunk) - len(error.object) + error.start
                before = chunk[: max(0, at - offset)]
                if b"\n" in before:
                    line_start = offset + before.rindex(b"\n") + 1
                file.seek(line_start)
                data = file.readline(4 * _EXCERPT_CHARACTERS)
                bad = _Raw(line + before.count(b"\n"), line_start, data)
                yield bad.bad("NOT_UTF8", _not_utf8(error.reason, at - line_start))
                return
            if not chunk:
                return
            if b"\n" in chunk:
                line += chunk.count(b"\n")
                line_start = offset + chunk.rindex(b"\n") + 1
            offset += len(chunk)


def _read_plain_text(path: Path) -> Iterator[Document | BadLine]:
    pieces = list[str]()
    for piece in read_plain_text(path):
        if isinstance(piece, BadLine):
            yield piece
            return
        pieces.append(piece)
    text = "".join(pieces)
    del pieces
    if text.strip():
        yield Document(1, text, DataFormat.PLAIN_TEXT)


def _parse(raw: _Raw) -> Record:
    if raw.is_too_long:
        size = LARGEST_RECORD >> 20
        raise BadRecord("TOO_LONG", Text(f"longer than {size} MiB", f"超过 {size} MiB"))
    if raw.flaw is not NOTHING:
        raise BadRecord("NOT_JSON", raw.flaw)
    try:
        check_extent(raw.data)
        value: object = json.loads(raw.data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord("NOT_UTF8", _not_utf8(error.reason, error.start)) from None
    except json.JSONDecodeError as error:
        raise BadRecord("NOT_JSON", _not_json(raw, error)) from None
    except (RecursionError, ValueError) as error:  # too deep, too many values
        raise BadRecord("NOT_JSON", Text(f"not JSON ({error})", f"不是 JSON（{error}）")) from None
    if not isinstance(value, dict):
        raise BadRecord("NOT_AN_OBJECT", Text("not a JSON object", "不是 JSON 对象"))
    return cast("Record", value)


def _not_utf8(why: str, index: int) -> Text:
    return Text(
        f"not UTF-8 ({why} at byte {index + 1})", f"不是 UTF-8（第 {index + 1} 字节：{why}）"
    )


def _not_json(raw: _Raw, error: json.JSONDecodeError) -> Text:
    if error.lineno == 1:
        return Text(
            f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})",
            f"不是 JSON（第 {error.colno} 列：{error.msg}）",
        )
    line = raw.line + error.lineno - 1
    return Text(
        f"not JSON ({error.msg.removesuffix(' at')} at line {line}, column {error.colno})",
        f"不是 JSON（第 {line} 行第 {error.colno} 列：{error.msg}）",
    )


# --- records as bytes


def _read_raw(path: Path) -> Iterator[_Raw]:
    with _open(path) as file:
        array_start = _array_start(file.read(_CHUNK))
        file.seek(0)
        if array_start is not None:
            yield from _ArraySplitter(file, array_start).split()
            return
        for raw in _read_lines(file):
            if not isinstance(raw, int):
                yield raw


def _read_stretch(descriptor: int, stretch: Stretch) -> Iterator[_Raw | int]:
    """The records that begin in a stretch, and last the number of its lines."""
    if stretch.start == 0:
        head = os.pread(descriptor, _CHUNK, 0)
        array_start = _array_start(head)
        if array_start is not None:
            with io.BufferedReader(_Shared(descriptor, 0, stretch.size), _CHUNK) as file:
                yield from _ArraySplitter(file, array_start).split()
            yield 0
            return
    begin = max(0, stretch.start - 1)
    with io.BufferedReader(_Shared(descriptor, begin, stretch.size), _CHUNK) as file:
        offset = begin
        # The line that began before it belongs to the stretch before.
        while stretch.start and (rest := file.readline(_CHUNK)):
            offset += len(rest)
            if rest.endswith(b"\n"):
                break
        yield from _read_lines(file, offset, stretch.end)


def _array_start(head: bytes) -> int | None:
    """Offset of the bracket that opens an array of records; None where the file holds lines.

    A line may be an array too, by mistake: what an array of records begins with is an object.
    """
    match = _ARRAY_BEGINNING.match(head)
    return match.start("bracket") if match else None


def _read_lines(file: BinaryIO, offset: int = 0, end: int | None = None) -> Iterator[_Raw | int]:
    """The records of the lines that begin before `end`, and last how many lines these were."""
    number = 0
    is_first = offset == 0
    while (end is None or offset < end) and (data := file.readline(LARGEST_RECORD + 1)):
        number += 1
        start = offset
        offset += len(data)
        is_too_long = len(data) > LARGEST_RECORD and not data.endswith(b"\n")
        if is_too_long:
            data = data[:_CHUNK]
            while rest := file.readline(_CHUNK):
                offset += len(rest)
                if rest.endswith(b"\n"):
                    break
        mark_size = 0
        if is_first and number == 1 and data.startswith(codecs.BOM_UTF8):
            mark_size = len(codecs.BOM_UTF8)
        data = data[mark_size:].rstrip(b"\r\n")
        if data.strip():
            yield _Raw(number, start, data, is_too_long, mark_size=mark_size)
    yield number


class _ArraySplitter:
    """Finds the elements of a JSON array by its brackets, a chunk at a time.

    Each element is parsed for itself afterwards: a bad one does not take the others with it.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self._offset = start + 1
        self._line = file.read(start + 1).count(b"\n") + 1
        self._element = bytearray()
        self._element_line = 0
        self._element_offset = 0
        self._is_too_long = False

    def split(self) -> Iterator[_Raw]:
        """Yields every element, and what stands behind the array, where that is not blank."""
        depth = position = 0
        in_string = is_closed = False
        while chunk := self._file.read(_CHUNK):
            begin = 0
            while not is_closed:
                match = (_IN_STRING if in_string else _OUTSIDE).search(chunk, position)
                if match is None:
                    break
                position = match.end()
                mark = match.group()
                if mark == b"\\":
                    position += 1
                elif mark == b'"':
                    in_string = not in_string
                elif mark in b"{[":
                    depth += 1
                elif depth and mark in b"]}":
                    depth -= 1
                elif not depth and mark in b",]":
                    yield from self._end(chunk[begin : position - 1])
                    self._offset += 1
                    begin = position
                    is_closed = mark == b"]"
            self._keep(chunk[begin:])
            # A backslash that ends a chunk hides the first byte of the next one.
            position = max(0, position - len(chunk))
        if is_closed:
            for rest in self._end(b""):
                yield replace(rest, flaw=_AFTER_ARRAY)
        else:
            yield from self._end(b"")
            yield _Raw(self._line, self._offset, b"", flaw=_ARRAY_NOT_CLOSED)

    def _keep(self, piece: bytes) -> None:
        size = len(piece)
        if not self._element:
            stripped = piece.lstrip(_BLANKS)
            skipped = size - len(stripped)
            self._element_line = self._line + piece.count(b"\n", 0, skipped)
            self._element_offset = self._offset + skipped
            self._element += stripped
        elif not self._is_too_long:
            self._element += piece
        if len(self._element) > LARGEST_RECORD:
            self._is_too_long = True
            del self._element[_CHUNK:]
        self._line += piece.count(b"\n")
        self._offset += size

    def _end(self, piece: bytes) -> Iterator[_Raw]:
        self._keep(piece)
        if self._element:
            yield _Raw(
                self._element_line,
                self._element_offset,
                bytes(self._element.rstrip(_BLANKS)),
                self._is_too_long,
            )
        self._element.clear()
        self._is_too_long = False
