"""How fast a run is and when it will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager

_WINDOW = 20


class Meter:
    """Measures optimizer steps; saving and evaluation don't count."""

    def __init__(self) -> None:
        # Seconds and tokens of the last steps. The first of a run is slower (memory, kernels), and
        # goes when others come.
        self._steps: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._since = time.monotonic()
        self._paused = 0.0
        self._measured = 0

    def start(self) -> None:
        """The first step begins."""
        self._since, self._paused = time.monotonic(), 0.0

    def step(self, tokens: int) -> None:
        """A step with `tokens` tokens has ended, the next begins."""
        now = time.monotonic()
        self._measured += 1
        if self._measured == 2:
            self._steps.clear()
        self._steps.append((now - self._since - self._paused, tokens))
        self._since, self._paused = now, 0.0

    @contextmanager
    def pause(self) -> Generator[None]:
        """What happens within is no part of a step."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - began

    @property
    def tokens_per_second(self) -> float:
        """Over the last steps."""
        seconds = sum(step[0] for step in self._steps)
        return sum(step[1] for step in self._steps) / seconds if seconds > 0 else 0.0

    def eta_seconds(self, steps_left: int) -> float | None:
        """How long `steps_left` steps will take; None before the first is measured."""
        if not self._steps:
            return None
        return steps_left * sum(step[0] for step in self._steps) / len(self._steps)
