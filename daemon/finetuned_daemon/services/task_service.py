"""TaskService: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from grpc import aio

from finetuned.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from finetuned_daemon.checkpoints import Checkpoint, check_resume
from finetuned_daemon.errors import InvalidRequest, NotFound, Stopping, Violation
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.events.log import PAGE
from finetuned_daemon.export import Settings, export
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.manager import Manager
from finetuned_daemon.parameters import protos
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.services.metrics import get_metrics
from finetuned_daemon.services.paging import (
    check_page_size,
    negative,
    next_page_token,
    not_negative,
    page_token,
)
from finetuned_daemon.services.repeats import request_id
from finetuned_daemon.services.task_list import TaskListStream
from finetuned_daemon.task_requests import Edit, NewTask, StartOptions
from finetuned_daemon.tasks import Task, TaskState, now_us

_WATCH_BYTES = BY_NAME["watch_page_bytes"].default
_MOST_PAGE_BYTES = BY_NAME["event_page_bytes"].default

_Context = aio.ServicerContext[Any, Any]


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
        wrong = list[Violation]()
        repeat = request_id(request, self._created, wrong)
        answer = await self._manager.create(
            NewTask(
                training_type=convert.training_type(request.task.training_type, wrong),
                parameters=protos.to_dict(request.task.parameters),
                display_name=request.task.display_name,
                device=request.task.device,
                template=request.task.template,
                task_id=request.task_id,
                wrong=wrong,
            ),
            start=request.start,
            validate_only=request.validate_only,
            update_template=request.update_template,
            request=repeat,
        )
        if isinstance(answer, bytes):
            return task_service_pb2.CreateTaskResponse.FromString(answer)
        return self._created(answer)

    async def GetTask(  # noqa: N802, D102
        self, request: task_service_pb2.GetTaskRequest, context: _Context
    ) -> task_service_pb2.GetTaskResponse:
        return task_service_pb2.GetTaskResponse(task=self._encode(self._manager.get(request.name)))

    async def ListTasks(  # noqa: N802, D102
        self, request: task_service_pb2.ListTasksRequest, context: _Context
    ) -> task_service_pb2.ListTasksResponse:
        violations = check_page_size(request.page_size)
        states = convert.states(request.states, violations)
        before_key = page_token("tasks", request.page_token, violations)
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
            tasks=self._encode_all(tasks[:size]),
            next_page_token=next_page_token("tasks", tasks, size, lambda task: task.key),
        )

    async def UpdateTask(  # noqa: N802, D102
        self, request: task_service_pb2.UpdateTaskRequest, context: _Context
    ) -> task_service_pb2.UpdateTaskResponse:
        task = await self._manager.update(
            request.task.name,
            Edit(
                parameters=protos.to_dict(request.task.parameters),
                display_name=request.task.display_name,
                device=request.task.device,
                template=request.task.template,
                paths=convert.mask_paths(request.update_mask),
            ),
            etag=request.task.etag,
            update_template=request.update_template,
            validate_only=request.validate_only,
        )
        return task_service_pb2.UpdateTaskResponse(task=self._encode(task))

    async def DeleteTask(  # noqa: N802, D102
        self, request: task_service_pb2.DeleteTaskRequest, context: _Context
    ) -> task_service_pb2.DeleteTaskResponse:
        deleted = await self._manager.delete(
            request.name,
            etag=request.etag,
            allow_missing=request.allow_missing,
            with_outputs=request.delete_outputs,
        )
        return task_service_pb2.DeleteTaskResponse(
            deleted_files=deleted.files,
            deleted_bytes=deleted.bytes,
            left_output_dirs=deleted.left,
        )

    async def StartTask(  # noqa: N802, D102
        self, request: task_service_pb2.StartTaskRequest, context: _Context
    ) -> task_service_pb2.StartTaskResponse:
        violations = list[Violation]()
        repeat = request_id(request, self._started, violations)
        options = StartOptions(
            resume=convert.resume_choice(request.resume, violations),
            resume_path=request.resume_path,
            probe=request.probe,
        )
        violations += check_resume(bool(request.resume), request.resume_path)
        if violations:
            raise InvalidRequest(violations)
        answer = await self._manager.runs.start(
            request.name, etag=request.etag, request=repeat, options=options
        )
        if isinstance(answer, bytes):
            return task_service_pb2.StartTaskResponse.FromString(answer)
        return self._started(answer)

    async def StopTask(  # noqa: N802, D102
        self, request: task_service_pb2.StopTaskRequest, context: _Context
    ) -> task_service_pb2.StopTaskResponse:
        task = self._manager.runs.stop(request.name, discard=request.discard)
        return task_service_pb2.StopTaskResponse(task=self._encode(task))

    async def PauseTask(  # noqa: N802, D102
        self, request: task_service_pb2.PauseTaskRequest, context: _Context
    ) -> task_service_pb2.PauseTaskResponse:
        task = self._manager.runs.pause(request.name)
        return task_service_pb2.PauseTaskResponse(task=self._encode(task))

    async def ResumeTask(  # noqa: N802, D102
        self, request: task_service_pb2.ResumeTaskRequest, context: _Context
    ) -> task_service_pb2.ResumeTaskResponse:
        violations = list[Violation]()
        repeat = request_id(request, self._resumed, violations)
        if violations:
            raise InvalidRequest(violations)
        answer = await self._manager.runs.resume(request.name, etag=request.etag, request=repeat)
        if isinstance(answer, bytes):
            return task_service_pb2.ResumeTaskResponse.FromString(answer)
        return self._resumed(answer)

    async def MoveTask(  # noqa: N802, D102
        self, request: task_service_pb2.MoveTaskRequest, context: _Context
    ) -> task_service_pb2.MoveTaskResponse:
        task = self._manager.runs.move(request.name, request.position)
        return task_service_pb2.MoveTaskResponse(task=self._encode(task))

    async def WatchTask(  # noqa: N802, D102
        self, request: task_service_pb2.WatchTaskRequest, context: _Context
    ) -> AsyncIterator[task_service_pb2.WatchTaskResponse]:
        task = self._manager.get(request.name)
        events = self._manager.events
        after_seq = not_negative("after_seq", request.after_seq)
        cursor = events.start(task.key, after_seq, task.last_seq, request.log_epoch)
        yield task_service_pb2.WatchTaskResponse(
            snapshot=task_service_pb2.Snapshot(
                task=self._encode(task),
                log_epoch=events.epoch,
                first_seq=events.first_seq(task.key),
            )
        )
        while not self._stopping.is_set():
            page = events.read(task.key, cursor, PAGE, most_bytes=_WATCH_BYTES)
            if page and page[0].seq != cursor + 1:  # deleted while this watcher did not read
                events.check_kept(cursor, page[0].seq)
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

    async def WatchTasks(  # noqa: N802, D102
        self, request: task_service_pb2.WatchTasksRequest, context: _Context
    ) -> AsyncIterator[task_service_pb2.WatchTasksResponse]:
        violations = list[Violation]()
        states = convert.states(request.states, violations)
        if violations:
            raise InvalidRequest(violations)
        stream = TaskListStream(self._manager, states, self._heartbeat_seconds, self._stopping)
        async with aclosing(stream.responses()) as responses:
            async for response in responses:
                yield response
        raise Stopping

    async def GetMetrics(  # noqa: N802, D102
        self, request: task_service_pb2.GetMetricsRequest, context: _Context
    ) -> task_service_pb2.GetMetricsResponse:
        return await get_metrics(self._manager, request)

    async def ListRuns(  # noqa: N802, D102
        self, request: task_service_pb2.ListRunsRequest, context: _Context
    ) -> task_service_pb2.ListRunsResponse:
        violations = check_page_size(request.page_size)
        before = page_token("runs", request.page_token, violations)
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        size = request.page_size or 100
        runs = self._manager.records.runs(task.key, limit=size + 1, before_number=before)
        return task_service_pb2.ListRunsResponse(
            runs=[convert.run(run, task) for run in runs[:size]],
            next_page_token=next_page_token("runs", runs, size, lambda run: run.number),
        )

    async def ListCheckpoints(  # noqa: N802, D102
        self, request: task_service_pb2.ListCheckpointsRequest, context: _Context
    ) -> task_service_pb2.ListCheckpointsResponse:
        violations = check_page_size(request.page_size)
        before = page_token("checkpoints", request.page_token, violations)
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        found = await self._manager.checkpoints.of_task(task, verify=request.verify)
        found = [c for c in found if not before or _place(c) < before]
        size = request.page_size or 100
        return task_service_pb2.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint(c, task, language(context)) for c in found[:size]],
            next_page_token=next_page_token("checkpoints", found, size, _place),
        )

    async def DeleteCheckpoint(  # noqa: N802, D102
        self, request: task_service_pb2.DeleteCheckpointRequest, context: _Context
    ) -> task_service_pb2.DeleteCheckpointResponse:
        deleted = await self._manager.checkpoints.delete(request.name)
        return task_service_pb2.DeleteCheckpointResponse(
            deleted_files=deleted.files,
            deleted_bytes=deleted.bytes,
            folder_left=bool(deleted.left),
        )

    async def ListEvents(  # noqa: N802, D102
        self, request: task_service_pb2.ListEventsRequest, context: _Context
    ) -> task_service_pb2.ListEventsResponse:
        violations = check_page_size(request.page_size)
        for field, value in (("run", request.run), ("after_seq", request.after_seq)):
            if value < 0:
                violations.append(negative(field, value))
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        events = self._manager.events
        cursor = events.start(task.key, request.after_seq, task.last_seq)
        return task_service_pb2.ListEventsResponse(
            events=events.read(
                task.key, cursor, request.page_size or 500, request.run, _MOST_PAGE_BYTES
            ),
            last_seq=task.last_seq,
            first_seq=events.first_seq(task.key),
            log_epoch=events.epoch,
        )

    async def ExportTaskConfig(  # noqa: N802, D102
        self, request: task_service_pb2.ExportTaskConfigRequest, context: _Context
    ) -> task_service_pb2.ExportTaskConfigResponse:
        violations = list[Violation]()
        number = request.run
        if number < 0:
            violations.append(negative("run", number))
        file_format = convert.config_format(request.format, violations)
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.name)
        run = self._manager.records.run(task.key, number) if number else None
        if number and run is None:
            raise NotFound("run", f"{task.name}/runs/{number}")
        source = run or task
        file = export(
            Settings(
                task.display_name, number, task.training_type, source.parameters, source.device
            ),
            file_format,
        )
        return task_service_pb2.ExportTaskConfigResponse(
            file_name=file.name, content=file.content, left_out=file.left_out
        )

    def _encode(self, task: Task) -> task_pb2.Task:
        return self._encode_all([task])[0]

    def _encode_all(self, tasks: list[Task]) -> list[task_pb2.Task]:
        positions = dict[int, int]()
        if any(task.state is TaskState.QUEUED for task in tasks):
            positions = self._manager.runs.queue_positions()
        # One that was queued and is not any more was the first, and has begun meanwhile.
        return [
            convert.task(task, positions.get(task.key, 1) if task.state is TaskState.QUEUED else 0)
            for task in tasks
        ]

    def _created(self, task: Task) -> task_service_pb2.CreateTaskResponse:
        return task_service_pb2.CreateTaskResponse(task=self._encode(task))

    def _resumed(self, task: Task) -> task_service_pb2.ResumeTaskResponse:
        return task_service_pb2.ResumeTaskResponse(task=self._encode(task))

    def _started(self, task: Task) -> task_service_pb2.StartTaskResponse:
        return task_service_pb2.StartTaskResponse(task=self._encode(task))


def _place(checkpoint: Checkpoint) -> int:
    """Place of a checkpoint in the list of its task: by run, then by step."""
    return (checkpoint.run << 40) + checkpoint.step
