"""What is kept of answers: never a byte that would be another one now."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetuned.v1 import task_pb2, task_service_pb2
from finetuned_daemon import logs
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.services import convert
from finetuned_daemon.services.ready import Ready, Repeated, joined, varint
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.kept import Kept
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Task


def new_task(number: int = 1) -> Task:
    return Task(
        task_id=f"task-{number}",
        display_name=f"task {number}",
        training_type=TrainingType.SFT,
        parameters=Parameters(),
        create_time=1,
        update_time=1,
    )


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "finetuned.db")


def insert(database: Database, *tasks: Task) -> list[Task]:
    records = Records(database)
    with database.transaction(durable=False) as connection:
        return [records.insert_task(connection, task) for task in tasks]


def test_a_row_that_says_the_same_is_the_same_record_and_one_that_changed_is_not(
    database: Database,
) -> None:
    """Whoever wrote it, and by whatever statement."""
    (task,) = insert(database, new_task())
    records = Records(database)
    before = records.task("task-1")
    assert records.task_by_key(task.key) is before
    with database.transaction(durable=False) as connection:
        connection.execute("UPDATE tasks SET last_seq = 7")
    after = records.task("task-1")
    assert after == replace(task, last_seq=7)
    assert before == task


def test_what_a_transaction_that_is_rolled_back_had_written_is_never_shown(
    database: Database,
) -> None:
    """Neither as a record, nor as an answer that was made of it."""
    (task,) = insert(database, new_task())
    records, repeated = Records(database), Repeated(database.written)
    request = task_service_pb2.GetTaskRequest(name=task.name)
    with pytest.raises(ZeroDivisionError), database.transaction(durable=False) as connection:
        records.save_task(connection, replace(task, display_name="never"))
        written = records.task("task-1")
        assert written is not None
        assert written.display_name == "never"
        assert repeated.keep(request, repeated.mark, b"never") == b"never"
        assert 1 / 0
    assert records.task("task-1") == task
    assert repeated.answer(request) is None


def test_no_more_records_are_kept_than_there_may_be() -> None:
    """Those that were read longest ago are forgotten."""
    made = list[int]()
    connection = sqlite3.connect(":memory:")
    connection.row_factory = sqlite3.Row

    def read(key: int) -> int:
        return kept(connection.execute("SELECT ? AS key", (key,)).fetchone())

    def make(row: sqlite3.Row) -> int:
        made.append(row["key"])
        return int(row["key"])

    kept = Kept(make, 2)
    assert [read(key) for key in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]


def test_an_answer_holds_until_a_row_is_written(database: Database) -> None:
    """Of whatever table, and only to the same request of the same kind."""
    repeated = Repeated(database.written)
    request = task_service_pb2.ListTasksRequest(page_size=3)
    repeated.keep(request, repeated.mark, b"three")
    assert repeated.answer(task_service_pb2.ListTasksRequest(page_size=3)) == b"three"
    assert repeated.answer(task_service_pb2.ListTasksRequest(page_size=4)) is None
    assert repeated.answer(task_service_pb2.ListRunsRequest(page_size=3)) is None
    with database.transaction(durable=False) as connection:
        connection.execute("INSERT INTO meta VALUES ('a', 'b')")
    assert repeated.answer(request) is None


def test_an_answer_that_was_written_to_while_it_was_made_is_not_kept(database: Database) -> None:
    """It may be half of one state and half of another."""
    repeated = Repeated(database.written)
    request = task_service_pb2.ListTasksRequest()
    mark = repeated.mark
    insert(database, new_task())
    assert repeated.keep(request, mark, b"torn") == b"torn"
    assert repeated.answer(request) is None


def test_few_answers_are_kept_and_no_large_one(database: Database) -> None:
    """What a client asks for decides nothing about the daemon's memory."""
    repeated = Repeated(database.written)
    requests = [task_service_pb2.ListTasksRequest(page_size=size) for size in range(50)]
    for request in requests:
        repeated.keep(request, repeated.mark, b"small")
    assert sum(repeated.answer(request) is not None for request in requests) == 8
    repeated.keep(requests[0], repeated.mark, bytes(300_000))
    assert repeated.answer(requests[0]) is None


@given(st.lists(st.text(max_size=300), max_size=5), st.text(max_size=9))
def test_messages_that_are_joined_are_the_message_of_them(names: list[str], token: str) -> None:
    """As protobuf itself would have written it, up to the order of fields."""
    tasks = [task_pb2.Task(name=name, run=len(name)) for name in names]
    rest = task_service_pb2.ListTasksResponse(next_page_token=token)
    data = joined(1, [task.SerializeToString() for task in tasks], rest)
    assert task_service_pb2.ListTasksResponse.FromString(
        data
    ) == task_service_pb2.ListTasksResponse(tasks=tasks, next_page_token=token)


@given(st.integers(0, 2**40))
def test_a_number_is_written_as_protobuf_writes_it(value: int) -> None:
    """Seven bits a byte, the lowest first."""
    message = task_pb2.Task(last_seq=value).SerializeToString()
    tag = task_pb2.Task(last_seq=1).SerializeToString()[:-1]
    assert message == (tag + varint(value) if value else b"")


def test_a_message_is_made_again_when_the_record_or_its_place_has_changed() -> None:
    """And is what `convert` makes of it."""
    ready = Ready[Task, int](convert.task, 2)
    task = new_task()
    for record, position in ((task, 0), (task, 0), (task, 3), (replace(task, run=2), 3)):
        expected = convert.task(record, position)
        assert task_pb2.Task.FromString(ready.of(1, record, position)) == expected


@pytest.mark.parametrize(
    "secret",
    [
        "Bearer abcdefgh1",
        "AUTHORIZATION: abcdefgh1",
        "hf_" + "a" * 20,
        "HF_" + "a" * 20,
        "s\u212a-" + "a" * 20,  # a kelvin sign
        "\u017fk-" + "a" * 20,  # a long s
        "ghp_" + "a" * 20,
        "github_pat_" + "a" * 20,
        "glpat-" + "a" * 20,
        *(f"xox{kind}-" + "a" * 20 for kind in "abp"),
    ],
)
def test_whatever_looks_like_a_secret_is_found_by_the_quick_look_too(secret: str) -> None:
    """The quick look passes over no text that the expression would change."""
    assert "[secret]" in logs.redacted(f"before {secret} behind")
