"""The stream of WatchTasks: what is in the list, then what changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from finetuned.v1 import task_service_pb2
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.events.changes import Shown, TaskWatcher
from finetuned_daemon.manager import Manager
from finetuned_daemon.services import convert
from finetuned_daemon.tasks import Task, TaskState, now_us

_AT_ONCE = 8
"""Tasks read in one go. A client that does not read costs 0.13 MiB; with 64 it was 0.76."""

_Response = task_service_pb2.WatchTasksResponse


class TaskListStream:
    """One stream."""

    def __init__(
        self,
        manager: Manager,
        states: Sequence[TaskState],
        heartbeat_seconds: float,
        stopping: asyncio.Event,
    ) -> None:
        """Takes the states of the tasks that are in the list; none: all are."""
        self._manager = manager
        self._states = states
        self._heartbeat_seconds = heartbeat_seconds
        self._stopping = stopping

    async def responses(self) -> AsyncGenerator[_Response | bytes]:
        """Messages, or their bytes, until the daemon stops; no transaction is open meanwhile."""
        with self._manager.changes.watch() as watcher:  # before the first read: nothing is missed
            async with aclosing(self._listing(watcher)) as listed:
                async for response in listed:
                    yield response
            quiet_since = time.monotonic()
            while not self._stopping.is_set():
                responses = self._changed(watcher)
                for response in responses:
                    yield response
                if responses:
                    quiet_since = time.monotonic()
                    continue
                left = quiet_since + self._heartbeat_seconds - time.monotonic()
                if left > 0:
                    await watcher.wait(left)
                    continue
                quiet_since = time.monotonic()
                beat = task_service_pb2.Heartbeat(time=timestamp(now_us()))
                yield _Response(heartbeat=beat)

    async def _listing(self, watcher: TaskWatcher) -> AsyncGenerator[_Response | bytes]:
        """Every task that there is, newest first, and that these are all."""
        count = before_key = 0
        is_over = False
        while not is_over and not self._stopping.is_set():
            tasks = self._manager.records.tasks(
                limit=_AT_ONCE,
                before_key=before_key,
                states=self._states,
                display_name="",
                with_parameters=False,
            )
            for task in tasks:
                watcher.sent(task)
                yield self._encode(task)
            count += len(tasks)
            is_over = len(tasks) < _AT_ONCE
            before_key = tasks[-1].key if tasks else 0
        if is_over:
            synced = task_service_pb2.Synced(task_count=count, time=timestamp(now_us()))
            yield _Response(synced=synced)

    def _changed(self, watcher: TaskWatcher) -> list[_Response | bytes]:
        """Some of what has changed since it was sent."""
        responses = list[_Response | bytes]()
        for key, deleted in watcher.take(_AT_ONCE):
            shown = None if deleted else self._shown(key)
            if shown is not None and (not self._states or shown.state in self._states):
                watcher.sent(shown)
                responses.append(shown.data)
            elif watcher.left(key):
                task = None if deleted else self._manager.records.task_by_key(key)
                responses.append(_Response(deleted=task.name if task else deleted))
        return responses

    def _shown(self, key: int) -> Shown | None:
        """A task as it stands, by whichever watcher it was read first; None: it is gone."""
        changes = self._manager.changes
        shown = changes.shown(key)
        if shown is None:
            task = self._manager.records.task_by_key(key)
            if task is None:
                return None
            shown = Shown(key, task.revision, task.state, self._encode(task))
            changes.keep(shown)
        return shown

    def _encode(self, task: Task) -> bytes:
        position = self._manager.changes.position(task)
        shown = convert.task(task, position, with_parameters=False)
        return _Response(task=shown).SerializeToString()
