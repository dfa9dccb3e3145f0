"""TaskService: decode, call, encode."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from grpc import aio

from finetuned.v1 import task_pb2, task_service_pb2, task_service_pb2_grpc
from finetuned_daemon.checkpoints import Checkpoint, check_resume
from finetuned_daemon.errors import InvalidRequest, NotFound, Stopping, Violation
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
    page_token,
)
from finetuned_daemon.services.ready import Ready, Repeated, joined
from finetuned_daemon.services.repeats import request_id
from finetuned_daemon.services.task_list import TaskListStream
from finetuned_daemon.services.task_watch import watch_task
from finetuned_daemon.task_requests import Edit, NewTask, StartOptions
from finetuned_daemon.tasks import Run, Task, TaskState

_MOST_PAGE_BYTES = BY_NAME["event_page_bytes"].default

_MOST_READY = 256
"""Tasks, and runs, whose messages are kept; one takes about 1 KiB."""

_Context = aio.ServicerContext[Any, Any]


class TaskService(task_service_pb2_grpc.TaskServiceServicer):
    """Tasks, their runs and their events."""

    def __init__(
        self, manager: Manager, *, heartbeat_seconds: float, stopping: asyncio.Event
    ) -> None:
        self._manager = manager
        self._heartbeat_seconds = heartbeat_seconds
        self._stopping = stopping
        self._ready_tasks = Ready[Task, int](convert.task, _MOST_READY)
        self._ready_runs = Ready[Run, str](convert.run, _MOST_READY)
        self._repeated = Repeated(manager.written)

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
    ) -> Any:  # its bytes
        task = self._manager.get(request.name)
        return joined(task_service_pb2.GetTaskResponse.TASK_FIELD_NUMBER, self._ready([task]))

    async def ListTasks(  # noqa: N802, D102
        self, request: task_service_pb2.ListTasksRequest, context: _Context
    ) -> Any:  # its bytes
        answer = self._repeated.answer(request)
        if answer is not None:
            return answer
        mark = self._repeated.mark
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
        token = next_page_token("tasks", tasks, size, lambda task: task.key)
        answer = joined(
            task_service_pb2.ListTasksResponse.TASKS_FIELD_NUMBER,
            self._ready(tasks[:size]),
            task_service_pb2.ListTasksResponse(next_page_token=token),
        )
        return self._repeated.keep(request, mark, answer)

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

    def WatchTask(  # noqa: N802, D102
        self, request: task_service_pb2.WatchTaskRequest, context: _Context
    ) -> AsyncIterator[Any]:  # bytes, where they are ready
        task = self._manager.get(request.name)
        return watch_task(self._manager, request, task, self._encode(task), self._stopping)

    async def WatchTasks(  # noqa: N802, D102
        self, request: task_service_pb2.WatchTasksRequest, context: _Context
    ) -> AsyncIterator[Any]:  # bytes, where they are ready
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
    ) -> Any:  # its bytes
        answer = self._repeated.answer(request)
        if answer is not None:
            return answer
        mark = self._repeated.mark
        curves = await get_metrics(self._manager, request)
        return self._repeated.keep(request, mark, curves.SerializeToString())

    async def ListRuns(  # noqa: N802, D102
        self, request: task_service_pb2.ListRunsRequest, context: _Context
    ) -> Any:  # its bytes
        violations = check_page_size(request.page_size)
        before = page_token("runs", request.page_token, violations)
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        size = request.page_size or 100
        runs = self._manager.records.runs(task.key, limit=size + 1, before_number=before)
        token = next_page_token("runs", runs, size, lambda run: run.number)
        return joined(
            task_service_pb2.ListRunsResponse.RUNS_FIELD_NUMBER,
            [self._ready_runs.of(run.key, run, task.name) for run in runs[:size]],
            task_service_pb2.ListRunsResponse(next_page_token=token),
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
    ) -> Any:  # its bytes
        answer = self._repeated.answer(request)
        if answer is not None:
            return answer
        mark = self._repeated.mark
        violations = check_page_size(request.page_size)
        for field, value in (("run", request.run), ("after_seq", request.after_seq)):
            if value < 0:
                violations.append(negative(field, value))
        if violations:
            raise InvalidRequest(violations)
        task = self._manager.get(request.parent)
        events, size = self._manager.events, request.page_size or 500
        found: list[bytes] | None = None
        if request.run:
            kept = self._manager.digests.events(task.key, request.run, request.after_seq, size)
            found = None if kept is None else [event.SerializeToString() for event in kept]
        read = events.read_serialized
        if found is None:
            cursor = events.start(task.key, request.after_seq, task.last_seq)
            found = read(task.key, cursor, size, request.run, _MOST_PAGE_BYTES)
        elif len(found) < size:  # and what of the log itself is left
            cursor, left = events.first_seq(task.key) - 1, size - len(found)
            found += read(task.key, cursor, left, request.run, _MOST_PAGE_BYTES)
        answer = joined(
            task_service_pb2.ListEventsResponse.EVENTS_FIELD_NUMBER,
            found,
            task_service_pb2.ListEventsResponse(
                last_seq=task.last_seq,
                first_seq=events.first_seq(task.key),
                log_epoch=events.epoch,
            ),
        )
        return self._repeated.keep(request, mark, answer)

    async def ExportTaskConfig(  # noqa: N802, D102
        self, request: task_service_pb2.ExportTaskConfigRequest, context: _Context
    ) -> task_service_pb2.ExportTaskConfigResponse:
        from finetuned_daemon.export import Settings, export  # a daemon starts sooner without

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
        return convert.task(task, self._positions([task])(task))

    def _ready(self, tasks: Sequence[Task]) -> list[bytes]:
        """The messages of tasks, serialized."""
        position = self._positions(tasks)
        return [self._ready_tasks.of(task.key, task, position(task)) for task in tasks]

    def _positions(self, tasks: Sequence[Task]) -> Callable[[Task], int]:
        """Tells each task's place in the queue; 0: it does not wait there."""
        queued = {task.key for task in tasks if task.state is TaskState.QUEUED}
        if not queued:
            return lambda _: 0
        positions = self._manager.runs.queue_positions()
        # One that was queued and is not any more was the first, and has begun meanwhile.
        return lambda task: positions.get(task.key, 1) if task.key in queued else 0

    def _created(self, task: Task) -> task_service_pb2.CreateTaskResponse:
        return task_service_pb2.CreateTaskResponse(task=self._encode(task))

    def _resumed(self, task: Task) -> task_service_pb2.ResumeTaskResponse:
        return task_service_pb2.ResumeTaskResponse(task=self._encode(task))

    def _started(self, task: Task) -> task_service_pb2.StartTaskResponse:
        return task_service_pb2.StartTaskResponse(task=self._encode(task))


def _place(checkpoint: Checkpoint) -> int:
    """Place of a checkpoint in the list of its task: by run, then by step."""
    return (checkpoint.run << 40) + checkpoint.step
