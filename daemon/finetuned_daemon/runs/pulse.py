"""Whether a live runner gives signs of life, and what happens where it does not.

A sign is a change of the time of its `heartbeat`, whatever that time is: clocks may jump. What
counts is the time in which this daemon looked and saw none. While the daemon itself was stopped, or
the machine slept, nobody looked.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from finetuned_daemon.config import Config
from finetuned_daemon.runs.contract import HEARTBEAT, Notice, ProcessIdentity

_LONGEST_LOOK_SECONDS = 1.0
"""More between two looks was the daemon's own absence."""


class Pulse:
    """The signs of life of one runner process."""

    def __init__(self, config: Config, folder: Path, identity: ProcessIdentity) -> None:
        self._config = config
        self._heartbeat = folder / HEARTBEAT
        self._pid = identity.pid
        self._looked = time.monotonic()
        self._beat: int | None = None
        self._silent = 0.0
        self._hung = 0.0
        self._is_noticed = False

    def look(self, *, has_begun: bool) -> Notice | None:
        """Looks for a sign; returns what is to be said, if anything.

        Args:
            has_begun: Whether the run has reported anything.
        """
        now = time.monotonic()
        passed = min(now - self._looked, _LONGEST_LOOK_SECONDS)
        self._looked = now
        beat = self._read()
        if beat != self._beat or (beat is None and has_begun):
            # One without a heartbeat that works is of an earlier version.
            self._beat = beat
            self._silent = self._hung = 0.0
            return self._back()
        self._silent += passed
        is_stopped = _is_stopped(self._pid)
        if not is_stopped:
            self._hung += passed
        if self._is_noticed or self._silent < self._config.hang_notice_seconds:
            return None
        self._is_noticed = True
        if is_stopped:
            text = (
                "The runner was stopped by somebody (SIGSTOP, or a debugger). It waits for SIGCONT "
                "and is not ended for that; a stop of the task still ends it."
            )
        else:
            text = (
                f"The runner has given no sign of life for {self._silent:.0f} s: it may be stuck "
                "in a driver, or on a disk that does not answer."
            )
            if self._deadline:
                text += f" After {self._deadline:g} s without any it is ended."
        return Notice(reason="RUNNER_SILENT", message=text)

    @property
    def due(self) -> signal.Signals | None:
        """The signal that it should have got by now for want of signs."""
        deadline = self._deadline
        if not deadline or self._hung < deadline:
            return None
        if self._hung < deadline + self._config.kill_deadline_seconds:
            return signal.SIGTERM
        return signal.SIGKILL

    @property
    def _deadline(self) -> float:
        if self._beat is None:
            return self._config.start_deadline_seconds
        return self._config.hang_deadline_seconds

    def _read(self) -> int | None:
        try:
            return self._heartbeat.stat().st_mtime_ns
        except OSError:
            return None

    def _back(self) -> Notice | None:
        if not self._is_noticed:
            return None
        self._is_noticed = False
        return Notice(reason="RUNNER_BACK", message="The runner gives signs of life again.")


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped or traced: it can do nothing about its silence."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        if Path("/proc/self/stat").exists():
            return False
    else:
        return stat[stat.rindex(")") + 2] in "Tt"
    import psutil  # not on Linux, where a daemon starts sooner without it

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.Error:
        return False
