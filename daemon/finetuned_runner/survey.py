"""What has to be known of each chat of a file before tokens are made, without keeping the chats.

A chat of a kilobyte takes four in memory, and a file may have a million: what is kept of each is
where it stands, and some numbers. Whoever makes its tokens reads it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from finetuned_daemon.dataset.formats import Chat, message_text
from finetuned_daemon.dataset.reader import BadLine, Place, Stretch, scan_chats

BAD_LINES_SHOWN = 5

_Ints = npt.NDArray[Any]
_ARRAYS = ("lines", "offsets", "sizes", "checksums", "kinds", "before", "characters")


@dataclass(frozen=True)
class Survey:
    """The chats of a stretch of a file: an array of each, with a number for each chat in order."""

    lines: _Ints
    offsets: _Ints
    sizes: _Ints
    checksums: _Ints
    kinds: _Ints
    """Equal for chats that a template treats alike."""
    before: _Ints
    """Bytes of the text before the first answer."""
    characters: _Ints
    """Of all text."""
    num_lines: int
    """In the file's own sense: lines that hold no chat count too."""
    bad: list[BadLine]
    """The first of the lines that can't be used."""
    num_bad: int

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, number: int) -> Place:
        """Where a chat stands."""
        return Place(
            int(self.lines[number]),
            int(self.offsets[number]),
            int(self.sizes[number]),
            int(self.checksums[number]),
        )

    def first_of_kinds(self) -> _Ints:
        """The first chat of each kind, in the order of the file."""
        _, first = np.unique(self.kinds, return_index=True)
        return np.sort(first)

    def firsts(self) -> _Ints:
        """For each chat, the first of its kind."""
        _, first, kind = np.unique(self.kinds, return_index=True, return_inverse=True)
        return first[kind]


def survey(descriptor: int, stretch: Stretch, most: int) -> Survey:
    """Goes through a stretch of a data file.

    Args:
        descriptor: Of the file.
        stretch: Which part of it.
        most: Records at most; 0: all.

    Raises:
        OSError: The file can't be read.
    """
    rows = list[tuple[int, ...]]()
    bad = list[BadLine]()
    num_bad = num_lines = 0
    for item in islice(scan_chats(descriptor, stretch), most or None):
        if isinstance(item, int):
            num_lines = item
        elif isinstance(item, BadLine):
            num_bad += 1
            if len(bad) < BAD_LINES_SHOWN:
                bad.append(item)
        else:
            chat, place = item
            rows.append(
                (
                    place.line,
                    place.offset,
                    place.size,
                    place.checksum,
                    _kind(chat),
                    _bytes_before_answer(chat),
                    sum(len(message_text(message)) for message in chat.messages),
                )
            )
    columns = zip(*rows, strict=True) if rows else [()] * len(_ARRAYS)
    types = (np.int32, np.int64, np.int32, np.uint32, np.uint64, np.int32, np.int32)
    arrays = {
        name: np.array(column, kind)
        for name, column, kind in zip(_ARRAYS, columns, types, strict=True)
    }
    return Survey(**arrays, num_lines=num_lines, bad=bad, num_bad=num_bad)


def whole(parts: Sequence[Survey]) -> Survey:
    """The survey of a file of those of its stretches, in order."""
    starts = np.cumsum([0, *(part.num_lines for part in parts)]).tolist()
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS}
    arrays["lines"] = np.concatenate(
        [part.lines + start for part, start in zip(parts, starts[:-1], strict=True)]
    ).astype(np.int32)
    return Survey(
        **arrays,
        num_lines=starts[-1],
        bad=shown(
            replace(line, line=line.line + start)
            for part, start in zip(parts, starts[:-1], strict=True)
            for line in part.bad
        ),
        num_bad=sum(part.num_bad for part in parts),
    )


def shown(bad: Iterable[BadLine]) -> list[BadLine]:
    """Those of the bad lines that are named."""
    return list(islice(bad, BAD_LINES_SHOWN))


def _kind(chat: Chat) -> int:
    """What a template may treat differently: roles, tools, reasoning, contents that are empty."""
    kind = (
        chat.tools is not None,
        *(
            (
                message["role"],
                not message["content"].strip(),
                "<" in message["content"] or "[" in message["content"],
                *sorted(message.keys() - {"role", "content"}),
            )
            for message in chat.messages
        ),
    )
    # Several processes have to agree on it, and Python's own hashes differ between them.
    return int.from_bytes(blake2b(repr(kind).encode(), digest_size=8).digest())


def _bytes_before_answer(chat: Chat) -> int:
    size = 0
    for message in chat.messages:
        if message["role"] == "assistant":
            break
        size += len(message_text(message).encode())
    return size
