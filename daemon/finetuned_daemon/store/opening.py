"""The database at a daemon's start: opened only where it is there and whole.

What is wrong is said with the commands that mend it; nothing is changed, moved or begun anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuned_daemon.runs.contract import boot_id
from finetuned_daemon.store import backup, integrity, wal
from finetuned_daemon.store.database import (
    Database,
    DatabaseUnusable,
    explain,
    may_have_lost_its_end,
)
from finetuned_daemon.store.files import SERVING, set_aside
from finetuned_daemon.store.records import Records

_log = logging.getLogger(__name__)

_PAGE = 100
_CHECK_SECONDS = 0.2
"""Bound of each of the two checks at a start, as integrity.Budget has it.

After a loss of power the first has none. A daily backup is read as a whole.
"""

# sqlite.org/wal.html#walresetbug
_WAL_RESET_BUG = ((3, 7, 0), (3, 51, 2))


def open_for_serving(path: Path, runs_dir: Path, *, may_be_new: bool = False) -> Database:
    """Opens the database of a state folder, with a backup before a migration.

    Args:
        path: The database.
        runs_dir: Where the run folders lie.
        may_be_new: An empty one is made although there are run folders; what is left of the old
            one is moved aside.

    Raises:
        DatabaseUnusable: It is missing, damaged, of a newer version, or the disk is full.
    """
    if _WAL_RESET_BUG[0] <= sqlite3.sqlite_version_info <= _WAL_RESET_BUG[1]:
        _log.info(
            "SQLite %s may have the WAL-reset bug (sqlite.org/wal.html#walresetbug); it can't "
            "happen here, where one connection alone writes and checkpoints",
            sqlite3.sqlite_version,
        )
    try:
        if is_missing(path):
            if not may_be_new:
                _refuse_new(path, runs_dir)
            if _has_log(path):
                moved = set_aside(path, backup.stamp(datetime.now(UTC)))
                _log.warning("what is left of a database was moved to %s", moved[0].parent)
        else:
            _check(path)
        database = Database(path, backups=path.parent / backup.FOLDER)
        _check_records(database)
        return database
    except OSError as error:
        raise DatabaseUnusable(explain(path, error)) from error


def is_missing(path: Path) -> bool:
    """Whether there is no database, or an empty file in its place."""
    return not path.exists() or not path.stat().st_size


def check_present(
    path: Path, *, thorough: bool = False, is_alone: bool = False
) -> integrity.Verdict:
    """Checks a database that may be in use, and changes nothing.

    Args:
        path: The database.
        thorough: As in `integrity.check`.
        is_alone: Nobody else opens it: no files of SQLite's appear beside it.

    Raises:
        DatabaseUnusable: The disk does not let it be read.
    """
    is_still = is_alone and not _has_log(path)
    try:
        with contextlib.closing(integrity.open_read_only(path, immutable=is_still)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            budget = None if thorough else integrity.Budget(_CHECK_SECONDS)
            if not thorough and (
                integrity.version_of(connection) and may_have_lost_its_end(connection)
            ):
                budget = None
                size = integrity.size_of(connection) >> 20
                _log.info("the machine went down under the last daemon: %d MiB are checked", size)
            return integrity.check(connection, thorough=thorough, budget=budget)
    except sqlite3.DatabaseError as error:
        if integrity.is_about_the_machine(error):
            raise DatabaseUnusable(explain(path, error)) from error
        return integrity.Verdict((str(error),))


def ways_back(path: Path) -> str:
    """The commands that bring a database back, one a line, as they are typed."""
    folder = shlex.quote(str(path.parent))
    newest = backup.newest_whole(path.parent / backup.FOLDER)
    lines = list[str]()
    if newest is not None:
        at = f"{newest.time:%Y-%m-%d %H:%M:%S} UTC"
        lines.append(f"  finetuned db restore --state-dir {folder}   # the backup of {at}")
    else:
        lines.append(f"  (there is no whole backup in {path.parent / backup.FOLDER})")
    lines.append(f"  finetuned db rebuild --state-dir {folder}   # from the run folders alone")
    return "\n".join(lines)


def _check(path: Path) -> None:
    began = time.monotonic()
    # Before SQLite opens it, which makes the index of the log anew.
    lost = wal.problem(path) if _was_used_in_this_boot(path.parent) else ""
    verdict = integrity.Verdict((lost,)) if lost else check_present(path, is_alone=True)
    if verdict.problems:
        raise DatabaseUnusable(
            f"{path} is damaged: {'; '.join(verdict.problems[:3])}. Nothing was changed. "
            f"Ways back:\n{ways_back(path)}"
        )
    if not verdict.is_complete:
        _log.warning(
            "%s is too large to be checked at every start; run: finetuned db check --state-dir %s",
            path,
            shlex.quote(str(path.parent)),
        )
    else:
        _log.info("the database is whole (checked in %.1f s)", time.monotonic() - began)


def _check_records(database: Database) -> None:
    """Reads tasks and their runs: what is whole to SQLite may still make none.

    The newest first, for as long as a start may take.
    """
    records, budget, before = Records(database), integrity.Budget(_CHECK_SECONDS), 0
    try:
        while not budget.is_over():
            tasks = records.tasks(limit=_PAGE, before_key=before, states=(), display_name="")
            for task in tasks:
                records.runs(task.key, limit=_PAGE)
            if len(tasks) < _PAGE:
                return
            before = tasks[-1].key
    # Whatever a wrong value leads to where it is read.
    except (ValueError, KeyError, TypeError, OverflowError, sqlite3.DatabaseError) as error:
        database.close()
        raise DatabaseUnusable(
            f"{database.path} is damaged: a record in it can't be read ({type(error).__name__}). "
            f"Ways back:\n{ways_back(database.path)}"
        ) from error


def _was_used_in_this_boot(folder: Path) -> bool:
    """Whether the daemon that had the database last was killed, and no power was lost since."""
    try:
        content: Any = json.loads((folder / SERVING).read_bytes())
        return bool(content["boot_id"] == boot_id())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _has_log(path: Path) -> bool:
    """Whether a part of the database lies in its write-ahead log."""
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


def _refuse_new(path: Path, runs_dir: Path) -> None:
    left = _has_log(path)
    if not left and next(runs_dir.glob("*/*/spec.json"), None) is None:
        return  # nothing was ever here
    what = f"{path.name}-wal, a part of it," if left else "run folders"
    raise DatabaseUnusable(
        f"{path} is missing, but there is {what} in {path.parent}. An empty one would forget "
        f"every task. Nothing was changed. Ways back:\n{ways_back(path)}\n"
        f"  finetuned serve --state-dir {shlex.quote(str(path.parent))} --new-database   "
        "# begin with none of them"
    )
