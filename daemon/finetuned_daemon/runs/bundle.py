"""The run folder from the daemon's side.

Makes it, reads what the runner leaves in it, puts wishes into it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetuned_daemon.runs.contract import (
    CONSOLE,
    CONTROL,
    EVENTS,
    HEARTBEAT,
    PROCESS,
    RESULT,
    SPEC,
    Control,
    EventLine,
    Process,
    Result,
    Spec,
    make_dirs,
    sync_dir,
    write_atomic,
    write_record,
)

_log = logging.getLogger(__name__)

_RecordT = TypeVar("_RecordT", Spec, Process, Result, Control)

_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""A file of the run folder is missing, or something else is in its place."""

_CHUNK = 1 << 15
"""Bytes of events taken over at once: about 200 events, 10 to 20 ms in which nobody is answered."""
_HUNG = "hung"
_CONSOLE_KEPT = 4 << 20
LONGEST_LINE = 4 << 20
"""A line of events longer than this is skipped: no runner of ours writes one."""


@dataclass(frozen=True)
class NewLines:
    """What a look at `events.jsonl` found."""

    lines: list[EventLine]
    end: int
    """Offset behind the last whole line, where the next look begins."""
    garbled: int
    """Whole lines that could not be read."""
    more: bool
    """There may be more at once."""
    was_cut: bool = False
    """The file has become shorter than `offset`; it is read from its beginning again."""


class Bundle:
    """One run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, spec: Spec) -> None:
        """Makes the folder with its spec, durably.

        A folder left by a start that was cut short is used again.
        """
        make_dirs(self.path, 0o700)
        write_record(self.path / SPEC, spec)
        sync_dir(self.path.parent)

    @property
    def console(self) -> Path:
        """Where the runner's stdout and stderr go."""
        return self.path / CONSOLE

    def read_spec(self) -> Spec | None:
        """The spec, if it is there and readable."""
        return self._read(SPEC, Spec)

    def read_process(self) -> Process | None:
        """Who the runner said it is."""
        return self._read(PROCESS, Process)

    def read_result(self) -> Result | None:
        """How the run ended by its own account; None where it left no whole account."""
        return self._read(RESULT, Result)

    def read_control(self) -> Control:
        """What was last wished of the run."""
        return self._read(CONTROL, Control) or Control()

    def write_control(self, control: Control) -> None:
        """Puts the wish into the folder, as a whole."""
        write_record(self.path / CONTROL, control)

    def read_events(self, offset: int) -> NewLines:
        """Whole event lines from `offset` on, one bounded chunk of them.

        A torn last line waits for its end.
        """
        path = self.path / EVENTS
        try:
            if path.stat().st_size == offset:  # nearly always: ten looks a second at a quiet run
                return NewLines([], offset, 0, more=False)
            with open(path, "rb") as file:
                was_cut = os.fstat(file.fileno()).st_size < offset
                offset = 0 if was_cut else offset
                file.seek(offset)
                data = file.read(_CHUNK)
                if data and b"\n" not in data:
                    data += file.readline(LONGEST_LINE)  # and not what follows it
        except _NOT_THERE:
            return NewLines([], offset, 0, more=False)
        whole, newline, _ = data.rpartition(b"\n")
        if not newline:
            if len(data) >= LONGEST_LINE:
                return NewLines([], offset + len(data), 1, more=True, was_cut=was_cut)
            return NewLines([], offset, 0, more=False, was_cut=was_cut)
        lines, garbled = list[EventLine](), 0
        for raw in whole.split(b"\n"):
            try:
                lines.append(EventLine.model_validate_json(raw))
            except ValidationError:
                if raw.strip(b"\0 \r"):  # a file system may leave zeros after a loss of power
                    garbled += 1
        end = offset + len(whole) + 1
        return NewLines(lines, end, garbled, more=len(data) >= _CHUNK, was_cut=was_cut)

    def console_tail(self, lines: int = 20, width: int = 4000) -> str:
        """The last lines that the runner printed, for a failure that left nothing better."""
        try:
            with open(self.console, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 16 * width))
                text = file.read().decode("utf-8", "replace")
        except _NOT_THERE:
            return ""
        return "\n".join(text.splitlines()[-lines:])[-width:]

    def end_time(self) -> int:
        """When it was written to last, in microseconds since the epoch: about when it ended."""
        for name in (RESULT, EVENTS, PROCESS, SPEC):
            with contextlib.suppress(FileNotFoundError):
                return (self.path / name).stat().st_mtime_ns // 1000
        return 0

    def last_seq(self) -> int:
        """Number of the last whole event that the runner has written."""
        last, offset, more = 0, 0, True
        while more:
            new = self.read_events(offset)
            last = max([last, *(line.seq for line in new.lines)])
            offset, more = new.end, new.more
        return last

    def has_not_begun(self) -> bool:
        """Whether a runner that is gone has left nothing but that it was starting."""
        events = self.read_events(0)
        return self.read_result() is None and len(events.lines) <= 1 and not events.garbled

    def clear(self) -> None:
        """Removes what a process left that had not begun, so that another one can have the folder.

        What it printed stays.
        """
        for name in (HEARTBEAT, EVENTS, CONTROL, PROCESS, _HUNG):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                continue
            with contextlib.suppress(*_NOT_THERE):
                path.unlink()
        if self.path.is_dir():
            sync_dir(self.path)

    def mark_hung(self) -> None:
        """Notes, before it is ended for want of signs of life, why: the next daemon has to know.

        Raises:
            OSError: It can't be written.
        """
        write_atomic(self.path / _HUNG, b"")

    def is_marked_hung(self) -> bool:
        """Whether a daemon has ended it for want of signs of life."""
        return (self.path / _HUNG).exists()

    def bound_console(self, most: int) -> None:
        """Begins `console.log` anew where it has become longer, and keeps its end beside it.

        The runner appends to it through a descriptor of its own, which stays good.
        """
        try:
            size = self.console.stat().st_size
        except _NOT_THERE:
            return
        if size <= most or not self.console.is_file():
            return
        with open(self.console, "r+b") as file:
            file.seek(max(0, size - _CONSOLE_KEPT))
            # Where there is no room for its end, that much more is needed.
            with contextlib.suppress(OSError):
                write_atomic(self.console.with_name(f"{CONSOLE}.1"), file.read())
            file.truncate(0)

    def _read(self, name: str, model: type[_RecordT]) -> _RecordT | None:
        try:
            return model.model_validate_json((self.path / name).read_bytes())
        except _NOT_THERE:
            return None
        except (ValidationError, json.JSONDecodeError) as error:
            _log.warning("%s can't be read: %s", self.path / name, error)
            return None
