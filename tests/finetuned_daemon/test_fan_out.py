"""Watchers of a task: the same events to each, read and encoded once, and nobody waits for any."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from finetuned.v1 import event_pb2
from finetuned.v1.task_service_pb2 import WatchTaskResponse
from finetuned_daemon.errors import CursorOutOfRange
from finetuned_daemon.events import fan_out
from finetuned_daemon.events.fan_out import Follower
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Task

NEVER = 600.0
PAGE_BYTES = BY_NAME["watch_page_bytes"].default


class Place:
    """A log with one task."""

    def __init__(self, path: Path, quiet_seconds: float = NEVER) -> None:
        self.database = Database(path)
        self.log = EventLog(self.database, quiet_seconds)
        self.fan_out = self.log.fan_out
        self.task = new_task(self.database)
        self.stack = ExitStack()

    def append(self, count: int, text: str = "") -> None:
        """Appends log lines."""
        lines = [event_pb2.Event(log_line=event_pb2.LogLine(text=text)) for _ in range(count)]
        with self.database.transaction(durable=False) as connection:
            self.log.append(connection, self.task.key, lines)

    def follow(self, after_seq: int = 0, *, in_batches: bool = True) -> Follower:
        """A watcher, for as long as the test lasts."""
        follow = self.fan_out.follow(self.task.key, after_seq, in_batches=in_batches)
        return self.stack.enter_context(follow)

    async def read(self, follower: Follower, until: int) -> list[event_pb2.Event]:
        """What a watcher is given, up to an event."""
        events = list[event_pb2.Event]()
        while follower.seq < until:
            events += _events(await follower.next())
        return events


def new_task(database: Database, task_id: str = "some-task") -> Task:
    """A task that was never started."""
    task = Task(
        task_id=task_id,
        display_name=task_id,
        training_type=TrainingType.SFT,
        parameters=Parameters(),
    )
    with database.transaction(durable=True) as connection:
        return Records(database).insert_task(connection, task)


def _events(messages: Iterable[bytes]) -> list[event_pb2.Event]:
    events = list[event_pb2.Event]()
    for message in messages:
        response = WatchTaskResponse.FromString(message)
        events += response.events.events
        if response.HasField("event"):
            events.append(response.event)
    return events


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A log with one task, whose watchers are never woken by time."""
    place = Place(tmp_path / "x.db")
    yield place
    place.stack.close()
    place.database.close()


@pytest.mark.parametrize("in_batches", [True, False])
async def test_from_every_cursor_come_the_events_behind_it(place: Place, in_batches: bool) -> None:
    """Whether they are read from the log or from memory, and however they are sent."""
    place.append(600, "old")  # more than a page
    live = place.follow(590, in_batches=in_batches)
    place.append(20, "new")
    place.append(1, "x" * 2 * PAGE_BYTES)
    place.append(5, "newest")
    everything = place.log.read(place.task.key, 0, 1000)
    assert await place.read(live, 626) == everything[590:]
    for cursor in (0, 1, 599, 600, 610, 620, 621, 625):
        follower = place.follow(cursor, in_batches=in_batches)
        assert await place.read(follower, 626) == everything[cursor:], cursor


async def test_events_that_come_while_one_is_sent_come_together(place: Place) -> None:
    """A watcher that takes its time is given what has come meanwhile as one message."""
    follower = place.follow()
    for _ in range(5):
        place.append(1)
    (message,) = await follower.next()
    assert [event.seq for event in _events([message])] == [1, 2, 3, 4, 5]


async def test_watchers_at_the_same_place_are_sent_the_same_bytes(place: Place) -> None:
    """A message is made once: what a watcher more costs is what gRPC costs."""
    place.append(10)
    one, other = place.follow(), place.follow()
    for new in (3, 4):
        place.append(new)
        (first,), (second,) = await one.next(), await other.next()
        assert first is second


async def test_what_is_in_memory_is_bounded_and_goes_with_the_last_watcher(place: Place) -> None:
    """However long its lines and however many its events, a task holds a page of them."""
    slow, quick = place.follow(), place.follow()
    for _ in range(40):
        place.append(50, "x" * 1000)
        await place.read(quick, place.log.last_seq(place.task.key) or 0)
        assert place.fan_out.held_bytes() <= BY_NAME["watch_kept_bytes"].default
    assert slow.feed.size <= PAGE_BYTES
    assert [event.seq for event in await place.read(slow, 2000)] == list(range(1, 2001))
    place.stack.close()
    assert place.fan_out.held_bytes() == 0
    assert not place.fan_out.is_watched(place.task.key)


async def test_the_newest_events_of_many_tasks_are_bounded_together(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are let go, their watchers read the log."""
    monkeypatch.setattr(fan_out, "_KEPT_BYTES", 100_000)
    other = new_task(place.database, "another-task")
    follow = place.fan_out.follow(other.key, 0, in_batches=True)
    follower, first = place.stack.enter_context(follow), place.follow()
    place.append(60, "x" * 1000)
    with place.database.transaction(durable=False) as connection:
        line = event_pb2.LogLine(text="y" * 1000)
        events = [event_pb2.Event(log_line=line) for _ in range(60)]
        place.log.append(connection, other.key, events)
    assert place.fan_out.held_bytes() <= 100_000
    assert len(await place.read(first, 60)) == len(await place.read(follower, 60)) == 60


async def test_watchers_that_do_not_read_take_nobodys_turn(place: Place) -> None:
    """Of any number that were given something and never come back for more."""
    place.append(1)
    stalled = [place.follow() for _ in range(100)]
    reader = place.follow()
    giving = [asyncio.ensure_future(one.next()) for one in stalled]
    assert [event.seq for event in await place.read(reader, 1)] == [1]
    sleeping = asyncio.ensure_future(reader.next())
    await asyncio.gather(*giving)
    place.append(1)
    assert [event.seq for event in _events(await sleeping)] == [2]


async def test_a_thousand_watchers_are_all_given_everything(place: Place) -> None:
    """Woken some at a time, each gets every event once."""
    followers = [place.follow() for _ in range(1000)]
    reading = [asyncio.ensure_future(place.read(one, 300)) for one in followers]
    for _ in range(30):
        place.append(10)
        await asyncio.sleep(0)
    for events in await asyncio.gather(*reading):
        assert [event.seq for event in events] == list(range(1, 301))


async def test_a_quiet_watcher_is_woken_all_the_same(tmp_path: Path) -> None:
    """So that it can be sent a sign of life, again and again."""
    place = Place(tmp_path / "x.db", quiet_seconds=0.01)
    place.append(1)
    followers = [place.follow(1), place.follow(1)]
    for _ in range(3):
        assert [await one.next() for one in followers] == [(), ()]
        assert all(one.has_all for one in followers)
    place.append(1)
    assert [len(await one.next()) for one in followers] == [1, 1]
    place.stack.close()
    place.database.close()


async def test_watchers_of_a_deleted_task_are_told(place: Place) -> None:
    """Both who waits for events, and who has not read those that there were."""
    place.append(3)
    waiting, behind = place.follow(3), place.follow()
    told = asyncio.ensure_future(waiting.next())
    await asyncio.sleep(0)
    with place.database.transaction(durable=True) as connection:
        Records(place.database).delete_task(connection, place.task)
        place.database.after_commit(lambda: place.log.wake(place.task.key))
    assert await told == ()
    assert waiting.is_gone
    assert await behind.next() == ()


async def test_events_that_were_deleted_behind_a_watcher_are_an_error_with_the_oldest_kept(
    place: Place,
) -> None:
    """Never a gap, and never a silence."""
    place.append(600)
    behind, empty = place.follow(), place.follow(599)
    key = place.task.key
    with place.database.transaction(durable=True) as connection:
        # Some that are looked back at stay, under the numbers that they had.
        connection.execute(
            "DELETE FROM events WHERE task_key = ? AND seq < 500 AND seq NOT IN (1, 2, 9)", (key,)
        )
        connection.execute("UPDATE tasks SET first_seq = 500 WHERE key = ?", (key,))
    with pytest.raises(CursorOutOfRange) as caught:
        await behind.next()
    assert caught.value.metadata["first_seq"] == "500"
    assert [event.seq for event in await place.read(empty, 600)] == [600]


async def test_a_watcher_that_goes_away_leaves_nothing(place: Place) -> None:
    """Neither while it waits for events, nor while it waits for its turn."""
    place.append(1)
    going = [place.follow() for _ in range(100)]
    turns = [asyncio.ensure_future(one.next()) for one in going]
    waits = [asyncio.ensure_future(place.follow(1).next()) for _ in range(10)]
    await asyncio.sleep(0)
    for one in (*turns, *waits):
        one.cancel()
    await asyncio.gather(*turns, *waits, return_exceptions=True)
    reader = place.follow(1)
    place.append(1)
    assert [event.seq for event in await place.read(reader, 2)] == [2]
    assert not reader.feed.sleepers
