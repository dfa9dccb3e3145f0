"""What a client remembers about its connection, and when a failed call is made again."""

from __future__ import annotations

import os
import secrets
import time

from finetuned._connect import Endpoint, find
from finetuned._errors import REQUEST_ID_KEY, DaemonUnavailable, FinetunedError, Unauthenticated
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
        timeout: float,
        language: str | None,
        tls: TLS | None = None,
    ) -> None:
        self._address = address
        self._token = token
        self._tls = tls
        self.timeout = timeout
        self.language = language_of(language)
        self.start = False
        """Whether a daemon is to be started before the first call."""
        self.was_reached = False
        self.is_closed = False
        self.endpoint: Endpoint | None = None
        self._pid = os.getpid()

    def check_open(self) -> None:
        """Raise where the client has been closed, so that no watch reconnects after that.

        And where the process was forked since: gRPC's threads are not in the child, and a call
        would hang there.
        """
        if self.is_closed:
            raise FinetunedError("this client is closed", reason="CLIENT_CLOSED")
        if self.endpoint is not None and os.getpid() != self._pid:
            raise FinetunedError(
                "this client was used before the fork: make one in each process",
                reason="CLIENT_FORKED",
            )

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

    def __init__(self, session: Session, repeatable: bool, limit: float | None = None) -> None:
        """Before the first.

        Args:
            session: The connection.
            repeatable: Whether a repeat does no harm.
            limit: Seconds that all attempts together may take. None: each has the time of its call.
        """
        self._session = session
        self._repeatable = repeatable
        self._delays = Backoff()
        self._has_shown_another = False
        now = time.monotonic()
        self._limit = None if limit is None else now + limit
        self._deadline = now + (RETRY_SECONDS if limit is None else min(limit, RETRY_SECONDS))

    def seconds(self, own: float) -> float:
        """Seconds that the next attempt may take, where the call by itself has its `own`."""
        return own if self._limit is None else max(self._limit - time.monotonic(), 0.0)

    def after(self, endpoint: Endpoint, error: FinetunedError) -> float:
        """Seconds to wait before the next attempt; raises the error where there is to be none."""
        if isinstance(error, Unauthenticated):
            # A call that was not let in was not begun, so that any can be made again, once.
            if self._has_shown_another:
                raise error
            self._session.check(endpoint, error)
            self._has_shown_another = True
            return 0
        if not isinstance(error, DaemonUnavailable):
            raise error
        self._session.check(endpoint, error)
        delay = next(self._delays)
        if not self._repeatable or time.monotonic() + delay > self._deadline:
            raise unreachable(endpoint, error) from error
        return delay


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
