"""The database file: connection, durability, migrations."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sqlite3
from collections.abc import Callable, Generator
from importlib import resources
from pathlib import Path

from finetuned_daemon.errors import DiskFull

_log = logging.getLogger(__name__)

_FULL_MESSAGES = ("disk is full", "disk I/O error")


class DatabaseUnusable(Exception):
    """The database can't be opened; the message says which file and what to do."""


class Database:
    """One connection, used by one thread: the only writer, and the only one that checkpoints.

    SQLite 3.7.0 to 3.51.2 can corrupt a WAL when two connections write and checkpoint at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=5)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA mmap_size = 0")
            self.schema_version = self._migrate()
        except sqlite3.DatabaseError as error:
            raise DatabaseUnusable(
                f"{path} can't be used: {error}. Nothing was changed. Move it aside (with "
                f"{path.name}-wal and {path.name}-shm) to start with an empty one; the run folders "
                "beside it keep every run's spec, events and result."
            ) from error
        self._durable = True
        self._after_commit: list[Callable[[], None]] = []
        self.log_epoch = self._epoch()

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

    def query_one(self, sql: str, *values: object) -> sqlite3.Row | None:
        """The first row, if there is one."""
        rows = self.query(sql, *values)
        return rows[0] if rows else None

    def close(self) -> None:
        """Checkpoints and closes."""
        self._connection.close()

    def _migrate(self) -> int:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        scripts = {
            int(entry.name.split("_")[0]): entry.read_text("utf-8")
            for entry in resources.files("finetuned_daemon.store").joinpath("migrations").iterdir()
            if entry.name.endswith(".sql")
        }
        newest = max(scripts)
        if version > newest:
            raise DatabaseUnusable(
                f"{self.path} was written by a newer version of finetuned (schema {version}, this "
                f"one knows {newest}). Install that version again; nothing was changed."
            )
        for number in range(version + 1, newest + 1):
            # One transaction each, the version in it: a crash leaves the version before or after.
            self._connection.executescript(
                f"BEGIN IMMEDIATE;\n{scripts[number]}\nPRAGMA user_version = {number};\nCOMMIT;"
            )
            _log.info("database migrated to schema %d", number)
        return newest

    def _epoch(self) -> str:
        row = self.query_one("SELECT value FROM meta WHERE key = 'log_epoch'")
        if row is not None:
            return str(row["value"])
        epoch = secrets.token_hex(8)
        with self.transaction(durable=True) as connection:
            connection.execute("INSERT INTO meta VALUES ('log_epoch', ?)", (epoch,))
        return epoch
