"""What a client remembers about its connection, and when a failed call is made again."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from datetime import timedelta

from finetuned import _fork
from finetuned._checks import seconds
from finetuned._connect import Endpoint, find
from finetuned._errors import (
    REQUEST_ID_KEY,
    DaemonUnavailable,
    DeadlineExceeded,
    FinetunedError,
    Unauthenticated,
)
from finetuned._language import METADATA_KEY, language_of
from finetuned._tls import TLS, advise, explain

RETRY_SECONDS = 10.0
"""How long a call that can be repeated is repeated while the daemon is away."""

_FIRST_DELAY = 0.05
_LONGEST_DELAY = 1.0


class Backoff:
    """Pauses in seconds: 0.05, 0.1, 0.2 ... 1, 1, 1."""

    def __init__(self) -> None:
        self._next = _FIRST_DELAY

    def __next__(self) -> float:
        delay = self._next
        self._next = min(delay * 2, _LONGEST_DELAY)
        return delay


class Session:
    """Address and history of one client's connection; knows no channel."""

    def __init__(
        self,
        address: str | None,
        token: str | None,
        start: bool,
        timeout: float | timedelta,
        language: str | None,
        tls: TLS | None = None,
    ) -> None:
        self._address = address
        self._token = token
        self._tls = tls
        self.timeout = seconds("timeout", timeout)
        self.language = language_of(language)
        self.starts = start
        """Whether a daemon is to be started where none serves."""
        self.start = start
        """Whether that is to be done before the next call."""
        self.was_reached = False
        self.is_closed = False
        self.endpoint: Endpoint | None = None
        self.pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None

    def check_open(self) -> None:
        """Raise where the client has been closed, so that no watch reconnects after that.

        And where the process was forked since: gRPC's threads are not in the child, and a call
        would hang there.
        """
        if self.is_closed:
            raise FinetunedError("this client is closed", reason="CLIENT_CLOSED")
        if self.endpoint is not None:
            _fork.check(self.pid)
        _fork.check_streams()

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process that made the client."""
        return os.getpid() != self.pid

    def is_of_this_loop(self) -> bool:
        """Whether the event loop that runs is the one that the client was first used in."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        return self._loop is loop

    def check_loop(self) -> None:
        """Raise where it is another: grpc's channel belongs to one."""
        if not self.is_of_this_loop():
            raise FinetunedError(
                "this AsyncClient was used in another event loop: make one in each asyncio.run",
                reason="CLIENT_OTHER_LOOP",
            )

    def own_seconds(self, of_call: float | None) -> float | None:
        """Seconds that an attempt may take, where the call needs as many; None: any number."""
        return None if self.timeout is None else max(self.timeout, of_call or 0.0)

    def text(self) -> str:
        """Address, and what is to be known of the client."""
        given = self._address or (self.endpoint.target if self.endpoint is not None else None)
        address = repr(given) if given else "at the default address"
        return f"{address}, closed" if self.is_closed else address

    def locate(self) -> Endpoint:
        """Where the daemon is now; a new one may have another port and token."""
        return find(self._address, self._token, self._tls)

    def metadata(self, endpoint: Endpoint) -> tuple[tuple[str, str], ...]:
        """Metadata of a call to that endpoint, with an id of its own for the daemon's log."""
        request_id = secrets.token_hex(8)
        return (*endpoint.metadata, (METADATA_KEY, self.language), (REQUEST_ID_KEY, request_id))

    def check(self, endpoint: Endpoint, error: FinetunedError) -> FinetunedError:
        """Raise the error where waiting cannot help: nobody was ever there, and nobody is now.

        Returns:
            The error; where the token was changed meanwhile, one that another attempt mends.
        """
        if self.is_closed:  # by another thread, and this is what became of the call
            self.check_open()
        if isinstance(error, Unauthenticated):
            if self.locate().token in ("", endpoint.token):
                raise error
            return DaemonUnavailable("the token was changed; the new one is shown from now on")
        # A handshake that fails now fails in a second as well.
        is_refused = isinstance(error, DaemonUnavailable) and explain(endpoint.tls, error.message)
        if is_refused or (not self.was_reached and not endpoint.is_listening()):
            raise unreachable(endpoint, error) from error
        return error


class Attempts:
    """The attempts of one call."""

    def __init__(
        self,
        session: Session,
        rpc: str,
        *,
        repeatable: bool,
        limit: float | None = None,
        until: float | None = None,
    ) -> None:
        """Before the first.

        Args:
            session: The connection.
            rpc: Name of the call.
            repeatable: Whether a repeat does no harm.
            limit: Seconds that all attempts together may take. None: each has the time of its call.
            until: Monotonic time at which all is over, whatever the limits.
        """
        self._session = session
        self._rpc = rpc
        self._repeatable = repeatable
        self._delays = Backoff()
        self._has_shown_another = False
        self._limit = None if limit is None else time.monotonic() + limit
        self._until = until
        self._deadline: float | None = None
        self._given: float | None = None

    def seconds(self, own: float | None) -> float | None:
        """Seconds that the next attempt may take, where the call by itself has its `own`."""
        now = time.monotonic()
        if self._limit is not None:
            own = max(self._limit - now, 0.0)
        if self._until is not None:
            left = max(self._until - now, 0.0)
            own = left if own is None else min(own, left)
        self._given = own
        return own

    def after(self, endpoint: Endpoint, error: FinetunedError) -> float:
        """Seconds to wait before the next attempt; raises the error where there is to be none."""
        try:
            return self._after(endpoint, error)
        except DaemonUnavailable:
            # Whoever calls again finds it started.
            self._session.start = self._session.starts and not endpoint.is_listening()
            raise

    def _after(self, endpoint: Endpoint, error: FinetunedError) -> float:
        if isinstance(error, Unauthenticated):
            # A call that was not let in was not begun, so that any can be made again, once.
            if self._has_shown_another:
                raise error
            self._session.check(endpoint, error)
            self._has_shown_another = True
            return 0
        if isinstance(error, DeadlineExceeded) and not error.reason and self._given is not None:
            raise _named(error, f"no answer to {self._rpc} within {self._given:.3g} s") from error
        if not isinstance(error, DaemonUnavailable):
            raise error
        self._session.check(endpoint, error)
        delay = next(self._delays)
        now = time.monotonic()
        if self._deadline is None:
            # From the first failure: a call can take long before it fails.
            ends = (now + RETRY_SECONDS, self._limit, self._until)
            self._deadline = min(end for end in ends if end is not None)
        if not self._repeatable or now + delay > self._deadline:
            raise unreachable(endpoint, error) from error
        return delay


def _named(error: DeadlineExceeded, message: str) -> DeadlineExceeded:
    result = DeadlineExceeded(message, code=error.code)
    result.request_id = error.request_id
    return result


def unreachable(endpoint: Endpoint, error: FinetunedError) -> FinetunedError:
    """The error with the address in it; what the daemon itself said stays as it is."""
    if error.reason or not isinstance(error, DaemonUnavailable):
        return error
    if not endpoint.is_listening():
        return DaemonUnavailable(f"no daemon serves {endpoint.target}")
    why = explain(endpoint.tls, error.message)
    if why:
        return DaemonUnavailable(f"no connection with {endpoint.target}: {why}", reason="TLS")
    message = f"no daemon answers at {endpoint.target} ({error.message})"
    if not endpoint.is_unix and "closed" in error.message.lower():
        message += f"; {advise(endpoint.tls)}"
    return DaemonUnavailable(message)
