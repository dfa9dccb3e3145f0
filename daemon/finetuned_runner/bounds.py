"""Bounds for what others wrote and a run works off: templates may loop for ever, or eat memory.

Templates come with models. They are run in a sandbox, from which they reach nothing; what they can
take within it, time and memory, is bounded here. Both bounds are those of the operating system:
one step of a template may well be a power with a billion digits.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from types import FrameType

_GRACE_SECONDS = 20.0
"""After it a step that can't be interrupted takes the process with it."""
MEMORY_BYTES = 1 << 30
"""Beyond what a process has already, for a batch of ordinary chats."""


class TakesTooLong(BaseException):
    """Time is up. No `Exception`, so that nobody on the way takes it for a failure of his own."""


@contextlib.contextmanager
def bounded_time(seconds: float) -> Generator[None]:
    """Raises TakesTooLong within, after so much processor time; in the main thread alone.

    A step that holds on for long after it ends the process, by SIGPROF.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TakesTooLong

    before = signal.signal(signal.SIGVTALRM, end)
    hard = signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds + _GRACE_SECONDS)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGVTALRM, before)
        signal.signal(signal.SIGPROF, hard)


@contextlib.contextmanager
def bounded_memory(more_bytes: int) -> Generator[None]:
    """Raises MemoryError within, where this process takes so much more than it has; on Linux alone.

    Elsewhere the system does not tell what a process has.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = has + more_bytes
    if any(limit != resource.RLIM_INFINITY and limit <= wanted for limit in (soft, hard)):
        yield  # the user's own limit comes first
        return
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
