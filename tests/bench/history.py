"""A state folder as years leave it: tasks, runs, events, templates, notifications.

Written through the store's own code, many rows in one transaction; only how the values come about
is made up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finetuned.v1 import event_pb2
from finetuned_daemon.events import build
from finetuned_daemon.explain import Explanation
from finetuned_daemon.limits import Limits
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    CheckpointSaved,
    EndReason,
    Evaluation,
    LogLine,
    Payload,
    PhaseChange,
    Progress,
    Result,
    RunPhase,
    TrainingType,
)
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.event_rows import EventRows
from finetuned_daemon.store.ledger import Ledger
from finetuned_daemon.store.notification_rows import NotificationRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.store.template_rows import TemplateRows
from finetuned_daemon.tasks import ENDS, Run, Task, TaskState
from finetuned_daemon.templates import Template

PROBE = "history-probe"
"""Id of the task that is asked for; of equal size in each state."""
PROBE_EVENTS = 400

_HOUR = 3_600_000_000
_FIRST = 1_700_000_000_000_000
_ENDS = (
    *(EndReason.FINISHED,) * 12,
    *(EndReason.STOPPED_BY_USER,) * 3,
    *(EndReason.EARLY_STOPPED, EndReason.DEVICE_OUT_OF_MEMORY),
    *(EndReason.RUNNER_KILLED, EndReason.DATASET_INVALID, EndReason.DISK_FULL),
)
_PER_TRANSACTION = 20_000
"""Events in one, about."""


@dataclass(frozen=True)
class Size:
    """How much there is."""

    tasks: int
    events: int
    """Of all tasks together, about."""
    long_tasks: int
    """Tasks among them of many events."""
    templates: int
    long_events: int = 100_000
    """Events of each of those."""


def long_task(number: int) -> str:
    """Id of a long task, from 0."""
    return f"history-long-{number}"


def write(path: Path, size: Size, model: Path, data: Path) -> None:
    """Writes a database.

    Args:
        path: The file; its folder is made.
        size: How much.
        model: What all tasks train.
        data: What they train it on.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(path)
    path.chmod(0o600)
    writer = _Writer(database, path.parent / "runs", model, data)
    short = size.tasks - size.long_tasks - 1
    each = max(
        20, (size.events - size.long_tasks * size.long_events - PROBE_EVENTS) // max(1, short)
    )
    for number in range(size.long_tasks):
        writer.task(long_task(number), size.long_events, runs=1)
    for number in range(short):
        writer.task(f"history-{number:06d}", each, runs=0 if number % 20 == 7 else 1 + number % 3)
        if number == short // 2:
            writer.task(PROBE, PROBE_EVENTS, runs=2)
    writer.templates(size.templates)
    writer.close()
    database.close()


class _Writer:
    def __init__(self, database: Database, runs_dir: Path, model: Path, data: Path) -> None:
        self._database = database
        self._records = Records(database, Limits({"tasks": 0}))
        self._events = EventRows(database)
        self._ledger = Ledger(database)
        self._notifications = NotificationRows(database, 1000)
        self._runs_dir = runs_dir
        self._model, self._data = model, data
        self._count = 0
        self._pending = 0
        self._transaction = database.transaction(durable=False)
        self._connection = self._transaction.__enter__()

    def close(self) -> None:
        self._transaction.__exit__(None, None, None)

    def templates(self, count: int) -> None:
        rows = TemplateRows(self._database)
        for number in range(count):
            template = Template(
                template_id=f"history-{number:05d}",
                display_name=f"setting {number:05d}",
                training_type=TrainingType.SFT,
                parameters=Parameters(),
                create_time=_FIRST,
                update_time=_FIRST,
            )
            rows.insert(self._connection, template)

    def task(self, task_id: str, events: int, *, runs: int) -> None:
        self._count += 1
        created = _FIRST + self._count * _HOUR
        parameters = self._parameters(task_id)
        task = Task(
            task_id=task_id,
            display_name=f"{task_id} of {self._count}",
            training_type=TrainingType.SFT,
            parameters=parameters,
            device="cpu",
            create_time=created,
            update_time=created,
        )
        task = self._records.insert_task(self._connection, task)
        seq = 1
        for number in range(1, runs + 1):
            seq = self._run(task, number, events // runs, seq, created + number * 60_000_000)

    def _run(self, task: Task, number: int, count: int, seq: int, time: int) -> int:
        """Writes a run with its events; returns the number of the next event of its task."""
        reason = _ENDS[(self._count + number) % len(_ENDS)]
        run_dir = self._runs_dir / task.task_id / str(number)
        steps = (count - 9) * 50 // 103
        progress = Progress(
            step=steps, total_steps=steps, epoch=1.0, tokens_per_second=900.0, loss=1.5
        )
        run = Run(
            task_key=task.key,
            number=number,
            place=self._records.next_place(self._connection),
            state=ENDS[reason].state,
            device="cpu",
            parameters=task.parameters,
            end_reason=reason,
            end_message=ENDS[reason].sentence.en,
            create_time=time,
            start_time=time,
            end_time=time + count * 500_000,
            progress=progress,
            run_dir=str(run_dir),
            output_dir=f"{task.parameters.data.output_dir}/run-{number}",
            exit_code=0,
        )
        run = self._records.insert_run(self._connection, run)
        rows = list(self._rows(task, run, count, seq, time))
        self._events.append(self._connection, task.key, rows)
        task = self._records.task_by_key(task.key) or task
        shown = {
            name: getattr(run, name)
            for name in ("state", "end_reason", "end_message", "progress", "start_time", "end_time")
        }
        changed = Task(**{**vars(task), **shown, "run": number, "revision": task.revision + 1})
        self._records.save_task(self._connection, changed)
        for saved in range(0, steps, 100):
            self._ledger.enter(
                self._connection,
                time=time,
                task_id=task.task_id,
                run=number,
                step=saved,
                path=run.output_dir,
            )
        self._notifications.add(
            self._connection,
            notification_id=f"{task.task_id}-{number}",
            time=time,
            task_key=task.key,
            run=number,
            cause="run-ended",
            body="{}",
            channels=["command"],
        )
        self._pending += len(rows)
        if self._pending > _PER_TRANSACTION:
            self._pending = 0
            self._transaction.__exit__(None, None, None)
            self._transaction = self._database.transaction(durable=False)
            self._connection = self._transaction.__enter__()
        return seq + len(rows)

    def _rows(
        self, task: Task, run: Run, count: int, seq: int, time: int
    ) -> Iterator[tuple[int, int, bytes]]:
        """About `count` events, as a run of so many writes them."""
        number, next_seq = run.number, seq

        def row(event: event_pb2.Event) -> tuple[int, int, bytes]:
            nonlocal next_seq
            event.seq = next_seq
            next_seq += 1
            return event.seq, number, event.SerializeToString()

        def reported(payload: Payload) -> tuple[int, int, bytes]:
            return row(build.reported(time, number, payload))

        yield row(build.state_change(time, number, TaskState.PENDING, TaskState.QUEUED))
        yield row(build.state_change(time, number, TaskState.QUEUED, TaskState.RUNNING))
        for phase in (
            *(RunPhase.STARTING, RunPhase.LOADING_MODEL, RunPhase.PREPARING_DATA),
            RunPhase.TRAINING,
        ):
            yield reported(PhaseChange(phase=phase))
        steps = (count - 9) * 50 // 103
        measured = event_pb2.Event(run=number)
        progress = event_pb2.Event(run=number)
        for step in range(1, steps + 1):
            time += 1_000_000
            measured.time.FromMicroseconds(time)
            progress.time.FromMicroseconds(time)
            loss = 2.0 + math.exp(-step / 500) + 0.1 * math.sin(step * 1.7)
            measured.metrics.step, measured.metrics.epoch = step, step / steps
            values = measured.metrics.values
            values["loss"], values["learning_rate"], values["grad_norm"] = loss, 1e-4, loss / 2
            yield row(measured)
            at = progress.progress
            at.step, at.total_steps, at.epoch, at.loss = step, steps, step / steps, loss
            at.tokens_per_second, at.num_tokens = 900.0 + step % 7, step * 1024
            yield row(progress)
            if step % 25 == 0:
                text = f"step {step} of {steps}, the loss is {loss:.4f}"
                yield reported(LogLine(level="info", logger="finetuned", text=text))
            if step % 100 == 0:
                path = f"{run.output_dir}/checkpoint-{step}"
                yield reported(CheckpointSaved(path=path, step=step, size_bytes=1 << 20))
                yield reported(
                    Evaluation(step=step, epoch=step / steps, values={"eval_loss": loss + 0.1})
                )
        outcome = Result(end_reason=run.end_reason or EndReason.FINISHED, step=steps)
        explanation = Explanation()
        yield row(
            build.result(time, number, outcome, exit_code=0, signal="", explanation=explanation)
        )
        yield row(
            build.state_change(
                time, number, TaskState.RUNNING, run.state, end_reason=run.end_reason
            )
        )

    def _parameters(self, task_id: str) -> Parameters:
        return Parameters.model_validate(
            {
                "data": {
                    "model_path": str(self._model),
                    "train_file": str(self._data),
                    "output_dir": f"/history/{task_id}",
                }
            }
        )
