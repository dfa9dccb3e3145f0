"""What is wished of a run: `control.json` and SIGTERM, watched by a thread from first to last.

The same thread touches `heartbeat`: it shows that the process runs Python at all, that it was not
stopped, is not stuck in the kernel, and that nothing keeps the interpreter to itself. It does not
show that the training gets on: a main thread that waits for ever in native code, and has let go of
the interpreter, is not seen by it. Of that a step that takes far too long tells, see `slow`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from enum import Enum, auto
from pathlib import Path
from typing import Literal

from finetuned_daemon.runs.contract import (
    CONTROL,
    DISK_FULL_ERRNOS,
    HEARTBEAT,
    HEARTBEAT_SECONDS,
    Control,
    EndReason,
    Result,
    RunPhase,
    StopWish,
)
from finetuned_runner.report import Report
from finetuned_runner.slow import SlowStep

_POLL_SECONDS = 0.1
_ROOM_SECONDS = 1.0
NO_ROOM_FOR_EVENTS = "No space is left where the daemon keeps its run folders: make room."

_logger = logging.getLogger(__name__)


def mask_signals() -> None:
    """Keeps the terminal's signals and SIGTERM away from this process, its threads and children.

    To be called before any thread starts. SIGHUP and SIGINT are for the terminal that the daemon
    was started from. SIGTERM is blocked and fetched by the watching thread: a Python handler would
    wait for the main thread, which may be minutes inside native code. Data loader workers inherit
    the mask, so that a SIGTERM to the process group leaves them to their parent. Where a library
    opens a thread's mask all the same (`multiprocessing` does, when it starts its tracker), the
    handler keeps the signal from ending the process, and the watching thread hears of it.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _catch)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


_caught: list[int] = []
"""Signals that came through where a mask was open."""


def _catch(number: int, _: object) -> None:
    _caught.append(number)


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
        self._is_over = False
        self._heartbeat = -1
        self._last_beat = 0.0
        self._last_try = 0.0
        self._full_since: float | None = None
        self._slow = SlowStep()
        self._looked = time.monotonic()
        self.disk_wait_seconds = 0.0
        """How long the run waits for room on a full disk."""
        self.is_urged = False
        """SIGTERM came after another wish: there is no more time."""
        self.save_wishes = 0
        """Grows each time that a checkpoint is wished for now."""
        self.wish: StopWish | None = None
        """How the run is asked to stop. May turn from DISCARD to SAVE until it is acted upon."""
        self.cause: Cause = "stop"
        """Where the wish came from."""
        self.checkpoint_quota: int | None = None
        """Checkpoints that the run may save, where that has changed since its start."""

    def start(self) -> None:
        """Starts watching."""
        self._beat()
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
        try:
            self._report.finish(result, self.disk_wait_seconds)
        finally:
            self._is_over = True

    def _run(self) -> None:
        while not self._is_over:
            try:
                self._beat()
                self._look()
                # Not sigtimedwait: after a freeze (SIGSTOP, a debugger, a cgroup freezer) Python's
                # returns rubbish that passes for a signal.
                if signal.SIGTERM in signal.sigpending():
                    signal.sigwait({signal.SIGTERM})
                    self._take(StopWish.SAVE, "signal")
                while _caught:
                    _caught.pop()
                    self._take(StopWish.SAVE, "signal")
                self._look_for_room()
                self._look_for_slow_step()
            except Exception:  # without its watch a run can't be stopped
                _logger.exception("a wish can't be read or told")
            time.sleep(_POLL_SECONDS)

    def _beat(self) -> None:
        now = time.monotonic()
        if self._heartbeat >= 0 and now - self._last_beat < HEARTBEAT_SECONDS:
            return
        self._last_beat = now
        if self._heartbeat < 0:
            try:
                self._heartbeat = os.open(
                    self._path.with_name(HEARTBEAT), os.O_WRONLY | os.O_CREAT, 0o600
                )
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                return
        os.utime(self._heartbeat)  # this needs no room

    def _look_for_slow_step(self) -> None:
        passed, self._looked = time.monotonic() - self._looked, time.monotonic()
        is_training = self._report.current_phase is RunPhase.TRAINING
        text = self._slow.look(passed, self._report.step, is_training=is_training)
        if text is not None:
            self._report.notice("", "RUNNER_SLOW", text)

    def _look_for_room(self) -> None:
        """Writes what a full disk has held back; ends the run where that lasts too long."""
        if not self._report.is_disk_full:
            self._full_since = None
            return
        now = time.monotonic()
        if self._full_since is None:
            self._full_since = self._last_try = now
        elif now - self._last_try >= _ROOM_SECONDS:
            self._last_try = now
            if self._report.write_held() and self._stage is not _Stage.ENDED:
                with contextlib.suppress(OSError):
                    self._report.reserve()
                return
        if now - self._full_since >= self.disk_wait_seconds:
            self._take(StopWish.SAVE, "disk")

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
        self.save_wishes = control.save
        if control.stop is not None:
            self._take(control.stop, "stop")

    def _take(self, stop: StopWish, cause: Cause) -> None:
        with self._lock:
            if self._stage is _Stage.ENDED:
                return
            if self.wish is not None:
                self.is_urged |= cause == "signal"
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
