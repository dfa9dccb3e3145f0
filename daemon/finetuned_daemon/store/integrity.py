"""Whether a database is whole: SQLite's own checks, and that no event of a log is missing.

A write-ahead log that was damaged loses its end in silence, and SQLite's own check says "ok": only
sequence numbers with a gap show it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

_MOST_PROBLEMS = 10
_OF_THE_MACHINE = (
    *("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_READONLY"),
    *("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_NOMEM"),
)
_MOST_BYTES = 64 << 20
"""A larger database has SQLite's own check only where there is no bound: nothing interrupts it.

It takes about a second a gigabyte from a warm disk, and from a cold one as long as reading it.
"""
_LOOK_EVERY = 20_000
"""Steps of SQLite's machine between two looks at the clock: about a millisecond."""

# Each with its own words; the first column of a row is what is wrong.
_LAST_SEQ = (
    "SELECT tasks.task_id || ' has events to ' || (SELECT coalesce(max(seq), 0) FROM events "
    "WHERE task_key = tasks.key) || ', not to ' || last_seq AS problem FROM tasks "
    "WHERE last_seq <> (SELECT coalesce(max(seq), 0) FROM events WHERE task_key = tasks.key) "
    "LIMIT ?"
)
_GAPS = (
    "SELECT 'of task ' || task_key || ', ' || (max(seq) - min(seq) + 1 - count(*)) || ' events are "
    "missing between ' || min(seq) || ' and ' || max(seq) AS problem FROM events "
    "GROUP BY task_key HAVING count(*) <> max(seq) - min(seq) + 1 LIMIT ?"
)


@dataclass(frozen=True)
class Verdict:
    """What a check has found."""

    problems: tuple[str, ...] = ()
    is_complete: bool = True
    """Everything was looked at; False where the time was up first."""


class Budget:
    """How long a check may take.

    Counted in the time of this thread on a core, so that others on the machine take none of it;
    a slow disk may take ten times as long.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.thread_time() + seconds
        self._latest = time.monotonic() + 10 * seconds

    def is_over(self) -> bool:
        """Whether it is used up."""
        return time.thread_time() > self._until or time.monotonic() > self._latest


def open_read_only(path: Path, *, immutable: bool = False) -> sqlite3.Connection:
    """A connection that never writes and never checkpoints.

    `immutable`: of a file that nobody changes, such as a backup; no file appears beside it.
    """
    options = "mode=ro&immutable=1" if immutable else "mode=ro"
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?{options}", uri=True, isolation_level=None, timeout=5
    )
    connection.row_factory = sqlite3.Row
    return connection


def check(
    connection: sqlite3.Connection,
    *,
    thorough: bool,
    budget: Budget | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Looks at everything, or at as much as the time allows.

    Args:
        connection: Of a database of any version of ours.
        thorough: Also holds indexes against their tables, which takes twice as long.
        budget: How long it may take, so that of a large one only rows are looked at; None: as
            long as it takes.
        is_cancelled: Asked again and again; True ends it.
    """
    connection.set_progress_handler(
        lambda: is_cancelled() or (budget is not None and budget.is_over()), _LOOK_EVERY
    )
    problems = list[str]()
    is_complete = True
    try:
        pragma = "integrity_check" if thorough else "quick_check"
        if budget is not None and size_of(connection) > _MOST_BYTES:
            is_complete, pragma = False, ""
        for problem in _problems(connection, pragma):
            problems.append(problem)
            if len(problems) >= _MOST_PROBLEMS:
                break
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorname == "SQLITE_INTERRUPT":
            return Verdict(tuple(problems), is_complete=False)
        if is_about_the_machine(error):
            raise
        problems.append(str(error))
    finally:
        connection.set_progress_handler(None, 0)
    return Verdict(tuple(problems), is_complete)


def check_file(path: Path) -> Verdict:
    """Checks all of a file that nobody changes, such as a backup."""
    try:
        with contextlib.closing(open_read_only(path, immutable=True)) as connection:
            verdict = check(connection, thorough=True)
            if not verdict.problems and not version_of(connection):
                return Verdict(("it holds no tasks: no database of finetuned",))
            return verdict
    except sqlite3.DatabaseError as error:
        return Verdict((str(error),))


def size_of(connection: sqlite3.Connection) -> int:
    """Bytes of all its pages."""
    pages, size = (connection.execute(f"PRAGMA page_{n}").fetchone()[0] for n in ("count", "size"))
    return int(pages) * int(size)


def version_of(connection: sqlite3.Connection) -> int:
    """The version of its schema; 0: it has none yet."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def is_about_the_machine(error: sqlite3.Error) -> bool:
    """Whether the disk or its rights are what fails, and not what the file holds."""
    name: str = getattr(error, "sqlite_errorname", "")
    return name.startswith(_OF_THE_MACHINE)


def _problems(connection: sqlite3.Connection, pragma: str) -> Iterator[str]:
    sql = f"PRAGMA {pragma}({_MOST_PROBLEMS})"
    for row in connection.execute(sql) if pragma else ():
        if row[0] != "ok":
            yield str(row[0])
    if not version_of(connection):
        return
    for sql in (_LAST_SEQ, _GAPS):
        for row in connection.execute(sql, (_MOST_PROBLEMS,)):
            yield str(row["problem"])
    for row in connection.execute("PRAGMA foreign_key_check"):
        yield f"a row of {row[0]} belongs to a row of {row[2]} that is not there"
