"""Around every call: its id, its place among the calls, its line in the log, its errors."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
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

    def call(
        self,
        details: grpc.HandlerCallDetails,
        context: aio.ServicerContext[Any, Any],
        *,
        is_stream: bool,
    ) -> Call:
        """The frame of one call, to be entered by `async with`."""
        return Call(self, details, context, is_stream=is_stream)

    def check_open(self, method: str) -> None:
        """Refuses calls of a daemon that ends; of its health it still tells.

        Raises:
            Stopping: It ends.
        """
        if self.is_closing and not method.startswith(_HEALTH):
            raise Stopping

    def take_place(self, name: str, is_stream: bool, is_tcp: bool) -> None:
        """Counts one more.

        Raises:
            LimitReached: There are as many as there may be.
        """
        if is_stream:
            if is_tcp:
                self._limits.check_tcp_streams(self._tcp_streams)
            self._limits.check("open_streams", self._streams)
        elif name not in ALWAYS:
            self._limits.check("calls_in_flight", self._unary)
        if name in HEAVY:
            self._limits.check("heavy_calls", self._heavy)
        self.count(name, is_stream, is_tcp, 1)

    def count(self, name: str, is_stream: bool, is_tcp: bool, by: int) -> None:
        """Counts so many more, or fewer."""
        if is_stream:
            self._streams += by
            self._tcp_streams += by * is_tcp
        elif name not in ALWAYS:
            self._unary += by
        if name in HEAVY:
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
    """One call. What goes wrong in it is answered and logged here."""

    def __init__(
        self,
        calls: Calls,
        details: grpc.HandlerCallDetails,
        context: aio.ServicerContext[Any, Any],
        *,
        is_stream: bool,
    ) -> None:
        self._calls = calls
        self._context = context
        self._is_stream = is_stream
        self._is_tcp = not context.peer().startswith("unix:")
        self._method = str(details.method)
        self._name = self._method.rpartition("/")[2]
        given = ""
        for key, value in details.invocation_metadata or ():
            if key == REQUEST_ID and isinstance(value, str):
                given = value
        self.request_id = checked_request_id(given)
        self._has_place = False
        self._began = time.monotonic()

    async def __aenter__(self) -> Self:
        # Not set back: the task of gRPC that this runs in is the call's own.
        ABOUT.set(About(request_id=self.request_id, method=self._method))
        self._calls.came()
        self._context.set_trailing_metadata(((REQUEST_ID, self.request_id),))
        return self

    async def take_place(self) -> None:
        """Counts the call among those under way, once it is known to be a good one.

        Raises:
            LimitReached: There are as many as there may be.
        """
        self._calls.take_place(self._name, self._is_stream, self._is_tcp)
        self._has_place = True
        if self._is_stream:  # its trailers come at its end alone
            await self._context.send_initial_metadata(((REQUEST_ID, self.request_id),))

    def note_task(self, message: Any) -> None:
        """Lets the call's log lines say which task a request or an answer is about."""
        task = getattr(message, "task", None)
        for name in (
            getattr(message, "name", ""),
            getattr(message, "parent", ""),
            getattr(task, "name", task),
        ):
            found = _TASK.match(name) if isinstance(name, str) else None
            if found is not None:
                ABOUT.set(replace(ABOUT.get(), task=found[0]))
                return

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._write_line("OK")
            elif isinstance(error, DaemonError):
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
            if self._has_place:
                self._calls.count(self._name, self._is_stream, self._is_tcp, -1)
            self._calls.went()

    async def _abort(self, status: status_pb2.Status) -> None:
        plain: Any = rpc_status.to_status(status)
        trailers = (*(plain.trailing_metadata or ()), (REQUEST_ID, self.request_id))
        await self._context.abort_with_status(plain._replace(trailing_metadata=trailers))

    def _write_line(self, code: str, reason: str = "") -> None:
        seconds = time.monotonic() - self._began
        self._calls.note(self._method, code, None if self._is_stream else seconds)
        fields: dict[str, Any] = {
            "code": code,
            "duration_ms": round(seconds * 1000, 1),
            "peer": "tcp" if self._is_tcp else "unix",
        }
        if reason:
            fields["reason"] = reason
        level = logging.DEBUG if self._method.startswith(_QUIET) else logging.INFO
        text = f"{self._name} {code}{f' {reason}' if reason else ''}"
        _rpc_log.log(level, "%s", text, extra={"fields": fields})


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
