"""The durable event log of every task, and the bell that wakes its watchers.

The log itself is the queue: a watcher holds a cursor and nothing else, reads bounded pages, and can
be as slow as it likes without anybody waiting for it or anything being lost.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Sequence

from finetuned.v1 import event_pb2
from finetuned_daemon.errors import CursorOutOfRange
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.event_rows import EventRows

PAGE = 256
"""Events read at once for a watcher: about 60 KiB."""


class EventLog:
    """Appends, reads and waits. Used on the event loop's thread alone."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._rows = EventRows(database)
        self._waiters: dict[int, set[asyncio.Future[None]]] = defaultdict(set)

    @property
    def epoch(self) -> str:
        """Tells this log from one restored from a backup."""
        return self._database.log_epoch

    def append(
        self, connection: sqlite3.Connection, task_key: int, events: Sequence[event_pb2.Event]
    ) -> int:
        """Gives events their `seq` and writes them within a transaction; returns the last `seq`.

        Watchers are woken once the transaction is committed.
        """
        seq = self._rows.next_seq(connection, task_key)
        rows = list[tuple[int, int, bytes]]()
        for event in events:
            event.seq = seq
            rows.append((seq, event.run, event.SerializeToString()))
            seq += 1
        self._rows.append(connection, task_key, rows)
        self._database.after_commit(lambda: self.wake(task_key))
        return seq - 1

    def read(
        self, task_key: int, after_seq: int, limit: int, run: int = 0
    ) -> list[event_pb2.Event]:
        """Up to `limit` events after `after_seq`, oldest first; `run` 0: of all runs."""
        bodies = self._rows.read(task_key, after_seq, limit, run)
        return [event_pb2.Event.FromString(body) for body in bodies]

    def last_seq(self, task_key: int) -> int | None:
        """Newest `seq` of a task; None once the task is deleted."""
        return self._rows.last_seq(task_key)

    def check_cursor(self, after_seq: int, last_seq: int, log_epoch: str = "") -> None:
        """A cursor is good from 0 to the last `seq`; then it waits.

        Raises:
            CursorOutOfRange: Beyond the newest event, or of another log.
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

    async def wait(self, task_key: int, after_seq: int, timeout: float) -> None:  # noqa: ASYNC109 - heartbeat
        """Returns once there may be events after `after_seq`, the task is gone, or time is up."""
        last = self.last_seq(task_key)
        if last is None or last > after_seq:
            return
        # No await between the look and the registration: nothing is missed.
        future = asyncio.get_running_loop().create_future()
        self._waiters[task_key].add(future)
        try:
            await asyncio.wait({future}, timeout=timeout)
        finally:
            waiters = self._waiters[task_key]
            waiters.discard(future)
            if not waiters:
                del self._waiters[task_key]

    def wake(self, task_key: int) -> None:
        """Wakes the watchers of a task."""
        for future in self._waiters.get(task_key, ()):
            if not future.done():
                future.set_result(None)

    def wake_all(self) -> None:
        """Wakes every watcher, such as to tell it that the daemon stops."""
        for task_key in list(self._waiters):
            self.wake(task_key)
