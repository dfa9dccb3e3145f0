"""What is wished of a run: `control.json` and SIGTERM, watched by a thread from first to last."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from finetuned_daemon.runs.contract import CONTROL, Control, EndReason, Result, RunPhase, StopWish
from finetuned_runner.report import Report

_POLL_SECONDS = 0.1
NO_ROOM_FOR_EVENTS = (
    "No space is left where the daemon keeps its run folders: make room, then start again."
)

_logger = logging.getLogger(__name__)


def mask_signals() -> None:
    """Keeps the terminal's signals and SIGTERM away from this process, its threads and children.

    To be called before any thread starts. SIGHUP and SIGINT are for the terminal that the daemon
    was started from. SIGTERM is blocked and fetched by the watching thread: a Python handler would
    wait for the main thread, which may be minutes inside native code. Data loader workers inherit
    the mask, so that a SIGTERM to the process group leaves them to their parent.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


Cause = Literal["stop", "signal", "disk"]


class _Stage(Enum):
    BEFORE_TRAINING = auto()  # nothing to save: a wish ends the process at once
    TRAINING = auto()  # the training loop sees to a wish
    FINISHING = auto()  # the work is done and gets saved
    ENDED = auto()


class Watch:
    """Watches for wishes, and is the one place where a run's end is decided."""

    def __init__(self, run_dir: Path, report: Report):
        self._path = run_dir / CONTROL
        self._report = report
        self._lock = threading.Lock()
        self._stage = _Stage.BEFORE_TRAINING
        self._seen: tuple[int, int, int] | None = None
        self.wish: StopWish | None = None
        """How the run is asked to stop. May turn from DISCARD to SAVE until it is acted upon."""
        self.cause: Cause = "stop"
        """Where the wish came from."""
        self.checkpoint_quota: int | None = None
        """Checkpoints that the run may save, where that has changed since its start."""

    def start(self) -> None:
        """Starts watching."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def begin_training(self) -> None:
        """From here on the training loop sees to a wish."""
        with self._lock:
            self._stage = _Stage.TRAINING

    def begin_finishing(self) -> None:
        """From here on a wish stops nothing that has begun."""
        with self._lock:
            self._stage = _Stage.FINISHING

    def end(self, result: Result) -> None:
        """Writes the result; a wish that comes later changes nothing.

        Raises:
            OSError: The result can't be written.
        """
        with self._lock:
            self._stage = _Stage.ENDED
            self._report.finish(result)

    def _run(self) -> None:
        while self._stage is not _Stage.ENDED:
            try:
                self._look()
                # Not sigtimedwait: after a freeze (SIGSTOP, a debugger, a cgroup freezer) Python's
                # returns rubbish that passes for a signal.
                if signal.SIGTERM in signal.sigpending():
                    signal.sigwait({signal.SIGTERM})
                    self._take(StopWish.SAVE, "signal")
                if self._report.is_disk_full:
                    self._take(StopWish.SAVE, "disk")
            except Exception:  # without its watch a run can't be stopped
                _logger.exception("a wish can't be read or told")
            time.sleep(_POLL_SECONDS)

    def _look(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        # Replaced as a whole, so that a new wish is a new inode; the other two are for file systems
        # that reuse them.
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        self._seen = seen
        control = Control.model_validate_json(self._path.read_bytes())
        self.checkpoint_quota = control.checkpoint_quota
        if control.stop is not None:
            self._take(control.stop, "stop")

    def _take(self, stop: StopWish, cause: Cause) -> None:
        with self._lock:
            if self._stage is _Stage.ENDED:
                return
            if self.wish is not None:
                # The signal may be the daemon's second step after a wish to discard: that stands. A
                # wish to save wins.
                if cause == "stop" and stop is StopWish.SAVE:
                    self.wish = stop
                return
            self.wish, self.cause = stop, cause
            if self._stage is _Stage.FINISHING:
                return
            self._report.phase(RunPhase.STOPPING)
            if self._stage is _Stage.BEFORE_TRAINING:
                self._exit()

    def _exit(self) -> None:
        # The main thread may be deep in an import or a load that nothing interrupts; there is
        # nothing of it to keep.
        try:
            self._report.finish(
                Result(end_reason=EndReason.DISK_FULL, message=NO_ROOM_FOR_EVENTS)
                if self.cause == "disk"
                else Result(
                    end_reason=EndReason.STOPPED_BY_USER,
                    message="Stopped before training began; there was nothing to save.",
                )
            )
        finally:
            sys.stdout.flush()
            os._exit(0)
