"""Keeps the database within its bound: the logs of old runs are thinned out.

The oldest runs first: those that their tasks have newer ones of, then the newest of each task, of
which the last events stay; where that is not enough, what stands for them goes as well. Never
anything of a task that has a run under way.

What is to stay of a run is written before the first of its events is deleted, with the note that it
is being deleted: a daemon that is killed goes on after its next start. Nothing waits for the disk:
a loss of power takes back what was written last first, the deletions.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Coroutine

from finetuned_daemon.errors import DiskFull
from finetuned_daemon.events.digest import Digests, stays
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.digest_rows import DigestRows, RunLog

_GOAL = 0.95
"""Of the bound: so far it goes down, so that not each event is followed by a deletion."""
_AT_ONCE = 500
"""Events deleted in one transaction: 3 to 6 ms, and what SQLite writes back now and then."""
_PAGES_AT_ONCE = 100
"""Pages given back in one go: 2 to 4 ms."""
_SHARE = 0.25
"""Of the event loop's time that it takes, at most, where there is much to do."""
_RUNS = 100
_DIGESTS = 10
_LOOK_EVERY = 20_000
"""Events written between two looks at the size."""

_log = logging.getLogger(__name__)


class Compaction:
    """Looks at the end of each run, and as logs grow. Used on the event loop's thread alone."""

    def __init__(self, database: Database, digests: Digests, most: int) -> None:
        """Takes the bound in bytes; 0: none."""
        self._database = database
        self._rows = DigestRows(database)
        self._digests = digests
        self._most = most
        self._bell = asyncio.Event()
        self._until_look = _LOOK_EVERY
        self._is_beyond = False
        self._is_free = False
        self._broken = set[int]()
        """Rows of runs whose logs can't be thinned out, and are left alone until the next start."""
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Goes on with what the last daemon began, and looks."""
        self._bell.set()
        self._worker = asyncio.get_running_loop().create_task(self._work())

    def look(self) -> None:
        """A run has ended."""
        self._bell.set()

    def grown(self, events: int) -> None:
        """So many events were written."""
        self._until_look -= events
        if self._until_look <= 0:
            self._until_look = _LOOK_EVERY
            self._bell.set()

    def freed(self) -> None:
        """A long log was deleted: what it took goes back to the disk."""
        self._is_free = True
        self._bell.set()

    async def close(self) -> None:
        """Ends it; what is left is done after the next start."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            await self._bell.wait()
            self._bell.clear()
            try:
                for log in self._rows.unfinished():
                    await self._tried(log, self._delete(log))
                if self._most and self._database.used_bytes() > self._most:
                    await self._shrink()
                if self._is_free:
                    self._is_free = False
                    await self._give_back()
            # At the end of the next run it is tried again.
            except (DiskFull, sqlite3.OperationalError) as error:
                _log.warning("the logs of old runs can't be thinned out: %s", error)
            except Exception:  # noqa: BLE001 - it goes on, whatever it was
                _log.exception("the logs of old runs can't be thinned out")

    async def _shrink(self) -> None:
        before, began = self._database.used_bytes(), time.monotonic()
        goal = int(self._most * _GOAL)
        thinned = await self._thin_all(goal, newest=False)
        thinned += await self._thin_all(goal, newest=True)
        forgotten = 0
        while self._database.used_bytes() > goal:
            found = await self._gently(lambda: self._rows.forget(_DIGESTS))
            forgotten += found
            if not found:
                break
        await self._give_back()
        after = self._database.used_bytes()
        if thinned or forgotten:
            _log.info(
                "the logs of %d old runs were thinned out, and what stood for %d deleted: the "
                "database has %.1f MiB of %.1f, %.1f less, in %.1f s",
                *(thinned, forgotten, after / 2**20, self._most / 2**20),
                *((before - after) / 2**20, time.monotonic() - began),
            )
        if after > self._most and not self._is_beyond:
            _log.warning(
                "the database has %.1f MiB, more than --most-database-bytes allows, and no log of "
                "an old run is left to thin out",
                after / 2**20,
            )
        self._is_beyond = after > self._most

    async def _thin_all(self, goal: int, *, newest: bool) -> int:
        """Thins out runs until the goal is reached; returns how many."""
        count = after_key = 0
        while logs := self._rows.to_thin(after_key, _RUNS, newest=newest):
            for log in logs:
                if self._database.used_bytes() <= goal:
                    return count
                after_key = log.run_key
                count += await self._tried(log, self._thin(log))
        return count

    async def _thin(self, log: RunLog) -> None:
        await self._digests.make(log, begin=True)
        await self._delete(log)

    async def _delete(self, log: RunLog) -> None:
        while await self._gently(lambda: self._rows.trim(log, _AT_ONCE, stays)):
            pass

    async def _tried(self, log: RunLog, work: Coroutine[None, None, None]) -> bool:
        """Whether it was done; what one run has that can't be read holds up no other."""
        if log.run_key in self._broken:
            work.close()
            return False
        try:
            await work
        except (DiskFull, sqlite3.OperationalError):  # it is not the run's
            raise
        except Exception:  # noqa: BLE001 - whatever is wrong with it
            self._broken.add(log.run_key)
            _log.exception(
                "the log of run %d of task %d can't be thinned out, and is left until the next "
                "start",
                *(log.run, log.task_key),
            )
            return False
        return True

    async def _give_back(self) -> None:
        while await self._gently(lambda: self._database.give_back(_PAGES_AT_ONCE)):
            pass

    async def _gently(self, step: Callable[[], int]) -> int:
        """Takes a step, and then leaves the loop to others for a while."""
        began = time.monotonic()
        result = step()
        await asyncio.sleep((time.monotonic() - began) * (1 / _SHARE - 1))
        return result
