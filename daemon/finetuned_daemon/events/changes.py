"""Tells the watchers of the list of tasks which of them have changed.

A watcher holds names of what it has to look at again, never what was seen: however slow it is, it
reads the newest state, and costs some bytes for each task that has changed since. What one has read
the others are sent as well, as long as it is the newest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass

from finetuned_daemon.runs import scheduler
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import ACTIVE, Task, TaskState

PROGRESS_SECONDS = 0.25
"""The least time between two messages on one task where nothing but its progress has changed."""

_PLACE = -1
"""Stands for a revision: nothing but its place in the queue has changed."""
_EVENTS = 0
"""The same: nothing but its log has grown."""
_KEPT = 1200
"""Tasks that are kept ready: a full queue, each of which changes its place when the first begins.

About 0.5 KiB each.
"""


@dataclass(frozen=True)
class Shown:
    """A task as watchers see it now."""

    key: int
    revision: int
    state: TaskState
    data: bytes
    """The message."""


class TaskChanges:
    """Who is to be told what has changed. Used on the event loop's thread alone."""

    def __init__(self, records: Records) -> None:
        """Takes what knows the queue; its callbacks are set here."""
        self._records = records
        records.on_saved = self._saved
        records.on_deleted = self._deleted
        self._watchers = set[TaskWatcher]()
        self._bells = set[asyncio.Event]()
        # Kept up to date only while somebody watches.
        self._standing = dict[int, TaskState]()
        self._positions = dict[int, int]()
        # Which task changed its place in the queue at which of the changes of the queue, in order:
        # one for all watchers, each of which looks when it is its turn.
        self._moves = dict[int, int]()
        self._moved = 0
        self._shown = dict[int, Shown]()

    @contextlib.contextmanager
    def watch(self) -> Generator[TaskWatcher]:
        """Within it, nothing that changes is missed."""
        self._begin()
        watcher = TaskWatcher(self._moves, self._moved)
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)
            if not self._watchers:
                self._shown.clear()

    @contextlib.contextmanager
    def device_bell(self) -> Generator[asyncio.Event]:
        """Within it, the event is set whenever a device is taken or freed, or its queue changes."""
        self._begin()
        bell = asyncio.Event()
        self._bells.add(bell)
        try:
            yield bell
        finally:
            self._bells.discard(bell)

    def position(self, task: Task) -> int:
        """The place of a task in the queue of its device, while somebody watches; 0: in none."""
        # One that was queued and is not any more was the first, and has begun meanwhile.
        return self._positions.get(task.key, 1) if task.state is TaskState.QUEUED else 0

    def logged(self, task_key: int) -> None:
        """Events were appended to the log of a task."""
        self._shown.pop(task_key, None)
        for watcher in self._watchers:
            watcher.note(task_key, _EVENTS)

    def wake_all(self) -> None:
        """Wakes every watcher, such as to tell it that the daemon stops."""
        for watcher in self._watchers:
            watcher.wake()
        for bell in self._bells:
            bell.set()

    def shown(self, task_key: int) -> Shown | None:
        """A task as somebody has read it, where it has not changed since."""
        return self._shown.get(task_key)

    def keep(self, shown: Shown) -> None:
        """What was read of a task now, for the other watchers."""
        if len(self._watchers) > 1:
            self._shown[shown.key] = shown
            if len(self._shown) > _KEPT:
                del self._shown[next(iter(self._shown))]

    def _begin(self) -> None:
        if not self._watchers and not self._bells:
            self._moves.clear()
            self._standing = self._records.active_states()
            self._positions = scheduler.queue_positions(self._records.queue())

    def _saved(self, task: Task) -> None:
        self._shown.pop(task.key, None)
        for watcher in self._watchers:
            watcher.note(task.key, task.revision)
        if self._watchers or self._bells:
            self._stands(task.key, task.state if task.state in ACTIVE else None)

    def _deleted(self, task: Task) -> None:
        self._shown.pop(task.key, None)
        self._moves.pop(task.key, None)
        for watcher in self._watchers:
            watcher.note(task.key, task.name)

    def _stands(self, task_key: int, state: TaskState | None) -> None:
        before = self._standing.get(task_key)
        if state is None:
            self._standing.pop(task_key, None)
        else:
            self._standing[task_key] = state
        if TaskState.QUEUED in (before, state):  # a move leaves its state what it was
            old = self._positions
            self._positions = scheduler.queue_positions(self._records.queue())
            self._move(
                [
                    key
                    for key, position in self._positions.items()
                    if old.get(key) != position and key != task_key
                ]
            )
        if state is not before:
            for bell in self._bells:
                bell.set()

    def _move(self, keys: list[int]) -> None:
        """Tasks have other places in the queue."""
        if not keys:
            return
        self._moved += 1
        for key in keys:
            self._shown.pop(key, None)
            self._moves.pop(key, None)  # the newest are the last
            self._moves[key] = self._moved
        for key in [key for key in self._moves if key not in self._positions]:
            del self._moves[key]  # it has begun, which was said of itself
        for watcher in self._watchers:
            watcher.moved(self._moved)


class TaskWatcher:
    """One watcher: what it was sent, and what it has to look at again."""

    def __init__(self, moves: dict[int, int], moved: int) -> None:
        """Takes which tasks changed their place when, and the last of these changes."""
        self._moves = moves
        self._moves_seen = self._moved = moved
        self._listed = _Keys()
        # Revision of a task that has changed, or its name where it is deleted, in order.
        self._changed = dict[int, int | str]()
        # When each was sent, and with which revision; forgotten once that is long enough ago.
        self._sent = dict[int, tuple[float, int]]()
        self._bell = asyncio.Event()

    def note(self, task_key: int, change: int | str) -> None:
        """A task has changed: its revision, or its name where it is deleted."""
        if isinstance(change, str) and task_key not in self._listed:
            self._changed.pop(task_key, None)  # nobody has seen it
        elif change == _EVENTS:
            self._changed.setdefault(task_key, change)
        else:
            self._changed[task_key] = change
        self._bell.set()

    def moved(self, number: int) -> None:
        """Tasks have changed their places in the queue, for the so-many-th time."""
        self._moved = number
        self._bell.set()

    def sent(self, task: Task | Shown) -> None:
        """A task is sent as it stands: until it changes again, there is nothing to tell of it."""
        self._changed.pop(task.key, None)
        self._listed.add(task.key)
        self._forget_old()
        self._sent.pop(task.key, None)
        self._sent[task.key] = (time.monotonic(), task.revision)

    def left(self, task_key: int) -> bool:
        """A task is no longer in the list; whether it was."""
        self._changed.pop(task_key, None)
        if task_key not in self._listed:
            return False
        self._listed.discard(task_key)
        return True

    def take(self, most: int) -> list[tuple[int, str]]:
        """Up to so many tasks to look at now, by their keys; with its name, one that is deleted."""
        self._bell.clear()
        self._look_at_moves()
        found = list[tuple[int, str]]()
        for key, change in self._changed.items():
            if self._wait(key, change) <= 0:
                found.append((key, change if isinstance(change, str) else ""))
                if len(found) == most:
                    break
        return found

    async def wait(self, seconds: float) -> None:
        """Returns once there may be something to take, or time is up."""
        self._look_at_moves()
        waits = [self._wait(key, change) for key, change in self._changed.items()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min([seconds, *waits])):
                await self._bell.wait()

    def wake(self) -> None:
        """Lets it look."""
        self._bell.set()

    def _look_at_moves(self) -> None:
        if self._moves_seen == self._moved:
            return
        for key in reversed(self._moves):
            if self._moves[key] <= self._moves_seen:
                break
            self._changed.setdefault(key, _PLACE)
        self._moves_seen = self._moved

    def _wait(self, key: int, change: int | str) -> float:
        """Seconds until a change may be sent."""
        time_sent, revision = self._sent.get(key, (0.0, 0))
        if change not in (_EVENTS, revision):
            return 0.0
        return time_sent + PROGRESS_SECONDS - time.monotonic()

    def _forget_old(self) -> None:
        old = time.monotonic() - PROGRESS_SECONDS
        while self._sent:
            key, (time_sent, _) = next(iter(self._sent.items()))
            if time_sent > old:
                break
            del self._sent[key]


class _Keys:
    """A set of rows' keys: a bit each, so that a list of 100,000 tasks costs a watcher 12 KiB."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, key: int) -> None:
        place = key >> 3
        if place >= len(self._bits):
            self._bits.extend(bytes(place + 1 - len(self._bits)))
        self._bits[place] |= 1 << (key & 7)

    def discard(self, key: int) -> None:
        if key in self:
            self._bits[key >> 3] &= ~(1 << (key & 7))

    def __contains__(self, key: int) -> bool:
        place = key >> 3
        return place < len(self._bits) and bool(self._bits[place] & (1 << (key & 7)))
