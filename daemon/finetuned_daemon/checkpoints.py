"""The checkpoints of tasks: which there are, which to go on from, and how one is deleted.

What a run recorded writing says where to look; the folder's manifest says what is in it. A
checkpoint that is not whole is listed as such, and never used.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuned_daemon.errors import InvalidRequest, NotFound, Violation, WrongState
from finetuned_daemon.events import build
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import CheckpointDeleted, Notice, TrainingType
from finetuned_daemon.runs.manifest import MANIFEST, Manifest
from finetuned_daemon.runs.outputs import Deleted, delete_outputs, read_records
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.task_requests import ResumeChoice, StartOptions
from finetuned_daemon.tasks import UNDER_WAY, Run, Task, TaskState, now_us
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.paths import read_json

_CHECKPOINT = re.compile(r"checkpoint-([1-9][0-9]{0,14})")
_NAME = re.compile(r"(tasks/[^/]+)/runs/([1-9][0-9]{0,8})/checkpoints/([1-9][0-9]{0,14})")
_MOST_RUNS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that a run of a task has saved and that still stands."""

    path: str
    run: int
    """Number of its run."""
    step: int
    create_time: int
    """Microseconds since the epoch."""
    size_bytes: int = 0
    manifest: Manifest | None = None
    """None where it can't be read."""
    problem: Text | None = None
    """Why it is not whole; None: it is."""
    is_newest: bool = False
    """The newest whole one."""
    is_best: bool = False
    """Of the whole ones that were evaluated on the same data, the one with the lowest loss."""

    @property
    def eval_loss(self) -> float | None:
        """Evaluation loss at its step."""
        return self.manifest.eval_loss if self.manifest else None


@dataclass(frozen=True)
class Resumed:
    """The parameters of a run that is to start, and what its log says of them first."""

    parameters: Parameters
    notices: Sequence[Notice] = ()


def check_resume(chooses: bool, path: str) -> list[Violation]:
    """What to go on from is chosen or named, not both."""
    if not chooses or not path:
        return []
    text = Text("is given together with resume", "与 resume 同时给出")
    return [Violation("resume_path", text, "CHECKPOINT_GIVEN_TWICE")]


def notices_of(violations: Iterable[Violation]) -> list[Notice]:
    """What a log is to keep of the findings at a start: files that are not the checkpoint's."""
    # Here and below with its first use: a daemon starts sooner without.
    from finetuned_daemon.validation.checkpoint import FILES_CHANGED

    return [
        Notice(field=v.field, reason=v.reason, message=f"{v.field} {v.message.en}.")
        for v in violations
        if v.reason == FILES_CHANGED
    ]


# --- what there is


def list_checkpoints(runs: Iterable[Run], *, verify: bool = False) -> list[Checkpoint]:
    """The checkpoints of runs, newest first: by run, then by step.

    Names and sizes are compared, with `verify` the hashes of all files. Reads files: not for the
    event loop's thread.
    """
    found = [checkpoint for run in runs for checkpoint in _of_run(run, verify=verify)]
    found.sort(key=lambda checkpoint: (checkpoint.run, checkpoint.step), reverse=True)
    newest = next((c for c in found if c.problem is None), None)
    best = next(iter(_best_first(found)), None)
    return [replace(c, is_newest=c is newest, is_best=c is best) for c in found]


def _of_run(run: Run, *, verify: bool) -> Iterator[Checkpoint]:
    if not run.run_dir or not run.output_dir:
        return
    from finetuned_daemon.validation.checkpoint import what_differs, what_lacks

    # One that was written again, or marked as the best, is recorded once more.
    records = {record.name: record for record in read_records(Path(run.run_dir))}
    for name, record in records.items():
        match = _CHECKPOINT.fullmatch(name)
        folder = Path(run.output_dir, name)
        if match is None or not folder.is_dir():
            continue
        problem = what_lacks(folder)
        if problem is None and verify:
            problem = what_differs(folder)
        manifest = _read_manifest(folder)
        yield Checkpoint(
            path=str(folder),
            run=run.number,
            step=int(match[1]),
            create_time=record.files.get(MANIFEST, 0) // 1000,
            size_bytes=manifest.size_bytes if manifest else 0,
            manifest=manifest,
            problem=problem,
        )


def _read_manifest(folder: Path) -> Manifest | None:
    values = read_json(folder / MANIFEST)
    try:
        return Manifest.model_validate(values)
    except ValueError:
        return None


def _best_first(found: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The whole checkpoints whose evaluation losses can be compared, the lowest first.

    Those are the ones that were evaluated on the same data as the newest of them.
    """
    evaluated = [c for c in found if c.problem is None and c.eval_loss is not None]
    if not evaluated:
        return []
    wanted = _evaluated_on(evaluated[0].manifest)
    comparable = [c for c in evaluated if _evaluated_on(c.manifest) == wanted]
    return sorted(comparable, key=lambda c: (c.eval_loss or 0.0, c.run, c.step))


def _evaluated_on(manifest: Manifest | None) -> tuple[object, ...]:
    """What the evaluation data of a checkpoint's run were taken from."""
    if manifest is None:
        return ()
    data: Mapping[str, Any] = manifest.parameters.get("data", {})
    length = manifest.parameters.get("training", {}).get("max_seq_length")
    if data.get("eval_file"):
        return (manifest.data_files.get("data.eval_file"), length)
    seed = manifest.parameters.get("general", {}).get("seed")
    file = manifest.data_files.get("data.train_file")
    return (file, length, data.get("eval_ratio"), data.get("max_samples"), seed)


# --- which to go on from


def choose(
    found: Sequence[Checkpoint], choice: ResumeChoice
) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The checkpoint of a choice with every file as it was written, and those passed over for it.

    `found` is as `list_checkpoints` gives it. Reads all files: not for the event loop's thread.
    """
    from finetuned_daemon.validation.checkpoint import what_differs

    is_newest = choice is ResumeChoice.NEWEST_CHECKPOINT
    passed = list[Checkpoint]()
    for checkpoint in found if is_newest else _best_first(found):
        problem = checkpoint.problem or what_differs(Path(checkpoint.path))
        if problem is None:
            return checkpoint, passed
        passed.append(replace(checkpoint, problem=problem))
    return None, passed


class Checkpoints:
    """The checkpoints of all tasks.

    Its methods run on the event loop's thread; files are read in others.
    """

    def __init__(self, database: Database, records: Records, events: EventLog) -> None:
        self._database = database
        self._records = records
        self._events = events
        self._deleting: set[str] = set()

    async def of_task(self, task: Task, *, verify: bool = False) -> list[Checkpoint]:
        """The checkpoints of a task, newest first."""
        runs = self._records.runs(task.key, limit=_MOST_RUNS)
        return await asyncio.to_thread(list_checkpoints, runs, verify=verify)

    async def resume(self, task: Task, options: StartOptions) -> Resumed:
        """The parameters of a run of `task` that goes on as the options say.

        Raises:
            InvalidRequest: The options contradict themselves.
            WrongState: The task has no such checkpoint.
        """
        parameters = task.parameters
        if wrong := check_resume(options.resume is not None, options.resume_path):
            raise InvalidRequest(wrong)
        if options.resume_path:
            return Resumed(resuming(parameters, task.training_type, options.resume_path))
        if options.resume is None:
            return Resumed(parameters)
        found = await self.of_task(task)
        chosen, passed = await asyncio.to_thread(choose, found, options.resume)
        if chosen is None:
            raise _none_to_resume(task, options.resume, found, passed)
        notices = _passed_over(passed, f"goes on from {chosen.path}")
        return Resumed(resuming(parameters, task.training_type, chosen.path), notices)

    async def resume_run(self, run: Run, training_type: TrainingType) -> tuple[str, Resumed]:
        """The checkpoint that a paused run goes on from, and the parameters of its next process.

        It is the newest whole one that it saved; empty: it begins as its own parameters say.
        """
        found = await asyncio.to_thread(list_checkpoints, [run])
        chosen, passed = await asyncio.to_thread(choose, found, ResumeChoice.NEWEST_CHECKPOINT)
        begins = chosen.path if chosen else run.parameters.data.resume_from_checkpoint
        how = f"goes on from {begins}" if begins else "begins anew"
        notices = [*_gone(run, found, chosen, how), *_passed_over(passed, how)]
        if chosen is None:
            return "", Resumed(run.parameters, notices)
        return chosen.path, Resumed(resuming(run.parameters, training_type, chosen.path), notices)

    def check_there(self, parameters: Parameters) -> None:
        """Raises WrongState where somebody deletes what a run would go on from."""
        path = parameters.data.resume_from_checkpoint
        if path and os.path.realpath(path) in self._deleting:
            raise WrongState(path, "CHECKPOINT_BEING_DELETED", f"{path} is being deleted")

    async def delete(self, name: str) -> Deleted:
        """Deletes what a run recorded writing into a checkpoint.

        Raises:
            NotFound: There is none of that name.
            WrongState: Its task has a run that is not over, or another run goes on from it.
        """
        task, run, step = self._named(name)
        folder = Path(run.output_dir, f"checkpoint-{step}")
        path = self._to_delete(name, task, folder)
        self._deleting.add(path)
        try:
            where = [(Path(run.run_dir), Path(run.output_dir))]
            deleted = await asyncio.to_thread(delete_outputs, where, only=folder.name)
            if deleted.files:
                self._record_deletion(task, run, folder, step)
        finally:
            self._deleting.discard(path)
        return replace(deleted, left=_standing(folder))

    def _named(self, name: str) -> tuple[Task, Run, int]:
        match = _NAME.fullmatch(name)
        task = self._records.task(match[1].removeprefix("tasks/")) if match else None
        run = self._records.run(task.key, int(match[2])) if match and task else None
        if match is None or task is None or run is None or not run.run_dir or not run.output_dir:
            raise NotFound("checkpoint", name)
        if not any(
            r.name == f"checkpoint-{int(match[3])}" for r in read_records(Path(run.run_dir))
        ):
            raise NotFound("checkpoint", name)
        return task, run, int(match[3])

    def check_unused(self, task: Task, folders: Sequence[Path]) -> None:
        """Raises WrongState where another task's run goes on from a checkpoint in one of these."""
        roots = [os.path.realpath(folder) for folder in folders]
        for run in self._under_way():
            resumed = run.parameters.data.resume_from_checkpoint
            path = os.path.realpath(resumed) if resumed and run.task_key != task.key else ""
            if path and any(path.startswith(f"{root}{os.sep}") for root in roots):
                user = self._records.task_by_key(run.task_key)
                name = user.name if user else ""
                raise WrongState(
                    name, "CHECKPOINT_IN_USE", f"{name} goes on from {path}; stop it first"
                )

    def _to_delete(self, name: str, task: Task, folder: Path) -> str:
        """The path of a checkpoint without links, where it may be deleted."""
        path = os.path.realpath(folder)
        if path in self._deleting or not folder.is_dir():
            raise NotFound("checkpoint", name)
        check_idle(task)
        for run in self._under_way():
            resumed = run.parameters.data.resume_from_checkpoint
            if resumed and os.path.realpath(resumed) == path:
                user = self._records.task_by_key(run.task_key)
                name = user.name if user else ""
                raise WrongState(
                    name, "CHECKPOINT_IN_USE", f"{name} goes on from {path}; stop it first"
                )
        return path

    def _under_way(self) -> list[Run]:
        return [*self._records.active_runs(), *self._records.paused_runs()]

    def _record_deletion(self, task: Task, run: Run, folder: Path, step: int) -> None:
        """Says it in the task's log, and names the newest checkpoint that is left."""
        now = now_us()
        event = build.reported(now, run.number, CheckpointDeleted(path=str(folder), step=step))
        left = [c.path for c in list_checkpoints([run]) if c.problem is None]
        newest = left[0] if left else ""
        with self._database.transaction(durable=True) as connection:
            if run.last_checkpoint == str(folder):
                self._records.save_run(connection, replace(run, last_checkpoint=newest))
            current = self._records.task_by_key(task.key)
            if current is None:  # deleted meanwhile
                return
            if current.last_checkpoint == str(folder):
                current = replace(
                    current,
                    last_checkpoint=newest,
                    update_time=now,
                    revision=current.revision + 1,
                )
                self._records.save_task(connection, current)
            self._events.append(connection, task.key, [event])


def _standing(folder: Path) -> list[str]:
    return [str(folder)] if os.path.lexists(folder) else []


def _passed_over(passed: Sequence[Checkpoint], how: str) -> list[Notice]:
    return [
        Notice(
            field="data.resume_from_checkpoint",
            reason="CHECKPOINT_PASSED_OVER",
            message=f"{broken.path} is not whole ({_en(broken.problem)}) and is passed over; "
            f"the run {how}.",
        )
        for broken in passed
    ]


def _gone(
    run: Run, found: Sequence[Checkpoint], chosen: Checkpoint | None, how: str
) -> list[Notice]:
    """Says where the newest checkpoint that a run has reported is not among those that stand."""
    newest = Path(run.last_checkpoint)
    match = _CHECKPOINT.fullmatch(newest.name)
    if match is None or any(Path(c.path).name == newest.name for c in found):
        return []
    if chosen is not None and chosen.step > int(match[1]):
        return []
    return [
        Notice(
            field="data.resume_from_checkpoint",
            reason="CHECKPOINT_GONE",
            message=f"{newest} is gone; the run {how}.",
        )
    ]


def check_idle(task: Task) -> None:
    """Raises WrongState where a run of a task is not over: nothing of it may be changed then."""
    if task.state is TaskState.PAUSED:
        raise WrongState(
            task.name, "TASK_PAUSED", f"{task.name} is paused; resume it or stop it first"
        )
    if task.state in UNDER_WAY:
        raise WrongState(
            task.name, "TASK_ACTIVE", f"{task.name} is {task.state.lower()}; stop it first"
        )


def resuming(parameters: Parameters, training_type: TrainingType, path: str) -> Parameters:
    """The parameters with the checkpoint in them.

    Weights that the task attaches at its beginning are in the checkpoint already: it has their
    shape, which need not be the form's, and the base model has to be named.
    """
    from finetuned_daemon.planning.model_files import ModelUnreadable, base_folder
    from finetuned_daemon.validation.checkpoint import ADAPTER_CONFIG

    data: dict[str, Any] = {"resume_from_checkpoint": path}
    lora = parameters.lora
    attaches = parameters.data.attach_lora and lora.use_lora
    if training_type is TrainingType.SFT and attaches:
        with contextlib.suppress(ModelUnreadable):  # the check of the parameters will say it
            data["model_path"] = str(base_folder(Path(parameters.data.model_path or "")))
        data["attach_lora"] = False
        lora = lora.model_copy(update={"peft_config_path": str(Path(path, ADAPTER_CONFIG))})
    return parameters.model_copy(
        update={"data": parameters.data.model_copy(update=data), "lora": lora}
    )


def _none_to_resume(
    task: Task,
    choice: ResumeChoice,
    found: Sequence[Checkpoint],
    passed: Sequence[Checkpoint],
) -> WrongState:
    broken = "".join(f"; {c.path} is not whole: {_en(c.problem)}" for c in passed)
    if choice is ResumeChoice.BEST_CHECKPOINT and any(c.problem is None for c in found):
        message = (
            f"no whole checkpoint of {task.name} was saved at a step that was evaluated{broken}; "
            "go on from the newest, or let training.save_steps be a multiple of training.eval_steps"
        )
        return WrongState(task.name, "NO_BEST_CHECKPOINT", message)
    message = f"{task.name} has no whole checkpoint{broken}; start it without resuming"
    return WrongState(task.name, "NO_CHECKPOINT", message)


def _en(problem: Text | None) -> str:
    return problem.en if problem else ""
