"""What can be done with tasks: create, list, edit, delete, start, stop. Knows no gRPC.

Writes through the store alone.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from finetuned_daemon.checkpoints import Checkpoints, notices_of
from finetuned_daemon.config import Config
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.environment.model import in_a_sentence
from finetuned_daemon.errors import (
    AlreadyExists,
    DiskFull,
    InvalidRequest,
    NotFound,
    StaleEtag,
    Violation,
    WrongState,
)
from finetuned_daemon.events import build
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.explain import Explainer
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planner import Planner
from finetuned_daemon.requests import (
    Repeats,
    RequestId,
    check_display_name,
    check_id,
    check_mask,
    masked,
    merged,
    training_type_missing,
)
from finetuned_daemon.runs import scheduler
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import Notice, StopWish, TrainingType
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.outputs import Deleted, delete_outputs
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.runs.supervisor import Supervisor
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.task_requests import Edit, NewTask, StartOptions
from finetuned_daemon.tasks import (
    ACTIVE,
    Run,
    Task,
    TaskState,
    default_display_name,
    new_task_id,
    now_us,
)
from finetuned_daemon.template_manager import TemplateManager
from finetuned_daemon.templates import Template
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.checkpoint import check_hashes
from finetuned_daemon.validation.judge import Judge

_log = logging.getLogger(__name__)

_DISK_FULL_RETRY_SECONDS = 5.0
_MOST_RUNS = 1_000_000

_EDITABLE = ("display_name", "device", "template", "parameters")


class Manager:
    """All operations on tasks. Its methods run on the event loop's thread.

    The reading of data files does not.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        *,
        records: Records,
        repeats: Repeats,
        templates: TemplateManager,
        judge: Judge,
        planner: Planner,
        environment: Environment,
        quota: Quota,
    ) -> None:
        self._config = config
        self._database = database
        self.records = records
        self.events = EventLog(database)
        self._repeats = repeats
        self._templates = templates
        self._judge = judge
        self._planner = planner
        self._environment = environment
        self._keeper = Keeper(database, self.records, self.events, Explainer(environment))
        self._supervisor = Supervisor(config, self._keeper, quota, self._fill_devices)
        self.checkpoints = Checkpoints(database, self.records, self.events)
        self._deleting: set[int] = set()
        self._stopping = False

    # --- life

    def recover(self) -> None:
        """Takes over what the last daemon left.

        Live runs are adopted, ended ones recorded, the queue goes on.
        """
        for run in self.records.active_runs():
            if run.state is TaskState.RUNNING:
                self._supervisor.recover(run)
        self._fill_devices()

    async def close(self) -> None:
        """Stops watching runs, and leaves them alone."""
        self._stopping = True
        await self._supervisor.close()

    # --- read

    def get(self, name: str) -> Task:
        """The task of a resource name.

        Raises:
            NotFound: There is none.
        """
        task = self.records.task(name.removeprefix("tasks/")) if name.startswith("tasks/") else None
        if task is None:
            raise NotFound("task", name)
        return task

    def queue_position(self, task: Task) -> int:
        """Place in the queue of its device, from 1; 0 if it is not queued."""
        if task.state is not TaskState.QUEUED:
            return 0
        run = self.records.run(task.key, task.run)
        return scheduler.queue_position(run, self.records.active_runs()) if run else 0

    def active(self) -> dict[str, list[tuple[Run, Task]]]:
        """Queued and running runs with their tasks, by device, in the order of the queue."""
        result = dict[str, list[tuple[Run, Task]]]()
        for run in self.records.active_runs():
            result.setdefault(run.device, []).append((run, self._keeper.task_of(run)))
        return result

    # --- create, edit, delete

    async def create(
        self,
        new: NewTask,
        *,
        start: bool,
        validate_only: bool,
        update_template: bool,
        request: RequestId[Task] | None,
    ) -> Task | bytes:
        """Creates a task, and starts it if asked.

        Returns:
            The task, or the serialized first answer to a repeated request.

        Raises:
            InvalidRequest: With every wrong field; nothing was written.
            AlreadyExists: The id or the display name is taken.
            NotFound: There is no such template.
            WrongState: The template is a preset and was to be written, or the training environment
                can't run.
        """
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        violations = check_id("task_id", new.task_id) + check_display_name(new.display_name)
        template = self._templates.get(new.template) if new.template else None
        training_type = new.training_type or (template.training_type if template else None)
        if training_type is None:
            violations.append(training_type_missing())
        elif template:
            violations += _check_type(template, training_type)
        training_type = training_type or TrainingType.SFT
        to_write = self._writable(new.template, training_type) if update_template else None
        given = merged(template.parameters, new.parameters) if template else new.parameters
        judgement = await self._judge.judge(given, training_type, new.device, complete=start)
        violations += judgement.errors
        parameters = judgement.parameters
        if violations or parameters is None:
            raise InvalidRequest(violations)
        planned = 0
        if start:
            planned = await self._prepare_start(parameters, training_type, judgement.device.id)
        # From here on nothing is awaited: what is checked stays true until it is written.
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        self._check_quota(parameters, planned)
        task = self._new_task(new, training_type, parameters)
        if validate_only:
            return task

        def also(connection: sqlite3.Connection, task: Task) -> None:
            if to_write is not None:
                self._templates.write(connection, to_write.name, new.parameters)
            self._repeats.keep(connection, request, task)

        if start:
            notices = notices_of(judgement.violations)
            return self._enqueue(task, judgement.device.id, planned, also, notices=notices)
        with self._database.transaction(durable=True) as connection:
            task = self.records.insert_task(connection, task)
            also(connection, task)
        return task

    async def update(
        self,
        name: str,
        edit: Edit,
        *,
        etag: str,
        update_template: bool,
        validate_only: bool,
    ) -> Task:
        """Changes a task that is not active; earlier runs keep the parameters they ran with.

        Raises:
            NotFound: There is no such task or template.
            StaleEtag: It has changed.
            WrongState: It is queued or running, or its template can't be written.
            InvalidRequest: With every wrong field; nothing was written.
            AlreadyExists: The display name is taken.
        """
        task = self._idle(name, etag)
        violations = check_mask(edit.paths, _EDITABLE)
        display_name = task.display_name
        if edit.changes("display_name"):
            display_name = edit.display_name
            violations += check_display_name(display_name)
            if not display_name:
                violations.append(
                    Violation("display_name", Text("must not be empty", "不能为空"), "REQUIRED")
                )
        device = edit.device if edit.changes("device") else task.device
        template = edit.template if edit.changes("template") else task.template
        if edit.changes("template") and template:
            violations += _check_type(self._templates.get(template), task.training_type)
        to_write = self._writable(template, task.training_type) if update_template else None
        given = (
            masked(task.parameters, edit.parameters, edit.paths)
            if edit.paths
            else merged(task.parameters, edit.parameters)
        )
        judgement = await self._judge.judge(
            given, task.training_type, device, complete=False, task=task
        )
        violations += judgement.errors
        parameters = judgement.parameters
        if violations or parameters is None:
            raise InvalidRequest(violations)
        # It may have been started or changed while files were read.
        now = self._idle(name, etag)
        if now.revision != task.revision:  # nobody said which revision: then this one
            return await self.update(
                name,
                edit,
                etag=etag,
                update_template=update_template,
                validate_only=validate_only,
            )
        if display_name != task.display_name:
            self._check_name_free(display_name)
        task = replace(
            now,
            display_name=display_name,
            device=device,
            template=template,
            parameters=parameters,
        )
        if validate_only:
            return task
        time = now_us()
        task = replace(task, update_time=time, revision=task.revision + 1)
        changed = _differences(now, task)
        edited = build.task_edited(time, changed)
        with self._database.transaction(durable=True) as connection:
            self.records.save_task(connection, task)
            last_seq = self.events.append(connection, task.key, [edited])
            task = replace(task, last_seq=last_seq)
            if to_write is not None:
                self._templates.write(connection, to_write.name, _values(parameters, changed))
        return task

    async def delete(
        self, name: str, *, etag: str, allow_missing: bool, with_outputs: bool
    ) -> Deleted:
        """Deletes a task with its runs, events and run folders.

        With `with_outputs`, also what its runs recorded writing into their output folders.

        Raises:
            NotFound: There is none.
            StaleEtag: It has changed.
            WrongState: It is queued or running, or another goes on from what would be deleted.
        """
        try:
            task = self._idle(name, etag)
        except NotFound:
            if allow_missing:
                return Deleted()
            raise
        runs = [
            (Path(run.run_dir), Path(run.output_dir))
            for run in self.records.runs(task.key, limit=_MOST_RUNS)
            if run.run_dir and run.output_dir
        ]
        if with_outputs:
            self.checkpoints.check_unused(task, [output for _, output in runs])
        self._deleting.add(task.key)
        try:
            # Outputs first: a crash in between leaves a task that can be deleted again.
            deleted = await asyncio.to_thread(delete_outputs, runs, only_look=not with_outputs)
            with self._database.transaction(durable=True) as connection:
                self.records.delete_task(connection, task)
                self._database.after_commit(lambda: self.events.wake(task.key))
        finally:
            self._deleting.discard(task.key)
        # Then rows: a crash in between leaves a folder that nobody names, never a task without its
        # folder.
        try:
            Bundle(self._config.runs_dir / task.task_id).remove()
        except OSError as error:
            _log.warning("the run folders of %s are left: %s", task.name, error)
        return deleted

    # --- start, stop

    async def start(
        self,
        name: str,
        *,
        etag: str,
        request: RequestId[Task] | None,
        options: StartOptions = StartOptions(),  # noqa: B008 - frozen
    ) -> Task | bytes:
        """Starts a new run; it waits in the queue while its device is busy.

        Raises:
            NotFound: There is no such task.
            StaleEtag: It has changed.
            WrongState: It is queued or running already, the training environment can't run, or
                there is no such checkpoint to resume.
            InvalidRequest: With every wrong or missing parameter.
        """
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        task = self._idle(name, etag)
        resumed = await self.checkpoints.resume(task, options)
        parameters = resumed.parameters
        judgement = await self._judge.judge(
            parameters.model_dump(exclude_none=True),
            task.training_type,
            task.device,
            complete=True,
            task=task,
        )
        if judgement.errors:
            raise InvalidRequest(judgement.errors)
        device = judgement.device.id
        planned = await self._prepare_start(
            parameters, task.training_type, device, is_probe=options.probe
        )
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        now = self._idle(name, etag)
        if now.revision != task.revision:
            return await self.start(name, etag=etag, request=request, options=options)
        self._check_quota(parameters, planned)
        return self._enqueue(
            now,
            device,
            planned,
            lambda c, t: self._repeats.keep(c, request, t),
            parameters=parameters,
            notices=[*resumed.notices, *notices_of(judgement.violations)],
            is_probe=options.probe,
        )

    async def _prepare_start(
        self,
        parameters: Parameters,
        training_type: TrainingType,
        device: str,
        *,
        is_probe: bool = False,
    ) -> int:
        """Checks environment and quota; returns the checkpoints that the run is planned to save.

        A probe saves none.
        """
        wrong = await self._environment.before_start(parameters, device)
        if wrong:
            raise WrongState(
                "environment",
                "ENVIRONMENT_NOT_READY",
                f"this machine can't train: {in_a_sentence(wrong)}",
            )
        violations = await asyncio.to_thread(check_hashes, parameters, training_type)
        if violations:
            raise InvalidRequest(violations)
        if is_probe:
            return 0
        planned, violations = await self._planner.check_quota(parameters, training_type)
        if violations:
            raise InvalidRequest(violations)
        return planned

    def stop(self, name: str, *, discard: bool) -> Task:
        """Asks for the end of a run; a queued one ends at once.

        Raises:
            NotFound: There is no such task.
            WrongState: It is neither queued nor running.
        """
        task = self.get(name)
        run = self.records.run(task.key, task.run) if task.state in ACTIVE else None
        if run is None:
            raise WrongState(
                task.name,
                "TASK_NOT_ACTIVE",
                f"{task.name} is {task.state.lower()}; there is nothing to stop",
            )
        wish = StopWish.DISCARD if discard or run.is_probe else StopWish.SAVE
        if run.state is TaskState.QUEUED:
            self._keeper.dequeued(run, wish)
        else:
            self._supervisor.stop(run, wish)
        return self.get(name)

    # --- parts

    def _check_quota(self, parameters: Parameters, planned: int) -> None:
        """Raises InvalidRequest where others have taken what was left since it was planned."""
        violations = self._planner.beyond_quota(parameters, planned) if planned else []
        if violations:
            raise InvalidRequest(violations)

    def _enqueue(
        self,
        task: Task,
        device: str,
        planned_checkpoints: int,
        also: Callable[[sqlite3.Connection, Task], None],
        *,
        parameters: Parameters | None = None,
        notices: Sequence[Notice] = (),
        is_probe: bool = False,
    ) -> Task:
        """Queues a new run, and starts it where its device is free; the task as it was queued.

        Without `parameters` of its own the run has the task's.

        Raises:
            WrongState: The checkpoint that it would go on from is being deleted.
        """
        parameters = parameters or task.parameters
        self.checkpoints.check_there(parameters)
        run = Run(
            task_key=task.key,
            # Not the task's: that is the one before a probe.
            number=next((run.number for run in self.records.runs(task.key, limit=1)), 0) + 1,
            device=device,
            parameters=parameters,
            planned_checkpoints=planned_checkpoints,
            is_probe=is_probe,
        )
        task, _ = self._keeper.enqueue(task, run, also, notices)
        self._fill_devices()
        return task

    def _fill_devices(self) -> None:
        """Starts whatever may start now."""
        if self._stopping:
            return
        try:
            for run in scheduler.may_start(self.records.active_runs()):
                self._supervisor.start(run)
            self._supervisor.share_quota()
        except DiskFull as error:
            # What is queued stays queued, and is tried again: there may be room by then.
            _log.error("%s; queued runs are tried again", error)
            asyncio.get_running_loop().call_later(_DISK_FULL_RETRY_SECONDS, self._fill_devices)

    def _idle(self, name: str, etag: str) -> Task:
        """The task of a name, where it may be changed, started or deleted."""
        task = self.get(name)
        _check_etag(task, etag)
        if task.state in ACTIVE:
            raise WrongState(
                task.name, "TASK_ACTIVE", f"{task.name} is {task.state.lower()}; stop it first"
            )
        if task.key in self._deleting:
            raise WrongState(task.name, "TASK_BEING_DELETED", f"{task.name} is being deleted")
        return task

    def _new_task(self, new: NewTask, training_type: TrainingType, parameters: Parameters) -> Task:
        task_id = new.task_id or new_task_id(training_type)
        if self.records.task(task_id):
            raise AlreadyExists(
                "task", f"tasks/{task_id}", "TASK_ID_TAKEN", f"there is a task {task_id!r} already"
            )
        if new.display_name:
            self._check_name_free(new.display_name)
        now = now_us()
        return Task(
            task_id=task_id,
            display_name=new.display_name
            or default_display_name(
                training_type,
                datetime.now().astimezone(),
                self.records.is_display_name_taken,
            ),
            training_type=training_type,
            parameters=parameters,
            device=new.device,
            template=new.template,
            create_time=now,
            update_time=now,
        )

    def _writable(self, name: str, training_type: TrainingType) -> Template:
        """The custom template that edits of a task go into.

        Raises:
            NotFound: There is none of that name.
            WrongState: It is a preset or of another type, or the task has none.
        """
        template = self._templates.check_writable(name)
        if template.training_type is not training_type:
            raise WrongState(
                template.name,
                "TEMPLATE_OF_OTHER_TYPE",
                f"{template.display_name} is a template for {template.training_type.lower()}",
            )
        return template

    def _check_name_free(self, display_name: str) -> None:
        if self.records.is_display_name_taken(display_name):
            raise AlreadyExists(
                "task",
                display_name,
                "DISPLAY_NAME_TAKEN",
                f"there is a task named {display_name!r} already; choose another name",
            )


def _differences(old: Task, new: Task) -> list[str]:
    """Paths of what an edit has changed."""
    fields = ("display_name", "device", "template")
    changed = [field for field in fields if getattr(old, field) != getattr(new, field)]
    before, after = old.parameters.model_dump(), new.parameters.model_dump()
    return changed + [
        f"{section}.{name}"
        for section, values in after.items()
        for name, value in values.items()
        if before[section][name] != value
    ]


def _values(parameters: Parameters, paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The values of the parameters among these paths, by section and name."""
    return {
        section: {k: v for k, v in values.items() if f"{section}.{k}" in paths}
        for section, values in parameters.model_dump().items()
    }


def _check_type(template: Template, training_type: TrainingType) -> list[Violation]:
    if template.training_type is training_type:
        return []
    text = Text(
        f"{template.display_name} is a template for {template.training_type.lower()}, not for "
        f"{training_type.lower()}",
        f"{template.display_name} 是 {template.training_type.lower()} 的模板，不适用于 "
        f"{training_type.lower()}",
    )
    return [Violation("template", text, "TEMPLATE_OF_OTHER_TYPE")]


def _check_etag(task: Task, etag: str) -> None:
    if etag and etag != task.etag:
        raise StaleEtag(task.name)
