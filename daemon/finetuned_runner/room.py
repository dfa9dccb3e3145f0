"""A full disk: the run waits for room with everything in memory, and goes on where it was.

Nothing is trained meanwhile, so that no step is lost or repeated. What could not be written whole
is removed first: it may be what takes the last room.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from finetuned_daemon.runs.contract import RunPhase, StopWish
from finetuned_runner.control import Watch
from finetuned_runner.failures import is_disk_full
from finetuned_runner.report import Report

_T = TypeVar("_T")

_WISH_SECONDS = 0.1
_LOOK_SECONDS = 2.0
_TRY_SECONDS = 60.0
"""It is tried all the same: how much is needed is an estimate."""
_RECORD_BYTES = 16 << 10
_RUN_FOLDER = "{}, where the run's events are kept"

_logger = logging.getLogger(__name__)


class GivenUp(Exception):
    """While the run waited for room it was asked to end, and to save nothing."""


class Room:
    """Waits for room as long as the run may; `seconds` 0: not at all."""

    def __init__(self, report: Report, watch: Watch, seconds: float) -> None:
        self._report = report
        self._watch = watch
        self._seconds = seconds

    def write(self, target: Path, needed: Callable[[], int], write: Callable[[], _T]) -> _T:
        """What `write` returns, which is called again as long as the disk is full.

        Args:
            target: What is written, for messages; its folder tells the disk.
            needed: About how many bytes that takes.
            write: Leaves nothing behind where it fails, and says which phase it is.

        Raises:
            GivenUp: A wish to discard came.
            Exception: What `write` raised; of a full disk only when the time was over.
        """
        began = 0.0
        while True:
            try:
                return write()
            except Exception as error:
                began = began or time.monotonic()
                if not is_disk_full(error) or not self._await(target, needed(), began):
                    raise

    def await_events(self) -> None:
        """Waits while the run folder takes no events; they are held in memory until then."""
        if not self._report.is_disk_full or not self._seconds:
            return
        began, before = time.monotonic(), self._report.current_phase
        self._say(_RUN_FOLDER.format(self._report.run_dir), None, began)
        # The watching thread writes them once there is room, and ends the run when that lasts too
        # long.
        while self._report.is_disk_full and self._watch.wish is None and self._left(began) > 0:
            time.sleep(_WISH_SECONDS)
        if before is not None:
            self._report.phase(before)

    def _await(self, target: Path, needed: int, began: float) -> bool:
        """Waits for room; False: the time is over."""
        if not self._may_wait(began):
            return False
        run_dir = self._report.run_dir
        if _has_room(run_dir, _RECORD_BYTES):
            self._say(str(target.parent), (target.name, needed), began)
        else:
            self._say(_RUN_FOLDER.format(run_dir), None, began)
        tried = looked = time.monotonic()
        while self._may_wait(began):
            time.sleep(_WISH_SECONDS)
            now = time.monotonic()
            if now - tried >= _TRY_SECONDS:
                return True
            if now - looked >= _LOOK_SECONDS:
                looked = now
                # What is written is recorded in the run folder, which may be on another disk.
                if _has_room(target.parent, needed) and _has_room(run_dir, _RECORD_BYTES):
                    return True
        return False

    def _may_wait(self, began: float) -> bool:
        wish = self._watch.wish
        if wish is StopWish.DISCARD:
            raise GivenUp
        if not self._seconds or self._watch.is_urged:
            return False
        if wish is not None and self._watch.cause == "stop":
            return True  # as long as the daemon lets it: SIGTERM is its last word
        return self._left(began) > 0

    def _left(self, began: float) -> float:
        return self._seconds - (time.monotonic() - began)

    def _say(self, where: str, what: tuple[str, int] | None, began: float) -> None:
        needed = f" {what[0]} needs about {_size(what[1])}." if what else ""
        message = (
            f"No space is left in {where}.{needed} Make room: everything is held in memory, and "
            f"the run goes on by itself. It waits for {_duration(self._left(began))} at most."
        )
        _logger.warning("%s", message)
        self._report.phase(RunPhase.WAITING_FOR_SPACE, message)


def size_of(model: torch.nn.Module, *, trained_only: bool = False) -> int:
    """About how much the weights of a model take on disk."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad or not trained_only)


def size_of_state(optimizer: Any) -> int:
    """About how much the state of an optimizer takes on disk."""
    states: Any = getattr(optimizer, "state", {})
    values = (value for state in states.values() for value in state.values())
    return sum(value.nbytes for value in values if torch.is_tensor(value))


def _has_room(folder: Path, needed: int) -> bool:
    """Whether a file of so many bytes can be had, which a user's quota may forbid."""
    try:
        if shutil.disk_usage(folder).free < needed:
            return False
        if hasattr(os, "posix_fallocate"):
            with tempfile.TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, max(needed, 1))
    except OSError:
        return False
    return True


def _size(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB" if size < 1 << 30 else f"{size / (1 << 30):.1f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"
