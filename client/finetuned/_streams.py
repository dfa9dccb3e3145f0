"""Streams that go on after the connection broke: how both clients read one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from finetuned import _fork, _silence
from finetuned._caller import Caller
from finetuned._errors import DeadlineExceeded, FinetunedError, OutOfRange
from finetuned._silence import Silence
from finetuned._status import from_rpc_error

if TYPE_CHECKING:
    from finetuned._connect import Endpoint
    from finetuned._session import Session

Item = TypeVar("Item", covariant=True)
T = TypeVar("T")


class Place(Protocol[Item]):
    """Where a reader stands in a stream, without input or output of its own."""

    service: str
    rpc: str
    is_done: bool
    interval: float
    """Seconds that the stream is quiet by itself, beside heartbeats."""

    def request(self) -> Message:
        """What to ask for on a new stream."""
        ...

    def accept(self, response: Any) -> tuple[Item, ...]:
        """Take a message of the stream; returns what is to be yielded."""
        ...

    def lost(self, error: FinetunedError | None) -> Item | None:
        """Take the end of a stream; returns what is to be yielded, or raises the error."""
        ...

    def delay(self) -> float:
        """Seconds to wait before the next stream."""
        ...


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(deadline - time.monotonic(), 0.0)


def _pause_of(delay: float, deadline: float | None) -> float:
    """The pause, cut at the deadline.

    Raises:
        DeadlineExceeded: It has passed.
    """
    left = _left(deadline)
    if left is None:
        return delay
    if not left:
        raise DeadlineExceeded("the daemon is away")
    return min(delay, left)


class Streams(Caller):
    """How `Client` reads a stream."""

    def _follow(self, place: Place[T], deadline: float | None = None) -> Generator[T, None, None]:
        """The stream's items; until the deadline of the monotonic clock, then DeadlineExceeded."""
        may_start = True
        while True:
            failure: FinetunedError | None = None
            endpoint = self._connect(may_start=may_start)
            may_start = False  # a watch waits for a daemon that has gone
            call = getattr(self._stubs[place.service], place.rpc)(
                place.request(),
                metadata=self._session.metadata(endpoint),
                timeout=_left(deadline),
            )
            silence = Silence(call, _silence.SILENCE_SECONDS + place.interval, self._session.pid)
            try:
                for response in silence.messages():
                    self._session.was_reached = True
                    try:
                        items = place.accept(response)
                    except OutOfRange as error:  # the place is to say if it can begin anew
                        failure = error
                        break
                    yield from items
                    if place.is_done:
                        return
            except grpc.RpcError as error:
                failure = silence.error or from_rpc_error(error)
            finally:
                silence.close()
            if failure is not None:
                failure = self._session.check(endpoint, failure)
            lost = place.lost(failure)
            if lost is not None:
                yield lost
            self._pause(_pause_of(place.delay(), deadline))


class AsyncStreams:
    """How `AsyncClient` reads a stream."""

    if TYPE_CHECKING:
        _session: Session
        _stubs: dict[str, Any]

        async def _connect(self, *, may_start: bool = True) -> Endpoint: ...

    async def _follow(
        self, place: Place[T], deadline: float | None = None
    ) -> AsyncGenerator[T, None]:
        may_start = True
        while True:
            failure: FinetunedError | None = None
            endpoint = await self._connect(may_start=may_start)
            may_start = False
            call = getattr(self._stubs[place.service], place.rpc)(
                place.request(),
                metadata=self._session.metadata(endpoint),
                timeout=_left(deadline),
            )
            quiet = _silence.SILENCE_SECONDS + place.interval
            _fork.stream_begins(call)
            try:
                while True:
                    _fork.check(self._session.pid)
                    # Not `wait_for`: before Python 3.12 it swallows a cancel that comes together
                    # with a message, and the watch would never end.
                    async with asyncio.timeout(quiet):
                        response = await call.read()
                    if not isinstance(response, Message):
                        break  # grpc.aio.EOF, which grpc-stubs do not know
                    self._session.was_reached = True
                    try:
                        items = place.accept(response)
                    except OutOfRange as error:
                        failure = error
                        break
                    for item in items:
                        yield item
                    if place.is_done:
                        return
            except TimeoutError:
                failure = _silence.silent(quiet)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
            finally:
                _fork.stream_ends(call)
                if not self._session.is_forked:
                    call.cancel()
            if failure is not None:
                failure = self._session.check(endpoint, failure)
            lost = place.lost(failure)
            if lost is not None:
                yield lost
            await asyncio.sleep(_pause_of(place.delay(), deadline))
