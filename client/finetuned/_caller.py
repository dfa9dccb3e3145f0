"""One connection of blocking gRPC: made, made again, and called through."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from datetime import timedelta
from typing import Any, Self

import grpc

from finetuned import _calls
from finetuned._calls import Call, Steps, T
from finetuned._channel import open_channel
from finetuned._checks import seconds
from finetuned._connect import Endpoint
from finetuned._errors import FinetunedError
from finetuned._launch import start_daemon
from finetuned._local import make_absolute
from finetuned._session import Attempts, Session
from finetuned._status import from_rpc_error
from finetuned._stubs import stubs
from finetuned._tls import TLS
from finetuned.v1.system_service_pb2 import GetSystemInfoRequest

# For a daemon that takes connections and drops them.
_SHORTEST_PAUSE = 0.05


class Caller:
    """What `Client` calls through. Threads may share one."""

    def __init__(
        self,
        address: str | None,
        token: str | None,
        start: bool,
        timeout: float | timedelta,
        language: str | None,
        tls: TLS | None,
    ) -> None:
        self._session = Session(address, token, start, timeout, language, tls)
        self._address = address
        self._token = token
        self._tls = tls
        self._lock = threading.Lock()
        self._channels: list[grpc.Channel] = []
        self._stubs: dict[str, Any] = {}
        self._limit: float | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._session.text()}>"

    def with_options(self, *, timeout: float | timedelta | None = None) -> Self:
        """The same client with another deadline for its calls, over the same connection.

        >>> client.with_options(timeout=2).get_task("greetings").display_name
        'Greetings'

        Closing either closes both. Streams, `watch` and its like, have no deadline.

        Args:
            timeout: Seconds that a call may take in all, its repeats while the daemon is away and
                the reading of training data included; else it is `DeadlineExceeded`, or
                `DaemonUnavailable`. None: as the client has it.
        """
        result = copy.copy(self)
        result._limit = seconds("timeout", timeout)  # noqa: SLF001 - its own copy
        return result

    def _run(self, steps: Steps[T], until: float | None = None) -> T:
        try:
            call = next(steps)
            while True:
                try:
                    answer = self._send(call, until)
                except FinetunedError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as end:
            result: T = end.value
            return result

    def _send(self, call: Call, until: float | None = None) -> Any:
        attempts = Attempts(
            self._session, call.rpc, repeatable=call.repeatable, limit=self._limit, until=until
        )
        while True:
            endpoint = self._connect(may_start=call.may_start)
            if endpoint.is_here:
                make_absolute(call.request)
            method = getattr(self._stubs[call.service], call.rpc)
            metadata = self._session.metadata(endpoint)
            try:
                answer = method(
                    call.request,
                    timeout=attempts.seconds(self._session.own_seconds(call.timeout)),
                    metadata=metadata,
                )
            except grpc.RpcError as error:
                delay = attempts.after(endpoint, from_rpc_error(error, metadata))
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
        endpoint = self._connect(may_start=False)
        with contextlib.suppress(grpc.RpcError):
            self._stubs[_calls.SYSTEM_SERVICE].GetSystemInfo(
                GetSystemInfoRequest(),
                timeout=seconds,
                wait_for_ready=True,
                metadata=self._session.metadata(endpoint),
            )

    def _connect(self, *, may_start: bool = True) -> Endpoint:
        """The endpoint, with a channel to it; a new one where the daemon has moved."""
        self._session.check_open()  # before the lock, which a fork can leave held
        with self._lock:
            self._session.check_open()
            if self._session.start and may_start:
                start_daemon(self._address, token=self._token, tls=self._tls)
                self._session.start = False
            endpoint = self._session.locate()
            if endpoint != self._session.endpoint:
                # The old channel leads nowhere, but other threads may still read from it.
                channel = open_channel(endpoint)
                self._channels.append(channel)
                self._stubs.update(stubs(channel))  # which `with_options` shares
                self._session.endpoint = endpoint
            return endpoint
