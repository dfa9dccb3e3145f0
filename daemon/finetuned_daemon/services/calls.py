"""Around every call: its id, its place among the calls, its line in the log, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from finetuned_daemon.errors import DaemonError, Stopping
from finetuned_daemon.limits import Limits
from finetuned_daemon.logs import ABOUT, RPC_LOGGER, About, checked_request_id

REQUEST_ID = "request-id"
"""Metadata of a call and of its answer. Not the field `request_id` of some messages, by which a
repeat gets the first answer again: this one is for logs alone."""

HEAVY = frozenset(
    {
        "CreateTask",
        "UpdateTask",
        "DeleteTask",
        "StartTask",
        "ResumeTask",
        "ListCheckpoints",
        "DeleteCheckpoint",
        "ExportTaskConfig",
        "ValidateParameters",
        "EstimateTask",
        "InspectDataset",
        "CheckEnvironment",
    }
)
"""They read files or start processes."""

ALWAYS = frozenset({"StopTask", "PauseTask", "Shutdown", "GetSystemInfo", "Check"})
"""They wait for nothing, and get in however many calls there are: they are the way out."""

_HEALTH = "/grpc.health."
_QUIET = (_HEALTH, "/grpc.reflection.")
_TASK = re.compile(r"tasks/[a-z0-9-]{1,63}(?=/|$)")
_CODES = {status.value[0]: status.name for status in grpc.StatusCode}

_log = logging.getLogger(__name__)
_rpc_log = logging.getLogger(RPC_LOGGER)

ToStatus = Callable[[DaemonError, Any], status_pb2.Status]


@dataclass(frozen=True, slots=True)
class Method:
    """What is known of a method before it is called."""

    path: str
    """gRPC's name for it, `/package.Service/Rpc`."""
    name: str
    is_stream: bool
    is_heavy: bool
    waits: bool
    """Whether there may be too many calls for one more."""
    level: int
    """Of its line in the log."""

    @classmethod
    def of(cls, path: str, *, is_stream: bool) -> Method:
        """The method that gRPC calls so."""
        name = path.rpartition("/")[2]
        level = logging.DEBUG if path.startswith(_QUIET) else logging.INFO
        return cls(path, name, is_stream, name in HEAVY, name not in ALWAYS, level)


class Calls:
    """The calls that are under way."""

    def __init__(self, limits: Limits, to_status: ToStatus) -> None:
        self._limits = limits
        self.to_status = to_status
        self.is_closing = False
        """Whether no new calls are taken, as those that come now would be cut off."""
        self._all = 0
        self._unary = 0
        self._heavy = 0
        self._streams = 0
        self._tcp_streams = 0
        self.answered = Counter[tuple[str, str]]()
        """Calls that were answered, by gRPC's name for the method and the status' name."""
        self.seconds = dict[str, tuple[int, float]]()
        """Number and duration of those that are no streams, by the same name."""
        self._idle = asyncio.Event()
        self._idle.set()
        limits.count_by("calls_in_flight", lambda: self._unary)
        limits.count_by("heavy_calls", lambda: self._heavy)
        limits.count_by("open_streams", lambda: self._streams)

    async def wait_until_idle(self, seconds: float) -> None:
        """Returns once no call is under way, or time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    def call(self, method: Method, context: aio.ServicerContext[Any, Any], *, is_tcp: bool) -> Call:
        """The frame of one call, to be entered."""
        return Call(self, method, context, is_tcp=is_tcp)

    def check_open(self, method: str) -> None:
        """Refuses calls of a daemon that ends; of its health it still tells.

        Raises:
            Stopping: It ends.
        """
        if self.is_closing and not method.startswith(_HEALTH):
            raise Stopping

    def take_place(self, method: Method, is_tcp: bool) -> None:
        """Counts one more.

        Raises:
            LimitReached: There are as many as there may be.
        """
        if method.is_stream:
            if is_tcp:
                self._limits.check_tcp_streams(self._tcp_streams)
            self._limits.check("open_streams", self._streams)
        elif method.waits:
            self._limits.check("calls_in_flight", self._unary)
        if method.is_heavy:
            self._limits.check("heavy_calls", self._heavy)
        self.count(method, is_tcp, 1)

    def count(self, method: Method, is_tcp: bool, by: int) -> None:
        """Counts so many more, or fewer."""
        if method.is_stream:
            self._streams += by
            self._tcp_streams += by * is_tcp
        elif method.waits:
            self._unary += by
        if method.is_heavy:
            self._heavy += by

    def came(self) -> None:
        """A call has come, be it a good one or not."""
        self._all += 1
        self._idle.clear()

    def note(self, method: str, code: str, seconds: float | None) -> None:
        """Counts an answer; `seconds` None: it was a stream."""
        self.answered[method, code] += 1
        if seconds is not None:
            number, total = self.seconds.get(method, (0, 0.0))
            self.seconds[method] = (number + 1, total + seconds)

    def went(self) -> None:
        """A call has ended."""
        self._all -= 1
        if not self._all:
            self._idle.set()


class Call:
    """One call. What goes wrong in it is answered and logged here.

    Entered by `async with`; or, where each microsecond counts, by `begin`, and then `succeed` or
    `fail`.
    """

    __slots__ = (
        *("_began", "_calls", "_context", "_has_place", "_has_task", "_is_tcp", "_method"),
        *("metadata", "request_id"),
    )

    def __init__(
        self,
        calls: Calls,
        method: Method,
        context: aio.ServicerContext[Any, Any],
        *,
        is_tcp: bool,
    ) -> None:
        self._calls = calls
        self._context = context
        self._method = method
        self._is_tcp = is_tcp
        self.metadata: tuple[tuple[str, Any], ...] = tuple(context.invocation_metadata() or ())
        """What the caller sent."""
        given = ""
        for key, value in self.metadata:
            if key == REQUEST_ID and isinstance(value, str):
                given = value
        self.request_id = checked_request_id(given)
        self._has_place = False
        self._has_task = False
        self._began = time.monotonic()

    def begin(self, request: Any = None) -> None:
        """The call has come; log lines from here on are about it, and the task that it names."""
        # Not set back: the task of gRPC that this runs in is the call's own.
        task = _task_of(request)
        self._has_task = bool(task)
        ABOUT.set(About(request_id=self.request_id, method=self._method.path, task=task))
        self._calls.came()
        self._context.set_trailing_metadata(((REQUEST_ID, self.request_id),))

    def take_place(self) -> None:
        """Counts the call among those under way, once it is known to be a good one.

        Raises:
            LimitReached: There are as many as there may be.
        """
        self._calls.take_place(self._method, self._is_tcp)
        self._has_place = True

    async def take_place_of_stream(self) -> None:
        """The same for a stream, whose trailers come at its end alone: its id is sent ahead.

        Raises:
            LimitReached: There are as many as there may be.
        """
        self.take_place()
        await self._context.send_initial_metadata(((REQUEST_ID, self.request_id),))

    def note_answer(self, answer: Any) -> None:
        """Lets the call's log lines say which task an answer is about, such as a new one."""
        if not self._has_task:
            task = _task_of(answer)
            if task:
                ABOUT.set(replace(ABOUT.get(), task=task))

    def succeed(self) -> None:
        """Ends a call that was answered."""
        self._write_line("OK")
        self._leave()

    async def fail(self, error: BaseException) -> None:
        """Ends a call with what it raised. Whatever is raised here, gRPC has been told.

        Raises:
            AbortError: The caller gets a status with its details.
        """
        try:
            if isinstance(error, DaemonError):
                status = self._calls.to_status(error, self._context)
                self._write_line(_CODES[status.code], error.reason)
                await self._abort(status)
            elif isinstance(error, aio.AbortError):
                code: Any = self._context.code()
                self._write_line(_CODES.get(code, str(code)))
            elif isinstance(error, Exception) and not isinstance(error, aio.BaseError):
                _log.error("a call failed by an error of the daemon's own", exc_info=error)
                self._write_line("INTERNAL", "INTERNAL")
                await self._abort(_internal(self.request_id))
            else:  # the client has gone, or wants no more
                self._write_line("CANCELLED")
        finally:
            self._leave()

    async def __aenter__(self) -> Self:
        self.begin()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.succeed()
        else:
            await self.fail(error)

    def _leave(self) -> None:
        if self._has_place:
            self._calls.count(self._method, self._is_tcp, -1)
        self._calls.went()

    async def _abort(self, status: status_pb2.Status) -> None:
        plain: Any = rpc_status.to_status(status)
        trailers = (*(plain.trailing_metadata or ()), (REQUEST_ID, self.request_id))
        await self._context.abort_with_status(plain._replace(trailing_metadata=trailers))

    def _write_line(self, code: str, reason: str = "") -> None:
        method = self._method
        seconds = time.monotonic() - self._began
        self._calls.note(method.path, code, None if method.is_stream else seconds)
        if not _rpc_log.isEnabledFor(method.level):
            return
        fields: dict[str, Any] = {
            "code": code,
            "duration_ms": round(seconds * 1000, 1),
            "peer": "tcp" if self._is_tcp else "unix",
        }
        if reason:
            fields["reason"] = reason
        text = f"{method.name} {code}{f' {reason}' if reason else ''}"
        _rpc_log.log(method.level, "%s", text, extra={"fields": fields})


_naming: dict[type, tuple[str, ...]] = {}


def _task_of(message: Any) -> str:
    """The task that a request or an answer is about; empty: it names none."""
    kind = type(message)
    fields = _naming.get(kind)
    if fields is None:  # there are as many kinds of messages as there are, and no more
        descriptor = getattr(message, "DESCRIPTOR", None)
        known = descriptor.fields_by_name if descriptor is not None else ()
        fields = _naming[kind] = tuple(f for f in ("name", "parent", "task") if f in known)
    for field in fields:
        name = getattr(message, field)
        if not isinstance(name, str):
            name = getattr(name, "name", "")
        found = _TASK.match(name)
        if found is not None:
            return found[0]
    return ""


def _internal(request_id: str) -> status_pb2.Status:
    status = status_pb2.Status(
        code=code_pb2.INTERNAL,
        message=f"the daemon failed by an error of its own (request {request_id}); runs are not "
        "affected. Please report it, with what `finetunectl support-bundle` collects.",
    )
    packed = any_pb2.Any()
    packed.Pack(
        error_details_pb2.ErrorInfo(
            reason="INTERNAL", domain="finetuned", metadata={"request_id": request_id}
        )
    )
    status.details.append(packed)
    return status
