"""The client for programs without asyncio."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc

from finetuned import _calls, _silence
from finetuned._calls import Call, Steps, T
from finetuned._connect import Endpoint
from finetuned._errors import FinetunedError
from finetuned._launch import start_daemon
from finetuned._session import Attempts, Session
from finetuned._silence import Silence
from finetuned._status import from_rpc_error
from finetuned._watch import ENDED, Cursor, WatchItem
from finetuned.v1.event_pb2 import Event
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.system_service_pb2 import (
    Device,
    GetSystemInfoRequest,
    GetSystemInfoResponse,
)
from finetuned.v1.system_service_pb2_grpc import SystemServiceStub
from finetuned.v1.task_pb2 import Run, Task, TaskState, TrainingType
from finetuned.v1.task_service_pb2_grpc import TaskServiceStub

# For a daemon that takes connections and drops them.
_SHORTEST_PAUSE = 0.05


class Client:
    """The daemon, from a program without asyncio. Threads may share one.

    Tasks are named by `tasks/{task_id}`, by the bare id, or by their display name; where an id and
    a display name are the same word, the id wins. Every method raises `FinetunedError`s. Calls that
    are safe to repeat are repeated for up to 10 s while the daemon restarts.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        start_daemon: bool = False,
        timeout: float = 10.0,
    ) -> None:
        """Connects at the first call.

        Args:
            address: `unix:/path` or `host:port`; else `FINETUNED_ADDRESS`, else the daemon of this
                user on this machine.
            token: What TCP demands; else `FINETUNED_TOKEN`, else the token file of this user's
                daemon, at an address that this daemon has announced and nowhere else.
            start_daemon: Start the daemon at the first call if none serves. It lives on.
            timeout: Seconds that a call may take; those that read training data may take longer.
        """
        self._session = Session(address, token, timeout)
        self._start = start_daemon
        self._address = address
        self._token = token
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._stubs: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; streams under way end. The daemon and its runs go on."""
        with self._lock:
            self._session.is_closed = True
            for channel in self._channels:
                channel.close()
            self._channels.clear()

    def train(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        request_id: str = "",
    ) -> Task:
        """Create a task and start it, in one step. As `create_task` with `start`."""
        return self.create_task(
            training_type,
            parameters,
            display_name=display_name,
            device=device,
            task_id=task_id,
            start=True,
            request_id=request_id,
        )

    def create_task(
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
        """Create a task.

        Args:
            training_type: `sft` or `pretrain`.
            parameters: Section to field to value, such as `{"training": {"batch_size": 4}}`; what
                is absent has its default. Paths are absolute, on the daemon's machine.
            display_name: What a user sees; unique. Empty: made from type and time.
            device: `cpu`, `cuda:0` ... Empty: the first GPU if there is one, else the CPU.
            task_id: The id within `tasks/{task_id}`. Empty: the daemon chooses.
            start: Start it as well.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.
            validate_only: Check and write nothing.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            AlreadyExists: The id or the display name is taken.
        """
        return self._run(
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

    def get_task(self, name: str) -> Task:
        """The task as it stands.

        Raises:
            NotFound: No such task.
            TypeError: The name is no text; a `Task` has its own in `name`.
        """
        return self._run(_calls.get_task(name))

    def list_tasks(self, states: Iterable[str | TaskState.ValueType] = ()) -> Iterator[Task]:
        """All tasks, newest first, page by page; only those in one of `states` if there are any."""
        states = tuple(states)
        token = ""
        while True:
            page = self._run(_calls.list_tasks_page(states, token))
            yield from page.tasks
            token = page.next_page_token
            if not token:
                return

    def delete_task(self, name: str, *, etag: str = "", allow_missing: bool = False) -> None:
        """Delete a task, its runs and events. What its runs wrote into the output folder stays.

        Raises:
            FailedPrecondition: It is queued or running.
            Aborted: It has changed since `etag` was seen.
        """
        self._run(_calls.delete_task(name, etag, allow_missing))

    def start_task(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        """Start a new run of a task. It waits in the queue while its device is busy.

        Raises:
            InvalidArgument: Parameters are wrong or missing, all of them in `violations`.
            FailedPrecondition: It is queued or running already.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(_calls.start_task(name, etag, request_id))

    def stop_task(self, name: str, *, discard: bool = False) -> Task:
        """Ask for the end of the run, with a checkpoint unless `discard`. See `wait` for the end.

        Raises:
            FailedPrecondition: It is neither queued nor running.
        """
        return self._run(_calls.stop_task(name, discard))

    def list_runs(self, name: str) -> Iterator[Run]:
        """The runs of a task, newest first, page by page."""
        name = self._run(_calls.resolve(name))
        token = ""
        while True:
            page = self._run(_calls.list_runs_page(name, token))
            yield from page.runs
            token = page.next_page_token
            if not token:
                return

    def list_events(self, name: str, after_seq: int = 0, *, run: int = 0) -> Iterator[Event]:
        """The events of a task so far, oldest first, page by page; of one run only if `run`."""
        name = self._run(_calls.resolve(name))
        while True:
            page = self._run(_calls.list_events_page(name, after_seq, run))
            yield from page.events
            if not page.events or page.events[-1].seq >= page.last_seq:
                return
            after_seq = page.events[-1].seq

    def watch(
        self,
        name: str,
        after_seq: int = 0,
        *,
        log_epoch: str = "",
        until_end: bool = False,
        reconnect_timeout: float | None = None,
    ) -> Iterator[WatchItem]:
        """Follow a task: a `Snapshot` of it, then its `Event`s after `after_seq`, old and new.

        Where the connection breaks, or nothing at all comes for 20 s, a `ConnectionLost` is
        yielded, and the watch goes on by itself when the daemon is back: with a new `Snapshot` and
        the events after the last one. No event is missed or comes twice.

        Args:
            name: The task.
            after_seq: Last `seq` already seen. 0: from the first event.
            log_epoch: The `log_epoch` of the snapshot in which it was seen; checked if given.
            until_end: End when the task's run has ended; else the watch has no end. A task that was
                never started is waited for.
            reconnect_timeout: Seconds to keep trying while the daemon is away. None: for ever.

        Raises:
            NotFound: No such task, or it was deleted meanwhile.
            OutOfRange: The log has been restored or cut: watch again from 0.
            EventsLost: The daemon left out or repeated events.
            DaemonUnavailable: It was away for longer than `reconnect_timeout`, or never there.
        """
        name = self._run(_calls.resolve(name))
        cursor = Cursor(name, after_seq, log_epoch, until_end, reconnect_timeout)
        while True:
            failure: FinetunedError | None = None
            endpoint = self._connect()
            call = self._stubs[_calls.TASK_SERVICE].WatchTask(
                cursor.request(), metadata=endpoint.metadata
            )
            silence = Silence(call, _silence.SILENCE_SECONDS)
            try:
                for response in silence.messages():
                    self._session.was_reached = True
                    item = cursor.accept(response)
                    if item is not None:
                        yield item
                    if cursor.is_done:
                        return
            except grpc.RpcError as error:
                failure = silence.error or from_rpc_error(error)
            finally:
                silence.close()
            if failure is not None:
                self._session.check(endpoint, failure)
            lost = cursor.lost(failure)
            if lost is not None:
                yield lost
            self._pause(cursor.delay())

    def wait(self, name: str) -> Task:
        """The task when its run has ended: at once if it has, else as long as it takes.

        A task that was never started is waited for. An end in failure is no error here: see
        `state`, `end_reason` and `end_message`.
        """
        task = self.get_task(name)
        if task.state in ENDED:
            return task
        for _ in self.watch(task.name, task.last_seq, until_end=True):
            pass
        return self.get_task(task.name)

    def system_info(self) -> GetSystemInfoResponse:
        """What the daemon is and where it keeps things."""
        return self._run(_calls.system_info())

    def list_devices(self) -> list[Device]:
        """The devices that a task can run on, GPUs first."""
        return self._run(_calls.list_devices())

    def shutdown(self) -> None:
        """End the daemon. Its runs go on; the next daemon adopts them."""
        self._run(_calls.shutdown())

    def _run(self, steps: Steps[T]) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = self._send(call)
                except FinetunedError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def _send(self, call: Call) -> Any:
        attempts = Attempts(self._session, call.repeatable)
        while True:
            endpoint = self._connect()
            method = getattr(self._stubs[call.service], call.rpc)
            try:
                answer = method(
                    call.request,
                    timeout=call.timeout or self._session.timeout,
                    metadata=endpoint.metadata,
                )
            except grpc.RpcError as error:
                delay = attempts.after(endpoint, from_rpc_error(error))
            else:
                self._session.was_reached = True
                return answer
            self._pause(delay)

    def _pause(self, seconds: float) -> None:
        """Sleep, and let the channel connect meanwhile.

        Between calls nothing drives a channel of blocking grpc: each attempt to connect ran out of
        time half-way, the next call failed by it, and 5 s passed until a restarted daemon was seen.
        So a call that waits for the connection passes the time. grpc's `channel_ready_future` would
        as well, but its thread raises where the channel is closed meanwhile.
        """
        time.sleep(min(seconds, _SHORTEST_PAUSE))
        endpoint = self._connect()
        with contextlib.suppress(grpc.RpcError):
            self._stubs[_calls.SYSTEM_SERVICE].GetSystemInfo(
                GetSystemInfoRequest(),
                timeout=seconds,
                wait_for_ready=True,
                metadata=endpoint.metadata,
            )

    def _connect(self) -> Endpoint:
        """The endpoint, with a channel to it; a new one where the daemon has moved."""
        with self._lock:
            self._session.check_open()
            if self._start:
                start_daemon(self._address, token=self._token)
                self._start = False
            endpoint = self._session.locate()
            if endpoint != self._session.endpoint:
                # The old channel leads nowhere, but other threads may still read from it.
                channel = grpc.insecure_channel(endpoint.target, endpoint.options)
                self._channels.append(channel)
                self._stubs = {
                    _calls.TASK_SERVICE: TaskServiceStub(channel),
                    _calls.SYSTEM_SERVICE: SystemServiceStub(channel),
                }
                self._session.endpoint = endpoint
            return endpoint
