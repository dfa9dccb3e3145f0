"""How often a run's folder is looked at for what its runner has reported."""

from __future__ import annotations

import time

_LIVE_SECONDS = 0.02
"""While somebody watches a run that reports: what is shown live is no more behind than this."""
_LIVELY_SECONDS = 0.25
"""So long after the last report, the next may come at any moment."""


class Pace:
    """The pace of one run. A look that finds nothing costs 0.1 ms."""

    def __init__(self, seconds: float) -> None:
        """Takes the time between two looks at a run that nobody watches, or that is quiet."""
        self._seconds = seconds
        self._read_bytes = -1
        self._lively_until = 0.0

    def next(self, read_bytes: int, *, is_watched: bool) -> float:
        """Seconds until the next look.

        Args:
            read_bytes: How much of the runner's file has been read.
            is_watched: Whether anybody watches.
        """
        now = time.monotonic()
        if read_bytes != self._read_bytes:
            self._read_bytes = read_bytes
            self._lively_until = now + _LIVELY_SECONDS
        if is_watched and now < self._lively_until:
            return min(_LIVE_SECONDS, self._seconds)
        return self._seconds
