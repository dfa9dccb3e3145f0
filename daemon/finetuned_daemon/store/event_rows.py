"""Events as rows: a dense sequence per task."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

from finetuned_daemon.store.database import Database
from finetuned_daemon.store.digest_rows import keep


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
                # SQLite would go through the events of the runs before it.
                "SELECT body FROM events INDEXED BY events_by_run "
                "WHERE task_key = ? AND run = ? AND seq > ? ORDER BY seq LIMIT ?",
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

    def page(
        self, task_key: int, after_seq: int, limit: int, most_bytes: int
    ) -> tuple[int, list[bytes]]:
        """The last `seq` of up to `limit` events after `after_seq`, 0 for none, and their bodies.

        Of `most_bytes` together, but one at least; what is beyond is not read.
        """
        last, size, bodies = 0, 0, list[bytes]()
        with self._database.reading(
            "SELECT seq, body FROM events WHERE task_key = ? AND seq > ? ORDER BY seq LIMIT ?",
            task_key,
            after_seq,
            limit,
        ) as rows:
            for seq, body in rows:
                size += len(body)
                if size > most_bytes and bodies:
                    break
                last = seq
                bodies.append(body)
        return last, bodies

    def of_run(self, task_key: int, run: int) -> tuple[int, int] | None:
        """The first and the last `seq` of a run, of what is kept; None: nothing is."""
        row = self._database.query_one(
            "SELECT (SELECT min(seq) FROM events WHERE task_key = ?1 AND run = ?2) AS first, "
            "(SELECT max(seq) FROM events WHERE task_key = ?1 AND run = ?2) AS last",
            task_key,
            run,
        )
        return (row["first"], row["last"]) if row and row["first"] is not None else None

    def small(
        self, task_key: int, run: int, after_seq: int, last_seq: int, limit: int, most_bytes: int
    ) -> list[tuple[int, bytes | None]]:
        """Up to `limit` events of a run as (seq, body), oldest first; None for a larger body.

        What is larger is not read from the disk.
        """
        rows = self._database.query(
            # The plus keeps SQLite on the table itself: a run's events lie one behind the other.
            "SELECT seq, iif(length(body) <= ?, body, NULL) AS body FROM events "
            "WHERE task_key = ? AND seq > ? AND seq <= ? AND +run = ? ORDER BY seq LIMIT ?",
            most_bytes,
            task_key,
            after_seq,
            last_seq,
            run,
            limit,
        )
        return [(row["seq"], row["body"]) for row in rows]

    def one(self, task_key: int, seq: int) -> bytes:
        """The body of one event; empty: it is gone."""
        row = self._database.query_one(
            "SELECT body FROM events WHERE task_key = ? AND seq = ?", task_key, seq
        )
        return bytes(row["body"]) if row else b""

    def last_seq(self, task_key: int) -> int | None:
        """Newest `seq` of a task; None once the task is deleted."""
        row = self._database.query_one("SELECT last_seq FROM tasks WHERE key = ?", task_key)
        return None if row is None else int(row["last_seq"])

    def first_seq(self, task_key: int) -> int:
        """Oldest `seq` that is kept, or the next one to come where there is none."""
        row = self._database.query_one("SELECT first_seq FROM tasks WHERE key = ?", task_key)
        return 1 if row is None else int(row["first_seq"])

    def too_long(self, most: int) -> list[int]:
        """Keys of ended tasks that have more events, some of them of earlier runs."""
        rows = self._database.query(
            f"SELECT key FROM tasks WHERE last_seq - first_seq + 1 > ? AND {_HAS_ENDED} "  # noqa: S608 - no value in it
            f"AND first_seq < {_NEWEST_RUNS_FIRST}",
            most,
        )
        return [row["key"] for row in rows]

    def begin_deletion(self, connection: sqlite3.Connection, task_key: int) -> None:
        """Notes that a task is being deleted, which is finished whatever comes."""
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES (?, '')", (f"{_DELETING}{task_key}",)
        )

    def deletions(self) -> list[int]:
        """Keys of the tasks that were being deleted as the daemon ended."""
        rows = self._database.query("SELECT key FROM meta WHERE key LIKE ?", f"{_DELETING}%")
        return [int(row["key"].removeprefix(_DELETING)) for row in rows]

    def end_deletion(self, connection: sqlite3.Connection, task_key: int) -> None:
        """It is deleted."""
        connection.execute("DELETE FROM meta WHERE key = ?", (f"{_DELETING}{task_key}",))

    def shorten(self, task_key: int, at_once: int) -> bool:
        """Deletes the oldest events of a task; False where no more than `at_once` are left."""
        with self._database.transaction(durable=False) as connection:
            row = connection.execute(
                "SELECT first_seq, last_seq FROM tasks WHERE key = ?", (task_key,)
            ).fetchone()
            if row is None or row["last_seq"] - row["first_seq"] < at_once:
                return False
            first = row["first_seq"] + at_once
            connection.execute(
                "DELETE FROM events WHERE task_key = ? AND seq < ?", (task_key, first)
            )
            connection.execute("UPDATE tasks SET first_seq = ? WHERE key = ?", (first, task_key))
            return True

    def loses_before(self, task_key: int, most: int) -> int | None:
        """The newest run of which `trim` would delete something; None: it would not."""
        row = self._database.query_one(
            f"SELECT (SELECT run FROM events WHERE task_key = tasks.key AND seq < goal "  # noqa: S608
            "ORDER BY seq DESC LIMIT 1) AS run FROM (SELECT key, first_seq, "
            f"min(last_seq - ? + 1, {_NEWEST_RUNS_FIRST}) AS goal FROM tasks "
            f"WHERE key = ? AND {_HAS_ENDED}) AS tasks WHERE goal > first_seq",
            most,
            task_key,
        )
        return None if row is None or row["run"] is None else int(row["run"])

    def trim(self, task_key: int, most: int, at_once: int, stays: Callable[[bytes], bool]) -> bool:
        """Deletes the oldest events beyond `most`, never those of the newest run.

        Only while the task has no run under way. `stays`: as `digest_rows.keep` has it.

        Returns:
            Whether there is more to delete than `at_once`.
        """
        with self._database.transaction(durable=False) as connection:
            row = connection.execute(
                f"SELECT first_seq, min(last_seq - ? + 1, {_NEWEST_RUNS_FIRST}) AS goal "  # noqa: S608
                f"FROM tasks WHERE key = ? AND {_HAS_ENDED}",
                (most, task_key),
            ).fetchone()
            if row is None or row["goal"] is None or row["first_seq"] >= row["goal"]:
                return False
            first = min(row["goal"], row["first_seq"] + at_once)
            keep(connection, task_key, first, stays)
            connection.execute(
                "DELETE FROM events WHERE task_key = ? AND seq < ?", (task_key, first)
            )
            connection.execute("UPDATE tasks SET first_seq = ? WHERE key = ?", (first, task_key))
            return bool(first < row["goal"])


_DELETING = "deleting "  # of `meta`, and the key of a task
_HAS_ENDED = "state IN ('PENDING', 'COMPLETED', 'STOPPED', 'FAILED')"
# The events of a run lie one behind the other, and the newest run's are the last.
_NEWEST_RUNS_FIRST = (
    "(SELECT min(seq) FROM events WHERE task_key = tasks.key "
    "AND run = (SELECT max(number) FROM runs WHERE task_key = tasks.key))"
)
