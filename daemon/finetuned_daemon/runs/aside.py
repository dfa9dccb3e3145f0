"""What only the database knew, written aside into run folders, so that they alone can rebuild it.

    {task_id}/task.json           the task, as it was when its latest run was started
    {task_id}/{number}/ended.json how the run was recorded to end, or to be paused

A daemon that goes on with a run writes nothing here; `rebuild.py` reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from google.protobuf import json_format
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetuned.v1 import event_pb2
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason, TrainingType, write_record
from finetuned_daemon.tasks import PauseReason, Run, Task, TaskState

_log = logging.getLogger(__name__)

TASK = "task.json"
ENDED = "ended.json"


class _Aside(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class RunAside(_Aside):
    """The run that was started; fields as in `Run`."""

    number: int
    create_time: int
    start_time: int
    planned_checkpoints: int
    retry: int


class TaskAside(_Aside):
    """A task; fields as in `Task`."""

    task_id: str
    display_name: str
    training_type: TrainingType
    parameters: Parameters
    device: str
    template: str
    create_time: int
    latest_run: RunAside


class EndedAside(_Aside):
    """The end of a run, or its pause; fields as in `Run`."""

    attempt: int
    """The process that ended; a later one has made it obsolete."""
    state: TaskState
    end_reason: EndReason | None
    end_message: str
    create_time: int
    start_time: int
    end_time: int
    exit_code: int | None
    signal: str
    planned_checkpoints: int
    retry: int
    pause: PauseReason | None
    resume_path: str = ""
    request_id: str
    events: list[dict[str, Any]] = Field(default_factory=list)
    """What was written into the log with it, as the JSON of `finetuned.v1.Event`."""

    def logged(self) -> list[event_pb2.Event]:
        """The events, without the place in the log that they had."""
        events = [
            json_format.ParseDict(event, event_pb2.Event(), ignore_unknown_fields=True)
            for event in self.events
        ]
        for event in events:
            event.seq = 0
        return events


def write_task(folder: Path, task: Task, run: Run) -> None:
    """Writes a task, a run of which is about to start, into the folder of its runs.

    Raises:
        OSError: It can't be written.
    """
    latest_run = RunAside(**{name: getattr(run, name) for name in RunAside.model_fields})
    values = {n: getattr(task, n) for n in TaskAside.model_fields if n != "latest_run"}
    write_record(folder / TASK, TaskAside(**values, latest_run=latest_run))


def write_ended(run: Run, events: Sequence[event_pb2.Event]) -> None:
    """Writes the end of a run into its folder, once the database has it."""
    if not run.run_dir:  # it never began
        return
    values = {name: getattr(run, name) for name in EndedAside.model_fields if name != "events"}
    logged = [json_format.MessageToDict(e, preserving_proto_field_name=True) for e in events]
    try:
        write_record(Path(run.run_dir) / ENDED, EndedAside(**values, events=logged))
    except OSError as error:
        # The database has it; a rebuild would judge by what the runner has left.
        _log.warning("the end of run %d is not written aside: %s", run.key, error)


def rewrite_ended(run: Run) -> None:
    """Brings what is written aside of a pause up to date; its events stay."""
    known = read_ended(Path(run.run_dir)) if run.run_dir else None
    if known is not None:
        write_ended(run, known.logged())


def read_task(folder: Path) -> TaskAside | None:
    """The task of a folder of runs, if it is there and readable."""
    return _read(folder / TASK, TaskAside)


def read_ended(run_dir: Path) -> EndedAside | None:
    """The recorded end of a run, if it is there and readable."""
    return _read(run_dir / ENDED, EndedAside)


_AsideT = TypeVar("_AsideT", TaskAside, EndedAside)


def _read(path: Path, model: type[_AsideT]) -> _AsideT | None:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        _log.warning("%s can't be read: %s", path, error)
        return None
