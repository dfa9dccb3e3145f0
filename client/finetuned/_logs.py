"""Log lines of runs, as Python values; the methods of both clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from finetuned._calls import Steps, T, list_events_page, resolve
from finetuned._checks import check_numbers, refuse
from finetuned._errors import FieldViolation
from finetuned._streams import AsyncStreams, Streams
from finetuned._watch import Cursor, WatchItem
from finetuned._words import local
from finetuned.v1.event_pb2 import Event

LEVELS = ("debug", "info", "warning", "error")
_SAME = {"warn": "warning", "critical": "error"}
"""What Python's own logging calls them besides."""


@dataclass(frozen=True)
class LogEntry:
    """One line of a run's log; `str` of it is a line for people."""

    time: datetime
    """When it was written, in local time."""
    level: str
    """`debug`, `info`, `warning` or `error`."""
    logger: str
    """Who wrote it, such as `transformers.trainer`."""
    text: str
    """What it says; several lines for a traceback."""
    run: int
    """Number of the run."""
    seq: int
    """Its place in the task's event log."""

    def __str__(self) -> str:
        return f"{self.time:%H:%M:%S} {self.level.upper():7} {self.logger}: {self.text}"


class LogFilter:
    """Which events are wanted, as lines."""

    def __init__(self, level: str, run: int) -> None:
        """Lines of at least this level.

        Raises:
            InvalidArgument: There is no such level.
        """
        given = level.lower() if isinstance(level, str) else level  # pyright: ignore[reportUnnecessaryIsInstance]
        level = _SAME.get(given, given)
        check_numbers(run=run)
        if level not in LEVELS:
            what = f"must be one of {', '.join(LEVELS)}, not {level!r}"
            refuse([FieldViolation("level", what, "NOT_A_CHOICE")])
        self._hidden = LEVELS[: LEVELS.index(level)]
        self._run = run

    def entry(self, item: WatchItem) -> LogEntry | None:
        """The line that an item brings; None where it brings none that is wanted."""
        if not isinstance(item, Event) or not item.HasField("log_line"):
            return None
        return log_entry(item) if self._takes(item) else None

    def _takes(self, event: Event) -> bool:
        # A level that a later daemon may send is shown rather than lost.
        return event.log_line.level not in self._hidden and self._run in (0, event.run)


def log_entry(event: Event) -> LogEntry:
    """The line that an event of the log is."""
    line = event.log_line
    return LogEntry(local(event.time), line.level, line.logger, line.text, event.run, event.seq)


class Logs(Streams):
    """How `Client` reads logs."""

    def logs(
        self, name: str, *, level: str = "info", run: int = 0, follow: bool = False
    ) -> Iterator[LogEntry]:
        """The log of a task, oldest line first; the daemon's own is `finetunectl daemon logs`.

        Args:
            name: The task.
            level: The least: `debug`, `info`, `warning` or `error`; in capitals too.
            run: Number of the run. 0: all.
            follow: Go on until the run has ended.

        Raises:
            NotFound: No such task.
            InvalidArgument: No such level.
        """
        wanted = LogFilter(level, run)
        name = self._run(resolve(name))
        if follow:
            for item in self._follow(Cursor(name, 0, "", True, None)):
                entry = wanted.entry(item)
                if entry is not None:
                    yield entry
            return
        after = 0
        while True:
            page = self._run(list_events_page(name, after, run))
            yield from filter(None, map(wanted.entry, page.events))
            if not page.events or page.events[-1].seq >= page.last_seq:
                return
            after = page.events[-1].seq


class AsyncLogs(AsyncStreams):
    """How `AsyncClient` reads logs."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def logs(
        self, name: str, *, level: str = "info", run: int = 0, follow: bool = False
    ) -> AsyncIterator[LogEntry]:
        wanted = LogFilter(level, run)
        name = await self._run(resolve(name))
        if follow:
            async with aclosing(self._follow(Cursor(name, 0, "", True, None))) as followed:
                async for item in followed:
                    entry = wanted.entry(item)
                    if entry is not None:
                        yield entry
            return
        after = 0
        while True:
            page = await self._run(list_events_page(name, after, run))
            for entry in filter(None, map(wanted.entry, page.events)):
                yield entry
            if not page.events or page.events[-1].seq >= page.last_seq:
                return
            after = page.events[-1].seq

    logs.__doc__ = Logs.logs.__doc__
