"""What a stream does about a connection that breaks: wait, tell it once, give up or go on.

Like `_calls.py` this does no input or output, so that both clients share it.
"""

from __future__ import annotations

import time

from finetuned._checks import seconds
from finetuned._errors import DaemonUnavailable, FinetunedError, InternalError
from finetuned._session import Backoff

# A transport that breaks can look like a fault of the daemon; one that always "breaks" is a fault.
_MOST_FAULTS = 5


class Outage:
    """The outages of one stream that is opened again and again."""

    def __init__(self, patience: float | None) -> None:
        """No outage yet.

        Args:
            patience: Seconds to keep trying in each. None: for ever.
        """
        self._patience = seconds("reconnect_timeout", patience)
        self._lost_at: float | None = None
        self._faults = 0
        self._delays = Backoff()

    def over(self) -> None:
        """Something has come."""
        self._lost_at = None
        self._faults = 0
        self._delays = Backoff()

    def take(self, error: FinetunedError | None) -> DaemonUnavailable | None:
        """Take the end of a stream; returns what is to be told of it, once an outage.

        Args:
            error: How it ended; None where it just ended, as the stream has no end of its own.

        Raises:
            FinetunedError: The error, where opening the stream again cannot mend it.
        """
        if error is None:
            error = DaemonUnavailable("the daemon ended the stream")
        if isinstance(error, InternalError) and not error.reason:
            self._faults += 1
            if self._faults >= _MOST_FAULTS:
                raise error
            error = DaemonUnavailable(f"the connection broke: {error.message}")
        if not isinstance(error, DaemonUnavailable):
            raise error
        now = time.monotonic()
        if self._lost_at is None:
            self._lost_at = now
            return error
        if self._patience is not None and now - self._lost_at >= self._patience:
            raise error
        return None

    def delay(self) -> float:
        """Seconds to wait before the next stream."""
        return next(self._delays)
