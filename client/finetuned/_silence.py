"""A watchdog for streams: grpc's blocking iteration has no timeout of its own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from finetuned import _fork
from finetuned._errors import DaemonUnavailable

SILENCE_SECONDS = 20.0
"""A stream this long without event or heartbeat is dead; heartbeats come every 5 s."""


def silent(seconds: float) -> DaemonUnavailable:
    """The error of a stream on which nothing came."""
    return DaemonUnavailable(f"nothing came from the daemon for {seconds:g} s")


class Silence:
    """Cancels a stream on which nothing comes; one thread for each stream."""

    def __init__(self, call: Any, seconds: float, pid: int) -> None:
        self.error: DaemonUnavailable | None = None
        self._call = call
        self._seconds = seconds
        self._pid = pid
        self._deadline: float | None = None
        self._closed = threading.Event()
        _fork.stream_begins(self)
        threading.Thread(target=self._guard, name="finetuned-silence", daemon=True).start()

    def messages(self) -> Iterator[Any]:
        """The stream's messages. Time that the caller spends on one does not count as silence."""
        messages = iter(self._call)
        while True:
            _fork.check(self._pid)
            self._deadline = time.monotonic() + self._seconds
            try:
                message = next(messages)
            except StopIteration:
                return
            finally:
                self._deadline = None
            yield message

    def close(self) -> None:
        """End stream and watchdog; in a child of a fork neither is there, and gRPC would hang."""
        _fork.stream_ends(self)
        if os.getpid() != self._pid:
            return
        self._closed.set()
        self._call.cancel()

    def _guard(self) -> None:
        while not self._closed.wait(self._seconds / 10):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self.error = silent(self._seconds)
                self._call.cancel()
                return
