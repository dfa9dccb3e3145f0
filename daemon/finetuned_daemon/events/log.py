"""The durable event log of every task.

The log itself is the queue: a watcher holds a cursor and nothing else, reads bounded pages, and can
be as slow as it likes without anybody waiting for it or anything being lost.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from finetuned.v1 import event_pb2
from finetuned_daemon import logs
from finetuned_daemon.errors import CursorOutOfRange
from finetuned_daemon.events.fan_out import FanOut
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.event_rows import EventRows

_CAUSED = frozenset({"state_change", "phase_change", "task_edited", "result", "notice"})
"""Kinds of events that say by which call they were caused; the others come too often."""

_TEXTS = {
    "log_line": ("text",),
    "notice": ("message",),
    "phase_change": ("message",),
    "result": ("message", "detail"),
    "state_change": ("message",),
}
"""Texts that come from elsewhere, and could be of any length."""

_LONGEST_TEXT = BY_NAME["log_line_bytes"].default


class EventLog:
    """Appends and reads. Used on the event loop's thread alone."""

    def __init__(self, database: Database, quiet_seconds: float = 5.0) -> None:
        """Takes the database, and after how long without an event a watcher is woken anyway."""
        self._database = database
        self._rows = EventRows(database)
        self.fan_out = FanOut(self._rows, quiet_seconds, self.check_kept)
        """Those who watch."""
        self.within: Callable[[sqlite3.Connection, int, Sequence[event_pb2.Event]], None] = _nobody
        """Called with a task's key and its new events, within the transaction that writes them."""
        self.on_append: Callable[[int, Sequence[event_pb2.Event]], None] = _nobody
        """The same, once they are committed."""
        self.on_end: Callable[[int], None] = lambda _: None
        """Called with a task's key once the end of a run of it is in the log."""

    @property
    def epoch(self) -> str:
        """Tells this log from one restored from a backup."""
        return self._database.log_epoch

    def append(
        self,
        connection: sqlite3.Connection,
        task_key: int,
        events: Sequence[event_pb2.Event],
        request_id: str | None = None,
    ) -> int:
        """Gives events their `seq` and writes them within a transaction; returns the last `seq`.

        Watchers are woken once the transaction is committed.

        Args:
            connection: That of the transaction.
            task_key: The task.
            events: At least one.
            request_id: The call that has caused them; None: the one that is being answered.
        """
        caused_by = logs.request_id() if request_id is None else request_id
        seq = self._rows.next_seq(connection, task_key)
        rows = list[tuple[int, int, bytes]]()
        for event in events:
            event.seq = seq
            kind = event.WhichOneof("payload")
            if kind in _CAUSED:
                event.request_id = event.request_id or caused_by
            for field in _TEXTS.get(kind or "", ()):
                message = getattr(event, str(kind))
                text = getattr(message, field)
                if len(text) > _LONGEST_TEXT // 4:  # characters of up to four bytes
                    setattr(message, field, cut(text))
            rows.append((seq, event.run, event.SerializeToString()))
            seq += 1
        self._rows.append(connection, task_key, rows)
        self.within(connection, task_key, events)
        bodies = [body for _, _, body in rows]
        self._database.after_commit(
            lambda: self.fan_out.appended(task_key, seq - len(bodies), bodies)
        )
        self._database.after_commit(lambda: self.on_append(task_key, events))
        if any(event.HasField("result") for event in events):
            self._database.after_commit(lambda: self.on_end(task_key))
        return seq - 1

    def read(
        self, task_key: int, after_seq: int, limit: int, run: int = 0, most_bytes: int = 0
    ) -> list[event_pb2.Event]:
        """Up to `limit` events after `after_seq`, oldest first.

        Args:
            task_key: The task.
            after_seq: As `start` gave it, or the last that was read.
            limit: Most of them.
            run: Only events of this run; 0: of all.
            most_bytes: Of all together, but one event at least; 0: any number.
        """
        bodies = self.read_serialized(task_key, after_seq, limit, run, most_bytes)
        return [event_pb2.Event.FromString(body) for body in bodies]

    def read_serialized(
        self, task_key: int, after_seq: int, limit: int, run: int = 0, most_bytes: int = 0
    ) -> list[bytes]:
        """The same events as they lie in the log."""
        bodies, size = list[bytes](), 0
        for body in self._rows.read(task_key, after_seq, limit, run):
            size += len(body)
            if most_bytes and size > most_bytes and bodies:
                break
            bodies.append(body)
        return bodies

    def last_seq(self, task_key: int) -> int | None:
        """Newest `seq` of a task; None once the task is deleted."""
        return self._rows.last_seq(task_key)

    def first_seq(self, task_key: int) -> int:
        """Oldest `seq` of a task that is kept, or the next to come."""
        return self._rows.first_seq(task_key)

    def start(self, task_key: int, after_seq: int, last_seq: int, log_epoch: str = "") -> int:
        """The cursor to read from: good from the oldest event kept to the newest; then it waits.

        0 is always good, and means from the oldest that is kept.

        Raises:
            CursorOutOfRange: Beyond the newest event, before the oldest, or of another log.
        """
        if log_epoch and log_epoch != self.epoch:
            raise CursorOutOfRange(
                "LOG_EPOCH_CHANGED",
                "this is not the log that the cursor comes from (the database was restored); "
                "watch again from 0",
            )
        if after_seq > last_seq:
            raise CursorOutOfRange(
                "SEQ_BEYOND_LAST",
                f"after_seq {after_seq} lies beyond the newest event, {last_seq}; "
                "watch again from 0",
            )
        first = self.first_seq(task_key)
        if not after_seq:
            return first - 1
        self.check_kept(after_seq, first)
        return after_seq

    def check_kept(self, after_seq: int, first_seq: int) -> None:
        """Raises where events after a cursor have been deleted.

        Raises:
            CursorOutOfRange: With the oldest event that is kept.
        """
        if after_seq < first_seq - 1:
            raise CursorOutOfRange(
                "SEQ_COMPACTED",
                f"events up to {first_seq - 1} were deleted, to keep the log at its bound: the "
                f"oldest that is kept is {first_seq}; watch again from 0",
                first_seq,
            )

    def wake(self, task_key: int) -> None:
        """Lets the watchers of a task see that it was deleted."""
        self.fan_out.look(task_key)

    def wake_all(self) -> None:
        """Wakes every watcher, such as to tell it that the daemon stops."""
        self.fan_out.wake_all()


def _nobody(*_: object) -> None:
    """Stands for whoever is not told."""


def cut(text: str) -> str:
    """A text as it goes into the log: cut in the middle where it is too long for an answer."""
    data = text.encode()
    if len(data) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2 - 40
    start, end = data[:half].decode(errors="ignore"), data[-half:].decode(errors="ignore")
    return f"{start} ... ({len(data) - 2 * half:,} bytes left out) ... {end}"
