"""The run folder from the daemon's side.

Makes it, reads what the runner leaves in it, puts wishes into it.
"""

from __future__ import annotations

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
    PROCESS,
    RESULT,
    SPEC,
    Control,
    EventLine,
    Process,
    Result,
    Spec,
    sync_dir,
    write_record,
)

_log = logging.getLogger(__name__)

_RecordT = TypeVar("_RecordT", Spec, Process, Result)

_CHUNK = 1 << 20
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


class Bundle:
    """One run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, spec: Spec) -> None:
        """Makes the folder with its spec, durably.

        A folder left by a start that was cut short is used again.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
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

    def write_control(self, control: Control) -> None:
        """Puts the wish into the folder, as a whole."""
        write_record(self.path / CONTROL, control)

    def read_events(self, offset: int) -> NewLines:
        """Whole event lines from `offset` on, one bounded chunk of them.

        A torn last line waits for its end.
        """
        try:
            with open(self.path / EVENTS, "rb") as file:
                file.seek(offset)
                data = file.read(_CHUNK)
                if data and b"\n" not in data:
                    data += file.read(LONGEST_LINE)
        except FileNotFoundError:
            return NewLines([], offset, 0, more=False)
        whole, newline, _ = data.rpartition(b"\n")
        if not newline:
            if len(data) >= LONGEST_LINE:
                return NewLines([], offset + len(data), 1, more=True)
            return NewLines([], offset, 0, more=False)
        lines, garbled = list[EventLine](), 0
        for raw in whole.split(b"\n"):
            try:
                lines.append(EventLine.model_validate_json(raw))
            except ValidationError:
                if raw.strip(b"\0 \r"):  # a file system may leave zeros after a loss of power
                    garbled += 1
        return NewLines(lines, offset + len(whole) + 1, garbled, more=len(data) >= _CHUNK)

    def console_tail(self, lines: int = 20, width: int = 4000) -> str:
        """The last lines that the runner printed, for a failure that left nothing better."""
        try:
            with open(self.console, "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 16 * width))
                text = file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])[-width:]

    def remove(self) -> None:
        """Removes the folder; no link is followed out of it."""
        if self.path.is_symlink():
            self.path.unlink()
        elif self.path.exists():
            shutil.rmtree(self.path)

    def _read(self, name: str, model: type[_RecordT]) -> _RecordT | None:
        try:
            return model.model_validate_json((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, json.JSONDecodeError) as error:
            _log.warning("%s can't be read: %s", self.path / name, error)
            return None
