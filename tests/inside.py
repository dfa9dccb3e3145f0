"""`finetunectl` within the process of the tests: no start of Python for each command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned.cli import main
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2


@dataclass
class Answer:
    """What a command has written, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout, which is JSON."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Stdout, which is lines of JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """Stderr, whose last line is an error in JSON."""
        content: dict[str, Any] = json.loads(self.err.splitlines()[-1])["error"]
        return content

    @property
    def next(self) -> str:
        """The command to type next: the last line of stderr."""
        last = self.err.splitlines()[-1]
        assert last.startswith("next: "), self.err
        return last.removeprefix("next: ")


class Inside:
    """Runs commands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Answer:
        self._monkeypatch.setattr(sys, "argv", ["finetunectl", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self._capsys.readouterr()
        return Answer(int(end.value.code or 0), out, err)


@contextmanager
def shared_daemon(root: Path, *options: str) -> Iterator[Daemon]:
    """A daemon for the tests of a module, who take care not to meet."""
    root.mkdir(exist_ok=True)
    daemon = Daemon(root, *options).start()
    try:
        yield daemon
    finally:
        daemon.close()


def environment_of(daemon: Daemon) -> dict[str, str]:
    """In which the daemon is the user's own."""
    result = {
        **os.environ,
        "FINETUNED_STATE_DIR": str(daemon.paths.state_dir),
        "FINETUNED_RUNTIME_DIR": str(daemon.paths.runtime_dir),
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
    }
    for name in ("FINETUNED_ADDRESS", "FINETUNED_TOKEN", "NO_COLOR", "FORCE_COLOR"):
        result.pop(name, None)
    return result


def create(
    daemon: Daemon,
    parameters: parameters_pb2.Parameters,
    task_id: str,
    display_name: str,
    *,
    start: bool = False,
) -> task_pb2.Task:
    """Creates a task with a display name, on the CPU."""
    task = task_pb2.Task(
        training_type=task_pb2.TRAINING_TYPE_SFT,
        parameters=parameters,
        device="cpu",
        display_name=display_name,
    )
    request = task_service_pb2.CreateTaskRequest(task=task, task_id=task_id, start=start)
    return daemon.tasks.CreateTask(request).task
