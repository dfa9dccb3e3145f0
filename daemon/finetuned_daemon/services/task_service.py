"""TaskService: decode, call, encode."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from finetuned.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from finetuned_daemon.errors import InvalidRequest, Stopping, Violation
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.events.log import PAGE
from finetuned_daemon.manager import Manager, NewTask, RequestId, check_request_id
from finetuned_daemon.parameters import protos
from finetuned_daemon.services import convert
from finetuned_daemon.tasks import Task, TaskState, now_us

_Context = aio.ServicerContext[Any, Any]

_LARGEST_PAGE = 1000


class TaskService(task_service_pb2_grpc.TaskServiceServicer):
    """Tasks, their runs and their events."""

    def __init__(
        self, manager: Manager, *, heartbeat_seconds: float, stopping: asyncio.Event
    ) -> None:
        self._manager = manager
        self._heartbeat_seconds = heartbeat_seconds
        self._stopping = stopping

    async def CreateTask(  # noqa: N802, D102 - described in the proto, as all rpcs here
        self, request: task_service_pb2.CreateTaskRequest, context: _Context
    ) -> task_service_pb2.CreateTaskResponse:
        answer = await self._manager.create(
            NewTask(
                training_type=convert.training_type(request.task.training_type),
                parameters=protos.to_dict(request.task.parameters),
                display_name=request.task.display_name,
                device=request.task.device,
                task_id=request.task_id,
            ),
            start=request.start,
            validate_only=request.validate_only,
            request=self._request_id(request, task_service_pb2.CreateTaskResponse),
        )
        if isinstance(answer, bytes):
            return task_service_pb2.CreateTaskResponse.FromString(answer)
        return task_service_pb2.CreateTaskResponse(task=self._encode(answer))

    async def GetTask(  # noqa: N802, D102
        self, request: task_service_pb2.GetTaskRequest, context: _Context
    ) -> task_service_pb2.GetTaskResponse:
        return task_service_pb2.GetTaskResponse(task=self._encode(self._manager.get(request.name)))

    async def ListTasks(  # noqa: N802, D102
        self, request: task_service_pb2.ListTasksRequest, context: _Context
    ) -> task_service_pb2.ListTasksResponse:
        violations = _check_page_size(request.page_size)
        states = list[TaskState]()
        for value in request.states:
            state = convert.state(value)
            if state is None:
                violations.append(Violation("states", f"{value} is no state", "NOT_A_CHOICE"))
            else:
                states.append(state)
        before_key = _page_token(request.page_token, violations)
        if violations:
            raise InvalidRequest(violations)
        size = request.page_size or 100
        tasks = self._manager.records.tasks(
            limit=size + 1,
            before_key=before_key,
            states=states,
            display_name=request.display_name,
        )
        return task_service_pb2.ListTasksResponse(
            tasks=[self._encode(task) for task in tasks[:size]],
            next_page_token=str(tasks[size - 1].key) if len(tasks) > size else "",
        )

    async def DeleteTask(  # noqa: N802, D102
        self, request: task_service_pb2.DeleteTaskRequest, context: _Context
    ) -> task_service_pb2.DeleteTaskResponse:
        self._manager.delete(request.name, etag=request.etag, allow_missing=request.allow_missing)
        return task_service_pb2.DeleteTaskResponse()

    async def StartTask(  # noqa: N802, D102
        self, request: task_service_pb2.StartTaskRequest, context: _Context
    ) -> task_service_pb2.StartTaskResponse:
        answer = await self._manager.start(
            request.name,
            etag=request.etag,
            request=self._request_id(request, task_service_pb2.StartTaskResponse),
        )
        if isinstance(answer, bytes):
            return task_service_pb2.StartTaskResponse.FromString(answer)
        return task_service_pb2.StartTaskResponse(task=self._encode(answer))

    async def StopTask(  # noqa: N802, D102
        self, request: task_service_pb2.StopTaskRequest, context: _Context
    ) -> task_service_pb2.StopTaskResponse:
        task = self._manager.stop(request.name, discard=request.discard)
        return task_service_pb2.StopTaskResponse(task=self._encode(task))

    async def WatchTask(  # noqa: N802, D102
        self, request: task_service_pb2.WatchTaskRequest, context: _Context
    ) -> AsyncIterator[task_service_pb2.WatchTaskResponse]:
        task = self._manager.get(request.name)
        events = self._manager.events
        cursor = _not_negative("after_seq", request.after_seq)
        events.check_cursor(cursor, task.last_seq, request.log_epoch)
        yield task_service_pb2.WatchTaskResponse(
            snapshot=task_service_pb2.Snapshot(task=self._encode(task), log_epoch=events.epoch)
        )
        while not self._stopping.is_set():
            page = events.read(task.key, cursor, PAGE)
            for event in page:
                cursor = event.seq
                yield task_service_pb2.WatchTaskResponse(event=event)
            if page:
                continue
            await events.wait(task.key, cursor, self._heartbeat_seconds)
            last_seq = events.last_seq(task.key)
            if last_seq is None:
                self._manager.get(request.name)  # NOT_FOUND
                return  # deleted, and another made under the same id
            if last_seq == cursor and not self._stopping.is_set():
                yield task_service_pb2.WatchTaskResponse(
                    heartbeat=task_service_pb2.Heartbeat(
                        last_seq=last_seq, time=timestamp(now_us())
                    )
                )
        raise Stopping

    async def ListRuns(  # noqa: N802, D102
        self, request: task_service_pb2.ListRunsRequest, context: _Context
    ) -> task_service_pb2.ListRunsResponse:
        violations = _check_page_size(request.page_size)
        before = _page_token(request.page_token, violations)
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        size = request.page_size or 100
        runs = self._manager.records.runs(task.key, limit=size + 1, before_number=before)
        return task_service_pb2.ListRunsResponse(
            runs=[convert.run(run, task) for run in runs[:size]],
            next_page_token=str(runs[size - 1].number) if len(runs) > size else "",
        )

    async def ListEvents(  # noqa: N802, D102
        self, request: task_service_pb2.ListEventsRequest, context: _Context
    ) -> task_service_pb2.ListEventsResponse:
        violations = _check_page_size(request.page_size)
        if request.run < 0:
            violations.append(Violation("run", "must not be negative", "OUT_OF_RANGE"))
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        events = self._manager.events
        after_seq = _not_negative("after_seq", request.after_seq)
        events.check_cursor(after_seq, task.last_seq)
        return task_service_pb2.ListEventsResponse(
            events=events.read(task.key, after_seq, request.page_size or 500, request.run),
            last_seq=task.last_seq,
            log_epoch=events.epoch,
        )

    def _encode(self, task: Task) -> task_pb2.Task:
        return convert.task(task, self._manager.queue_position(task))

    def _request_id(
        self,
        request: task_service_pb2.CreateTaskRequest | task_service_pb2.StartTaskRequest,
        answer: type[task_service_pb2.CreateTaskResponse | task_service_pb2.StartTaskResponse],
    ) -> RequestId | None:
        if not request.request_id:
            return None
        violations = check_request_id(request.request_id)
        if violations:
            raise InvalidRequest(violations)
        body = copy.deepcopy(request)
        body.ClearField("request_id")
        name = type(request).DESCRIPTOR.name.encode()
        return RequestId(
            request.request_id,
            name + b"\0" + body.SerializeToString(deterministic=True),
            lambda task: answer(task=self._encode(task)).SerializeToString(),
        )


def _check_page_size(size: int) -> list[Violation]:
    if 0 <= size <= _LARGEST_PAGE:
        return []
    return [
        Violation("page_size", f"must be from 0 to {_LARGEST_PAGE}, not {size}", "OUT_OF_RANGE")
    ]


def _page_token(token: str, violations: list[Violation]) -> int:
    if not token:
        return 0
    if token.isascii() and token.isdigit() and len(token) < 19 and int(token) > 0:
        return int(token)
    violations.append(
        Violation("page_token", "must be the next_page_token of an answer", "BAD_PAGE_TOKEN")
    )
    return 0


def _not_negative(field: str, value: int) -> int:
    if value < 0:
        raise InvalidRequest(
            [Violation(field, f"must not be negative, not {value}", "OUT_OF_RANGE")]
        )
    return value
