"""Brings a database up to what run folders say: all of it, or what is newer than a backup.

Nothing is guessed: what a runner has left decides, as after a crash. A runner that lives is left to
the next daemon, which adopts it.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuned.v1 import event_pb2
from finetuned_daemon.config import Config
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.events import build
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.explain import Explainer, Explanation
from finetuned_daemon.fixes import advice_of
from finetuned_daemon.limits import Limits
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.aside import EndedAside, RunAside, read_ended, read_task
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import (
    SPEC,
    EndReason,
    PhaseChange,
    Progress,
    Result,
    RunPhase,
    Spec,
)
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.outcome import Evidence, decide
from finetuned_daemon.runs.process import Exit, find_runner
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import (
    ENDED,
    ENDS,
    TASK_ID,
    UNDER_WAY,
    Run,
    Standing,
    Task,
    TaskState,
    default_display_name,
    now_us,
)

_log = logging.getLogger(__name__)


@dataclass
class Report:
    """What was brought up to date; names of resources, but for folders."""

    added_tasks: list[str] = field(default_factory=list)
    added_runs: list[str] = field(default_factory=list)
    updated_runs: list[str] = field(default_factory=list)
    """Known to be under way, and further by now."""
    live_runs: list[str] = field(default_factory=list)
    """Their runners live; the next daemon adopts them."""
    queued: list[str] = field(default_factory=list)
    """Tasks that wait in the queue, and are started by the next daemon."""
    unknown: list[str] = field(default_factory=list)
    """Folders of tasks that the database does not know."""
    unreadable: list[str] = field(default_factory=list)
    """Folders that hold no spec that can be read."""


@dataclass(frozen=True)
class _Found:
    """One run folder."""

    path: Path
    number: int
    spec: Spec
    attempts: int
    """Number of its last process."""
    known: EndedAside | RunAside | None
    """What the last daemon wrote of it."""

    @property
    def ended(self) -> EndedAside | None:
        return self.known if isinstance(self.known, EndedAside) else None

    def bundle(self, attempt: int) -> Bundle:
        return Bundle(self.path if attempt == 1 else self.path / f"attempt-{attempt}")

    @property
    def create_time(self) -> int:
        if self.known is not None:
            return self.known.create_time
        return (self.path / SPEC).stat().st_mtime_ns // 1000


class Rebuilder:
    """Works on a database that no daemon has."""

    def __init__(self, config: Config, database: Database) -> None:
        self._database = database
        # As many as there are: they were within their bounds once.
        self._records = Records(database, Limits({"tasks": 0}))
        self._events = EventLog(database)
        explainer = Explainer(Environment(config))
        self._keeper = Keeper(database, self._records, self._events, explainer)
        self._report = Report()

    def run(self, runs_dir: Path, *, add_tasks: bool) -> Report:
        """Brings the database up to the run folders.

        Args:
            runs_dir: Where they lie.
            add_tasks: Tasks that the database does not know are added; else they are reported.
        """
        for folder in _by_age(runs_dir):
            found = _look(folder)
            task = self._records.task(folder.name)
            if not found:
                self._report.unreadable.append(str(folder))
            elif task is None and not add_tasks:
                self._report.unknown.append(str(folder))
            else:
                if task is None:
                    task = self._add(folder, found)
                for run in found:
                    task = self._take(task, run)
        self._report.queued = [
            self._keeper.task_of(run).name
            for run in self._records.active_runs()
            if run.state is TaskState.QUEUED
        ]
        return self._report

    def _add(self, folder: Path, found: list[_Found]) -> Task:
        aside = read_task(folder)
        first, last = found[0].spec, found[-1].spec
        if aside is not None:
            fields = set(type(aside).model_fields) - {"latest_run"}
            values: dict[str, Any] = {name: getattr(aside, name) for name in fields}
        else:  # of a version that wrote none
            moment = datetime.fromtimestamp(found[0].create_time / 1e6).astimezone()
            values = {
                "task_id": folder.name,
                "display_name": default_display_name(
                    first.training_type, moment, self._records.is_display_name_taken
                ),
                "training_type": first.training_type,
                "parameters": _parameters(last),
                "device": last.device,
                "create_time": found[0].create_time,
            }
        name, number = values["display_name"], 1
        while self._records.is_display_name_taken(values["display_name"]):
            number += 1
            values["display_name"] = f"{name}_{number}"
        values |= {"task_id": folder.name, "update_time": now_us()}
        task = Task(**values)
        with self._database.transaction(durable=False) as connection:
            task = self._records.insert_task(connection, task)
        self._report.added_tasks.append(task.name)
        return task

    def _take(self, task: Task, found: _Found) -> Task:
        run = self._records.run(task.key, found.number)
        if run is not None and run.state in ENDED:
            return task
        if run is None:
            task = self._end_earlier(task, found.number)
            task, run = self._insert(task, found)
            self._report.added_runs.append(f"{task.name} run {run.number}")
        elif not self._is_further(run, found):
            # One that runs is the next daemon's, which adopts it, or explains its end.
            process = found.bundle(run.attempt).read_process()
            if process is not None and process.identity.is_alive():
                self._report.live_runs.append(f"{task.name} run {run.number}")
            return task
        else:
            self._report.updated_runs.append(f"{task.name} run {run.number}")
        run = self._begin(run, found)
        for attempt in range(run.attempt, found.attempts + 1):
            if attempt != run.attempt:
                spec = found.bundle(attempt).read_spec()
                run = replace(
                    run,
                    attempt=attempt,
                    ingested_bytes=0,
                    ingested_seq=0,
                    identity=None,
                    request_id=spec.request_id if spec else run.request_id,
                )
            more, before = True, -1
            while more or run.ingested_bytes != before:
                before = run.ingested_bytes
                run, more = self._keeper.ingest(run, found.bundle(attempt))
        return self._finish(run, found)

    def _is_further(self, run: Run, found: _Found) -> bool:
        """Whether the folder knows of more than the record of a run that is under way."""
        if found.attempts != run.attempt:
            return found.attempts > run.attempt
        if found.ended is not None and found.ended.attempt >= run.attempt:
            return found.ended.state is not run.state
        has_begun = found.bundle(run.attempt).read_process() is not None
        return run.state is TaskState.QUEUED and has_begun

    def _insert(self, task: Task, found: _Found) -> tuple[Task, Run]:
        """Writes a run as it was in the queue."""
        known = found.known
        run = Run(
            task_key=task.key,
            number=found.number,
            device=found.spec.device,
            parameters=_parameters(found.spec),
            create_time=found.create_time,
            planned_checkpoints=known.planned_checkpoints if known else 0,
            retry=known.retry if known else 0,
            is_probe=found.spec.probe,
            request_id=found.spec.request_id,
        )
        change = build.state_change(run.create_time, run.number, task.state, TaskState.QUEUED)
        before = Standing.of(task) if run.is_probe else None
        task = replace(
            task,
            state=TaskState.QUEUED,
            phase=None,
            end_reason=None,
            end_message="",
            run=run.number,
            progress=Progress(),
            last_checkpoint="",
            start_time=0,
            end_time=0,
            before_probe=before,
        )
        with self._database.transaction(durable=False) as connection:
            run = replace(run, place=self._records.next_place(connection))
            run = self._records.insert_run(connection, run)
            task = self._save(connection, task, [change])
        return task, run

    def _begin(self, run: Run, found: _Found) -> Run:
        """Writes that a run has begun; whatever is in its folder comes behind."""
        task = self._keeper.task_of(run)
        known = found.known
        start = run.start_time or (known.start_time if known else 0) or found.create_time
        old, run = (
            run,
            replace(
                run,
                state=TaskState.RUNNING,
                start_time=start,
                run_dir=str(found.path),
                output_dir=found.spec.output_dir,
                pause=None,
            ),
        )
        events = list[event_pb2.Event]()
        if old.state is not TaskState.RUNNING:
            if old.state is TaskState.PAUSED:
                events.append(build.state_change(start, run.number, old.state, TaskState.QUEUED))
            events += [
                build.state_change(start, run.number, TaskState.QUEUED, TaskState.RUNNING),
                build.reported(start, run.number, PhaseChange(phase=RunPhase.STARTING)),
            ]
        task = replace(task, state=TaskState.RUNNING, start_time=start, pause_reason=None)
        with self._database.transaction(durable=False) as connection:
            self._records.save_run(connection, run)
            self._save(connection, task, events)
        return run

    def _finish(self, run: Run, found: _Found) -> Task:
        bundle = found.bundle(run.attempt)
        process, ended = bundle.read_process(), found.ended
        task = self._keeper.task_of(run)
        if ended is not None and ended.attempt >= run.attempt:
            run = replace(
                run,
                identity=process.identity if process else None,
                **{name: getattr(ended, name) for name in _OF_END},
            )
            return self._record(task, run, [e for e in ended.logged() if e.HasField("result")])
        run = replace(run, stop=bundle.read_control().stop)
        identity = process.identity if process else find_runner(str(bundle.path))
        if identity is not None and identity.is_alive():
            run = replace(run, identity=identity, stop_time=now_us() if run.stop else 0)
            with self._database.transaction(durable=False) as connection:
                self._records.save_run(connection, run)
            self._report.live_runs.append(f"{task.name} run {run.number}")
            return task
        outcome = decide(
            Evidence(
                result=bundle.read_result(),
                exit=Exit(),
                was_watched=False,
                stop=run.stop,
                was_forced=False,
                step=run.progress.step,
                last_checkpoint=run.last_checkpoint,
                console_tail=bundle.console_tail(),
            )
        )
        return self._end(task, run, outcome, bundle.end_time())

    def _end_earlier(self, task: Task, number: int) -> Task:
        """Ends a run that is under way by the record although a later one has begun since."""
        run = self._records.run(task.key, task.run) if task.state in UNDER_WAY else None
        if run is None or run.number >= number:
            return task
        outcome = Result(
            end_reason=EndReason.STOPPED_BY_USER,
            message="It ended after the backup was made; how, is not known.",
            step=run.progress.step,
        )
        return self._end(task, run, outcome, now_us())

    def _end(self, task: Task, run: Run, outcome: Result, time: int) -> Task:
        state = ENDS[outcome.end_reason].state
        advice = advice_of(outcome.end_reason) if state is TaskState.FAILED else None
        result = build.result(
            time,
            run.number,
            outcome,
            exit_code=None,
            signal="",
            explanation=Explanation() if advice is None else Explanation(advice=advice),
        )
        run = replace(
            run,
            state=state,
            end_reason=outcome.end_reason,
            end_message=outcome.message,
            end_time=time,
        )
        return self._record(task, run, [result])

    def _record(self, task: Task, run: Run, events: list[event_pb2.Event]) -> Task:
        """Writes the end of a run, or its pause."""
        before = task.before_probe if run.state is not TaskState.FAILED else None
        shown: dict[str, Any] = {
            "state": run.state,
            "end_reason": run.end_reason,
            "end_message": run.end_message,
            "end_time": run.end_time,
        }
        if before is not None:
            shown = before.shown()
        change = build.state_change(
            run.end_time or now_us(),
            run.number,
            task.state,
            shown["state"],
            end_reason=run.end_reason,
            message=run.end_message,
        )
        if run.is_probe:
            run = replace(run, output_dir="")
        task = replace(task, **shown, phase=None, before_probe=None, pause_reason=run.pause)
        with self._database.transaction(durable=False) as connection:
            self._records.save_run(connection, run)
            return self._save(connection, task, [*events, change])

    def _save(
        self, connection: sqlite3.Connection, task: Task, events: list[event_pb2.Event]
    ) -> Task:
        task = replace(task, update_time=now_us(), revision=task.revision + 1)
        self._records.save_task(connection, task)
        if events:
            task = replace(task, last_seq=self._events.append(connection, task.key, events))
        return task


_OF_END = (
    *("state", "end_reason", "end_message", "end_time", "exit_code", "signal"),
    *("pause", "resume_path"),
)


def _parameters(spec: Spec) -> Parameters:
    """The run's own; after a pause its process has others."""
    return spec.run_parameters or spec.parameters


def _by_age(runs_dir: Path) -> list[Path]:
    """Folders of tasks, the oldest first: the order in which they are listed."""

    def age(folder: Path) -> float:
        aside = read_task(folder)
        if aside is not None:
            return aside.create_time / 1e6
        return min((path.stat().st_mtime for path in folder.glob(f"*/{SPEC}")), default=0.0)

    if not runs_dir.is_dir():
        return []
    return sorted((f for f in runs_dir.iterdir() if f.is_dir() and not f.is_symlink()), key=age)


def _look(folder: Path) -> list[_Found]:
    """The runs in the folder of a task, in order."""
    found = list[_Found]()
    if not TASK_ID.fullmatch(folder.name):
        return found
    aside = read_task(folder)
    latest = aside.latest_run if aside else None
    for path in _numbered(folder.iterdir(), ""):
        specs = [Bundle(path).read_spec()]
        numbers = [1]
        for attempt in _numbered(path.iterdir(), "attempt-"):
            spec = Bundle(attempt).read_spec()
            if spec is not None:
                specs.append(spec)
                numbers.append(int(attempt.name.removeprefix("attempt-")))
        spec = specs[0]
        if spec is not None and spec.task == f"tasks/{folder.name}":
            number = int(path.name)
            started = latest if latest and latest.number == number else None
            known = read_ended(path) or started
            found.append(_Found(path, number, spec, numbers[-1], known))
    return found


def _numbered(paths: Iterable[Path], prefix: str) -> list[Path]:
    def number(path: Path) -> str:
        return path.name.removeprefix(prefix) if path.name.startswith(prefix) else ""

    folders = [p for p in paths if number(p).isdecimal() and p.is_dir() and not p.is_symlink()]
    return sorted(folders, key=lambda path: int(number(path)))
