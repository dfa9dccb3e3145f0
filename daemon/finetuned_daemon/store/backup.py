"""Backups of the database: made while it is in use, verified, bounded in number.

A backup is one file. It is copied through SQLite by a connection that only reads; never as a file,
of which a part may lie in the write-ahead log.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from finetuned_daemon.runs.contract import make_dirs, sync_dir
from finetuned_daemon.store import integrity

FOLDER = "backups"

_NAME = re.compile(r"finetuned-(\d{8}T\d{12}Z)-schema-(\d+)-([a-z]+)\.db")
_TIME = "%Y%m%dT%H%M%S%fZ"
_PAGES = 2048
"""Pages copied between two looks at whether to go on: 8 MiB."""
_RESERVE = 16 << 20
"""Bytes that a backup leaves free: what else writes to the disk comes first."""


class BackupFailed(Exception):
    """No backup was made; the message says why. Nothing is left of it."""


class Cause(StrEnum):
    """Why a backup was made; a part of its name."""

    DAILY = "daily"
    MIGRATION = "migration"
    MANUAL = "manual"


@dataclass(frozen=True)
class Backup:
    """One backup, as its name tells."""

    path: Path
    time: datetime
    schema: int
    cause: Cause


def stamp(time: datetime) -> str:
    """A time as it stands in names of files."""
    return time.strftime(_TIME)


def backups(folder: Path) -> list[Backup]:
    """The backups in a folder, newest first; their content is not looked at."""
    found = list[Backup]()
    for path in folder.glob("finetuned-*.db"):
        match = _NAME.fullmatch(path.name)
        if match and match[3] in list(Cause):
            time = datetime.strptime(match[1], _TIME).replace(tzinfo=UTC)
            found.append(Backup(path, time, int(match[2]), Cause(match[3])))
    return sorted(found, key=lambda backup: backup.path.name, reverse=True)


def newest_whole(folder: Path) -> Backup | None:
    """The newest backup that is whole; all of it is read."""
    for backup in backups(folder):
        if not integrity.check_file(backup.path).problems:
            return backup
    return None


def make(
    source: Path,
    folder: Path,
    cause: Cause,
    *,
    keep: int | None = None,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Backup:
    """Backs up a database into a folder; one that is in use goes on meanwhile.

    Args:
        source: The database.
        folder: Made if it is missing.
        cause: Why.
        keep: How many backups of this cause stay; the oldest goes once the new one is whole. None:
            all.
        is_cancelled: Asked again and again; True ends it, as failed.

    Raises:
        BackupFailed: With the reason, such as a full disk.
    """
    try:
        make_dirs(folder, 0o700)
        with _alone(folder):
            backup = _make(source, folder, cause, is_cancelled)
            if keep is not None:
                for old in [b for b in backups(folder) if b.cause is cause][keep:]:
                    old.path.unlink()
            return backup
    except (OSError, sqlite3.Error) as error:
        raise BackupFailed(f"no backup of {source} into {folder}: {error}") from error


def copy(
    source: sqlite3.Connection,
    target: Path,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Copies a database as it is at one moment into a new file, durably.

    Raises:
        OSError: There is too little room, or it can't be written.
        sqlite3.Error: It can't be read or written.
        BackupFailed: It was cancelled.
    """
    # In one transaction: writers do not make it begin anew.
    source.execute("BEGIN")
    try:
        size = integrity.size_of(source)
        free = shutil.disk_usage(target.parent).free
        if free < size + _RESERVE:
            raise OSError(
                f"too little room on the disk: {_mib(size + _RESERVE)} are needed, {_mib(free)} "
                "are free"
            )

        def look(_status: int, _remaining: int, _total: int) -> None:
            if is_cancelled():
                raise BackupFailed("it was cancelled")

        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(target, isolation_level=None)
        try:
            # Nobody sees it before it is whole; it is synced as a whole.
            connection.execute("PRAGMA synchronous = OFF")
            source.backup(connection, pages=_PAGES, progress=look)
        finally:
            connection.close()
    finally:
        source.execute("ROLLBACK")
    with open(target, "rb") as file:
        os.fsync(file.fileno())


def _make(source: Path, folder: Path, cause: Cause, is_cancelled: Callable[[], bool]) -> Backup:
    for leftover in folder.glob(".finetuned-*"):  # of one that was cut short
        leftover.unlink()
    with contextlib.closing(integrity.open_read_only(source)) as connection:
        time, schema = datetime.now(UTC), integrity.version_of(connection)
        name = f"finetuned-{stamp(time)}-schema-{schema}-{cause}.db"
        temporary = folder / f".{name}"
        try:
            copy(connection, temporary, is_cancelled)
            with contextlib.closing(integrity.open_read_only(temporary, immutable=True)) as written:
                verdict = integrity.check(written, thorough=True, is_cancelled=is_cancelled)
            if verdict.problems:
                raise BackupFailed(f"the copy is not whole: {'; '.join(verdict.problems)}")
            if not verdict.is_complete:
                raise BackupFailed("it was cancelled")
            os.replace(temporary, folder / name)
            sync_dir(folder)
        finally:
            for end in ("", "-journal"):
                temporary.with_name(temporary.name + end).unlink(missing_ok=True)
    return Backup(folder / name, time, schema, cause)


@contextlib.contextmanager
def _alone(folder: Path) -> Generator[None]:
    """One backup at a time in a folder, whoever makes it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"
