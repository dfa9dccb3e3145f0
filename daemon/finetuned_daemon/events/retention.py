"""Keeps the logs of tasks at their bound: the oldest events of earlier runs go.

Never while a run of the task is under way, and never those of its newest run.
"""

from __future__ import annotations

import asyncio
import logging

from finetuned_daemon.errors import DiskFull
from finetuned_daemon.events.compaction import Compaction
from finetuned_daemon.events.digest import Digests, stays
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.digest_rows import DigestRows
from finetuned_daemon.store.event_rows import EventRows

_AT_ONCE = 500
"""Events deleted in one transaction: others get their turn between two."""

_log = logging.getLogger(__name__)


class Retention:
    """Looks at the end of each run. Used on the event loop's thread alone."""

    def __init__(self, database: Database, digests: Digests, most: int, most_bytes: int) -> None:
        """Takes the bounds of a task's log, in events, and of the whole database; 0: none."""
        self._rows = EventRows(database)
        self._logs = DigestRows(database)
        self._digests = digests
        self.compaction = Compaction(database, digests, most_bytes)
        self._most = most
        self._to_look_at: asyncio.Queue[int] = asyncio.Queue()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Looks at all tasks now, and from now on at those whose runs end."""
        self.compaction.start()
        if self._most:
            for task_key in self._rows.too_long(self._most):
                self.look(task_key)
            self._worker = asyncio.get_running_loop().create_task(self._work())

    def look(self, task_key: int) -> None:
        """A run of the task has ended."""
        self.compaction.look()
        if self._most:
            self._to_look_at.put_nowait(task_key)

    async def close(self) -> None:
        """Ends it; what is left is done after the next start."""
        await self.compaction.close()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _work(self) -> None:
        while True:
            task_key = await self._to_look_at.get()
            try:
                await self._trim(task_key)
            except DiskFull as error:  # at the end of its next run it is tried again
                _log.warning("events can't be deleted: %s", error)
            except Exception:  # noqa: BLE001 - of other tasks it says nothing
                _log.exception("events of task %d can't be deleted", task_key)

    async def _trim(self, task_key: int) -> None:
        """Deletes what is too much, once the curves of the runs that lose events are kept."""
        kept = 0
        # More runs lose events than a moment ago, where the task had a run meanwhile.
        while newest := self._rows.loses_before(task_key, self._most):
            if newest > kept:
                for log in self._logs.earlier(task_key, newest + 1):
                    await self._digests.make(log)
                kept = newest
            elif not self._rows.trim(task_key, self._most, _AT_ONCE, stays):
                return
            await asyncio.sleep(0)
