"""The client for asyncio: `Client`'s methods, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from finetuned import _calls, _silence
from finetuned._calls import Call, Steps, T
from finetuned._connect import Endpoint
from finetuned._errors import FinetunedError
from finetuned._launch import start_daemon
from finetuned._session import Attempts, Session
from finetuned._status import from_rpc_error
from finetuned._watch import ENDED, Cursor, WatchItem
from finetuned.v1.event_pb2 import Event
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.system_service_pb2 import Device, GetSystemInfoResponse
from finetuned.v1.system_service_pb2_grpc import SystemServiceStub
from finetuned.v1.task_pb2 import Run, Task, TaskState, TrainingType
from finetuned.v1.task_service_pb2 import WatchTaskResponse
from finetuned.v1.task_service_pb2_grpc import TaskServiceStub


class AsyncClient:
    """The daemon, from asyncio. Use one within one event loop.

    Methods, arguments and errors are those of `Client`, where they are described.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        start_daemon: bool = False,
        timeout: float = 10.0,
    ) -> None:
        """Connects at the first call. Arguments as for `Client`."""
        self._session = Session(address, token, timeout)
        self._start = start_daemon
        self._address = address
        self._token = token
        self._lock = asyncio.Lock()
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: dict[str, Any] = {}

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
        async with self._lock:
            self._session.is_closed = True
            for channel in self._channels:
                await channel.close(None)
            self._channels.clear()

    async def train(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        request_id: str = "",
    ) -> Task:
        """As `Client.train`."""
        return await self.create_task(
            training_type,
            parameters,
            display_name=display_name,
            device=device,
            task_id=task_id,
            start=True,
            request_id=request_id,
        )

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
            )
        )

    async def get_task(self, name: str) -> Task:
        """As `Client.get_task`."""
        return await self._run(_calls.get_task(name))

    async def list_tasks(
        self, states: Iterable[str | TaskState.ValueType] = ()
    ) -> AsyncIterator[Task]:
        """As `Client.list_tasks`."""
        states = tuple(states)
        token = ""
        while True:
            page = await self._run(_calls.list_tasks_page(states, token))
            for task in page.tasks:
                yield task
            token = page.next_page_token
            if not token:
                return

    async def delete_task(self, name: str, *, etag: str = "", allow_missing: bool = False) -> None:
        """As `Client.delete_task`."""
        await self._run(_calls.delete_task(name, etag, allow_missing))

    async def start_task(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        """As `Client.start_task`."""
        return await self._run(_calls.start_task(name, etag, request_id))

    async def stop_task(self, name: str, *, discard: bool = False) -> Task:
        """As `Client.stop_task`."""
        return await self._run(_calls.stop_task(name, discard))

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
    ) -> AsyncIterator[WatchItem]:
        """As `Client.watch`."""
        name = await self._run(_calls.resolve(name))
        cursor = Cursor(name, after_seq, log_epoch, until_end, reconnect_timeout)
        while True:
            failure: FinetunedError | None = None
            endpoint = await self._connect()
            call = self._stubs[_calls.TASK_SERVICE].WatchTask(
                cursor.request(), metadata=endpoint.metadata
            )
            try:
                while True:
                    response = await asyncio.wait_for(call.read(), _silence.SILENCE_SECONDS)
                    if not isinstance(response, WatchTaskResponse):
                        break  # grpc.aio.EOF, which grpc-stubs do not know
                    self._session.was_reached = True
                    item = cursor.accept(response)
                    if item is not None:
                        yield item
                    if cursor.is_done:
                        return
            except TimeoutError:
                failure = _silence.silent(_silence.SILENCE_SECONDS)
            except grpc.RpcError as error:
                failure = from_rpc_error(error)
            finally:
                call.cancel()
            if failure is not None:
                self._session.check(endpoint, failure)
            lost = cursor.lost(failure)
            if lost is not None:
                yield lost
            await asyncio.sleep(cursor.delay())

    async def wait(self, name: str) -> Task:
        """As `Client.wait`."""
        task = await self.get_task(name)
        if task.state in ENDED:
            return task
        async for _ in self.watch(task.name, task.last_seq, until_end=True):
            pass
        return await self.get_task(task.name)

    async def system_info(self) -> GetSystemInfoResponse:
        """As `Client.system_info`."""
        return await self._run(_calls.system_info())

    async def list_devices(self) -> list[Device]:
        """As `Client.list_devices`."""
        return await self._run(_calls.list_devices())

    async def shutdown(self) -> None:
        """As `Client.shutdown`."""
        await self._run(_calls.shutdown())

    async def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = await self._send(call)
                except FinetunedError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    async def _send(self, call: Call) -> Any:
        attempts = Attempts(self._session, call.repeatable)
        while True:
            endpoint = await self._connect()
            method = getattr(self._stubs[call.service], call.rpc)
            try:
                answer = await method(
                    call.request,
                    timeout=call.timeout or self._session.timeout,
                    metadata=endpoint.metadata,
                )
            except grpc.RpcError as error:
                delay = attempts.after(endpoint, from_rpc_error(error))
            else:
                self._session.was_reached = True
                return answer
            await asyncio.sleep(delay)

    async def _connect(self) -> Endpoint:
        async with self._lock:
            self._session.check_open()
            if self._start:
                # It waits for a process: in a thread, so that the loop goes on.
                await asyncio.to_thread(start_daemon, self._address, token=self._token)
                self._start = False
            endpoint = self._session.locate()
            if endpoint != self._session.endpoint:
                channel = grpc.aio.insecure_channel(endpoint.target, endpoint.options)
                self._channels.append(channel)
                self._stubs = {
                    _calls.TASK_SERVICE: TaskServiceStub(channel),
                    _calls.SYSTEM_SERVICE: SystemServiceStub(channel),
                }
                self._session.endpoint = endpoint
            return endpoint
