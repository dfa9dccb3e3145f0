"""Keeps the record of runs.

Every change of a run is written here, with its events, in one transaction.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetuned.v1 import event_pb2
from finetuned_daemon import logs
from finetuned_daemon.events import build
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.measurements import Measurement, measured_by
from finetuned_daemon.runs import reports
from finetuned_daemon.runs.aside import rewrite_ended, write_ended
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import (
    CheckpointDeleted,
    CheckpointSaved,
    EndReason,
    LogLine,
    Notice,
    PhaseChange,
    ProbeReport,
    ProcessIdentity,
    Progress,
    Result,
    RunPhase,
    StopWish,
)
from finetuned_daemon.runs.outcome import stays_paused
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.ledger import Ledger
from finetuned_daemon.store.measurement_rows import MeasurementRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import (
    ENDS,
    PauseReason,
    Run,
    Standing,
    Task,
    TaskState,
    check_transition,
    now_us,
)

if TYPE_CHECKING:
    from finetuned_daemon.explain import Explainer

_log = logging.getLogger(__name__)


class Keeper:
    """Run records, task records and events, changed together or not at all."""

    def __init__(
        self, database: Database, records: Records, events: EventLog, explainer: Explainer
    ) -> None:
        self._database = database
        self._records = records
        self._events = events
        self._explainer = explainer
        self._ledger = Ledger(database)
        self._measurements = MeasurementRows(database)

    def task_of(self, run: Run) -> Task:
        """The task of a run; there is always one."""
        task = self._records.task_by_key(run.task_key)
        if task is None:
            raise AssertionError(f"run {run.key} has no task")
        return task

    def enqueue(
        self,
        task: Task,
        run: Run,
        also: Callable[[sqlite3.Connection, Task], None] | None = None,
        notices: Sequence[Notice] = (),
    ) -> tuple[Task, Run]:
        """Puts a new run of a task into the queue; `also` writes more in the same transaction.

        Its log begins with the notices.

        A task that is not in the database yet is created with it.
        """
        check_transition(task.state, TaskState.QUEUED)
        before = Standing.of(task) if run.is_probe else None
        now = now_us()
        with self._database.transaction(durable=True) as connection:
            if not task.key:
                task = self._records.insert_task(connection, task)
            self._records.check_room(run)
            place = self._records.next_place(connection)
            run = replace(run, task_key=task.key, create_time=now, place=place)
            run = self._records.insert_run(connection, run)
            events = [build.state_change(now, run.number, task.state, TaskState.QUEUED)]
            events += [build.reported(now, run.number, notice) for notice in notices]
            queued = _queued(run)
            task = replace(
                task,
                **queued,
                before_probe=before,
                update_time=now,
                revision=task.revision + 1,
            )
            self._records.save_task(connection, task)
            task = replace(task, last_seq=self._events.append(connection, task.key, events))
            if also is not None:
                also(connection, task)
        return task, run

    def starting(self, run: Run) -> Run:
        """Records the intent to start, before the process exists."""
        now = now_us()
        # After a pause it is the same run that goes on.
        start_time = run.start_time or now
        run = replace(run, state=TaskState.RUNNING, start_time=start_time, starts=1)
        self._change(
            run,
            [
                build.state_change(now, run.number, TaskState.QUEUED, TaskState.RUNNING),
                build.reported(now, run.number, PhaseChange(phase=RunPhase.STARTING)),
            ],
            state=TaskState.RUNNING,
            phase=RunPhase.STARTING,
            start_time=start_time,
        )
        return run

    def restarting(self, run: Run, notice: Notice) -> Run:
        """Records the intent to start a process once more that had not begun, and says so.

        Its events are to be read from the beginning of a new file: nothing but that it was starting
        stood in the old one.
        """
        run = replace(run, identity=None, ingested_bytes=0, ingested_seq=0, starts=run.starts + 1)
        self.notice(run, notice)
        return run

    def notice(self, run: Run, notice: Notice) -> None:
        """Tells the watchers of a run something that the runner can't tell itself."""
        self._change(run, [build.reported(now_us(), run.number, notice)])

    def started(self, run: Run, identity: ProcessIdentity) -> Run:
        """Records the process of a run."""
        run = replace(run, identity=identity)
        with self._database.transaction(durable=True) as connection:
            self._records.save_run(connection, run)
        return run

    def stopping(self, run: Run, stop: StopWish, deadline_seconds: float) -> Run:
        """Records a wish to stop, durably, before anybody acts on it.

        A wish to save is never taken back. A stop wins over a pause.
        """
        if run.pause is None and (run.stop is StopWish.SAVE or run.stop is stop):
            return run
        now = now_us()
        stop = StopWish.SAVE if run.stop is StopWish.SAVE else stop
        run = replace(
            run,
            stop=stop,
            stop_time=run.stop_time or now,
            pause=None,
            wish_request_id=logs.request_id(),
        )
        phase = PhaseChange(
            phase=RunPhase.STOPPING,
            message="a stop was asked for; a checkpoint is saved"
            if stop is StopWish.SAVE
            else "a stop was asked for; nothing is saved",
            deadline_seconds=deadline_seconds,
        )
        self._change(
            run,
            [build.reported(now, run.number, phase)],
            caused_by=logs.request_id(),
            phase=RunPhase.STOPPING,
            update_time=now,
        )
        return run

    def pausing(self, run: Run, deadline_seconds: float) -> Run:
        """Records a wish to pause, durably, before anybody acts on it.

        The runner is told to save and stop, and knows nothing of pauses.
        """
        now = now_us()
        run = replace(
            run,
            pause=PauseReason.REQUESTED,
            stop=StopWish.SAVE,
            stop_time=now,
            wish_request_id=logs.request_id(),
        )
        phase = PhaseChange(
            phase=RunPhase.PAUSING,
            message="a pause was asked for; a checkpoint is saved",
            deadline_seconds=deadline_seconds,
        )
        self._change(
            run,
            [build.reported(now, run.number, phase)],
            caused_by=logs.request_id(),
            phase=RunPhase.PAUSING,
            update_time=now,
        )
        return run

    def ingest(self, run: Run, bundle: Bundle) -> tuple[Run, bool]:
        """Takes over what the runner has newly reported; True: there is more at once.

        Offset, events and task change in one transaction, so that a crash repeats or skips nothing.
        """
        new = bundle.read_events(run.ingested_bytes)
        if new.end == run.ingested_bytes:
            return run, False
        events = list[event_pb2.Event]()
        changes = dict[str, Any]()
        durable = False
        saved = list[CheckpointSaved]()
        measured = None
        seq = run.ingested_seq
        repeated = 0
        if new.was_cut:
            events.append(self._remark(run, "its event file was cut, and is read anew"))
        if new.garbled:
            events.append(self._remark(run, f"{new.garbled} unreadable lines in its event file"))
        ahead = reports.Ahead(new.lines)
        for number, line in enumerate(new.lines):
            if line.seq <= seq:  # taken over already
                repeated += 1
                continue
            if ahead.is_out_of_place(number, seq):
                events.append(self._remark(run, f"event {line.seq} does not follow event {seq}"))
                continue
            if line.seq != seq + 1:
                events.append(self._remark(run, f"events {seq + 1} to {line.seq - 1} are missing"))
            seq = line.seq
            try:
                read = reports.read(line, run)
            except reports.Unreadable as error:
                events.append(self._remark(run, f"event {line.seq} can't be read: {error}"))
                continue
            if read is None:
                events.append(self._remark(run, f"unknown event {line.kind!r}"))
                continue
            payload, event = read
            if isinstance(payload, PhaseChange) and payload.phase is RunPhase.STARTING:
                continue  # said already, when the process was about to start
            if isinstance(payload, CheckpointSaved):
                saved.append(payload)
            if isinstance(payload, ProbeReport):
                measured = measured_by(run, self.task_of(run).training_type, payload)
            durable |= isinstance(payload, PhaseChange | CheckpointSaved | CheckpointDeleted)
            events.append(event)
            changes |= reports.changes(payload, run)
        if repeated and not new.was_cut:
            events.append(self._remark(run, f"{repeated} events were written twice"))
        run = replace(
            run,
            ingested_bytes=new.end,
            ingested_seq=seq,
            saved_checkpoints=run.saved_checkpoints + len(saved),
        )
        of_run = {k: v for k, v in changes.items() if k in ("progress", "last_checkpoint")}
        run = replace(run, **of_run)
        self._change(run, events, durable=durable, saved=saved, measured=measured, **changes)
        return run, new.more

    def ended(self, run: Run, outcome: Result, exit_: Exit, caused_by: str | None = None) -> Run:
        """Records the end of a run, and queues its retry where the policy starts one.

        `caused_by` is a call's id; None: that of the call that wished for the end, where one did,
        else of the one that started the run.

        One transaction for both: a crash between them would forget the retry. After a probe that
        has not failed the task is what it was before.
        """
        now = now_us()
        if caused_by is None and outcome.end_reason is EndReason.STOPPED_BY_USER:
            caused_by = run.wish_request_id or None
        end = ENDS[outcome.end_reason]
        task = self.task_of(run)
        before = task.before_probe if end.state is not TaskState.FAILED else None
        state = before.state if before else end.state
        check_transition(run.state, state)
        explanation = self._explainer.explain(
            run, task, outcome, exit_, lambda: self._last_events(task, run)
        )
        result = build.result(
            now,
            run.number,
            outcome,
            exit_code=exit_.code,
            signal=exit_.signal,
            explanation=explanation,
        )
        old_state = run.state
        run = replace(
            run,
            state=end.state,
            end_reason=outcome.end_reason,
            end_message=outcome.message,
            end_time=now,
            exit_code=exit_.code,
            signal=exit_.signal,
            pause=None,
            wish_request_id="",
        )
        retry = explanation.retry
        if retry is not None:
            retry = replace(retry, create_time=now)
            change = build.state_change(now, retry.number, old_state, TaskState.QUEUED)
            events = [result, change]
            if explanation.notice is not None:
                events.insert(1, build.reported(now, retry.number, explanation.notice))
            self._change(run, events, new_run=retry, **_queued(retry))
            write_ended(run, events)
            return run
        event = build.state_change(
            now,
            run.number,
            old_state,
            state,
            end_reason=outcome.end_reason,
            message=outcome.message,
        )
        shown: dict[str, Any] = {
            "state": state,
            "end_reason": outcome.end_reason,
            "end_message": outcome.message,
            "end_time": now,
        }
        if before is not None:
            shown = before.shown()
        self._change(
            run,
            [result, event],
            caused_by=caused_by,
            **shown,
            phase=None,
            before_probe=None,
            pause_reason=None,
        )
        write_ended(run, [result, event])
        return run

    def paused(
        self,
        run: Run,
        outcome: Result,
        exit_: Exit,
        reason: PauseReason,
        caused_by: str | None = None,
    ) -> Run:
        """Records that a run is paused. Its log has no end; a full disk is explained there.

        `caused_by` as for `ended`.
        """
        check_transition(run.state, TaskState.PAUSED)
        now = now_us()
        if caused_by is None:
            caused_by = run.wish_request_id or None
        task = self.task_of(run)
        is_full = outcome.end_reason is EndReason.DISK_FULL
        end_reason, message = (outcome.end_reason, outcome.message) if is_full else (None, "")
        events = [
            build.state_change(
                now,
                run.number,
                run.state,
                TaskState.PAUSED,
                end_reason=end_reason,
                message=outcome.message,
            )
        ]
        if is_full:
            explanation = self._explainer.explain(
                run, task, outcome, exit_, lambda: self._last_events(task, run)
            )
            result = build.result(
                now,
                run.number,
                outcome,
                exit_code=exit_.code,
                signal=exit_.signal,
                explanation=explanation,
            )
            events.insert(0, result)
        run = replace(
            run,
            state=TaskState.PAUSED,
            pause=reason,
            stop=None,
            stop_time=0,
            wish_request_id="",
            end_reason=end_reason,
            end_message=message,
            exit_code=exit_.code,
            signal=exit_.signal,
        )
        self._change(
            run,
            events,
            caused_by=caused_by,
            state=TaskState.PAUSED,
            phase=None,
            pause_reason=reason,
            end_reason=end_reason,
            end_message=message,
        )
        write_ended(run, events)
        return run

    def stays_paused(self, run: Run) -> Run:
        """Records that a run that waits for room does not go on by itself."""
        run = replace(run, pause=PauseReason.REQUESTED, end_message=stays_paused(run))
        notice = Notice(reason="PAUSED_ON_REQUEST", message=run.end_message)
        self._change(
            run,
            [build.reported(now_us(), run.number, notice)],
            caused_by=logs.request_id(),
            pause_reason=run.pause,
            end_message=run.end_message,
        )
        rewrite_ended(run)
        return run

    def resume_refused(self, run: Run, message: str) -> None:
        """Says, once, why a run that waits for room can't go on by itself although there is."""
        if run.end_message == message:
            return
        run = replace(run, end_message=message)
        notice = Notice(reason="RESUME_REFUSED", message=message)
        event = build.reported(now_us(), run.number, notice)
        self._change(run, [event], end_message=message)
        rewrite_ended(run)

    def resumed(
        self,
        run: Run,
        also: Callable[[sqlite3.Connection, Task], None] | None = None,
        notices: Sequence[Notice] = (),
    ) -> tuple[Task, Run]:
        """Puts a paused run back into the queue, behind the others, for its next process.

        One that never had a process gets its first. What clients saw of its progress stays.
        """
        check_transition(run.state, TaskState.QUEUED)
        now = now_us()
        has_begun = run.identity is not None
        run = replace(
            run,
            state=TaskState.QUEUED,
            attempt=run.attempt + has_begun,
            starts=0,
            # Where it goes on by itself, it is still what that call has started.
            request_id=logs.request_id() or run.request_id,
            pause=None,
            end_reason=None,
            end_message="",
            identity=None,
            exit_code=None,
            signal="",
            ingested_bytes=0,
            ingested_seq=0,
        )
        events = [build.state_change(now, run.number, TaskState.PAUSED, TaskState.QUEUED)]
        events += [build.reported(now, run.number, notice) for notice in notices]
        with self._database.transaction(durable=True) as connection:
            self._records.check_room(run)
            run = replace(run, place=self._records.next_place(connection))
            self._records.save_run(connection, run)
            task = self.task_of(run)
            task = replace(
                task,
                state=TaskState.QUEUED,
                last_checkpoint=run.last_checkpoint,
                pause_reason=None,
                end_reason=None,
                end_message="",
                update_time=now,
                revision=task.revision + 1,
            )
            self._records.save_task(connection, task)
            task = replace(task, last_seq=self._events.append(connection, task.key, events))
            if also is not None:
                also(connection, task)
        return task, run

    def moved(self, run: Run, runs: Sequence[Run]) -> None:
        """Records new places in the queue; `run` is the one that somebody moved."""
        with self._database.transaction(durable=True) as connection:
            for other in runs:
                self._records.save_run(connection, other)
            task = self.task_of(run)
            task = replace(task, update_time=now_us(), revision=task.revision + 1)
            self._records.save_task(connection, task)

    def _last_events(self, task: Task, run: Run) -> list[event_pb2.Event]:
        from finetuned_daemon.explain import EVENTS_LOOKED_AT  # a daemon starts sooner without

        after = max(0, task.last_seq - EVENTS_LOOKED_AT)
        return self._events.read(task.key, after, EVENTS_LOOKED_AT, run.number)

    def dequeued(self, run: Run, stop: StopWish) -> Run:
        """Ends a run that has no process: it is queued, or paused."""
        where = "in the queue" if run.state is TaskState.QUEUED else "while it was paused"
        remains = (
            f"the newest checkpoint is {run.last_checkpoint}."
            if run.last_checkpoint
            else "no checkpoint had been saved."
        )
        return self.ended(
            replace(run, stop=stop, stop_time=now_us()),
            Result(
                end_reason=EndReason.STOPPED_BY_USER,
                # Where it began, it has a start; a later process may not have begun.
                message=f"Stopped {where}; {remains}"
                if run.start_time
                else f"Stopped {where}, before it began.",
                step=run.progress.step,
            ),
            Exit(),
            logs.request_id(),
        )

    def paused_in_queue(self, run: Run) -> Run:
        """Pauses a run that waits for its device."""
        outcome = Result(
            end_reason=EndReason.STOPPED_BY_USER,
            message="Paused in the queue; once resumed it waits behind the others.",
            step=run.progress.step,
        )
        return self.paused(run, outcome, Exit(), PauseReason.REQUESTED, logs.request_id())

    def _remark(self, run: Run, text: str) -> event_pb2.Event:
        _log.warning("run %d of task %d: %s", run.number, run.task_key, text)
        line = LogLine(level="warning", logger="finetuned", text=text)
        return build.reported(now_us(), run.number, line)

    def _change(
        self,
        run: Run,
        events: list[event_pb2.Event],
        /,
        *,
        durable: bool = True,
        saved: Sequence[CheckpointSaved] = (),
        measured: Measurement | None = None,
        new_run: Run | None = None,
        caused_by: str | None = None,
        **changes: object,
    ) -> None:
        with self._database.transaction(durable=durable) as connection:
            self._records.save_run(connection, run)
            if new_run is not None:
                place = self._records.next_place(connection)
                self._records.insert_run(connection, replace(new_run, place=place))
            task = self.task_of(run)
            for checkpoint in saved:
                self._ledger.enter(
                    connection,
                    time=now_us(),
                    task_id=task.task_id,
                    run=run.number,
                    step=checkpoint.step,
                    path=checkpoint.path,
                )
            if measured is not None:
                self._measurements.add(connection, measured)
            if changes.keys() - {"progress"}:
                changes = {"update_time": now_us(), "revision": task.revision + 1, **changes}
            self._records.save_task(connection, replace(task, **changes))  # type: ignore[arg-type]
            if events:
                cause = run.request_id if caused_by is None else caused_by
                self._events.append(connection, task.key, events, cause)


def _queued(run: Run) -> dict[str, Any]:
    """What becomes of a task when a run of it is queued."""
    return {
        "state": TaskState.QUEUED,
        "phase": None,
        "end_reason": None,
        "end_message": "",
        "run": run.number,
        "progress": Progress(),
        "last_checkpoint": "",
        "start_time": 0,
        "end_time": 0,
        "pause_reason": None,
    }
