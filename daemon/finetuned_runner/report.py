"""What a run says of itself: `events.jsonl`, `result.json`, and the log."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Literal

from finetuned_daemon.runs.contract import (
    DISK_FULL_ERRNOS,
    EVENTS,
    RESULT,
    EventLine,
    LogLine,
    Notice,
    Payload,
    PhaseChange,
    Result,
    RunPhase,
    sync_dir,
    write_record,
)
from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder

_LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_RESERVE = ".reserve"
_RESERVED_BYTES = 256 << 10
_LOOK_SECONDS = 1.0

# They write out the model's whole configuration at every load and save.
_WORDY_LOGGERS = (
    "transformers.configuration_utils",
    "transformers.generation.configuration_utils",
    "transformers.generation.utils",
    "transformers.tokenization_utils_base",
    "transformers.utils.hub",
)


class Report:
    """Appends to `events.jsonl`, one event a line, whole or not at all; safe in threads.

    A forked process (a data loader's worker) inherits the object and stays silent: two writers
    would give a `seq` twice.
    """

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._seq = 0
        self._size = 0
        self._held: list[bytes] = []
        self._file = os.open(
            run_dir / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600
        )
        self.reserve()
        sync_dir(run_dir)
        self.is_disk_full = False
        """Events are held back, as the run folder takes no more of them."""
        self.current_phase: RunPhase | None = None
        self.step = 0
        """Last whole optimizer step."""

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self._run_dir

    def emit(self, payload: Payload) -> None:
        """Appends one event. On a full disk it is held back, to follow when there is room.

        Raises:
            OSError: It can't be written for another reason.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._seq += 1
            line = EventLine.make(self._seq, payload).model_dump_json().encode() + b"\n"
            self._held.append(line)
            self._write_held()

    def write_held(self) -> bool:
        """Writes what was held back, as far as there is room; whether that was all."""
        with self._lock:
            self._write_held()
            return not self._held

    def _write_held(self) -> None:
        while self._held:
            line = self._held[0]
            try:
                _append(self._file, line, self._size)
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                self.is_disk_full = True
                return
            self._size += len(line)
            del self._held[0]
        self.is_disk_full = False

    def reserve(self) -> None:
        """Sets room aside for the run's last words, should the disk be full by then."""
        with open(self._run_dir / _RESERVE, "wb") as file:
            file.write(bytes(_RESERVED_BYTES))
            os.fsync(file.fileno())

    def _use_reserve(self) -> bool:
        """Gives up the room set aside; False: that was done before."""
        try:
            (self._run_dir / _RESERVE).unlink()
        except FileNotFoundError:
            return False
        return True

    def phase(self, phase: RunPhase, message: str = "") -> None:
        """Says that the run entered a phase. A run that is stopping enters no other."""
        with self._lock:
            if self.current_phase is RunPhase.STOPPING:
                return
            self.current_phase = phase
            self.emit(PhaseChange(phase=phase, message=message))

    def notice(self, field: str, reason: str, message: str) -> None:
        """Says that a setting was changed, and why.

        Args:
            field: Path of the parameter, such as `optimization.fp16`.
            reason: Stable, in capitals, such as `FP16_UNAVAILABLE_ON_CPU`.
            message: One sentence.
        """
        self.emit(Notice(field=field, reason=reason, message=message))

    def sync(self) -> None:
        """Makes every event so far durable."""
        os.fsync(self._file)

    def record_output(self, folder: Path, files: dict[str, int]) -> None:
        """Records, durably, a folder that is about to appear in the output folder.

        Deleting a task removes what is recorded here, and nothing else.

        Raises:
            OSError: It can't be written; then the folder must not appear.
        """
        parent = folder.parent.stat()
        record = WrittenFolder(
            name=folder.name,
            files=files,
            path=os.path.realpath(folder.parent),
            device=parent.st_dev,
            inode=parent.st_ino,
        )
        line = record.model_dump_json().encode() + b"\n"
        with open(self._run_dir / OUTPUTS, "ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                _append(file.fileno(), line, size)
            except OSError as error:
                # The last checkpoint of a run, on another disk, must not be lost for want of one
                # line here.
                is_last = self.current_phase is RunPhase.STOPPING
                if error.errno not in DISK_FULL_ERRNOS or not is_last or not self._use_reserve():
                    raise
                _append(file.fileno(), line, size)
            os.fsync(file.fileno())
        if size == 0:
            sync_dir(self._run_dir)

    def finish(self, result: Result, patience: float = 0.0) -> None:
        """Writes `result.json`, the last thing of a run, when all events are durable.

        Args:
            result: How the run ended.
            patience: Seconds to wait for room on a full disk.

        Raises:
            OSError: It can't be written; the exit status is all there is then.
        """
        deadline = time.monotonic() + patience
        self._use_reserve()
        while True:
            is_late = time.monotonic() >= deadline
            try:
                with self._lock:
                    if self.write_held() or is_late:
                        self.sync()
                        write_record(self._run_dir / RESULT, result)
                        return
            except OSError as error:
                if is_late or error.errno not in DISK_FULL_ERRNOS:
                    raise
            time.sleep(_LOOK_SECONDS)


def _append(file: int, line: bytes, size: int) -> None:
    """Appends a line to a file of `size` bytes, whole or not at all."""
    try:
        written = 0
        while written < len(line):  # a full disk takes a part, and then says so
            written += os.write(file, line[written:])
    except OSError:
        os.ftruncate(file, size)
        raise


class _EventHandler(logging.Handler):
    def __init__(self, report: Report):
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._report.emit(
                LogLine(
                    level=_level_name(record.levelno),
                    logger=record.name,
                    text=self.format(record).strip(),
                )
            )
        except OSError:
            self.handleError(record)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    # The Trainer ends by asking to share the model, which is the user's own business.
    return "share your model" not in record.getMessage()


def _level_name(level: int) -> Literal["debug", "info", "warning", "error"]:
    if level >= logging.ERROR:
        return "error"
    if level >= logging.WARNING:
        return "warning"
    return "info" if level >= logging.INFO else "debug"


def send_logs(report: Report, level: str) -> None:
    """Sends Python's log and warnings from `level` (debug, info ...) on to events and stdout."""
    events = _EventHandler(report)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(_LEVELS[level])
    for handler in (events, console):
        handler.addFilter(_is_no_advertisement)
    root.handlers[:] = [events, console]
    logging.captureWarnings(True)


def send_transformers_logs(level: str) -> None:
    """Makes transformers' loggers, which keep to themselves by default, follow the root logger."""
    # Called when transformers is wanted anyway: its import takes seconds.
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity(_LEVELS[level])
    if level != "debug":
        for name in _WORDY_LOGGERS:
            logging.getLogger(name).setLevel(max(logging.WARNING, _LEVELS[level]))
        # Between the libraries; the user can't do anything about it.
        warnings.simplefilter("ignore", FutureWarning)
