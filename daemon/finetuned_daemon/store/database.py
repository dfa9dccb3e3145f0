"""The database file: connection, durability, migrations."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from finetuned_daemon.errors import DiskFull
from finetuned_daemon.runs.contract import boot_id
from finetuned_daemon.store import backup, integrity

_log = logging.getLogger(__name__)

_FULL_MESSAGES = ("disk is full", "disk I/O error")
_MIGRATION_BACKUPS = 3
_MIGRATIONS = Path(__file__).with_name("migrations")

# Rows of `meta`.
_EPOCH = "log_epoch"
_BOOT = "boot_id"
_CLOSED = "closed"


class DatabaseUnusable(Exception):
    """The database can't be opened; the message says which file and what to do."""


class Database:
    """One connection, used by one thread: the only writer, and the only one that checkpoints.

    SQLite 3.7.0 to 3.51.2 can corrupt a WAL when two connections write and checkpoint at once.
    """

    def __init__(self, path: Path, *, backups: Path | None = None) -> None:
        """Opens the database, or makes an empty one, and brings its schema up to date.

        Args:
            path: The file.
            backups: Folder for a backup before a migration. None: none is made.

        Raises:
            DatabaseUnusable: Nothing was changed, or migrations up to one of them were done.
        """
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=5)
            self._connection.row_factory = sqlite3.Row
            # Of a new one alone; an older one has it once `finetuned db compact` has rewritten it.
            self._connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA mmap_size = 0")
            self.schema_version = self._migrate(backups)
        except sqlite3.DatabaseError as error:
            raise DatabaseUnusable(explain(path, error)) from error
        self._durable = True
        self._after_commit: list[Callable[[], None]] = []
        try:
            self.log_epoch = self._begin()
        except DiskFull as error:
            raise DatabaseUnusable(explain(path, error.__cause__)) from error

    @contextlib.contextmanager
    def transaction(self, *, durable: bool) -> Generator[sqlite3.Connection]:
        """All or nothing. `durable`: survives a loss of power once it has returned.

        Raises:
            DiskFull: Nothing was written.
        """
        if self._connection.in_transaction:
            raise AssertionError("transactions do not nest")
        if durable != self._durable:  # can't be changed inside a transaction
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._durable = durable
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException as error:
            self._after_commit.clear()
            with contextlib.suppress(
                sqlite3.OperationalError
            ):  # it was rolled back by SQLite itself
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and any(
                text in str(error) for text in _FULL_MESSAGES
            ):
                raise DiskFull(str(self.path)) from error
            raise
        after, self._after_commit = self._after_commit, []
        for callback in after:
            callback()

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Runs `callback` once the present transaction is committed; never if it is not."""
        self._after_commit.append(callback)

    def query(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a bounded query; no read transaction stays open behind it."""
        return self._connection.execute(sql, values).fetchall()

    @contextlib.contextmanager
    def reading(self, sql: str, *values: object) -> Generator[Iterator[tuple[Any, ...]]]:
        """Rows as plain tuples, read as they are taken; never to be held over an `await`."""
        with contextlib.closing(self._connection.cursor()) as cursor:
            cursor.row_factory = None
            yield cursor.execute(sql, values)

    def query_one(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row, if there is one."""
        rows = self.query(sql, *values)
        return rows[0] if rows else None

    def written(self) -> int | None:
        """Goes up with every row that is written, and so tells that nothing was.

        None while a transaction is open: what is read in it may never become true.
        """
        connection = self._connection
        return None if connection.in_transaction else connection.total_changes

    def oldest_record(self) -> int | None:
        """When the first task or template was made, as their records have it; None: none."""
        row = self.query_one(
            "SELECT min(create_time) AS first FROM ("
            "SELECT * FROM (SELECT create_time FROM tasks ORDER BY key LIMIT 1) UNION ALL "
            "SELECT * FROM (SELECT create_time FROM templates ORDER BY key LIMIT 1))"
        )
        return row["first"] if row else None

    def used_bytes(self) -> int:
        """Bytes of all its pages that hold something."""
        free = self.query("PRAGMA freelist_count")[0][0]
        size = self.query("PRAGMA page_size")[0][0]
        return (int(self.query("PRAGMA page_count")[0][0]) - int(free)) * int(size)

    def give_back(self, pages: int) -> bool:
        """Gives up to so many free pages back to the disk; whether there may be more.

        Nothing where it was made by a version that could not.
        """
        before = self.query("PRAGMA freelist_count")[0][0]
        self.query(f"PRAGMA incremental_vacuum({pages})")
        after = self.query("PRAGMA freelist_count")[0][0]
        return 0 < int(after) < int(before)

    def rewrite(self) -> None:
        """Writes all of it anew without free pages; nobody else may have it open.

        From then on free pages can be given back.
        """
        self.query("VACUUM")
        self.query("PRAGMA wal_checkpoint(TRUNCATE)")

    def new_epoch(self) -> None:
        """Begins a new log: every cursor into the old one is told so."""
        self.log_epoch = secrets.token_hex(8)
        with self.transaction(durable=True) as connection:
            _put(connection, _EPOCH, self.log_epoch)

    def close(self) -> None:
        """Notes that nothing is lost, checkpoints, and closes."""
        try:
            with self.transaction(durable=True) as connection:
                _put(connection, _CLOSED, "1")
        except DiskFull as error:
            # The next start takes it for a daemon that was killed.
            _log.warning("%s", error)
        self._connection.close()

    def _migrate(self, backups: Path | None) -> int:
        version = integrity.version_of(self._connection)
        scripts = {
            int(entry.name.split("_")[0]): entry.read_text("utf-8")
            for entry in _MIGRATIONS.iterdir()
            if entry.name.endswith(".sql")
        }
        newest = max(scripts)
        if version > newest:
            raise DatabaseUnusable(
                f"{self.path} was written by a newer version of finetuned (schema {version}, this "
                f"one knows {newest}). Install that version again; nothing was changed."
            )
        if backups is not None and 0 < version < newest:
            self._back_up(backups)
        for number in range(version + 1, newest + 1):
            # One transaction each, the version in it: a crash leaves the version before or after.
            try:
                self._connection.executescript(
                    f"BEGIN IMMEDIATE;\n{scripts[number]}\nPRAGMA user_version = {number};\nCOMMIT;"
                )
            except sqlite3.Error:
                self._connection.close()  # which rolls back
                raise
            _log.info("database migrated to schema %d", number)
        return newest

    def _back_up(self, folder: Path) -> None:
        try:
            made = backup.make(self.path, folder, backup.Cause.MIGRATION, keep=_MIGRATION_BACKUPS)
        except backup.BackupFailed as error:
            raise DatabaseUnusable(
                f"{error}. It comes before a migration, so nothing was changed; make room, and "
                "start again."
            ) from error
        _log.info("backed up into %s before the migration", made.path)

    def _begin(self) -> str:
        """The epoch of the log: a new one where its end may be lost.

        Events are not synced one by one, so that a loss of power may take back some that watchers
        have seen, and their numbers would be given again.
        """
        is_lost = may_have_lost_its_end(self._connection)
        epoch = secrets.token_hex(8) if is_lost else _get(self._connection, _EPOCH)
        with self.transaction(durable=True) as connection:
            _put(connection, _EPOCH, epoch or secrets.token_hex(8))
            _put(connection, _BOOT, boot_id())
            _put(connection, _CLOSED, "0")
        if is_lost:
            _log.warning(
                "the machine went down while the last daemon ran: events of its last moments may "
                "be lost, and watchers begin anew"
            )
        return _get(self._connection, _EPOCH)


def may_have_lost_its_end(connection: sqlite3.Connection) -> bool:
    """Whether the machine went down under the daemon that had the database last."""
    before = _get(connection, _BOOT)
    return bool(before) and before != boot_id() and _get(connection, _CLOSED) != "1"


def explain(path: Path, error: BaseException | None) -> str:
    """What to do about an error that the machine gave, not the file."""
    return (
        f"{path} can't be used: {error}. Nothing is lost, and nothing was moved. See to the disk "
        f"of {path.parent} (room, rights, its health), and start again."
    )


def _get(connection: sqlite3.Connection, key: str) -> str:
    row = connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return str(row["value"]) if row else ""


def _put(connection: sqlite3.Connection, key: str, value: str) -> None:
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
