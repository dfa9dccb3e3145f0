"""Answers as the bytes that are sent: what has not changed is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from google.protobuf.message import Message

T = TypeVar("T")
B = TypeVar("B")

_LENGTH_DELIMITED = 2


class Ready(Generic[T, B]):
    """Encodings of the records that were shown last."""

    def __init__(self, encode: Callable[[T, B], Message], most: int) -> None:
        """Takes what makes the message of a record, and how many to keep."""
        self._encode = encode
        self._most = most
        self._kept: OrderedDict[Hashable, tuple[T, B, bytes]] = OrderedDict()

    def of(self, key: Hashable, record: T, beside: B) -> bytes:
        """The serialized message of a record.

        Args:
            key: Tells records apart.
            record: Nobody changes it: the same object has the same message.
            beside: All else that the message depends on, such as the place in the queue.
        """
        kept = self._kept.get(key)
        if kept is not None and kept[0] is record and kept[1] == beside:
            self._kept.move_to_end(key)
            return kept[2]
        body = self._encode(record, beside).SerializeToString()
        self._kept[key] = record, beside, body
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return body


class Repeated:
    """The answers that were given last, for as long as nothing was written since.

    For what is polled: a list that has not changed, a curve of a run that is over. Only for answers
    that say what the database says, and nothing else.
    """

    _MOST = 8
    _MOST_BYTES = 256 << 10
    """Of one answer; a larger one is not kept."""

    def __init__(self, written: Callable[[], int | None]) -> None:
        """Takes what counts the rows that were written; None while a transaction is open."""
        self._written = written
        self._kept: OrderedDict[tuple[type, bytes], tuple[int, bytes]] = OrderedDict()

    def answer(self, request: Message) -> bytes | None:
        """The answer to the same request, if it holds still."""
        kept = self._kept.get((type(request), request.SerializeToString()))
        return kept[1] if kept is not None and kept[0] == self._written() else None

    @property
    def mark(self) -> int | None:
        """To be taken before what an answer says is read."""
        return self._written()

    def keep(self, request: Message, mark: int | None, answer: bytes) -> bytes:
        """Keeps an answer that was read after `mark`, if all of it is of one state; returns it."""
        if mark is not None and mark == self._written() and len(answer) <= self._MOST_BYTES:
            key = type(request), request.SerializeToString()
            self._kept[key] = mark, answer
            self._kept.move_to_end(key)
            if len(self._kept) > self._MOST:
                self._kept.popitem(last=False)
        return answer


def joined(field: int, bodies: Iterable[bytes], rest: Message | None = None) -> bytes:
    """A message whose field of this number holds these messages, and `rest` all else of it."""
    tag = varint(field << 3 | _LENGTH_DELIMITED)
    pieces = list[bytes]()
    for body in bodies:
        pieces += (tag, varint(len(body)), body)
    if rest is not None:
        pieces.append(rest.SerializeToString())  # the order of fields is free
    return b"".join(pieces)


def varint(value: int) -> bytes:
    """A number that is not negative, as protobuf writes it."""
    if value < 128:
        return _ONE_BYTE[value]
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


_ONE_BYTE = tuple(bytes((value,)) for value in range(128))
