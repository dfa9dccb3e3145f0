"""The daily backup of a daemon that may run for months."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time

from finetuned_daemon.config import Config
from finetuned_daemon.store import backup
from finetuned_daemon.store.database import Database

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
"""How often the clock is looked at: a machine that was suspended, or set, is no matter."""
_CLOSE_SECONDS = 1.0
"""How long a backup that is told to end is waited for."""
_RETRY_SECONDS = 3600.0
"""How long after a backup that failed, on a full disk say, the next is tried."""


class DailyBackups:
    """Makes a backup whenever the newest is a day old; in a thread, with a connection of its own.

    A backup that fails is logged and tried again, and disturbs nobody.
    """

    def __init__(self, config: Config, database: Database) -> None:
        self._database = database
        self._folder = config.backups_dir
        self._interval = config.backup_hours * 3600
        self._keep = config.backup_keep
        self._cancelled = threading.Event()
        self._loop: asyncio.Task[None] | None = None
        self._making: asyncio.Future[bool] | None = None

    @property
    def last_time(self) -> int | None:
        """When the newest backup was made, in microseconds since the epoch; None: never."""
        newest = next(iter(backup.backups(self._folder)), None)
        return round(newest.time.timestamp() * 1e6) if newest else None

    def start(self) -> None:
        """Makes backups from now on."""
        if self._interval > 0:
            self._loop = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ends a backup that is under way; what is left of it goes with the next."""
        self._cancelled.set()
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        if self._making is not None:
            await asyncio.wait({self._making}, timeout=_CLOSE_SECONDS)

    async def _run(self) -> None:
        failed_at: float | None = None
        while True:
            patience = min(_RETRY_SECONDS, self._interval)
            is_patient = failed_at is None or time.monotonic() - failed_at >= patience
            if is_patient and self._is_due():
                self._making = self._begin()
                made = await asyncio.shield(self._making)
                failed_at = None if made else time.monotonic()
            await asyncio.sleep(min(_LOOK_SECONDS, self._interval / 4))

    def _begin(self) -> asyncio.Future[bool]:
        """Makes a backup beside everything else; tells whether it was made.

        In a thread that the end of the process ends: SQLite does not let go of a file that it
        verifies, and a daemon that stops waits for no backup.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def tell(made: bool) -> None:
            if not future.done():
                future.set_result(made)

        def work() -> None:
            made = self._make()
            with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
                loop.call_soon_threadsafe(tell, made)

        threading.Thread(target=work, name="backup", daemon=True).start()
        return future

    def _is_due(self) -> bool:
        since = self.last_time or self._database.oldest_record()
        # One of the future: the clock was wrong then, or is now.
        return since is not None and abs(time.time() - since / 1e6) >= self._interval

    def _make(self) -> bool:
        began = time.monotonic()
        try:
            made = backup.make(
                self._database.path,
                self._folder,
                backup.Cause.DAILY,
                keep=self._keep,
                is_cancelled=self._cancelled.is_set,
            )
        except backup.BackupFailed as error:
            if not self._cancelled.is_set():
                _log.error("%s; it is tried again", error)
            return False
        _log.info("backed up into %s in %.1f s", made.path, time.monotonic() - began)
        return True
