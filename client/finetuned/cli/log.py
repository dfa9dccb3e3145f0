"""`finetunectl daemon logs`: the daemon's log, from its files; a daemon need not run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from finetuned._errors import FinetunedError, InvalidArgument, NotFound
from finetuned.cli.settings import JsonOption, say, settings

LEVELS = ("debug", "info", "warning", "error", "critical")

_FOLLOW_SECONDS = 0.2
_STYLES = {"warning": "yellow", "error": "red", "critical": "bold red", "debug": "dim"}
# They have a place of their own in a line, or say nothing to people.
_SHOWN = {"time", "level", "logger", "message", "exception", "method", "peer"}


@dataclass(frozen=True)
class Filter:
    """Which lines are wanted."""

    level: str = "info"
    request: str = ""
    task: str = ""

    def takes(self, entry: dict[str, Any]) -> bool:
        """Whether it is one of them."""
        level = str(entry.get("level", ""))
        return (
            (level not in LEVELS or LEVELS.index(level) >= LEVELS.index(self.level))
            and self.request in ("", entry.get("request_id"))
            and self.task in ("", entry.get("task"))
        )


def logs(
    ctx: typer.Context,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new lines, until Ctrl-C.")
    ] = False,
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help="The least: " + ", ".join(LEVELS) + ".")
    ] = "info",
    request: Annotated[
        str, typer.Option("--request", metavar="ID", help="Of one call, and what it caused.")
    ] = "",
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="Of one task, by display name or id.")
    ] = "",
    lines: Annotated[
        int,
        typer.Option("-n", "--lines", metavar="N", min=0, help="So many of the newest; 0: all."),
    ] = 200,
    as_json: JsonOption = False,
) -> None:
    """Show the daemon's log. It is read from its files: no daemon need run."""
    if level not in LEVELS:
        raise typer.BadParameter("must be one of " + ", ".join(LEVELS), param_hint="--level")
    path = log_path(settings(ctx).address)
    wanted = Filter(level, request, _task_name(settings(ctx).address, task))
    with contextlib.closing(_Log(path)) as log:
        for entry in deque((e for e in log.entries() if wanted.takes(e)), maxlen=lines or None):
            _show(entry, as_json)
        while follow:
            for entry in log.news():
                if wanted.takes(entry):
                    _show(entry, as_json)
            time.sleep(_FOLLOW_SECONDS)


class _Log:
    """The log's files, from the oldest line to those that are yet to come; none twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb")

    def close(self) -> None:
        self._stream.close()

    def entries(self) -> Iterator[dict[str, Any]]:
        """All lines so far, oldest first."""
        own = os.fstat(self._stream.fileno()).st_ino
        older = (f for f in self._path.parent.glob(f"{self._path.name}.*") if _age(f))
        for file in sorted(older, key=_age, reverse=True):
            with contextlib.suppress(FileNotFoundError), file.open("rb") as stream:
                if os.fstat(stream.fileno()).st_ino != own:
                    yield from _lines(stream)
        yield from _lines(self._stream)

    def news(self) -> Iterator[dict[str, Any]]:
        """Lines since; a file that was renamed is read to its end first."""
        yield from _lines(self._stream)
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino != os.fstat(self._stream.fileno()).st_ino:
                yield from _lines(self._stream)
                self._stream.close()
                self._stream = self._path.open("rb")
                yield from _lines(self._stream)


def _age(file: Path) -> int:
    """How often a log file was renamed; 0: it is none."""
    number = file.suffix[1:]
    return int(number) if number.isascii() and number.isdecimal() else 0


def _lines(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Whole lines from here on; a part of one is left for later."""
    while line := stream.readline():
        if not line.endswith(b"\n"):
            stream.seek(-len(line), os.SEEK_CUR)
            return
        entry = parsed(line)
        if entry is not None:
            yield entry


def log_path(address: str | None) -> Path:
    """The log file of the daemon at the address, or of one that would serve there.

    Raises:
        NotFound: There is none on this machine.
    """
    from finetuned._client import Client
    from finetuned._paths import paths

    path = paths().log_file
    with contextlib.suppress(FinetunedError), Client(address) as client:
        path = Path(client.system_info().log_path or path)
    if not path.exists():
        raise NotFound(f"there is no log at {path}: no daemon has run here", reason="NO_LOG")
    return path


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None where it is none, such as one that a full disk has cut."""
    try:
        entry: object = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _task_name(address: str | None, task: str) -> str:
    """The resource name of a task; also where no daemon can be asked."""
    from finetuned._client import Client

    if not task or task.startswith("tasks/"):
        return task
    try:
        with Client(address) as client:
            return client.get_task(task).name
    except InvalidArgument:
        raise
    except FinetunedError:
        return f"tasks/{task}"


def _show(entry: dict[str, Any], as_json: bool) -> None:
    from finetuned.cli.output import print_json_line

    if as_json:
        print_json_line(entry)
        return
    from rich.text import Text

    from finetuned.cli.output import console

    level = str(entry.get("level", ""))
    line = Text(f"{_local(str(entry.get('time', '')))} ")
    line.append(f"{level:<8}", _STYLES.get(level, "")).append(str(entry.get("message", "")))
    rest = "  ".join(f"{key}={value}" for key, value in entry.items() if key not in _SHOWN)
    if rest:
        line.append(f"  {rest}", "dim")
    console().print(line, soft_wrap=True)
    if entry.get("exception"):
        say(str(entry["exception"]))


def _local(moment: str) -> str:
    try:
        return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M:%S}"
    except ValueError:
        return moment
