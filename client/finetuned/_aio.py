"""The client for asyncio: `Client`'s methods, awaited."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from datetime import timedelta
from os import PathLike
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from finetuned import _calls, _fork, _prepare
from finetuned._calls import Call, Steps, T, TaskName
from finetuned._channel import open_aio_channel
from finetuned._checkpoints import AsyncCheckpoints, resume_choice
from finetuned._checks import seconds
from finetuned._client import Client
from finetuned._connect import Endpoint
from finetuned._errors import FinetunedError
from finetuned._export import AsyncExports
from finetuned._health import AsyncHealths
from finetuned._launch import start_daemon
from finetuned._local import make_absolute
from finetuned._logs import AsyncLogs
from finetuned._metrics import AsyncCurves
from finetuned._overview import AsyncOverviews
from finetuned._pause import AsyncPauses
from finetuned._probe import AsyncProbes
from finetuned._session import Attempts, Session
from finetuned._status import from_rpc_error
from finetuned._stubs import stubs
from finetuned._tls import TLS
from finetuned._train import AsyncTrains
from finetuned._violations import ParameterViolation
from finetuned._waiting import AsyncWaits
from finetuned._watch import Cursor, WatchItem
from finetuned.v1.dataset_service_pb2 import BadLinePolicy, DatasetReport, InspectionProgress
from finetuned.v1.event_pb2 import Event
from finetuned.v1.parameter_service_pb2 import (
    EstimateTaskResponse,
    GetParameterSchemaResponse,
)
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.system_service_pb2 import (
    CheckEnvironmentResponse,
    Device,
    GetQuotaResponse,
    GetSystemInfoResponse,
)
from finetuned.v1.task_pb2 import Run, Task, TaskState, TrainingType
from finetuned.v1.task_service_pb2 import DeleteTaskResponse
from finetuned.v1.template_service_pb2 import Template


class AsyncClient(
    AsyncCheckpoints,
    AsyncCurves,
    AsyncExports,
    AsyncHealths,
    AsyncLogs,
    AsyncOverviews,
    AsyncPauses,
    AsyncProbes,
    AsyncTrains,
    AsyncWaits,
):
    """The daemon, from asyncio. Use one within one event loop.

    >>> import asyncio
    >>> async def main():
    ...     async with AsyncClient() as client:
    ...         task = await client.task("greetings")
    ...         async for item in (await task.start()).watch():
    ...             if isinstance(item, finetuned.Event) and item.HasField("progress"):
    ...                 print(item.progress.step)
    >>> asyncio.run(main())
    1
    2
    3

    Methods, arguments and errors are those of `Client`, where they are described.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        start_daemon: bool = False,
        timeout: float | timedelta = 10.0,
        language: str | None = None,
        tls: TLS | None = None,
    ) -> None:
        """Connects at the first call. Arguments as for `Client`."""
        self._session = Session(address, token, start_daemon, timeout, language, tls)
        self._address = address
        self._token = token
        self._tls = tls
        self._lock = asyncio.Lock()
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: dict[str, Any] = {}
        self._limit: float | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._session.text()}>"

    def with_options(self, *, timeout: float | timedelta | None = None) -> Self:
        """As `Client.with_options`."""
        result = copy.copy(self)
        result._limit = seconds("timeout", timeout)  # noqa: SLF001 - its own copy
        return result

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As `Client.close`."""
        if self._session.is_forked or not self._session.is_of_this_loop():
            # The channel is another process' or loop's, and can't be closed from here.
            self._session.is_closed = True
            return
        async with self._lock:
            self._session.is_closed = True
            for channel in self._channels:
                await channel.close(None)
            self._channels.clear()

    async def create_task(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        start: bool = False,
        request_id: str = "",
        validate_only: bool = False,
        template: str = "",
        update_template: bool = False,
    ) -> Task:
        """As `Client.create_task`."""
        return await self._run(
            _calls.create_task(
                training_type,
                parameters,
                display_name,
                device,
                task_id,
                start,
                request_id,
                validate_only,
                template,
                update_template,
            )
        )

    async def get_task(self, name: TaskName) -> Task:
        """As `Client.get_task`."""
        return await self._run(_calls.get_task(name))

    async def list_tasks(
        self, states: str | TaskState.ValueType | Iterable[str | TaskState.ValueType] = ()
    ) -> AsyncIterator[Task]:
        """As `Client.list_tasks`."""
        states = _calls.items(states)
        token = ""
        while True:
            page = await self._run(_calls.list_tasks_page(states, token))
            for task in page.tasks:
                yield task
            token = page.next_page_token
            if not token:
                return

    async def update_task(
        self,
        name: str,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        device: str | None = None,
        reset: str | Iterable[str] = (),
        update_template: bool = False,
        validate_only: bool = False,
        etag: str = "",
    ) -> Task:
        """As `Client.update_task`."""
        return await self._run(
            _calls.update_task(
                name,
                parameters,
                display_name,
                device,
                reset,
                update_template,
                validate_only,
                etag,
            )
        )

    async def delete_task(
        self,
        name: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        delete_outputs: bool = False,
    ) -> DeleteTaskResponse:
        """As `Client.delete_task`."""
        return await self._run(_calls.delete_task(name, etag, allow_missing, delete_outputs))

    async def start_task(
        self, name: str, *, etag: str = "", request_id: str = "", resume: str | PathLike[str] = ""
    ) -> Task:
        """As `Client.start_task`."""
        return await self._run(_calls.start_task(name, etag, request_id, *resume_choice(resume)))

    async def list_runs(self, name: str) -> AsyncIterator[Run]:
        """As `Client.list_runs`."""
        name = await self._run(_calls.resolve(name))
        token = ""
        while True:
            page = await self._run(_calls.list_runs_page(name, token))
            for run in page.runs:
                yield run
            token = page.next_page_token
            if not token:
                return

    async def list_events(
        self, name: str, after_seq: int = 0, *, run: int = 0
    ) -> AsyncIterator[Event]:
        """As `Client.list_events`."""
        name = await self._run(_calls.resolve(name))
        while True:
            page = await self._run(_calls.list_events_page(name, after_seq, run))
            for event in page.events:
                yield event
            if not page.events or page.events[-1].seq >= page.last_seq:
                return
            after_seq = page.events[-1].seq

    async def watch(
        self,
        name: str,
        after_seq: int = 0,
        *,
        log_epoch: str = "",
        until_end: bool = False,
        reconnect_timeout: float | None = None,
    ) -> AsyncGenerator[WatchItem, None]:
        """As `Client.watch`."""
        name = await self._run(_calls.resolve(name))
        cursor = Cursor(name, after_seq, log_epoch, until_end, reconnect_timeout)
        async with aclosing(self._follow(cursor)) as followed:
            async for item in followed:
                yield item

    async def parameter_schema(
        self, training_type: str | TrainingType.ValueType
    ) -> GetParameterSchemaResponse:
        """As `Client.parameter_schema`."""
        return await self._run(_prepare.parameter_schema(training_type))

    async def validate(
        self,
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        device: str = "",
        template: str = "",
        task: str = "",
        allow_unfinished: bool = False,
    ) -> list[ParameterViolation]:
        """As `Client.validate`."""
        return await self._run(
            _prepare.validate(training_type, parameters, device, template, task, allow_unfinished)
        )

    async def estimate(
        self,
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        device: str = "",
        template: str = "",
        task: str = "",
        resume: str | PathLike[str] = "",
    ) -> EstimateTaskResponse:
        """As `Client.estimate`."""
        return await self._run(
            _prepare.estimate(training_type, parameters, device, template, task, resume)
        )

    async def create_template(
        self,
        display_name: str = "",
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        task: str = "",
        template_id: str = "",
        request_id: str = "",
    ) -> Template:
        """As `Client.create_template`."""
        return await self._run(
            _prepare.create_template(
                display_name, training_type, parameters, task, template_id, request_id
            )
        )

    async def get_template(self, name: str) -> Template:
        """As `Client.get_template`."""
        return await self._run(_prepare.get_template(name))

    async def list_templates(
        self, training_type: str | TrainingType.ValueType | None = None
    ) -> AsyncIterator[Template]:
        """As `Client.list_templates`."""
        token = ""
        while True:
            page = await self._run(_prepare.list_templates_page(training_type, token))
            for template in page.templates:
                yield template
            token = page.next_page_token
            if not token:
                return

    async def update_template(
        self,
        name: str,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        reset: str | Iterable[str] = (),
        etag: str = "",
    ) -> Template:
        """As `Client.update_template`."""
        return await self._run(
            _prepare.update_template(name, parameters, display_name, reset, etag)
        )

    async def delete_template(
        self, name: str, *, etag: str = "", allow_missing: bool = False
    ) -> None:
        """As `Client.delete_template`."""
        await self._run(_prepare.delete_template(name, etag, allow_missing))

    async def inspect_dataset(
        self,
        path: str | PathLike[str],
        training_type: str | TrainingType.ValueType = "sft",
        *,
        tokenizer_path: str | PathLike[str] = "",
        max_seq_length: int = 0,
        bad_line_policy: str | BadLinePolicy.ValueType = "fail",
        max_rendered_samples: int | None = None,
        max_samples: int = 0,
    ) -> AsyncIterator[InspectionProgress | DatasetReport]:
        """As `Client.inspect_dataset`."""
        request = _prepare.inspect_request(
            path,
            training_type,
            tokenizer_path,
            max_seq_length,
            bad_line_policy,
            max_rendered_samples,
            max_samples,
        )
        attempts = Attempts(self._session, "InspectDataset", repeatable=True)
        while True:
            was_answered = False
            endpoint = await self._connect()
            if endpoint.is_here:
                make_absolute(request)
            call = self._stubs[_calls.DATASET_SERVICE].InspectDataset(
                request, metadata=self._session.metadata(endpoint)
            )
            _fork.stream_begins(call)
            try:
                async for response in call:
                    was_answered = self._session.was_reached = True
                    item = _prepare.inspect_item(response)
                    if item is not None:
                        yield item
                return
            except grpc.RpcError as error:
                if was_answered:
                    raise from_rpc_error(error) from error
                delay = attempts.after(endpoint, from_rpc_error(error))
            finally:
                _fork.stream_ends(call)
                call.cancel()
            await asyncio.sleep(delay)

    async def system_info(self) -> GetSystemInfoResponse:
        """As `Client.system_info`."""
        return await self._run(_calls.system_info())

    async def list_devices(self) -> list[Device]:
        """As `Client.list_devices`."""
        return await self._run(_calls.list_devices())

    async def check_environment(self, *, refresh: bool = False) -> CheckEnvironmentResponse:
        """As `Client.check_environment`."""
        return await self._run(_prepare.check_environment(refresh))

    async def quota(self) -> GetQuotaResponse:
        """As `Client.quota`."""
        return await self._run(_prepare.quota())

    async def shutdown(self) -> None:
        """As `Client.shutdown`."""
        await self._run(_calls.shutdown())

    async def _run(self, steps: Steps[T], until: float | None = None) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = await self._send(call, until)
                except FinetunedError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    async def _send(self, call: Call, until: float | None = None) -> Any:
        attempts = Attempts(
            self._session, call.rpc, repeatable=call.repeatable, limit=self._limit, until=until
        )
        while True:
            endpoint = await self._connect(may_start=call.may_start)
            if endpoint.is_here:
                make_absolute(call.request)
            method = getattr(self._stubs[call.service], call.rpc)
            metadata = self._session.metadata(endpoint)
            try:
                answer = await method(
                    call.request,
                    timeout=attempts.seconds(self._session.own_seconds(call.timeout)),
                    metadata=metadata,
                )
            except grpc.RpcError as error:
                delay = attempts.after(endpoint, from_rpc_error(error, metadata))
            else:
                self._session.was_reached = True
                return answer
            await asyncio.sleep(delay)

    async def _connect(self, *, may_start: bool = True) -> Endpoint:
        self._session.check_open()
        self._session.check_loop()
        async with self._lock:
            self._session.check_open()
            if self._session.start and may_start:
                # It waits for a process: in a thread, so that the loop goes on.
                await asyncio.to_thread(
                    start_daemon, self._address, token=self._token, tls=self._tls
                )
                self._session.start = False
            endpoint = self._session.locate()
            if endpoint != self._session.endpoint:
                channel = open_aio_channel(endpoint)
                self._channels.append(channel)
                self._stubs.update(stubs(channel))
                self._session.endpoint = endpoint
            return endpoint


def _describe() -> None:
    """Gives the methods `Client`'s descriptions, for `help()` and editors."""
    for name, method in vars(AsyncClient).items():
        if not name.startswith("_"):
            method.__doc__ = getattr(Client, name).__doc__


_describe()
