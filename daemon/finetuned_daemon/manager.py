"""What can be done with tasks: create, list, delete, start, stop. Knows no gRPC.

Writes through the store alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from finetuned_daemon.config import Config
from finetuned_daemon.devices import Device, choose_device, list_devices
from finetuned_daemon.errors import (
    AlreadyExists,
    DiskFull,
    InvalidRequest,
    NotFound,
    StaleEtag,
    Violation,
    WrongState,
)
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.parameters.check import check
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs import scheduler
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import StopWish, TrainingType
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.supervisor import Supervisor
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import (
    ACTIVE,
    LONGEST_DISPLAY_NAME,
    TASK_ID,
    Run,
    Task,
    TaskState,
    default_display_name,
    new_task_id,
    now_us,
)

_log = logging.getLogger(__name__)

_REQUEST_IDS_KEPT_US = 7 * 24 * 3600 * 1_000_000
_LONGEST_REQUEST_ID = 64
_DISK_FULL_RETRY_SECONDS = 5.0

Serialize = Callable[[Task], bytes]


@dataclass(frozen=True, kw_only=True)
class NewTask:
    """A task as asked for."""

    training_type: TrainingType | None
    parameters: Mapping[str, Mapping[str, Any]]
    display_name: str = ""
    device: str = ""
    task_id: str = ""


@dataclass(frozen=True)
class RequestId:
    """A repeat of the same request gets the first answer again."""

    id: str
    body: bytes
    """What the request says, without its id."""
    serialize: Serialize
    """Makes the answer that is kept."""

    @property
    def digest(self) -> bytes:
        """Tells a repeat from another request under the same id."""
        return hashlib.sha256(self.body).digest()


class Manager:
    """All operations on tasks. Its methods run on the event loop's thread.

    The reading of data files does not.
    """

    def __init__(self, config: Config, database: Database) -> None:
        self._config = config
        self._database = database
        self.records = Records(database)
        self.events = EventLog(database)
        self._keeper = Keeper(database, self.records, self.events)
        self._supervisor = Supervisor(config, self._keeper, self._fill_devices)
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

    # --- create, delete

    async def create(
        self, new: NewTask, *, start: bool, validate_only: bool, request: RequestId | None
    ) -> Task | bytes:
        """Creates a task, and starts it if asked.

        Returns:
            The task, or the serialized first answer to a repeated request.

        Raises:
            InvalidRequest: With every wrong field; nothing was written.
            AlreadyExists: The id or the display name is taken.
        """
        answered = self._answered(request)
        if answered is not None:
            return answered
        violations = _check_names(new)
        if new.training_type is None:
            violations.append(
                Violation("training_type", "is required: SFT or PRETRAIN", "REQUIRED")
            )
        training_type = new.training_type or TrainingType.SFT
        devices = await asyncio.to_thread(list_devices)
        device, wrong = _device(new.device, devices)
        violations += wrong
        parameters, wrong = await asyncio.to_thread(
            check, new.parameters, training_type, device, complete=start
        )
        violations += wrong
        if violations or parameters is None:
            raise InvalidRequest(violations)
        # From here on nothing is awaited: what is checked stays true until it is written.
        answered = self._answered(request)
        if answered is not None:
            return answered
        task = self._new_task(new, training_type, parameters)
        if validate_only:
            return task
        if start:
            return self._enqueue(task, device, request)
        with self._database.transaction(durable=True) as connection:
            task = self.records.insert_task(connection, task)
            self._keep_answer(connection, request, task)
        return task

    def delete(self, name: str, *, etag: str, allow_missing: bool) -> None:
        """Deletes a task with its runs, events and run folders.

        Raises:
            NotFound: There is none.
            StaleEtag: It has changed.
            WrongState: It is queued or running.
        """
        try:
            task = self.get(name)
        except NotFound:
            if allow_missing:
                return
            raise
        _check_etag(task, etag)
        if task.state in ACTIVE:
            raise WrongState(
                task.name,
                "TASK_ACTIVE",
                f"{task.name} is {task.state.lower()}; stop it first",
            )
        with self._database.transaction(durable=True) as connection:
            self.records.delete_task(connection, task)
            self._database.after_commit(lambda: self.events.wake(task.key))
        # The rows are gone first: a crash in between leaves a folder that nobody names, never a
        # task without its folder.
        try:
            Bundle(self._config.runs_dir / task.task_id).remove()
        except OSError as error:
            _log.warning("the run folders of %s are left: %s", task.name, error)

    # --- start, stop

    async def start(self, name: str, *, etag: str, request: RequestId | None) -> Task | bytes:
        """Starts a new run; it waits in the queue while its device is busy.

        Raises:
            NotFound: There is no such task.
            StaleEtag: It has changed.
            WrongState: It is queued or running already.
            InvalidRequest: With every wrong or missing parameter.
        """
        answered = self._answered(request)
        if answered is not None:
            return answered
        task = self._startable(name, etag)
        devices = await asyncio.to_thread(list_devices)
        device, violations = _device(task.device, devices)
        _, wrong = await asyncio.to_thread(
            check, task.parameters.model_dump(), task.training_type, device, complete=True
        )
        violations += wrong
        if violations:
            raise InvalidRequest(violations)
        answered = self._answered(request)
        if answered is not None:
            return answered
        return self._enqueue(self._startable(name, etag), device, request)

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
        wish = StopWish.DISCARD if discard else StopWish.SAVE
        if run.state is TaskState.QUEUED:
            self._keeper.dequeued(run, wish)
        else:
            self._supervisor.stop(run, wish)
        return self.get(name)

    # --- parts

    def _enqueue(self, task: Task, device: str, request: RequestId | None) -> Task:
        """Queues a new run, and starts it where its device is free; the task as it was queued."""
        task, _ = self._keeper.enqueue(
            task, self._new_run(task, device), lambda c, t: self._keep_answer(c, request, t)
        )
        self._fill_devices()
        return task

    def _fill_devices(self) -> None:
        """Starts whatever may start now."""
        if self._stopping:
            return
        try:
            for run in scheduler.may_start(self.records.active_runs()):
                self._supervisor.start(run)
        except DiskFull as error:
            # What is queued stays queued, and is tried again: there may be room by then.
            _log.error("%s; queued runs are tried again", error)
            asyncio.get_running_loop().call_later(_DISK_FULL_RETRY_SECONDS, self._fill_devices)

    def _startable(self, name: str, etag: str) -> Task:
        task = self.get(name)
        _check_etag(task, etag)
        if task.state in ACTIVE:
            raise WrongState(
                task.name, "TASK_ACTIVE", f"{task.name} is {task.state.lower()} already"
            )
        return task

    def _new_task(self, new: NewTask, training_type: TrainingType, parameters: Parameters) -> Task:
        task_id = new.task_id or new_task_id(training_type)
        if self.records.task(task_id):
            raise AlreadyExists(
                "task", f"tasks/{task_id}", "TASK_ID_TAKEN", f"there is a task {task_id!r} already"
            )
        if new.display_name and self.records.is_display_name_taken(new.display_name):
            raise AlreadyExists(
                "task",
                new.display_name,
                "DISPLAY_NAME_TAKEN",
                f"there is a task named {new.display_name!r} already; choose another name",
            )
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
            create_time=now,
            update_time=now,
        )

    def _new_run(self, task: Task, device: str) -> Run:
        return Run(
            task_key=task.key, number=task.run + 1, device=device, parameters=task.parameters
        )

    def _answered(self, request: RequestId | None) -> bytes | None:
        if request is None:
            return None
        kept = self.records.answer(request.id)
        if kept is None:
            return None
        digest, answer = kept
        if digest != request.digest:
            raise InvalidRequest(
                [
                    Violation(
                        "request_id",
                        "was used for another request; choose a new one for each",
                        "REQUEST_ID_REUSED",
                    )
                ]
            )
        return answer

    def _keep_answer(
        self, connection: sqlite3.Connection, request: RequestId | None, task: Task
    ) -> None:
        if request is None:
            return
        now = now_us()
        self.records.save_answer(
            connection,
            request.id,
            request.digest,
            request.serialize(task),
            now=now,
            forget_before=now - _REQUEST_IDS_KEPT_US,
        )


def check_request_id(request_id: str) -> list[Violation]:
    """A request id is printable and short."""
    if len(request_id) > _LONGEST_REQUEST_ID or not request_id.isprintable():
        return [
            Violation(
                "request_id",
                f"must be at most {_LONGEST_REQUEST_ID} printable characters, such as a UUID",
                "BAD_REQUEST_ID",
            )
        ]
    return []


def _check_names(new: NewTask) -> list[Violation]:
    found = list[Violation]()
    if new.task_id and not TASK_ID.fullmatch(new.task_id):
        found.append(
            Violation(
                "task_id",
                "must be 4 to 63 of a-z, 0-9 and -, a letter first and no - last",
                "BAD_TASK_ID",
            )
        )
    name = new.display_name
    if len(name) > LONGEST_DISPLAY_NAME or not name.isprintable() or name != name.strip():
        found.append(
            Violation(
                "display_name",
                f"must be at most {LONGEST_DISPLAY_NAME} printable characters, "
                "no space at either end",
                "BAD_DISPLAY_NAME",
            )
        )
    return found


def _device(asked: str, devices: Sequence[Device]) -> tuple[str, list[Violation]]:
    if not asked:
        return choose_device(list(devices)), []
    ids = [device.id for device in devices]
    if asked in ids:
        return asked, []
    message = f"must be one of {', '.join(ids)}, not {asked!r}"
    return asked, [Violation("device", message, "DEVICE_NOT_FOUND")]


def _check_etag(task: Task, etag: str) -> None:
    if etag and etag != task.etag:
        raise StaleEtag(task.name)
