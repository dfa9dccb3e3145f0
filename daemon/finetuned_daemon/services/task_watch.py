"""The stream of WatchTask: the task as it stands, what was missed, then what happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from finetuned.v1 import task_pb2, task_service_pb2
from finetuned_daemon.errors import Stopping
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.manager import Manager
from finetuned_daemon.services.paging import not_negative
from finetuned_daemon.tasks import Task, now_us

_Response = task_service_pb2.WatchTaskResponse


async def watch_task(
    manager: Manager,
    request: task_service_pb2.WatchTaskRequest,
    task: Task,
    shown: task_pb2.Task,
    stopping: asyncio.Event,
) -> AsyncGenerator[_Response | bytes]:
    """Messages, or their bytes, until the daemon stops. No transaction is open while one is sent.

    Raises:
        InvalidRequest: The cursor is none.
        CursorOutOfRange: There is no such place in the log, or what follows it was deleted.
        NotFound: The task was deleted.
        Stopping: The daemon stops.
    """
    events = manager.events
    after_seq = not_negative("after_seq", request.after_seq)
    cursor = events.start(task.key, after_seq, task.last_seq, request.log_epoch)
    snapshot = task_service_pb2.Snapshot(
        task=shown, log_epoch=events.epoch, first_seq=events.first_seq(task.key)
    )
    yield _Response(snapshot=snapshot)
    with events.fan_out.follow(task.key, cursor, in_batches=request.allow_batches) as follower:
        while not stopping.is_set():
            messages = await follower.next()
            for message in messages:
                yield message
            if follower.is_gone:
                manager.get(request.name)  # NOT_FOUND
                return  # deleted, and another made under the same id
            if not messages and follower.has_all and not stopping.is_set():
                beat = task_service_pb2.Heartbeat(last_seq=follower.seq, time=timestamp(now_us()))
                yield _Response(heartbeat=beat)
    raise Stopping
