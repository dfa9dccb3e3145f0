"""Tasks, runs and answered requests as rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace

from finetuned_daemon.limits import Limits
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    EndReason,
    ProcessIdentity,
    Progress,
    RunPhase,
    StopWish,
    TrainingType,
)
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.kept import Kept
from finetuned_daemon.tasks import PauseReason, Run, Standing, Task, TaskState

_BEYOND = 1 << 62
"""Beyond every key."""
_ACTIVE_RUNS = "runs INDEXED BY runs_active WHERE state IN ('QUEUED', 'RUNNING')"
"""SQLite would go through all runs by their places, so as not to sort some."""
_LOOKED_AT_EVERY = 1000
"""Answers kept between two looks at how many there are."""

_MOST_KEPT = 256
"""Tasks that are kept as they were read, two pages, and half as many runs; each about 14 KiB."""


class Records:
    """Reads and writes of whole tasks and runs. Writes take the connection of a transaction."""

    def __init__(self, database: Database, limits: Limits | None = None) -> None:
        self._database = database
        self._limits = limits or Limits()
        self._task = Kept(_task, _MOST_KEPT)
        self._run = Kept(_run, _MOST_KEPT // 2)
        self._defaults: Parameters | None = None
        # Of all tasks, once somebody has asked: to count them at each creation takes a while.
        self._count: int | None = None
        self.on_saved: Callable[[Task], None] = lambda _: None
        """Called with a task that was made or changed, once that is committed."""
        self.on_deleted: Callable[[Task], None] = lambda _: None
        """The same for one that was deleted."""

    # --- tasks

    def task(self, task_id: str) -> Task | None:
        """The task of an id."""
        row = self._database.query_one("SELECT * FROM tasks WHERE task_id = ?", task_id)
        return None if row is None else self._task(row)

    def task_by_key(self, key: int) -> Task | None:
        """The task of a row."""
        row = self._database.query_one("SELECT * FROM tasks WHERE key = ?", key)
        return None if row is None else self._task(row)

    def is_display_name_taken(self, display_name: str) -> bool:
        """Whether a task has this display name."""
        return (
            self._database.query_one("SELECT 1 FROM tasks WHERE display_name = ?", display_name)
            is not None
        )

    def tasks(
        self,
        *,
        limit: int,
        before_key: int,
        states: Sequence[TaskState],
        display_name: str,
        with_parameters: bool = True,
    ) -> list[Task]:
        """Up to `limit` tasks, newest first; `before_key` 0: from the newest.

        Without parameters they have the defaults in their place, and take a third of the time.
        """
        where, values = ["1"], list[object]()
        if before_key:
            where.append("key < ?")
            values.append(before_key)
        if display_name:
            where.append("display_name = ?")
            values.append(display_name)
        if states and display_name:
            where.append(f"state IN ({', '.join('?' * len(states))})")
            values.extend(state.value for state in states)
        elif states:
            # With IN, SQLite sorts all tasks of these states for each page.
            keys = {key for state in set(states) for key in self._keys(state, before_key, limit)}
            where.append("key IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(sorted(keys, reverse=True)[:limit]))
        rows = self._database.query(
            f"SELECT * FROM tasks WHERE {' AND '.join(where)} ORDER BY key DESC LIMIT ?",  # noqa: S608 - no value in it
            *values,
            limit,
        )
        if not with_parameters:
            if self._defaults is None:
                self._defaults = Parameters()
            return [_task(row, self._defaults) for row in rows]
        return [self._task(row) for row in rows]

    def _keys(self, state: TaskState, before_key: int, limit: int) -> list[int]:
        """Keys of up to `limit` tasks in a state, newest first, as the index has them."""
        rows = self._database.query(
            "SELECT key FROM tasks WHERE state = ? AND key < ? ORDER BY key DESC LIMIT ?",
            state.value,
            before_key or _BEYOND,
            limit,
        )
        return [row["key"] for row in rows]

    def count(self, state: TaskState | None = None) -> int:
        """How many tasks there are, in a state or in all."""
        if state is None:
            if self._count is None:
                row = self._database.query_one("SELECT count(*) AS number FROM tasks")
                self._count = int(row["number"]) if row else 0
            return self._count
        row = self._database.query_one(
            "SELECT count(*) AS number FROM tasks WHERE state = ?", state.value
        )
        return int(row["number"]) if row else 0

    def counts(self) -> dict[TaskState, int]:
        """How many tasks there are, by state."""
        rows = self._database.query("SELECT state, count(*) AS number FROM tasks GROUP BY state")
        return {TaskState(row["state"]): row["number"] for row in rows}

    def active_states(self) -> dict[int, TaskState]:
        """The state of every task that is QUEUED or RUNNING, by its key."""
        rows = self._database.query(
            "SELECT key, state FROM tasks WHERE state IN ('QUEUED', 'RUNNING')"
        )
        return {row["key"]: TaskState(row["state"]) for row in rows}

    def check_room(self, run: Run) -> None:
        """Holds the bounds on the queue and on the runs of a task.

        Raises:
            LimitReached: There is no room for the run.
        """
        self._limits.check("queued_tasks", self.count(TaskState.QUEUED))
        self._limits.check("runs", run.number - 1)

    def insert_task(self, connection: sqlite3.Connection, task: Task) -> Task:
        """Writes a new task; returns it with its key.

        Raises:
            LimitReached: There are as many as there may be.
        """
        self._limits.check("tasks", self.count())
        columns = _task_columns(task)
        cursor = connection.execute(insert("tasks", columns), columns)
        task = replace(task, key=int(cursor.lastrowid or 0))
        self._database.after_commit(lambda: self._counted(1))
        self._database.after_commit(lambda: self.on_saved(task))
        return task

    def save_task(self, connection: sqlite3.Connection, task: Task) -> None:
        """Writes all of a task but `last_seq`, which belongs to the event log."""
        columns = _task_columns(task)
        del columns["last_seq"]
        connection.execute(update("tasks", columns), {**columns, "key": task.key})
        self._database.after_commit(lambda: self.on_saved(task))

    def delete_task(self, connection: sqlite3.Connection, task: Task) -> None:
        """Deletes a task with its runs and events."""
        cursor = connection.execute("DELETE FROM tasks WHERE key = ?", (task.key,))
        deleted = cursor.rowcount
        self._database.after_commit(lambda: self._counted(-deleted))
        self._database.after_commit(lambda: self.on_deleted(task))

    def _counted(self, more: int) -> None:
        if self._count is not None:
            self._count += more

    # --- runs

    def run(self, task_key: int, number: int) -> Run | None:
        """A run of a task."""
        row = self._database.query_one(
            "SELECT * FROM runs WHERE task_key = ? AND number = ?", task_key, number
        )
        return None if row is None else self._run(row)

    def runs(self, task_key: int, *, limit: int, before_number: int = 0) -> list[Run]:
        """Up to `limit` runs of a task, newest first; `before_number` 0: from the newest."""
        rows = self._database.query(
            "SELECT * FROM runs WHERE task_key = ? AND (? = 0 OR number < ?) "
            "ORDER BY number DESC LIMIT ?",
            task_key,
            before_number,
            before_number,
            limit,
        )
        return [self._run(row) for row in rows]

    def active_runs(self) -> list[Run]:
        """Every run that is QUEUED or RUNNING, in the order of the queue."""
        rows = self._database.query(
            f"SELECT * FROM {_ACTIVE_RUNS} ORDER BY place, key"  # noqa: S608 - no value in it
        )
        return [self._run(row) for row in rows]

    def occupancy(self) -> dict[str, tuple[str, int]]:
        """By device, the id of the task that runs on it, or nothing, and how many wait for it."""
        rows = self._database.query(
            "SELECT device, max(iif(state = 'RUNNING', "  # noqa: S608 - no value in it
            "(SELECT task_id FROM tasks WHERE tasks.key = task_key), '')) AS running, "
            f"sum(state = 'QUEUED') AS queued FROM {_ACTIVE_RUNS} GROUP BY device"
        )
        return {row["device"]: (row["running"], row["queued"]) for row in rows}

    def newest_run(self, task_key: int) -> int:
        """Number of the newest run of a task that began, probes left out; 0: none."""
        row = self._database.query_one(
            "SELECT max(number) AS number FROM runs "
            "WHERE task_key = ? AND start_time > 0 AND NOT is_probe",
            task_key,
        )
        return int(row["number"] or 0) if row else 0

    def paused_runs(self) -> list[Run]:
        """Every run that is PAUSED."""
        rows = self._database.query("SELECT * FROM runs WHERE state = 'PAUSED' ORDER BY key")
        return [self._run(row) for row in rows]

    def queue(self) -> list[tuple[int, str]]:
        """Task and device of every run that is QUEUED, in the order of the queue."""
        rows = self._database.query(
            f"SELECT task_key, device FROM {_ACTIVE_RUNS} AND state = 'QUEUED' "  # noqa: S608
            "ORDER BY place, key"
        )
        return [(row["task_key"], row["device"]) for row in rows]

    def next_place(self, connection: sqlite3.Connection) -> int:
        """The place behind everybody's in the queue."""
        row = connection.execute("SELECT coalesce(max(place), 0) + 1 AS next FROM runs").fetchone()
        return int(row["next"])

    def tasks_with_outputs_below(self, folder: str) -> list[str]:
        """Ids of the tasks whose runs have output folders below a folder, by id."""
        rows = self._database.query(
            "SELECT DISTINCT tasks.task_id FROM runs JOIN tasks ON tasks.key = task_key "
            "WHERE runs.output_dir > ? AND runs.output_dir < ? ORDER BY tasks.task_id LIMIT 100",
            f"{folder}/",
            f"{folder}0",  # "0" follows "/"
        )
        return [row["task_id"] for row in rows]

    def task_with_output(self, folders: Sequence[str]) -> str:
        """Id of a task one of whose runs has one of these as its output folder; empty: none."""
        row = self._database.query_one(
            "SELECT tasks.task_id FROM runs JOIN tasks ON tasks.key = task_key "
            "WHERE runs.output_dir IN (SELECT value FROM json_each(?)) LIMIT 1",
            json.dumps(folders),
        )
        return row["task_id"] if row else ""

    def speed(self, *, model_path: str, training_type: TrainingType, device: str) -> list[Run]:
        """The latest completed runs of a device that measured a speed, newest first."""
        rows = self._database.query(
            "SELECT runs.* FROM runs JOIN tasks ON tasks.key = task_key "
            "WHERE runs.state = 'COMPLETED' AND NOT runs.is_probe "
            "AND runs.device = ? AND tasks.training_type = ? "
            # The words of the index runs_by_speed.
            "AND iif(json_valid(runs.parameters), "
            "json_extract(runs.parameters, '$.data.model_path'), NULL) = ? "
            "AND json_extract(runs.progress, '$.tokens_per_second') > 0 "
            "ORDER BY runs.key DESC LIMIT 20",
            device,
            training_type.value,
            model_path,
        )
        return [self._run(row) for row in rows]

    def insert_run(self, connection: sqlite3.Connection, run: Run) -> Run:
        """Writes a new run; returns it with its key."""
        columns = _run_columns(run)
        cursor = connection.execute(insert("runs", columns), columns)
        return replace(run, key=int(cursor.lastrowid or 0))

    def save_run(self, connection: sqlite3.Connection, run: Run) -> None:
        """Writes all of a run."""
        columns = _run_columns(run)
        connection.execute(update("runs", columns), {**columns, "key": run.key})


class Answers:
    """Answers by request id."""

    def __init__(self, database: Database, most: int) -> None:
        """Takes how many are kept."""
        self._database = database
        self._most = most
        self._until_look = 0

    def answer(self, request_id: str) -> tuple[bytes, bytes] | None:
        """Digest of the request and serialized answer, if this id was answered."""
        row = self._database.query_one(
            "SELECT digest, answer FROM requests WHERE request_id = ?", request_id
        )
        return None if row is None else (bytes(row["digest"]), bytes(row["answer"]))

    def save(
        self,
        connection: sqlite3.Connection,
        request_id: str,
        digest: bytes,
        answer: bytes,
        *,
        now: int,
        forget_before: int,
    ) -> None:
        """Keeps an answer, and drops those older than `forget_before`, and the oldest of many."""
        connection.execute("DELETE FROM requests WHERE time < ?", (forget_before,))
        if not self._until_look:  # counting them takes a while
            self._until_look = min(_LOOKED_AT_EVERY, self._most)
            connection.execute(
                "DELETE FROM requests WHERE time <= (SELECT time FROM requests "
                "ORDER BY time DESC LIMIT 1 OFFSET ?)",
                (self._most - 1,),
            )
        self._until_look -= 1
        connection.execute(
            "INSERT INTO requests (request_id, digest, answer, time) VALUES (?, ?, ?, ?)",
            (request_id, digest, answer, now),
        )


def insert(table: str, columns: dict[str, object]) -> str:
    """The statement that inserts a row of these columns."""
    names = ", ".join(columns)
    return f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{c}' for c in columns)})"  # noqa: S608 - names are ours


def update(table: str, columns: dict[str, object]) -> str:
    """The statement that replaces these columns of the row `key`."""
    return f"UPDATE {table} SET {', '.join(f'{c} = :{c}' for c in columns)} WHERE key = :key"  # noqa: S608 - names are ours


def _task_columns(task: Task) -> dict[str, object]:
    return {
        "task_id": task.task_id,
        "display_name": task.display_name,
        "training_type": task.training_type.value,
        "parameters": task.parameters.model_dump_json(),
        "device": task.device,
        "template": task.template,
        "state": task.state.value,
        "phase": task.phase,
        "end_reason": task.end_reason,
        "end_message": task.end_message,
        "run": task.run,
        "progress": task.progress.model_dump_json(),
        "last_checkpoint": task.last_checkpoint,
        "create_time": task.create_time,
        "update_time": task.update_time,
        "start_time": task.start_time,
        "end_time": task.end_time,
        "last_seq": task.last_seq,
        "revision": task.revision,
        "pause_reason": task.pause_reason,
        "before_probe": task.before_probe.model_dump_json() if task.before_probe else None,
    }


def _task(row: sqlite3.Row, parameters: Parameters | None = None) -> Task:
    return Task(
        key=row["key"],
        task_id=row["task_id"],
        display_name=row["display_name"],
        training_type=TrainingType(row["training_type"]),
        parameters=parameters or Parameters.model_validate_json(row["parameters"]),
        device=row["device"],
        template=row["template"],
        state=TaskState(row["state"]),
        phase=RunPhase(row["phase"]) if row["phase"] else None,
        end_reason=EndReason(row["end_reason"]) if row["end_reason"] else None,
        end_message=row["end_message"],
        run=row["run"],
        progress=Progress.model_validate_json(row["progress"]),
        last_checkpoint=row["last_checkpoint"],
        create_time=row["create_time"],
        update_time=row["update_time"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        last_seq=row["last_seq"],
        revision=row["revision"],
        pause_reason=PauseReason(row["pause_reason"]) if row["pause_reason"] else None,
        before_probe=Standing.model_validate_json(row["before_probe"])
        if row["before_probe"]
        else None,
    )


def _run_columns(run: Run) -> dict[str, object]:
    return {
        "task_key": run.task_key,
        "number": run.number,
        "state": run.state.value,
        "device": run.device,
        "parameters": run.parameters.model_dump_json(),
        "end_reason": run.end_reason,
        "end_message": run.end_message,
        "create_time": run.create_time,
        "start_time": run.start_time,
        "end_time": run.end_time,
        "identity": run.identity.model_dump_json() if run.identity else None,
        "exit_code": run.exit_code,
        "signal": run.signal,
        "progress": run.progress.model_dump_json(),
        "last_checkpoint": run.last_checkpoint,
        "run_dir": run.run_dir,
        "output_dir": run.output_dir,
        "stop": run.stop,
        "stop_time": run.stop_time,
        "planned_checkpoints": run.planned_checkpoints,
        "saved_checkpoints": run.saved_checkpoints,
        "retry": run.retry,
        "is_probe": run.is_probe,
        "place": run.place,
        "attempt": run.attempt,
        "starts": run.starts,
        "pause": run.pause,
        "resume_path": run.resume_path,
        "request_id": run.request_id,
        "wish_request_id": run.wish_request_id,
        "ingested_bytes": run.ingested_bytes,
        "ingested_seq": run.ingested_seq,
    }


def _run(row: sqlite3.Row) -> Run:
    identity = row["identity"]
    return Run(
        key=row["key"],
        task_key=row["task_key"],
        number=row["number"],
        state=TaskState(row["state"]),
        device=row["device"],
        parameters=Parameters.model_validate_json(row["parameters"]),
        end_reason=EndReason(row["end_reason"]) if row["end_reason"] else None,
        end_message=row["end_message"],
        create_time=row["create_time"],
        start_time=row["start_time"],
        end_time=row["end_time"],
        identity=ProcessIdentity.model_validate_json(identity) if identity else None,
        exit_code=row["exit_code"],
        signal=row["signal"],
        progress=Progress.model_validate_json(row["progress"]),
        last_checkpoint=row["last_checkpoint"],
        run_dir=row["run_dir"],
        output_dir=row["output_dir"],
        stop=StopWish(row["stop"]) if row["stop"] else None,
        stop_time=row["stop_time"],
        planned_checkpoints=row["planned_checkpoints"],
        saved_checkpoints=row["saved_checkpoints"],
        retry=row["retry"],
        is_probe=bool(row["is_probe"]),
        place=row["place"],
        attempt=row["attempt"],
        starts=row["starts"],
        pause=PauseReason(row["pause"]) if row["pause"] else None,
        resume_path=row["resume_path"],
        request_id=row["request_id"],
        wish_request_id=row["wish_request_id"],
        ingested_bytes=row["ingested_bytes"],
        ingested_seq=row["ingested_seq"],
    )
