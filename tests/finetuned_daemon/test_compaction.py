"""Logs of old runs are thinned out in steps, each of which leaves a log that is whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetuned.v1 import event_pb2
from finetuned_daemon.errors import CursorOutOfRange
from finetuned_daemon.events import compaction
from finetuned_daemon.events.compaction import Compaction
from finetuned_daemon.events.curves import Curves, Points
from finetuned_daemon.events.digest import Digests, decode, encode, stays
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.events.retention import Retention
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store import integrity
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.digest_rows import TAIL, DigestRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Run, Task, TaskState

RUNS = 3
STEPS = 40
EVENTS = RUNS * (STEPS + 2)

# Each child is killed before one more statement than the one before it.
SWEEP = """
import asyncio, os, shutil, signal, sqlite3, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
import test_compaction as tests

source, work = Path(sys.argv[1]), Path(sys.argv[2])
connect = sqlite3.connect
outcomes = []
while not outcomes or outcomes[-1] != "done":
    left = len(outcomes)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copy(source, work / "x.db")

    def count(statement):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    child = os.fork()
    if not child:
        sqlite3.connect = counting
        asyncio.run(tests.thin_out(work / "x.db"))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    problems = tests.problems(work / "x.db")
    asyncio.run(tests.thin_out(work / "x.db"))
    outcomes.append("done" if not status else [problems, asyncio.run(tests.said(work / "x.db"))])
print(tests.json.dumps(outcomes))
"""


def fill(path: Path, state: TaskState = TaskState.COMPLETED, task_id: str = "some-task") -> None:
    """Writes a database with a task of some runs."""
    database = Database(path)
    records, log = Records(database), EventLog(database, 1.0)
    task = Task(
        task_id=task_id,
        display_name=task_id,
        training_type=TrainingType.SFT,
        parameters=Parameters(),
        state=state,
    )
    with database.transaction(durable=True) as connection:
        task = records.insert_task(connection, task)
        for number in range(1, RUNS + 1):
            run = Run(
                task_key=task.key,
                number=number,
                state=TaskState.COMPLETED,
                device="cpu",
                parameters=Parameters(),
            )
            records.insert_run(connection, run)
            begun = event_pb2.Event(run=number)
            begun.state_change.message = "it begins"
            measured = [event_pb2.Event(run=number) for _ in range(STEPS)]
            for step, event in enumerate(measured, 1):
                event.metrics.step, event.metrics.epoch = step, step / STEPS
                event.metrics.values["loss"] = math.sin(step)
                event.time.FromMicroseconds(step * 1000)
            ended = event_pb2.Event(run=number)
            ended.result.step = STEPS
            log.append(connection, task.key, [begun, *measured, ended])
    database.close()


async def thin_out(path: Path, most: int = 1, *, forget: bool = False) -> None:
    """Thins out all that there is, but keeps what stands for it; returns once nothing is left."""
    compaction._AT_ONCE = 13
    database = Database(path)
    curves = Curves(database)
    one = Compaction(database, Digests(database, curves), most)
    if not forget:
        one._rows.forget = lambda limit: 0  # type: ignore[method-assign]
    for log in one._rows.unfinished():
        await one._delete(log)
    if database.used_bytes() > most:
        await one._shrink()
    database.close()


async def said(path: Path) -> list[object]:
    """What of the log and the curves a client is told."""
    database = Database(path)
    log, curves = EventLog(database, 1.0), Curves(database)
    digests = Digests(database, curves)
    result: list[object] = [log.first_seq(1), [event.seq for event in log.read(1, 0, 1000)]]
    for run in range(1, RUNS + 1):
        async with curves.of(1, run) as found:
            (points,) = await found.thinned((), 0, 1000)
        events = digests.events(1, run, 0, 1000) or []
        result.append([points.steps, points.values, points.point_count, [e.seq for e in events]])
    for task in curves._kept.values():
        if task.timer is not None:
            task.timer.cancel()
    database.close()
    return json.loads(json.dumps(result))


def problems(path: Path) -> list[str]:
    """What a check of the whole database finds."""
    with contextlib.closing(integrity.open_read_only(path)) as connection:
        return list(integrity.check(connection, thorough=True).problems)


def test_a_kill_at_any_statement_loses_nothing_that_was_to_stay(tmp_path: Path) -> None:
    """The database is whole, and the next daemon comes to the very same."""
    fill(tmp_path / "source.db")
    before = asyncio.run(said(tmp_path / "source.db"))
    swept = subprocess.run(
        [
            *(sys.executable, "-c", SWEEP, str(tmp_path / "source.db")),
            *(str(tmp_path / "work"), str(Path(__file__).parent)),
        ],
        stdout=subprocess.PIPE,
        check=True,
    )
    *killed, last = json.loads(swept.stdout)
    assert last == "done"
    assert len(killed) > 30
    first = EVENTS - TAIL + 1
    for found, after in killed:
        assert found == []
        assert after[0] == first
        assert after[1] == list(range(first, EVENTS + 1))
        for then, now in zip(before[2:], after[2:], strict=True):
            assert now[:3] == then[:3]  # type: ignore[index]
    assert len({json.dumps(after) for _, after in killed}) == 1


async def test_a_task_with_a_run_under_way_is_left_alone(tmp_path: Path) -> None:
    """Neither its events nor what stands for them change."""
    fill(tmp_path / "x.db", TaskState.PAUSED)
    before = await said(tmp_path / "x.db")
    await thin_out(tmp_path / "x.db", forget=True)
    assert await said(tmp_path / "x.db") == before


async def test_an_old_cursor_is_told_the_oldest_event_that_is_kept(tmp_path: Path) -> None:
    """One that is good goes on."""
    fill(tmp_path / "x.db")
    await thin_out(tmp_path / "x.db")
    database = Database(tmp_path / "x.db")
    log = EventLog(database, 1.0)
    first = EVENTS - TAIL + 1
    with pytest.raises(CursorOutOfRange, match=f"the oldest that is kept is {first}"):
        log.start(1, first - 2, EVENTS)
    assert log.start(1, first - 1, EVENTS) == first - 1
    assert log.start(1, 0, EVENTS) == first - 1
    database.close()


async def test_a_bound_on_one_task_keeps_the_curves_of_what_it_deletes(tmp_path: Path) -> None:
    """Of a run that loses some of its events all of the curve stays, thinned out; of others too."""
    fill(tmp_path / "x.db")
    before = await said(tmp_path / "x.db")
    database = Database(tmp_path / "x.db")
    curves = Curves(database)
    retention = Retention(database, Digests(database, curves), 50, 0)
    retention.start()
    log = EventLog(database, 1.0)
    async with asyncio.timeout(60):
        while log.first_seq(1) != EVENTS - 50 + 1:  # noqa: ASYNC110 - as clients see it
            await asyncio.sleep(0.01)
    await retention.close()
    database.close()
    after = await said(tmp_path / "x.db")
    assert after[1] == list(range(EVENTS - 50 + 1, EVENTS + 1))
    for then, now in zip(before[2:], after[2:], strict=True):
        assert now[:3] == then[:3]  # type: ignore[index]


async def test_what_is_free_goes_back_to_the_disk(tmp_path: Path) -> None:
    """A database of this version becomes smaller by itself; a rewritten one from then on."""
    fill(tmp_path / "x.db")
    old = tmp_path / "old.db"
    shutil.copy(tmp_path / "x.db", old)
    database = Database(old)
    for text in ("PRAGMA auto_vacuum = NONE", "VACUUM"):
        database.query(text)
    database.close()
    sizes = [path.stat().st_size for path in (tmp_path / "x.db", old)]
    for path in (tmp_path / "x.db", old):
        await thin_out(path)
    assert (tmp_path / "x.db").stat().st_size < sizes[0]
    assert old.stat().st_size >= sizes[1]
    database = Database(old)
    database.rewrite()
    assert database.query("PRAGMA auto_vacuum")[0][0] == 2
    assert database.query("PRAGMA freelist_count")[0][0] == 0
    database.close()
    assert problems(old) == []


async def test_others_get_their_turn_between_two_steps(tmp_path: Path) -> None:
    """However much there is to delete."""
    fill(tmp_path / "x.db")
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await thin_out(tmp_path / "x.db")
    beside.cancel()
    assert turns > EVENTS // 13


def test_curves_come_back_as_they_were_kept() -> None:
    """Values that are no numbers too, and how many points there were."""
    curves = [
        Points("loss", [1, 5], [0.5, math.inf], [0.1, 0.2], [1.0, 2.0], 9),
        Points("é", [3], [-0.0], [0.0], [1e9], 1),
    ]
    assert decode(encode(curves)) == curves
    assert decode(encode([])) == []


def edit(path: Path, times: int) -> None:
    """Events of the task itself behind all that there are, as edits write them."""
    database = Database(path)
    log = EventLog(database, 1.0)
    with database.transaction(durable=True) as connection:
        for _ in range(times):
            log.append(connection, 1, [event_pb2.Event(task_edited=event_pb2.TaskEdited())])
    database.close()


async def test_what_is_the_end_of_a_log_no_more_stays_as_well(tmp_path: Path) -> None:
    """A task that is edited while its log is thinned out, and later, loses nothing that stays."""
    path = tmp_path / "x.db"
    fill(path)
    database = Database(path)
    rows, digests = DigestRows(database), Digests(database, Curves(database))
    logs = rows.to_thin(0, 10, newest=False) + rows.to_thin(0, 10, newest=True)
    for log in logs:
        await digests.make(log, begin=True)
    edit(path, 2 * TAIL)
    for log in logs:
        while rows.trim(log, 13, stays):
            pass
    database.close()
    after = await said(path)
    assert after[0] == EVENTS + TAIL + 1
    for run, found in enumerate(after[2:], 1):
        assert found[3] == [(run - 1) * (STEPS + 2) + 1, run * (STEPS + 2)]  # type: ignore[index]


async def test_the_end_of_a_log_stays_where_a_bound_on_its_task_deletes_it(tmp_path: Path) -> None:
    """The last events of a run that was thinned out are kept, and those of one that is gone not."""
    for forget, kept in ((False, 1), (True, 0)):
        path = tmp_path / f"{forget}.db"
        fill(path)
        await thin_out(path, forget=forget)
        database = Database(path)
        records, log = Records(database), EventLog(database, 1.0)
        run = Run(
            task_key=1,
            number=RUNS + 1,
            state=TaskState.COMPLETED,
            device="cpu",
            parameters=Parameters(),
        )
        with database.transaction(durable=True) as connection:
            records.insert_run(connection, run)
            log.append(connection, 1, [event_pb2.Event(run=RUNS + 1) for _ in range(STEPS)])
        retention = Retention(database, Digests(database, Curves(database)), STEPS, 0)
        await retention._trim(1)
        assert log.first_seq(1) == EVENTS + 1
        found = DigestRows(database).kept(1, RUNS, EVENTS - TAIL, EVENTS + 1, TAIL)
        assert [event_pb2.Event.FromString(body).seq for body in found] == [EVENTS][:kept]
        database.close()


async def test_a_run_of_which_nothing_is_left_has_no_curve(tmp_path: Path) -> None:
    """The last events of a task, which always stay, are not taken for a whole curve."""
    fill(tmp_path / "x.db")
    await thin_out(tmp_path / "x.db", forget=True)
    database = Database(tmp_path / "x.db")
    curves = Curves(database)
    Digests(database, curves)
    async with curves.of(1, RUNS) as found:
        assert await found.thinned((), 0, 1000) == []
    database.close()


async def test_a_log_that_cant_be_read_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said which it is; what its task has stays, and those of others are thinned out."""
    path = tmp_path / "x.db"
    fill(path)
    fill(path, task_id="other-task")
    database = Database(path)
    with database.transaction(durable=True) as connection:
        connection.execute("UPDATE events SET body = x'ffffff' WHERE task_key = 1 AND seq = 5")
    database.close()
    await thin_out(path)
    assert "the log of run 1 of task 1 can't be thinned out" in caplog.text
    database = Database(path)
    rows = database.query("SELECT log FROM runs ORDER BY key")
    assert [row["log"] for row in rows] == ["WHOLE"] * RUNS + ["THINNED"] * RUNS
    database.close()
