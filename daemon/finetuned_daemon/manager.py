"""What can be done with tasks: create, edit, delete. Knows no gRPC; `run_manager.py` has the runs.

Writes through the store alone.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from finetuned.v1 import event_pb2
from finetuned_daemon.checkpoints import Checkpoints, notices_of
from finetuned_daemon.config import Config
from finetuned_daemon.errors import (
    AlreadyExists,
    DiskFull,
    InvalidRequest,
    NotFound,
    Violation,
    WrongState,
)
from finetuned_daemon.events import build
from finetuned_daemon.events.changes import TaskChanges
from finetuned_daemon.events.curves import Curves
from finetuned_daemon.events.digest import Digests
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.events.tally import Tally
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.requests import (
    Repeats,
    RequestId,
    check_display_name,
    check_id,
    check_mask,
    check_training_type,
    masked,
    merged,
)
from finetuned_daemon.run_manager import RunManager
from finetuned_daemon.runs import deleted as folders
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.outputs import Deleted, delete_outputs
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.event_rows import EventRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.task_requests import Edit, NewTask
from finetuned_daemon.tasks import (
    Task,
    default_display_name,
    new_task_id,
    now_us,
)
from finetuned_daemon.template_manager import TemplateManager
from finetuned_daemon.templates import Template
from finetuned_daemon.texts import Text

if TYPE_CHECKING:
    from finetuned_daemon.environment.environment import Environment
    from finetuned_daemon.planner import Planner
    from finetuned_daemon.validation.judge import Judge

_log = logging.getLogger(__name__)

_DISK_FULL_RETRY_SECONDS = 5.0
_MOST_RUNS = 1_000_000
_DELETED_AT_ONCE = 1000
"""Events of a task that is deleted: 5 to 10 ms."""

_Result = TypeVar("_Result")

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
        self.events = EventLog(database, config.heartbeat_seconds)
        self.changes = TaskChanges(records)
        self.tally = Tally()
        self.events.on_append = self._appended
        self._logs = EventRows(database)
        self.curves = Curves(database)
        self.digests = Digests(database, self.curves)
        self.grown: Callable[[int], None] = lambda _: None
        """Called with how many events were written."""
        self.freed: Callable[[], None] = lambda: None
        """Called once a long log was deleted."""
        self._deletions = set[asyncio.Task[Any]]()
        self._repeats = repeats
        self._templates = templates
        self._judge = judge
        self.checkpoints = Checkpoints(database, self.records, self.events)
        self.runs = RunManager(
            config,
            database,
            records=records,
            events=self.events,
            checkpoints=self.checkpoints,
            repeats=repeats,
            judge=judge,
            planner=planner,
            environment=environment,
            quota=quota,
        )

    def _appended(self, task_key: int, events: Sequence[event_pb2.Event]) -> None:
        self.tally.note(events)
        self.changes.logged(task_key)
        self.grown(len(events))

    def recover(self) -> None:
        """Takes over what the last daemon left."""
        folders.recover(
            self._config.runs_dir, lambda task_id: self.records.task(task_id) is not None
        )
        for key in self._logs.deletions():
            task = self.records.task_by_key(key)
            if task is not None:
                self._finish_later(task, self._put_away(task))
        self.runs.recover()

    async def close(self) -> None:
        """Stops watching runs, and leaves them alone."""
        for work in self._deletions:
            work.cancel()
        await asyncio.gather(*self._deletions, return_exceptions=True)
        await self.runs.close()

    def written(self) -> int | None:
        """As the database's: tells whether what was read still holds."""
        return self._database.written()

    def get(self, name: str) -> Task:
        """The task of a resource name.

        Raises:
            NotFound: There is none.
        """
        return self.runs.get(name)

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
        violations = [*new.wrong, *check_id("task_id", new.task_id)]
        violations += check_display_name(new.display_name)
        template = self._templates.get(new.template) if new.template else None
        training_type = new.training_type or (template.training_type if template else None)
        violations += check_training_type(training_type, violations)
        if training_type and template:
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
            planned = await self.runs.prepare_start(parameters, training_type, judgement.device.id)
        # From here on nothing is awaited: what is checked stays true until it is written.
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        self.runs.check_quota(parameters, planned)
        task = self._new_task(new, training_type, parameters)
        if validate_only:
            return task

        def also(connection: sqlite3.Connection, task: Task) -> None:
            if to_write is not None:
                self._templates.write(connection, to_write.name, new.parameters)
            self._repeats.keep(connection, request, task)

        if start:
            notices = notices_of(judgement.violations)
            device = judgement.device.id
            queued = self.runs.enqueue(task, device, planned, also, notices=notices)
            return self._repeats.first(request, queued)
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
        """Changes a task without a run under way; earlier runs keep the parameters they ran with.

        Raises:
            NotFound: There is no such task or template.
            StaleEtag: It has changed.
            WrongState: It has a run that is not over, or its template can't be written.
            InvalidRequest: With every wrong field; nothing was written.
            AlreadyExists: The display name is taken.
        """
        task = self.runs.idle(name, etag)
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
        now = self.runs.idle(name, etag)
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

        With `with_outputs`, also what its runs recorded writing into their output folders. What has
        begun goes on though the caller gives up, and after the next start where the log is long.

        Raises:
            NotFound: There is none.
            StaleEtag: It has changed.
            WrongState: It has a run that is not over, or another task's run goes on from what would
                be deleted.
        """
        try:
            task = self.runs.idle(name, etag)
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
        self.runs.deleting.add(task.key)
        return await asyncio.shield(self._deletion(self._delete(task, runs, with_outputs)))

    # --- parts

    async def _delete(
        self, task: Task, runs: list[tuple[Path, Path]], with_outputs: bool
    ) -> Deleted:
        aside, is_begun = None, False
        try:
            # Outputs first: a crash in between leaves a task that can be deleted again.
            deleted = await asyncio.to_thread(delete_outputs, runs, only_look=not with_outputs)
            aside = self._put_away(task)
            first_seq = self._logs.first_seq(task.key)
            if task.last_seq - first_seq >= _DELETED_AT_ONCE:
                with self._database.transaction(durable=True) as connection:
                    self._logs.begin_deletion(connection, task.key)
                is_begun = True
            await self._delete_rows(task)
        except BaseException as error:
            if aside is not None and not is_begun:
                folders.put_back(aside)
            if not is_begun:
                self.runs.deleting.discard(task.key)
            elif isinstance(error, DiskFull):
                self._finish_later(task, aside)
            raise
        if aside is not None:
            folders.remove(aside)
        return deleted

    async def _delete_rows(self, task: Task) -> None:
        """Deletes most of a long log before its task: all of it at once would hold up everybody.

        A task of which some is gone is noted in the database, and never used again.
        """
        was_long = False
        while self._logs.shorten(task.key, _DELETED_AT_ONCE):
            was_long = True
            await asyncio.sleep(0)
        with self._database.transaction(durable=True) as connection:
            self._logs.end_deletion(connection, task.key)
            self.records.delete_task(connection, task)
            self._database.after_commit(lambda: self.events.wake(task.key))
        self.runs.deleting.discard(task.key)
        if was_long:
            self.freed()

    def _put_away(self, task: Task) -> Path | None:
        try:
            return folders.put_away(self._config.runs_dir / task.task_id)
        except OSError as error:
            _log.warning("the run folders of %s are left: %s", task.name, error)
            return None

    def _finish_later(self, task: Task, aside: Path | None) -> None:
        """Deletes what is left of a task that was being deleted, and its run folders."""
        self.runs.deleting.add(task.key)
        self._deletion(self._finish(task, aside))

    async def _finish(self, task: Task, aside: Path | None) -> None:
        try:
            is_there = True
            while is_there:
                try:
                    await self._delete_rows(task)
                    is_there = False
                except DiskFull as error:
                    _log.warning("%s is not deleted yet: %s", task.name, error)
                    await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
        except Exception:  # noqa: BLE001 - nobody else would hear of it
            _log.exception("%s can't be deleted before the next start", task.name)
            return
        _log.info("%s is deleted, as was begun before", task.name)
        if aside is not None:
            folders.remove(aside)

    def _deletion(self, work: Coroutine[None, None, _Result]) -> asyncio.Task[_Result]:
        """Does it, whatever becomes of the call that asks for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)
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
