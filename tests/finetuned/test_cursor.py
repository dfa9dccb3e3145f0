"""Where a watcher stands: dense events, ends, lost connections."""

from __future__ import annotations

import pytest

from finetuned import (
    DaemonUnavailable,
    Event,
    EventsLost,
    InternalError,
    NotFound,
    OutOfRange,
    Snapshot,
    Task,
    TaskState,
)
from finetuned._watch import Cursor, LogReplaced
from finetuned.v1.event_pb2 import StateChange
from finetuned.v1.task_service_pb2 import EventBatch, Heartbeat, WatchTaskResponse


def cursor(after_seq: int = 0, patience: float | None = None) -> Cursor:
    return Cursor("tasks/a", after_seq, "", True, patience)


def snapshot(state: str, last_seq: int, epoch: str = "e", created: int = 1) -> WatchTaskResponse:
    task = Task(name="tasks/a", state=TaskState.Value(f"TASK_STATE_{state}"), last_seq=last_seq)
    task.create_time.FromSeconds(created)
    return WatchTaskResponse(snapshot=Snapshot(task=task, log_epoch=epoch))


def event(seq: int, state: str = "") -> WatchTaskResponse:
    result = Event(seq=seq)
    if state:
        new_state = TaskState.Value(f"TASK_STATE_{state}")
        result.state_change.CopyFrom(StateChange(new_state=new_state))
    return WatchTaskResponse(event=result)


def test_it_asks_for_what_comes_after_the_last_event() -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 1))
    place.accept(event(1))
    place.accept(event(2))
    request = place.request()
    assert (request.after_seq, request.log_epoch) == (2, "e")


def events(*seqs: int, end: int = 0) -> WatchTaskResponse:
    batch = [event(seq, "COMPLETED" if seq == end else "").event for seq in seqs]
    return WatchTaskResponse(events=EventBatch(events=batch))


def test_events_that_come_together_are_passed_on_one_by_one() -> None:
    """A watcher sees no difference between a message of many and many of one."""
    place = cursor()
    assert place.request().allow_batches
    place.accept(snapshot("RUNNING", 9))
    passed = [*place.accept(events(1, 2, 3)), *place.accept(event(4)), *place.accept(events(5))]
    assert [one.seq for one in passed if isinstance(one, Event)] == [1, 2, 3, 4, 5]
    assert place.request().after_seq == 5


def test_a_gap_within_a_batch_is_an_error() -> None:
    """As one between messages is."""
    place = cursor()
    place.accept(snapshot("RUNNING", 0))
    with pytest.raises(EventsLost, match="event 3 "):
        place.accept(events(1, 3))


def test_what_follows_the_end_in_its_batch_is_not_passed_on() -> None:
    """A watch to the end of a run ends with it, and goes on from there."""
    place = cursor()
    place.accept(snapshot("RUNNING", 0))
    assert [one.seq for one in place.accept(events(1, 2, 3, end=2)) if isinstance(one, Event)] == [
        1,
        2,
    ]
    assert place.is_done
    assert place.request().after_seq == 2


def test_a_heartbeat_is_not_passed_on() -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 0))
    assert place.accept(WatchTaskResponse(heartbeat=Heartbeat())) == ()


@pytest.mark.parametrize("seq", [1, 2, 4])
def test_a_gap_or_a_repeat_is_an_error(seq: int) -> None:
    place = cursor(after_seq=2)
    place.accept(snapshot("RUNNING", 2))
    if seq == 2:
        place.accept(event(3))
        seq = 3
    with pytest.raises(EventsLost, match=f"event {seq} "):
        place.accept(event(seq))


def test_it_ends_with_the_run_and_not_with_an_earlier_one() -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 3))
    place.accept(event(1, "FAILED"))
    place.accept(event(2, "QUEUED"))
    place.accept(event(3, "RUNNING"))
    assert not place.is_done
    place.accept(event(4, "COMPLETED"))
    assert place.is_done


def test_a_run_that_ended_before_is_replayed_to_its_last_event() -> None:
    place = cursor()
    place.accept(snapshot("STOPPED", 2))
    place.accept(event(1, "RUNNING"))
    assert not place.is_done
    place.accept(event(2, "STOPPED"))
    assert place.is_done


def test_where_nothing_is_missing_of_an_ended_run_it_ends_at_once() -> None:
    place = cursor(after_seq=2)
    place.accept(snapshot("FAILED", 2))
    assert place.is_done


def test_without_until_end_it_never_ends() -> None:
    place = Cursor("tasks/a", 0, "", False, None)
    place.accept(snapshot("RUNNING", 0))
    place.accept(event(1, "COMPLETED"))
    assert not place.is_done


def test_a_run_that_ended_while_the_connection_was_lost_ends_it() -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 1))
    place.accept(event(1))
    assert place.lost(DaemonUnavailable("gone")) is not None
    place.accept(snapshot("COMPLETED", 2))
    place.accept(event(2, "COMPLETED"))
    assert place.is_done


@pytest.mark.parametrize("last_seq", [0, 5])
def test_another_log_is_out_of_range(last_seq: int) -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 1))
    place.accept(event(1))
    with pytest.raises(OutOfRange):
        place.accept(snapshot("RUNNING", last_seq, "other"))


def test_a_task_made_again_under_its_id_is_told_as_replaced_and_read_from_its_first_event() -> None:
    """Its first events would be missing else, and nobody would know that it is another task."""
    place = cursor()
    place.accept(snapshot("RUNNING", 2))
    place.accept(events(1, 2))
    assert place.lost(DaemonUnavailable("gone")) is not None
    with pytest.raises(OutOfRange) as raised:
        place.accept(snapshot("RUNNING", 4, created=2))
    assert place.lost(raised.value) == LogReplaced(after_seq=2)
    assert (place.request().after_seq, place.request().log_epoch) == (0, "")
    place.accept(snapshot("RUNNING", 4, created=2))
    assert len(place.accept(events(1, 2, 3, 4))) == 4


def test_a_log_shorter_than_what_was_seen_is_out_of_range() -> None:
    with pytest.raises(OutOfRange):
        cursor(after_seq=5).accept(snapshot("RUNNING", 4))


def test_a_loss_is_told_once_an_outage() -> None:
    place = cursor()
    place.accept(snapshot("RUNNING", 1))
    place.accept(event(1))
    first = place.lost(DaemonUnavailable("gone"))
    assert first is not None
    assert first.after_seq == 1
    assert place.lost(DaemonUnavailable("gone")) is None
    place.accept(snapshot("RUNNING", 1))
    assert place.lost(None) is not None


def test_waiting_grows_to_a_second_and_starts_over() -> None:
    place = cursor()
    place.lost(DaemonUnavailable("gone"))
    delays = [place.delay() for _ in range(8)]
    assert delays == sorted(delays)
    assert delays[0] <= 0.1
    assert delays[-1] == 1.0
    place.accept(snapshot("RUNNING", 0))
    assert place.delay() == delays[0]


def test_patience_ends() -> None:
    place = cursor(patience=0)
    place.lost(DaemonUnavailable("gone"))
    with pytest.raises(DaemonUnavailable):
        place.lost(DaemonUnavailable("gone"))


def test_what_watching_again_cannot_mend_is_raised() -> None:
    with pytest.raises(NotFound):
        cursor().lost(NotFound("deleted"))
    with pytest.raises(InternalError):
        cursor().lost(InternalError("a fault", reason="BUG"))


def test_a_transport_that_always_breaks_is_a_fault() -> None:
    place = cursor()
    for _ in range(4):
        place.lost(InternalError("RST_STREAM"))
    with pytest.raises(InternalError):
        place.lost(InternalError("RST_STREAM"))
