"""Stops, pauses and the queue: generators as in `_calls`, and the methods of both clients."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from finetuned._caller import Caller
from finetuned._calls import (
    READING_SECONDS,
    TASK_SERVICE,
    Call,
    Steps,
    T,
    resolve,
    stop_task,
)
from finetuned._checks import check_numbers, check_texts
from finetuned.v1 import task_service_pb2 as tasks
from finetuned.v1.task_pb2 import Task


def pause_task(name: str) -> Steps[Task]:
    """PauseTask."""
    request = tasks.PauseTaskRequest(name=(yield from resolve(name)))
    answer: tasks.PauseTaskResponse = yield Call(TASK_SERVICE, "PauseTask", request)
    return answer.task


def resume_task(name: str, etag: str, request_id: str) -> Steps[Task]:
    """ResumeTask, repeatable by a request id of our own."""
    check_texts(etag=etag, request_id=request_id)
    request = tasks.ResumeTaskRequest(
        name=(yield from resolve(name)), etag=etag, request_id=request_id or str(uuid.uuid4())
    )
    answer: tasks.ResumeTaskResponse = yield Call(
        TASK_SERVICE, "ResumeTask", request, timeout=READING_SECONDS
    )
    return answer.task


def move_task(name: str, position: int) -> Steps[Task]:
    """MoveTask."""
    check_numbers(4096, position=position)
    # What a field of 32 bits can't hold is as far from the queue as what it can.
    bounded = max(-(2**31), min(position, 2**31 - 1))
    request = tasks.MoveTaskRequest(name=(yield from resolve(name)), position=bounded)
    answer: tasks.MoveTaskResponse = yield Call(TASK_SERVICE, "MoveTask", request)
    return answer.task


class Pauses(Caller):
    """What `Client` does with a run that is under way."""

    def stop_task(self, name: str, *, discard: bool = False) -> Task:
        """Ask for the end of the run, with a checkpoint unless `discard`. See `wait` for the end.

        Raises:
            FailedPrecondition: It is neither queued nor running nor paused.
        """
        return self._run(stop_task(name, discard))

    def pause_task(self, name: str) -> Task:
        """Ask a run to save a checkpoint and to free its device; the same run goes on later.

        It returns when the wish is durable: watch the task for its state PAUSED. A queued task is
        paused at once.

        Raises:
            FailedPrecondition: It is neither queued nor running, is stopping, or is a probe.
        """
        return self._run(pause_task(name))

    def resume_task(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        """Let a paused run go on from its newest whole checkpoint. It waits in the queue before.

        Args:
            name: The task.
            etag: The task's `etag` when it was seen. Empty: whatever is there.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.

        Raises:
            InvalidArgument: Parameters can't be used any more, all of them in `violations`.
            FailedPrecondition: It is not paused.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(resume_task(name, etag, request_id))

    def move_task(self, name: str, position: int) -> Task:
        """Move a queued task to another place in the queue of its device.

        Args:
            name: The task.
            position: From 1, the next to run. Beyond the end: last.

        Raises:
            InvalidArgument: The position is below 1.
            FailedPrecondition: It is not queued.
        """
        return self._run(move_task(name, position))


class AsyncPauses:
    """What `AsyncClient` does with a run that is under way."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def stop_task(self, name: str, *, discard: bool = False) -> Task:
        return await self._run(stop_task(name, discard))

    async def pause_task(self, name: str) -> Task:
        return await self._run(pause_task(name))

    async def resume_task(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        return await self._run(resume_task(name, etag, request_id))

    async def move_task(self, name: str, position: int) -> Task:
        return await self._run(move_task(name, position))

    stop_task.__doc__ = Pauses.stop_task.__doc__
    pause_task.__doc__ = Pauses.pause_task.__doc__
    resume_task.__doc__ = Pauses.resume_task.__doc__
    move_task.__doc__ = Pauses.move_task.__doc__
