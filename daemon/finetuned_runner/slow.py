"""A step that takes far longer than those before: all that shows a main thread that hangs.

The heartbeat goes on when the main thread waits in native code, for a device or for another
process. Nothing is ended for it: a step may be long for a good reason.
"""

from __future__ import annotations

import statistics
from collections import deque

_TIMES = 20
_LEAST_SECONDS = 600.0
_ENOUGH = 5
_LONGEST_LOOK_SECONDS = 1.0
"""More between two looks, and the process itself was stopped."""


class SlowStep:
    """Counts the time of each step, by the looks of the watching thread."""

    def __init__(self) -> None:
        self._steps = deque[float](maxlen=_TIMES)
        self._step = 0
        self._passed = 0.0
        self._is_told = False

    def look(self, passed: float, step: int, *, is_training: bool) -> str | None:
        """What is to be said of the step that is under way, once.

        Args:
            passed: Seconds since the last look.
            step: The last whole step.
            is_training: Not when it evaluates or saves, or waits.
        """
        if not is_training:
            self._step, self._passed = -1, 0.0  # what is left of this step tells nothing
            return None
        if step != self._step:
            if self._step >= 0 and step == self._step + 1:
                self._steps.append(self._passed)
            self._step, self._passed, self._is_told = step, 0.0, False
        self._passed += min(passed, _LONGEST_LOOK_SECONDS)
        if self._is_told or len(self._steps) < _ENOUGH:
            return None
        usual = statistics.median(self._steps)
        if self._passed < max(_LEAST_SECONDS, _TIMES * usual):
            return None
        self._is_told = True
        return (
            f"Step {step + 1} has taken {self._passed / 60:.0f} minutes so far, where "
            f"{usual:.1f} s were usual. The process lives; it may wait for the device, for data on "
            "a slow disk, or for a machine that is busy with other things."
        )
