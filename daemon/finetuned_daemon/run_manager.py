"""What can be done with runs: start, stop, pause, resume, move in the queue. Knows no gRPC.

Writes through the store alone. What is decided is durable before anything acts on it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finetuned_daemon import logs
from finetuned_daemon.checkpoints import Checkpoints, check_idle, notices_of
from finetuned_daemon.config import Config
from finetuned_daemon.errors import (
    DaemonError,
    DiskFull,
    InvalidRequest,
    NotFound,
    StaleEtag,
    Violation,
    WrongState,
)
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.later import later
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.requests import Repeats, RequestId
from finetuned_daemon.runs import scheduler
from finetuned_daemon.runs.contract import Notice, RunPhase, StopWish, TrainingType
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.runs.standby import StandbyStatus
from finetuned_daemon.runs.supervisor import Supervisor
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.task_requests import StartOptions
from finetuned_daemon.tasks import ACTIVE, UNDER_WAY, PauseReason, Run, Task, TaskState
from finetuned_daemon.texts import Text

if TYPE_CHECKING:
    from finetuned_daemon.environment.environment import Environment
    from finetuned_daemon.explain import Explainer
    from finetuned_daemon.planner import Planner
    from finetuned_daemon.validation.judge import Judge

_log = logging.getLogger(__name__)

_DISK_FULL_RETRY_SECONDS = 5.0
_LONGEST_LOOK_SECONDS = 3600.0


@dataclass(frozen=True)
class _Prepared:
    """What a paused run is about to go on with."""

    resume_path: str
    parameters: Parameters
    planned: int
    notices: Sequence[Notice]


@dataclass
class _Waiting:
    """A run that waits for room on a disk, as this daemon has seen it."""

    attempt: int
    step: int
    delay: float
    """Seconds from one try to the next; doubled where a try got no further.

    A user's share of a disk can be used up where the disk itself has room.
    """
    not_before: float
    trouble: str = ""
    """Why the last try could not be made, said once."""


class RunManager:
    """All operations on runs. Its methods run on the event loop's thread.

    The reading of data files does not.
    """

    def __init__(
        self,
        config: Config,
        database: Database,
        *,
        records: Records,
        events: EventLog,
        checkpoints: Checkpoints,
        repeats: Repeats,
        judge: Judge,
        planner: Planner,
        environment: Environment,
        quota: Quota,
    ) -> None:
        self._config = config
        self._records = records
        self._checkpoints = checkpoints
        self._repeats = repeats
        self._judge = judge
        self._planner = planner
        self._environment = environment
        self._quota = quota
        self._keeper = Keeper(database, records, events, later(lambda: _explainer(environment)))
        self._supervisor = Supervisor(
            config, self._keeper, quota, self._fill_devices, events.fan_out.is_watched
        )
        self.deleting: set[int] = set()
        """Keys of the tasks that are being deleted."""
        self._stopping = False
        self._waiting: dict[int, _Waiting] = {}
        self._look: asyncio.Task[None] | None = None

    # --- life

    def recover(self) -> None:
        """Takes over what the last daemon left.

        Live runs are adopted, ended ones recorded, the queue goes on.
        """
        self._supervisor.begin()
        for run in self._records.active_runs():
            if run.state is TaskState.RUNNING:
                self._supervisor.recover(run)
        self._fill_devices()
        self._look = asyncio.get_running_loop().create_task(self._look_for_room())

    async def save_now(self, seconds: float) -> None:
        """Lets every live run save, as before a suspend; waits for them no longer than this."""
        await self._supervisor.save_now(seconds)

    async def close(self) -> None:
        """Stops watching runs, and leaves them alone."""
        self._stopping = True
        if self._look is not None:
            self._look.cancel()
            await asyncio.gather(self._look, return_exceptions=True)
        await self._supervisor.close()

    # --- read

    @property
    def standby(self) -> StandbyStatus:
        """What is to be seen of the standby."""
        return self._supervisor.standby

    def get(self, name: str) -> Task:
        """The task of a resource name.

        Raises:
            NotFound: There is none.
        """
        task = (
            self._records.task(name.removeprefix("tasks/")) if name.startswith("tasks/") else None
        )
        if task is None:
            raise NotFound("task", name)
        return task

    def idle(self, name: str, etag: str) -> Task:
        """The task of a name, where it may be changed, started or deleted."""
        task = self.get(name)
        _check_etag(task, etag)
        check_idle(task)
        if task.key in self.deleting:
            raise WrongState(task.name, "TASK_BEING_DELETED", f"{task.name} is being deleted")
        return task

    def queue_positions(self) -> dict[int, int]:
        """Places in the queues of their devices, from 1, by the keys of the queued tasks."""
        return scheduler.queue_positions(self._records.queue())

    def active(self) -> dict[str, list[tuple[Run, Task]]]:
        """Queued and running runs with their tasks, by device, in the order of the queue."""
        result = dict[str, list[tuple[Run, Task]]]()
        for run in self._records.active_runs():
            result.setdefault(run.device, []).append((run, self._keeper.task_of(run)))
        return result

    # --- start

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
            WrongState: It has a run that is not over, the training environment can't run, or
                there is no such checkpoint to resume.
            InvalidRequest: With every wrong or missing parameter.
        """
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        task = self.idle(name, etag)
        resumed = await self._checkpoints.resume(task, options)
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
        planned = await self.prepare_start(
            parameters, task.training_type, device, is_probe=options.probe
        )
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        now = self.idle(name, etag)
        if now.revision != task.revision:
            return await self.start(name, etag=etag, request=request, options=options)
        self.check_quota(parameters, planned)
        queued = self.enqueue(
            now,
            device,
            planned,
            lambda c, t: self._repeats.keep(c, request, t),
            parameters=parameters,
            notices=[*resumed.notices, *notices_of(judgement.violations)],
            is_probe=options.probe,
        )
        return self._repeats.first(request, queued)

    async def prepare_start(
        self,
        parameters: Parameters,
        training_type: TrainingType,
        device: str,
        *,
        is_probe: bool = False,
    ) -> int:
        """Checks environment, data and quota; returns how many checkpoints the run is to save.

        A probe saves none.
        """
        await self._check_can_run(parameters, training_type, device)
        refused = await self._planner.refused(parameters, training_type)
        if refused:
            raise InvalidRequest(refused)
        if is_probe:
            return 0
        planned, violations = await self._planner.check_quota(parameters, training_type)
        if violations:
            raise InvalidRequest(violations)
        return planned

    def check_quota(self, parameters: Parameters, planned: int) -> None:
        """Raises InvalidRequest where others have taken what was left since it was planned."""
        violations = self._planner.beyond_quota(parameters, planned) if planned else []
        if violations:
            raise InvalidRequest(violations)

    def enqueue(
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
        self._checkpoints.check_there(parameters)
        run = Run(
            task_key=task.key,
            # Not the task's: that is the one before a probe.
            number=next((run.number for run in self._records.runs(task.key, limit=1)), 0) + 1,
            device=device,
            parameters=parameters,
            planned_checkpoints=planned_checkpoints,
            is_probe=is_probe,
            request_id=logs.request_id(),
        )
        task, _ = self._keeper.enqueue(task, run, also, notices)
        self._fill_devices()
        return task

    # --- stop, pause, resume, move

    def stop(self, name: str, *, discard: bool) -> Task:
        """Asks for the end of a run; one without a process ends at once.

        Raises:
            NotFound: There is no such task.
            WrongState: It is neither queued nor running nor paused.
        """
        task = self.get(name)
        run = self._run_of(task, UNDER_WAY, "there is nothing to stop")
        wish = StopWish.DISCARD if discard or run.is_probe else StopWish.SAVE
        if run.state is TaskState.RUNNING:
            self._supervisor.stop(run, wish)
        else:
            self._keeper.dequeued(run, wish)
        return self.get(name)

    def pause(self, name: str) -> Task:
        """Asks a run to save and to free its device; a queued one is paused at once.

        Raises:
            NotFound: There is no such task.
            WrongState: It is not active, is stopping or about to end, or is a probe.
        """
        task = self.get(name)
        if task.state is TaskState.PAUSED:
            run = self._run_of(task, UNDER_WAY, "")
            if run.pause is not PauseReason.REQUESTED:
                self._keeper.stays_paused(run)
            return self.get(name)
        run = self._run_of(task, ACTIVE, "there is nothing to pause")
        if run.is_probe:
            message = f"what runs of {task.name} is a probe, which can't be paused; stop it"
            raise WrongState(task.name, "TASK_PROBING", message)
        if run.pause is not None:
            return task
        if run.stop is not None:
            raise WrongState(task.name, "TASK_STOPPING", f"{task.name} is stopping already")
        if task.phase is RunPhase.MERGING:
            message = f"{task.name} is trained, and merges its weights; it ends by itself"
            raise WrongState(task.name, "TASK_ENDING", message)
        if run.state is TaskState.QUEUED:
            self._keeper.paused_in_queue(run)
        else:
            self._supervisor.pause(run)
        return self.get(name)

    async def resume(
        self, name: str, *, etag: str, request: RequestId[Task] | None
    ) -> Task | bytes:
        """Lets a paused run go on; it waits in the queue while its device is busy.

        Raises:
            NotFound: There is no such task.
            StaleEtag: It has changed.
            WrongState: It is not paused, or the training environment can't run.
            InvalidRequest: With every parameter that can't be used any more.
        """
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        task = self.get(name)
        _check_etag(task, etag)
        run = self._paused_run(task)
        prepared = await self._prepare_resume(task, run)
        answered = self._repeats.answered(request)
        if answered is not None:
            return answered
        now = self.get(name)
        _check_etag(now, etag)
        self._paused_run(now)
        if now.revision != task.revision:
            return await self.resume(name, etag=etag, request=request)
        queued = self._requeue(run, prepared, lambda c, t: self._repeats.keep(c, request, t))
        return self._repeats.first(request, queued)

    def move(self, name: str, position: int) -> Task:
        """Moves a queued run to another place in the queue of its device, from 1.

        Raises:
            InvalidRequest: There is no such place.
            NotFound: There is no such task.
            WrongState: It is not queued.
        """
        if position < 1:
            text = Text(f"must be 1 or more, not {position}", f"必须不小于 1，而不是 {position}")
            raise InvalidRequest([Violation("position", text, "OUT_OF_RANGE")])
        task = self.get(name)
        run = self._records.run(task.key, task.run) if task.state is TaskState.QUEUED else None
        if run is None:
            raise WrongState(
                task.name,
                "TASK_NOT_QUEUED",
                f"{task.name} is {task.state.lower()}; only what is queued can be moved",
            )
        changed = scheduler.moved(run, position, self._records.active_runs())
        if changed:
            self._keeper.moved(run, changed)
        self._fill_devices()
        return self.get(name)

    # --- parts

    def _run_of(self, task: Task, states: frozenset[TaskState], otherwise: str) -> Run:
        run = self._records.run(task.key, task.run) if task.state in states else None
        if run is None:
            raise WrongState(
                task.name, "TASK_NOT_ACTIVE", f"{task.name} is {task.state.lower()}; {otherwise}"
            )
        return run

    def _paused_run(self, task: Task) -> Run:
        run = self._records.run(task.key, task.run) if task.state is TaskState.PAUSED else None
        if run is None:
            raise WrongState(
                task.name,
                "TASK_NOT_PAUSED",
                f"{task.name} is {task.state.lower()}, not paused; there is nothing to resume",
            )
        return run

    async def _check_can_run(
        self, parameters: Parameters, training_type: TrainingType, device: str
    ) -> None:
        """Raises where the environment can't run, or a checkpoint is not as it was written."""
        wrong = await self._environment.before_start(parameters, device)
        if wrong:
            from finetuned_daemon.environment.model import in_a_sentence

            raise WrongState(
                "environment",
                "ENVIRONMENT_NOT_READY",
                f"this machine can't train: {in_a_sentence(wrong)}",
            )
        from finetuned_daemon.validation.checkpoint import check_hashes

        violations = await asyncio.to_thread(check_hashes, parameters, training_type)
        if violations:
            raise InvalidRequest(violations)

    async def _prepare_resume(self, task: Task, run: Run) -> _Prepared:
        """Chooses from where a paused run goes on, and checks everything as a start does."""
        resume_path, resumed = await self._checkpoints.resume_run(run, task.training_type)
        parameters = resumed.parameters
        judgement = await self._judge.judge(
            parameters.model_dump(exclude_none=True),
            task.training_type,
            run.device,
            complete=True,
            task=task,
        )
        if judgement.errors:
            raise InvalidRequest(judgement.errors)
        await self._check_can_run(parameters, task.training_type, run.device)
        # What is beyond the quota is cut off below: a run that has begun may use what is left.
        planned, _ = await self._planner.check_quota(parameters, task.training_type)
        notices = [*resumed.notices, *notices_of(judgement.violations)]
        return _Prepared(resume_path, parameters, planned, notices)

    def _requeue(
        self,
        run: Run,
        prepared: _Prepared,
        also: Callable[[sqlite3.Connection, Task], None] | None = None,
        notices: Sequence[Notice] = (),
    ) -> Task:
        """Queues a paused run again; the task as it was queued.

        Raises:
            InvalidRequest: Not one checkpoint is left of the training quota.
        """
        self._checkpoints.check_there(prepared.parameters)
        left, planned = self._quota.left(), prepared.planned
        if left is not None:
            left += max(0, run.planned_checkpoints - run.saved_checkpoints)
            if left < 1:
                raise InvalidRequest(self._planner.beyond_quota(prepared.parameters, 1))
            planned = min(max(1, planned), left)
        run = replace(
            run,
            resume_path=prepared.resume_path,
            last_checkpoint=prepared.resume_path,
            planned_checkpoints=planned,
            saved_checkpoints=0,
        )
        task, _ = self._keeper.resumed(run, also, [*notices, *prepared.notices])
        self._waiting.pop(run.key, None)
        self._fill_devices()
        return task

    def _fill_devices(self) -> None:
        """Starts whatever may start now."""
        if self._stopping:
            return
        try:
            for run in scheduler.may_start(self._records.active_runs()):
                self._supervisor.start(run)
            self._supervisor.share_quota()
        except DiskFull as error:
            # What is queued stays queued, and is tried again: there may be room by then.
            _log.error("%s; queued runs are tried again", error)
            asyncio.get_running_loop().call_later(_DISK_FULL_RETRY_SECONDS, self._fill_devices)

    # --- room on disks

    async def _look_for_room(self) -> None:
        """Queues runs that are paused for want of space again, once there is room."""
        while True:
            await asyncio.sleep(self._config.disk_look_seconds)
            for run in self._records.paused_runs():
                if run.pause is PauseReason.DISK_FULL:
                    await self._resume_where_room(run)

    async def _resume_where_room(self, run: Run) -> None:
        waiting = self._waits(run)
        if time.monotonic() < waiting.not_before:
            return
        task = self._records.task_by_key(run.task_key)
        if task is None:  # stopped and deleted while another run was looked at
            return
        from finetuned_daemon.runs.room import needs_of  # where a run waits for a disk alone

        needs = await asyncio.to_thread(needs_of, run, task.training_type, self._config.runs_dir)
        if not all(need.is_met for need in needs):
            return
        try:
            prepared = await self._prepare_resume(task, run)
            now = self._records.run(run.task_key, run.number)
            if now is None or now.pause is not run.pause or now.attempt != run.attempt:
                return  # somebody has resumed, stopped or deleted it meanwhile
            notice = Notice(
                reason="ROOM_ON_DISK",
                message="There is room on the disk again; the run goes on by itself.",
            )
            self._requeue(now, prepared, notices=[notice])
        except (DaemonError, OSError) as error:
            if str(error) != waiting.trouble:
                waiting.trouble = str(error)
                _log.warning("run %d of %s stays paused: %s", run.number, task.name, error)
                self._say_refused(run, error)
            return
        self._waiting[run.key] = waiting  # until it is seen whether it gets any further

    def _say_refused(self, run: Run, error: DaemonError | OSError) -> None:
        """Tells watchers why a run can't go on by itself, where it is not for want of space."""
        now = self._records.run(run.task_key, run.number)
        if now is None or now.pause is not run.pause or now.attempt != run.attempt:
            return  # it is not what it was: nobody waits for this
        if isinstance(error, DiskFull):
            return
        message = (
            f"There is room on the disk again, but the run can't go on by itself: {error}. "
            "It is tried again."
        )
        try:
            self._keeper.resume_refused(now, message)
        except DiskFull as full:
            _log.error("%s", full)

    def _waits(self, run: Run) -> _Waiting:
        """What is known of a waiting run, brought up to date."""
        known = self._waiting.get(run.key)
        if known is None or run.progress.step > known.step:
            known = _Waiting(run.attempt, run.progress.step, self._config.disk_look_seconds, 0.0)
        elif run.attempt > known.attempt:
            known.attempt = run.attempt
            known.not_before = time.monotonic() + known.delay
            known.delay = min(2 * known.delay, _LONGEST_LOOK_SECONDS)
        self._waiting[run.key] = known
        return known


def _explainer(environment: Environment) -> Explainer:
    from finetuned_daemon.explain import Explainer

    return Explainer(environment)


def _check_etag(task: Task, etag: str) -> None:
    if etag and etag != task.etag:
        raise StaleEtag(task.name)
