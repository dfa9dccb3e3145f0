"""The curves of a run: what its events have measured, by name and step.

Read from the log in slices, between which others get their turn, and kept for a while, so that the
next page and the next look read only what is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from finetuned.v1 import event_pb2
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.event_rows import EventRows

_SLICE = 500
"""Events read in one go: 2 to 3 ms."""
_SMALL_BYTES = 4096
"""A larger event is a log line nearly always, and is read alone."""
_BUCKETS_AT_ONCE = 500
_LOADS_AT_ONCE = 2
_KEPT_SECONDS = 60.0
_KEPT_POINTS = BY_NAME["kept_points"].default
_NEVER = 1 << 62
"""As `last_seq`: nothing is to be read of the log any more."""
_KEPT_RUNS = 250
"""A run costs some KiB even where it has no point."""
_ANSWER_POINTS = BY_NAME["thinned_points"].default


@dataclass(frozen=True)
class Points:
    """A piece of one curve; the lists are of equal length."""

    metric: str
    steps: list[int]
    values: list[float]
    epochs: list[float]
    times: list[float]
    """Seconds since the epoch."""
    point_count: int
    """Points that the curve has, of which these are some."""


@dataclass(frozen=True)
class Place:
    """Where a page ended: behind all of a step, or behind one metric of it."""

    step: int
    metric: str = ""
    """Empty: behind all of them."""


@dataclass
class _Column:
    """One curve: the rows that have a value of it, ascending, and the values."""

    rows: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    total: int = 0
    """Points that it had before it was thinned out; less than there are: it was not."""


class RunCurves:
    """All curves of one run, each step once. 8 bytes a value, and what its event has in common."""

    def __init__(self) -> None:
        self.last_seq = 0
        """How far the log has been read."""
        self._steps = array("q")
        self._epochs = array("d")
        self._times = array("d")
        self._columns = dict[str, _Column]()

    @classmethod
    def restored(cls, curves: Sequence[Points]) -> RunCurves:
        """The curves of a run of which only so much is left."""
        measured = dict[tuple[int, float, float], dict[str, float]]()
        for points in curves:
            for step, value, epoch, time in zip(
                points.steps, points.values, points.epochs, points.times, strict=True
            ):
                measured.setdefault((step, time, epoch), {})[points.metric] = value
        result = cls()
        result.last_seq = _NEVER
        for step, time, epoch in sorted(measured):
            result.add(step, epoch, time, measured[step, time, epoch])
        for points in curves:
            result._columns[points.metric].total = points.point_count
        return result

    @property
    def point_count(self) -> int:
        """Points of all curves."""
        return sum(len(column.values) for column in self._columns.values())

    def add(self, step: int, epoch: float, time: float, values: Mapping[str, float]) -> None:
        """Takes what was measured at a step. One before the last takes the run back to it.

        What was measured from there on, before a pause or a kill, is about to be measured again.
        """
        if self._steps and step < self._steps[-1]:
            self._go_back_to(step)
        row = len(self._steps)
        self._steps.append(step)
        self._epochs.append(epoch)
        self._times.append(time)
        for name, value in values.items():
            column = self._columns.setdefault(name, _Column())
            if column.rows and self._steps[column.rows[-1]] == step:
                column.rows[-1], column.values[-1] = row, value
            else:
                column.rows.append(row)
                column.values.append(value)

    def page(
        self, metrics: Sequence[str], after_step: int, after: Place | None, most: int
    ) -> tuple[list[Points], Place | None]:
        """Up to `most` points of all curves together, by step, and where to go on; None: nowhere.

        Args:
            metrics: Names; empty: all.
            after_step: Only steps after this one; 0: all.
            after: Where the page before ended.
            most: At least 1.
        """
        names = self._names(metrics)
        firsts = {name: self._first(name, after_step) for name in names}
        starts = firsts
        if after is not None:
            starts = {
                name: max(
                    firsts[name],
                    self._at(name, after.step)
                    if after.metric and name > after.metric
                    else self._behind(name, after.step),
                )
                for name in names
            }
        ends = self._ends(starts, most)
        steps_left = {
            name: self._steps[self._columns[name].rows[start]]
            for name, start in starts.items()
            if start < len(self._columns[name].rows)
        }
        if ends is None:  # more metrics at one step than a page has points
            step = min(steps_left.values())
            chosen = [name for name in names if steps_left.get(name) == step][:most]
            ends = {name: starts[name] + (name in chosen) for name in names}
            place: Place | None = Place(step, chosen[-1])
        else:
            sent = [self._columns[name].rows[end - 1] for name, end in ends.items() if end]
            place = Place(self._steps[max(sent)]) if sent else None
        if all(end == len(self._columns[name].rows) for name, end in ends.items()):
            place = None
        pieces = [
            self._points(name, range(starts[name], ends[name]), firsts[name])
            for name in names
            if ends[name] > starts[name]
        ]
        return pieces, place

    async def thinned(self, metrics: Sequence[str], after_step: int, most: int) -> list[Points]:
        """The whole of the curves with at most so many points each.

        First and last stay, and of each stretch between them the lowest and the highest.
        """
        names = self._names(metrics)
        most = max(2, min(most, _ANSWER_POINTS // max(1, len(names))))
        result = list[Points]()
        for name in names:
            first = self._first(name, after_step)
            values = self._columns[name].values
            if len(values) - first <= most:
                indices: Sequence[int] = range(first, len(values))
            else:
                indices = await _thin(values, first, most)
            if indices:
                result.append(self._points(name, indices, first))
            await asyncio.sleep(0)
        return result

    def _names(self, metrics: Sequence[str]) -> list[str]:
        return sorted(set(metrics) & set(self._columns) if metrics else self._columns)

    def _first(self, name: str, after_step: int) -> int:
        return self._behind(name, after_step) if after_step else 0

    def _at(self, name: str, step: int) -> int:
        return bisect_left(self._columns[name].rows, step, key=self._steps.__getitem__)

    def _behind(self, name: str, step: int) -> int:
        return bisect_right(self._columns[name].rows, step, key=self._steps.__getitem__)

    def _ends(self, starts: Mapping[str, int], most: int) -> dict[str, int] | None:
        """How far each curve goes in a page that ends behind a step; None: not one step fits."""

        def ends(row: int) -> dict[str, int]:
            return {
                name: max(start, bisect_left(self._columns[name].rows, row))
                for name, start in starts.items()
            }

        def points(row: int) -> int:
            return sum(ends(row).values()) - sum(starts.values())

        end = bisect_right(range(len(self._steps) + 1), most, key=points) - 1
        while 0 < end < len(self._steps) and self._steps[end] == self._steps[end - 1]:
            end -= 1
        if end < len(self._steps) and not points(end):
            return None
        return ends(end)

    def _points(self, name: str, indices: Sequence[int], first: int) -> Points:
        column = self._columns[name]
        rows = [column.rows[index] for index in indices]
        return Points(
            metric=name,
            steps=[self._steps[row] for row in rows],
            values=[column.values[index] for index in indices],
            epochs=[self._epochs[row] for row in rows],
            times=[self._times[row] for row in rows],
            point_count=_scaled(column, first),
        )

    def _go_back_to(self, step: int) -> None:
        row = bisect_left(self._steps, step)
        for rows in (self._steps, self._epochs, self._times):
            del rows[row:]
        for column in self._columns.values():
            place = bisect_left(column.rows, row)
            del column.rows[place:]
            del column.values[place:]
        self._columns = {name: c for name, c in self._columns.items() if c.rows}


def _scaled(column: _Column, first: int) -> int:
    """Points that a curve has or had from its `first` on.

    Those that are left of one that was thinned out lie evenly among those that there were.
    """
    there, left = len(column.rows), len(column.rows) - first
    return left if column.total <= there else -(-left * column.total // there)


async def _thin(values: array[float], first: int, most: int) -> list[int]:
    """Up to `most` indices from `first` on, ascending: first, last, and extremes between."""
    last = len(values) - 1
    buckets = (most - 2) // 2
    result = [first]
    for bucket in range(buckets):
        start = first + 1 + bucket * (last - first - 1) // buckets
        end = first + 1 + (bucket + 1) * (last - first - 1) // buckets
        piece = values[start:end]
        lowest, highest = min(piece), max(piece)
        if math.isnan(lowest) or math.isnan(highest):  # it compares with nothing
            numbers = [value for value in piece if not math.isnan(value)] or piece
            lowest, highest = min(numbers), max(numbers)
        if math.isnan(lowest):
            result.append(start)
        else:
            result += sorted({start + piece.index(lowest), start + piece.index(highest)})
        if bucket % _BUCKETS_AT_ONCE == _BUCKETS_AT_ONCE - 1:
            await asyncio.sleep(0)
    return [*result, last]


@dataclass
class _Kept:
    """The curves of a run, as long as somebody may ask for them again."""

    curves: RunCurves = field(default_factory=RunCurves)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0
    timer: asyncio.TimerHandle | None = None


class Curves:
    """Reads curves, and keeps those that were asked for last. Used on the event loop's thread."""

    def __init__(self, database: Database) -> None:
        self._rows = EventRows(database)
        self._kept = dict[tuple[int, int], _Kept]()
        self._loads = asyncio.Semaphore(_LOADS_AT_ONCE)
        self.digest: Callable[[int, int], RunCurves | None] = lambda _, __: None
        """What stands for the log of a run, by its task's key and its number; None: it does."""

    @contextlib.asynccontextmanager
    async def of(self, task_key: int, run: int) -> AsyncGenerator[RunCurves]:
        """The curves of a run as they stand; within it they don't change."""
        key = (task_key, run)
        kept = self._kept.pop(key, None) or _Kept()
        self._kept[key] = kept  # the last in use is the last to go
        kept.users += 1
        if kept.timer is not None:
            kept.timer.cancel()
        try:
            async with kept.lock:
                digest = None if kept.curves.last_seq else self.digest(task_key, run)
                if digest is not None:
                    kept.curves = digest
                else:
                    async with self._loads:
                        await self._read_on(task_key, run, kept.curves)
                    # Deleted while it was read?
                    kept.curves = self.digest(task_key, run) or kept.curves
                yield kept.curves
        finally:
            kept.users -= 1
            if not kept.users:
                loop = asyncio.get_running_loop()
                kept.timer = loop.call_later(_KEPT_SECONDS, self._kept.pop, key, None)
            self._make_room()

    async def _read_on(self, task_key: int, run: int, curves: RunCurves) -> None:
        bounds = self._rows.of_run(task_key, run)
        if bounds is None:
            return
        curves.last_seq = max(curves.last_seq, bounds[0] - 1)
        while curves.last_seq < bounds[1]:
            rows = self._rows.small(task_key, run, curves.last_seq, bounds[1], _SLICE, _SMALL_BYTES)
            for seq, body in rows:
                curves.last_seq = seq
                body = self._rows.one(task_key, seq) if body is None else body
                take(curves, event_pb2.Event.FromString(body))
            if len(rows) < _SLICE:
                return
            await asyncio.sleep(0)

    def _make_room(self) -> None:
        """Forgets the oldest beyond the bounds; the one that was asked for last always stays."""
        points = sum(kept.curves.point_count for kept in self._kept.values())
        for key, kept in list(self._kept.items())[:-1]:
            if points <= _KEPT_POINTS and len(self._kept) <= _KEPT_RUNS:
                return
            if not kept.users:
                points -= kept.curves.point_count
                del self._kept[key]
                if kept.timer is not None:
                    kept.timer.cancel()


def take(curves: RunCurves, event: event_pb2.Event) -> None:
    """Takes what an event has measured, if it has."""
    kind = event.WhichOneof("payload")
    if kind == "metrics":
        measured: event_pb2.Metrics | event_pb2.Evaluation = event.metrics
    elif kind == "evaluation":
        measured = event.evaluation
    else:
        return
    time = event.time.seconds + event.time.nanos / 1e9
    curves.add(measured.step, measured.epoch, time, measured.values)
