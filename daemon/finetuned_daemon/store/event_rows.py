"""Events as rows: a dense sequence per task."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from finetuned_daemon.store.database import Database


class EventRows:
    """Reads and writes serialized events."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def next_seq(self, connection: sqlite3.Connection, task_key: int) -> int:
        """The number of a task's next event, within the transaction that will write it."""
        row = connection.execute("SELECT last_seq FROM tasks WHERE key = ?", (task_key,)).fetchone()
        return int(row["last_seq"]) + 1

    def append(
        self,
        connection: sqlite3.Connection,
        task_key: int,
        rows: Sequence[tuple[int, int, bytes]],
    ) -> None:
        """Writes rows of (seq, run, body), the first at `next_seq` and the others behind it."""
        connection.executemany(
            "INSERT INTO events (task_key, seq, run, body) VALUES (?, ?, ?, ?)",
            [(task_key, *row) for row in rows],
        )
        connection.execute("UPDATE tasks SET last_seq = ? WHERE key = ?", (rows[-1][0], task_key))

    def read(self, task_key: int, after_seq: int, limit: int, run: int) -> list[bytes]:
        """Up to `limit` bodies after `after_seq`, oldest first; `run` 0: of all runs."""
        if run:
            rows = self._database.query(
                "SELECT body FROM events WHERE task_key = ? AND run = ? AND seq > ? "
                "ORDER BY seq LIMIT ?",
                task_key,
                run,
                after_seq,
                limit,
            )
        else:
            rows = self._database.query(
                "SELECT body FROM events WHERE task_key = ? AND seq > ? ORDER BY seq LIMIT ?",
                task_key,
                after_seq,
                limit,
            )
        return [bytes(row["body"]) for row in rows]

    def last_seq(self, task_key: int) -> int | None:
        """Newest `seq` of a task; None once the task is deleted."""
        row = self._database.query_one("SELECT last_seq FROM tasks WHERE key = ?", task_key)
        return None if row is None else int(row["last_seq"])
