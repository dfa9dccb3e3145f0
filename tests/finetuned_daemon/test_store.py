"""The database: all or nothing, never a number twice, and nothing newer is touched."""

from __future__ import annotations

import sqlite3
from importlib import resources
from pathlib import Path

import pytest

from finetuned.v1 import event_pb2
from finetuned_daemon.errors import DiskFull
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.database import Database, DatabaseUnusable
from finetuned_daemon.store.records import Records, insert
from finetuned_daemon.tasks import Task


def new_task(database: Database, task_id: str = "some-task") -> Task:
    task = Task(
        task_id=task_id,
        display_name=task_id,
        training_type=TrainingType.SFT,
        parameters=Parameters(),
    )
    with database.transaction(durable=True) as connection:
        return Records(database).insert_task(connection, task)


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "x.db")


def append(database: Database, log: EventLog, task: Task, count: int) -> int:
    with database.transaction(durable=False) as connection:
        return log.append(connection, task.key, [event_pb2.Event() for _ in range(count)])


def test_a_record_comes_back_as_it_was_saved(database: Database) -> None:
    task = new_task(database)
    assert Records(database).task("some-task") == task
    assert Records(database).task("other") is None


def test_sequence_numbers_are_dense_per_task_and_never_come_again(database: Database) -> None:
    log = EventLog(database)
    one, two = new_task(database, "one-task"), new_task(database, "two-task")
    assert append(database, log, one, 3) == 3
    assert append(database, log, two, 1) == 1
    with database.transaction(durable=True) as connection:
        connection.execute("DELETE FROM events WHERE seq > 1")
    assert append(database, log, one, 1) == 4
    with database.transaction(durable=True) as connection:
        Records(database).delete_task(connection, two)
    assert new_task(database, "three-task").key == 3, "the key of a deleted task is not given again"


def test_a_transaction_that_fails_leaves_nothing_and_wakes_nobody(database: Database) -> None:
    log = EventLog(database)
    task = new_task(database)
    woken = list[int]()
    with pytest.raises(ZeroDivisionError), database.transaction(durable=True) as connection:
        log.append(connection, task.key, [event_pb2.Event()])
        database.after_commit(lambda: woken.append(1))
        _ = 1 / 0
    assert log.last_seq(task.key) == 0
    assert log.read(task.key, 0, 10) == []
    assert woken == []


def test_states_are_synced_and_metrics_are_not(database: Database) -> None:
    def level() -> int:
        return int(database.query("PRAGMA synchronous")[0][0])

    for durable, expected in ((False, 1), (True, 2), (False, 1)):
        with database.transaction(durable=durable):
            assert level() == expected


def test_a_full_disk_is_a_typed_error_and_changes_nothing(database: Database) -> None:
    task = new_task(database)
    pages = database.query("PRAGMA page_count")[0][0]
    database.query(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match=r"x\.db"):
        for number in range(1000):
            new_task(database, f"task-{number}-{'x' * 40}")
    assert Records(database).task("some-task") == task


def test_a_database_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 999")
    connection.close()
    with pytest.raises(DatabaseUnusable, match="newer version"):
        Database(path)


def test_an_epoch_stays_with_its_database(tmp_path: Path) -> None:
    first = Database(tmp_path / "x.db")
    epoch = first.log_epoch
    first.close()
    assert Database(tmp_path / "x.db").log_epoch == epoch
    assert Database(tmp_path / "y.db").log_epoch != epoch


def test_a_database_of_the_first_version_keeps_its_tasks_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    first = resources.files("finetuned_daemon.store") / "migrations" / "0001_first.sql"
    connection = sqlite3.connect(path)
    connection.executescript(f"{first.read_text()}\nPRAGMA user_version = 1;")
    task: dict[str, object] = {
        "task_id": "old-task",
        "display_name": "old",
        "training_type": "SFT",
        "parameters": "{}",
        "device": "",
        "state": "COMPLETED",
        "end_message": "",
        "run": 1,
        "progress": "{}",
        "last_checkpoint": "",
        **dict.fromkeys(("create_time", "update_time", "start_time", "end_time", "last_seq"), 1),
        "revision": 3,
    }
    run: dict[str, object] = {
        "task_key": 1,
        "number": 1,
        **{name: task[name] for name in ("state", "device", "parameters", "end_message")},
        **{name: task[name] for name in ("create_time", "start_time", "end_time", "progress")},
        **dict.fromkeys(("signal", "last_checkpoint", "run_dir", "output_dir"), ""),
        **dict.fromkeys(("stop_time", "ingested_bytes", "ingested_seq"), 0),
    }
    for table, columns in (("tasks", task), ("runs", run)):
        connection.execute(insert(table, columns), columns)
    connection.commit()
    connection.close()

    records = Records(Database(path))
    old = records.task("old-task")
    assert old is not None
    assert (old.display_name, old.revision, old.template) == ("old", 3, "")
    assert [(r.number, r.saved_checkpoints) for r in records.runs(old.key, limit=9)] == [(1, 0)]
