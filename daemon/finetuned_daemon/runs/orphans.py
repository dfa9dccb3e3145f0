"""Orphans below the daemon: asked for, so that runs of a standby are its children, and reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from finetuned_daemon.runs.process import awaited

_PR_SET_CHILD_SUBREAPER = 36
_LOOK_SECONDS = 1.0
_UNWANTED_SECONDS = 60.0
"""A child that ended so long ago is nobody's: whoever waits for one does it at once."""
_FIRST = 1


def ask_for_orphans() -> bool:
    """Makes this process the parent of all orphans below it; False: it can't be. Linux alone."""
    if sys.platform != "linux":
        return False
    import ctypes  # a daemon starts sooner without it

    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):  # a C library without it
        return False


class Orphans:
    """Reaps them as they end: what a runner has left behind, or what has lost its parent elsewhere.

    Children that the daemon has made itself are left to whoever waits for them. They can be told:
    each is in the daemon's session or leads its own, and what a run leaves is in the run's. What
    leads a session of its own, and nobody has waited for in a minute, was left by somebody as well.
    """

    def __init__(self) -> None:
        self.are_ours = False
        """Whether orphans below this process become its children."""
        self._look: asyncio.TimerHandle | None = None
        self._seen: dict[int, float] = {}
        """When children that lead a session were first seen to have ended, by the loop's clock."""

    def start(self, *, asks: bool) -> None:
        """Begins, where this process gets orphans at all: the first one of a container does.

        Args:
            asks: Asks for them.
        """
        self.are_ours = (asks and ask_for_orphans()) or os.getpid() == _FIRST
        if not self.are_ours:
            return
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._soon, _LOOK_SECONDS)

    def close(self) -> None:
        """Ends; those that are left are the next parent's."""
        if not self.are_ours:
            return
        asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
        if self._look is not None:
            self._look.cancel()

    def _soon(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        if self._look is not None:
            if self._look.when() <= loop.time() + seconds:
                return
            self._look.cancel()
        self._look = loop.call_later(seconds, self._reap)

    def _reap(self) -> None:
        self._look = None
        now, seen = asyncio.get_running_loop().time(), dict[int, float]()
        for pid, session in _ended_children():
            if pid in awaited:
                continue
            since = self._seen.get(pid, now)
            is_left = session not in (pid, os.getsid(0))
            if is_left or now - since >= _UNWANTED_SECONDS:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            else:
                seen[pid] = since
        self._seen = seen
        if seen:
            self._soon(_UNWANTED_SECONDS)


def _ended_children() -> Iterator[tuple[int, int]]:
    """Children that have ended and were not waited for, with their sessions."""
    for thread in Path("/proc/self/task").iterdir():
        try:
            children = (thread / "children").read_text().split()
        except OSError:  # a thread that has ended; a kernel without it
            continue
        for child in children:
            with contextlib.suppress(OSError):  # reaped meanwhile
                # After the name: state, parent, group, session; see proc(5).
                stat = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                if stat[0] == "Z":
                    yield int(child), int(stat[3])
