"""What stands for runs whose events are deleted, as rows, and which runs those may be."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import StrEnum

from finetuned_daemon.store.database import Database

TAIL = 20
"""The newest events of a task that are never deleted: how it ended, and its last lines."""


class LogState(StrEnum):
    """What is left of a run's log."""

    WHOLE = "WHOLE"
    THINNING = "THINNING"
    """What is to stay stands beside it, and it is being deleted."""
    THINNED = "THINNED"
    GONE = "GONE"
    """Not even what stood for it is left."""


@dataclass(frozen=True)
class RunLog:
    """A run whose log may be made less."""

    run_key: int
    task_key: int
    run: int


@dataclass(frozen=True)
class Digest:
    """What stands for the log of a run."""

    first_seq: int
    """The first of its events that is kept now; 0: none is."""
    curves: bytes
    kept: Collection[tuple[int, int, bytes]]
    """`seq`, run and body of events that stay."""


class DigestRows:
    """Reads and writes digests. A run has one for good: what made it may be gone."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- which

    def to_thin(self, after_key: int, limit: int, *, newest: bool) -> list[RunLog]:
        """Runs whose logs are whole, the oldest first; their tasks have no run under way.

        Args:
            after_key: Row of the last that was looked at; 0: from the oldest.
            limit: At most.
            newest: Each the newest of its task; else each an earlier one.
        """
        rows = self._database.query(
            f"SELECT runs.key, task_key, number FROM runs JOIN tasks ON tasks.key = task_key "  # noqa: S608 - no value in it
            f"WHERE log = 'WHOLE' AND runs.key > ? AND {_HAS_ENDED} "
            f"AND (number = {_NEWEST}) = ? ORDER BY runs.key LIMIT ?",
            after_key,
            newest,
            limit,
        )
        return [_run_log(row) for row in rows]

    def unfinished(self) -> list[RunLog]:
        """Runs whose logs were being deleted as the daemon ended."""
        rows = self._database.query(
            "SELECT key, task_key, number FROM runs WHERE log = 'THINNING' ORDER BY key"
        )
        return [_run_log(row) for row in rows]

    def earlier(self, task_key: int, before_run: int) -> list[RunLog]:
        """The runs of a task before one whose logs are whole."""
        rows = self._database.query(
            "SELECT key, task_key, number FROM runs WHERE task_key = ? AND number < ? "
            "AND log = 'WHOLE' ORDER BY number",
            task_key,
            before_run,
        )
        return [_run_log(row) for row in rows]

    # --- the log

    def first_seq(self, task_key: int) -> int:
        """The oldest event of a task that is kept."""
        row = self._database.query_one("SELECT first_seq FROM tasks WHERE key = ?", task_key)
        return int(row["first_seq"]) if row else 1

    def end(self, task_key: int, run: int) -> int:
        """The number before which nothing has to stay, where a run and all before it go."""
        row = self._database.query_one(f"{_END} WHERE tasks.key = ?1", task_key, run)
        return int(row["goal"]) if row else 0

    def read(
        self, task_key: int, after_seq: int, before_seq: int, limit: int
    ) -> list[tuple[int, int, bytes]]:
        """`seq`, run and body of up to `limit` events between two numbers, oldest first."""
        rows = self._database.query(
            "SELECT seq, run, body FROM events WHERE task_key = ? AND seq > ? AND seq < ? "
            "ORDER BY seq LIMIT ?",
            task_key,
            after_seq,
            before_seq,
            limit,
        )
        return [(row["seq"], row["run"], bytes(row["body"])) for row in rows]

    def last_seq(self, task_key: int, run: int) -> int:
        """The newest event of a run that is kept; 0: none is."""
        row = self._database.query_one(
            "SELECT max(seq) AS last FROM events WHERE task_key = ? AND run = ?", task_key, run
        )
        return int(row["last"] or 0) if row else 0

    def trim(self, log: RunLog, at_once: int, stays: Callable[[bytes], bool]) -> bool:
        """Deletes the oldest events of a task, up to the end of a run.

        Nothing where the task is gone or has a run under way.

        Args:
            log: The run.
            at_once: Most events in this transaction.
            stays: As `keep` has it.

        Returns:
            Whether there is more to delete than `at_once`.
        """
        with self._database.transaction(durable=False) as connection:
            row = connection.execute(
                f"{_END} WHERE tasks.key = ?1 AND {_HAS_ENDED}", (log.task_key, log.run)
            ).fetchone()
            if row is None:
                return False
            first = min(row["goal"], row["first_seq"] + at_once)
            if first > row["first_seq"]:
                keep(connection, log.task_key, first, stays)
                connection.execute(
                    "DELETE FROM events WHERE task_key = ? AND seq < ?", (log.task_key, first)
                )
                connection.execute(
                    "UPDATE tasks SET first_seq = ? WHERE key = ?", (first, log.task_key)
                )
            if first < row["goal"]:
                return True
            _mark(connection, log, LogState.THINNED)
            return False

    # --- digests

    def is_gone(self, task_key: int, run: int) -> bool:
        """Whether not even what stood for a run is left."""
        row = self._database.query_one(
            "SELECT log FROM runs WHERE task_key = ? AND number = ?", task_key, run
        )
        return row is not None and row["log"] == LogState.GONE

    def has(self, task_key: int, run: int) -> bool:
        """Whether a run has a digest."""
        return self._body(task_key, run) is not None

    def save(self, log: RunLog, digest: Digest | None, *, begin: bool) -> None:
        """Writes the digest of a run, where it has none.

        Args:
            log: The run; nothing is written where it is gone.
            digest: None: it has one.
            begin: Notes that its log is about to be deleted: a daemon that ends meanwhile goes on
                after its next start.
        """
        with self._database.transaction(durable=False) as connection:
            there = "WHERE EXISTS (SELECT 1 FROM tasks WHERE key = ?)"
            if digest is not None:
                connection.execute(
                    f"INSERT OR IGNORE INTO digests SELECT ?, ?, ?, ? {there}",
                    (log.task_key, log.run, digest.first_seq, digest.curves, log.task_key),
                )
                connection.executemany(
                    f"INSERT OR IGNORE INTO kept_events SELECT ?, ?, ?, ? {there}",
                    [
                        (log.task_key, run, seq, text, log.task_key)
                        for seq, run, text in digest.kept
                    ],
                )
            if begin:
                _mark(connection, log, LogState.THINNING)

    def curves(self, task_key: int, run: int) -> bytes | None:
        """The curves of a run that stand for its log; None: the log itself is there, or neither."""
        row = self._body(task_key, run)
        if row is None or self.first_seq(task_key) <= row["first_seq"]:
            return None
        return bytes(row["body"])

    def kept(
        self, task_key: int, run: int, after_seq: int, before_seq: int, limit: int
    ) -> list[bytes]:
        """Up to `limit` events of a run that stay, of those between two numbers, oldest first."""
        rows = self._database.query(
            "SELECT body FROM kept_events WHERE task_key = ? AND run = ? AND seq > ? AND seq < ? "
            "ORDER BY seq LIMIT ?",
            task_key,
            run,
            after_seq,
            before_seq,
            limit,
        )
        return [bytes(row["body"]) for row in rows]

    def forget(self, limit: int) -> int:
        """Deletes the oldest digests; returns how many."""
        with self._database.transaction(durable=False) as connection:
            rows = connection.execute(
                "SELECT key, task_key, number FROM runs WHERE log = 'THINNED' ORDER BY key LIMIT ?",
                (limit,),
            ).fetchall()
            for log in map(_run_log, rows):
                where = (log.task_key, log.run)
                connection.execute("DELETE FROM digests WHERE task_key = ? AND run = ?", where)
                connection.execute("DELETE FROM kept_events WHERE task_key = ? AND run = ?", where)
                _mark(connection, log, LogState.GONE)
        return len(rows)

    def _body(self, task_key: int, run: int) -> sqlite3.Row | None:
        return self._database.query_one(
            "SELECT first_seq, body FROM digests WHERE task_key = ? AND run = ?", task_key, run
        )


_HAS_ENDED = "tasks.state IN ('PENDING', 'COMPLETED', 'STOPPED', 'FAILED')"
_NEWEST = "(SELECT max(number) FROM runs AS others WHERE others.task_key = runs.task_key)"
# Where the next run's events begin; behind the newest run, all but the tail.
_END = f"""
    SELECT first_seq, coalesce(
        (SELECT seq FROM events WHERE task_key = ?1 AND run = (
            SELECT run FROM events WHERE task_key = ?1 AND run > ?2 ORDER BY run LIMIT 1
        ) ORDER BY seq LIMIT 1),
        last_seq - {TAIL} + 1
    ) AS goal FROM tasks
"""  # noqa: S608 - numbers of ours


def keep(
    connection: sqlite3.Connection,
    task_key: int,
    before_seq: int,
    stays: Callable[[bytes], bool],
) -> None:
    """Keeps what is to stay of events that are about to be deleted, in the same transaction.

    A digest has what came before its end; but the end of a log moves, where its task is edited or
    started meanwhile, and what was its end then goes with the rest. Nothing of a run that is gone.

    Args:
        connection: That of the transaction.
        task_key: The task.
        before_seq: The events before this one.
        stays: Whether an event of this body is to stay.
    """
    rows = connection.execute(
        "SELECT seq, run, body FROM events WHERE task_key = ? AND seq < ?", (task_key, before_seq)
    ).fetchall()
    # What is older than the newest that was kept is there, or was one too many.
    newest = {run: _newest_kept(connection, task_key, run) for run in {row["run"] for row in rows}}
    connection.executemany(
        "INSERT OR IGNORE INTO kept_events VALUES (?, ?, ?, ?)",
        [
            (task_key, row["run"], row["seq"], row["body"])
            for row in rows
            if (last := newest[row["run"]]) is not None and row["seq"] > last and stays(row["body"])
        ],
    )


def _newest_kept(connection: sqlite3.Connection, task_key: int, run: int) -> int | None:
    """The number of the newest event of a run that is kept, 0 where none is; None: it is gone."""
    row = connection.execute(
        "SELECT (SELECT log FROM runs WHERE task_key = ?1 AND number = ?2) AS log, "
        "(SELECT coalesce(max(seq), 0) FROM kept_events WHERE task_key = ?1 AND run = ?2) AS last",
        (task_key, run),
    ).fetchone()
    return None if row["log"] == LogState.GONE else int(row["last"])


def _run_log(row: sqlite3.Row) -> RunLog:
    return RunLog(row["key"], row["task_key"], row["number"])


def _mark(connection: sqlite3.Connection, log: RunLog, state: LogState) -> None:
    connection.execute("UPDATE runs SET log = ? WHERE key = ?", (state.value, log.run_key))
