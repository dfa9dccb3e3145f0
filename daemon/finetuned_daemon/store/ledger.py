"""The ledger of the training quota as rows: one a checkpoint saved."""

from __future__ import annotations

import sqlite3

from finetuned_daemon.store.database import Database


class Ledger:
    """Counts checkpoints of all runs, of deleted tasks too."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def used(self) -> int:
        """Checkpoints saved so far."""
        # No row is ever deleted, and a number that is rolled back comes again: they are as many.
        row = self._database.query_one("SELECT coalesce(max(key), 0) AS used FROM quota_ledger")
        return int(row["used"]) if row else 0

    def enter(
        self,
        connection: sqlite3.Connection,
        *,
        time: int,
        task_id: str,
        run: int,
        step: int,
        path: str,
    ) -> None:
        """Writes down one checkpoint; `time` in microseconds since the epoch."""
        connection.execute(
            "INSERT INTO quota_ledger (time, task_id, run, step, path) VALUES (?, ?, ?, ?, ?)",
            (time, task_id, run, step, path),
        )
