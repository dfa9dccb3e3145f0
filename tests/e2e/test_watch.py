"""Watching: everybody sees the same events with the same numbers, however late or slow."""

from __future__ import annotations

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, system_service_pb2, task_pb2, task_service_pb2


def test_two_watchers_one_of_them_late_see_the_same_events(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=6, gated=True), start=True)
    with daemon.watch(task.name) as early:
        scene.let_pass(3)
        early.until_step(3)
        with daemon.watch(task.name) as late:
            scene.let_pass(3)
            early.until_end()
            late.until_end()
    assert early.seen == late.seen
    assert early.seqs == list(range(1, len(early.seqs) + 1))
    assert early.seen == daemon.events(task.name)
    assert late.snapshot.progress.step >= 3, "the first message is the state as it stands"


def test_the_events_tell_the_whole_story_in_order(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=2, save_steps=1), start=True)
    daemon.wait(task.name, "COMPLETED")
    story = list[str]()
    for event in daemon.events(task.name):
        kind = str(event.WhichOneof("payload"))
        if kind == "state_change":
            story.append(task_pb2.TaskState.Name(event.state_change.new_state))
        elif kind == "phase_change":
            story.append(task_pb2.RunPhase.Name(event.phase_change.phase))
        else:
            story.append(kind)
    assert [s.removeprefix("TASK_STATE_").removeprefix("RUN_PHASE_") for s in story] == [
        *("QUEUED", "RUNNING", "STARTING", "LOADING_MODEL", "PREPARING_DATA", "TRAINING"),
        *("metrics", "progress", "checkpoint_saved"),
        *("metrics", "progress", "checkpoint_saved"),
        *("checkpoint_saved", "log_line", "result", "COMPLETED"),
    ]


def test_a_watcher_goes_on_where_it_left(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=3), start=True)
    daemon.wait(task.name, "COMPLETED")
    everything = daemon.events(task.name)
    last = everything[-1].seq
    for cursor in (0, 5, last - 1):
        with daemon.watch(task.name, cursor) as watch:
            watch.until_end()
        assert watch.seen == everything[cursor:]


def test_a_quiet_stream_shows_that_it_lives(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=1, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        for response in watch.call:
            if response.HasField("heartbeat"):
                break
        assert response.heartbeat.last_seq == daemon.get(task.name).last_seq
        scene.let_pass(1)
        watch.until_end()


def test_a_cursor_beyond_the_log_or_of_another_log_is_refused(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(), start=True)
    last = daemon.wait(task.name, "COMPLETED").last_seq

    def code(after_seq: int, log_epoch: str = "") -> grpc.StatusCode:
        request = task_service_pb2.WatchTaskRequest(
            name=task.name, after_seq=after_seq, log_epoch=log_epoch
        )
        with pytest.raises(grpc.RpcError) as caught:
            next(daemon.tasks.WatchTask(request, timeout=10))
        result: grpc.StatusCode = caught.value.code()
        return result

    assert code(last + 1) is grpc.StatusCode.OUT_OF_RANGE
    assert code(0, "another") is grpc.StatusCode.OUT_OF_RANGE
    assert code(-1) is grpc.StatusCode.INVALID_ARGUMENT
    with daemon.watch(task.name, last) as watch:
        assert watch.snapshot.last_seq == last, "the newest is good: it waits for the next"


def test_a_stalled_watcher_keeps_nobody_waiting(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=400), start=True)
    stalled = [daemon.watch(task.name) for _ in range(20)]  # they read the snapshot and no more
    daemon.wait(task.name, "COMPLETED")
    with daemon.watch(task.name) as watch:
        watch.until_end()
    assert watch.seqs == list(range(1, len(watch.seqs) + 1))
    for late in stalled:
        late.until_end()
        assert late.seen == watch.seen
        late.call.cancel()


def test_the_watchers_of_a_deleted_task_are_told(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(), start=True)
    daemon.wait(task.name, "COMPLETED")
    with daemon.watch(task.name) as watch:
        watch.until_end()
        daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name))
        with pytest.raises(grpc.RpcError) as caught:
            watch.until_end()
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_when_the_daemon_stops_its_watchers_are_told_to_come_again(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
        assert daemon.process is not None
        daemon.process.terminate()
        with pytest.raises(grpc.RpcError) as caught:
            watch.until_end()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "daemon stops" in caught.value.details()
        assert daemon.process.wait(20) == 0


# --- several events in a message


class Batches:
    """A watch that lets events come together."""

    def __init__(self, daemon: Daemon, name: str, after_seq: int = 0) -> None:
        request = task_service_pb2.WatchTaskRequest(
            name=name, after_seq=after_seq, allow_batches=True
        )
        self.call = daemon.tasks.WatchTask(request, timeout=60)
        assert next(self.call).HasField("snapshot")
        self.seen = list[event_pb2.Event]()
        self.sizes = list[int]()

    def until(self, seq: int) -> list[event_pb2.Event]:
        """Reads to this event; all that were seen."""
        while not self.seen or self.seen[-1].seq < seq:
            response = next(self.call)
            assert not response.HasField("event"), "they come in batches alone"
            if response.HasField("events"):
                self.seen += response.events.events
                self.sizes.append(len(response.events.events))
        return self.seen


def test_batches_bring_the_same_events_from_every_cursor(daemon: Daemon, scene: Scene) -> None:
    """Those of a task that has ended, read from the log."""
    task = daemon.create(scene.play(steps=200), start=True)
    last = daemon.wait(task.name, "COMPLETED").last_seq
    with daemon.watch(task.name) as watch:
        watch.until_end()
    for cursor in (0, 1, 255, 256, 257, last - 1):
        batches = Batches(daemon, task.name, cursor)
        assert batches.until(last) == watch.seen[cursor:], cursor
        assert batches.sizes[0] == min(256, last - cursor)
        batches.call.cancel()


def test_batches_bring_the_same_events_while_they_happen(daemon: Daemon, scene: Scene) -> None:
    """And a client that stops reading for a while, and reads on, misses none."""
    task = daemon.create(scene.play(steps=400, gated=True), start=True)
    live, idle = Batches(daemon, task.name), Batches(daemon, task.name)
    with daemon.watch(task.name) as watch:
        for _ in range(40):
            scene.let_pass(10)
            live.until(watch.until_step(len(watch.seen) // 2).seq)
        last = watch.until_end().seq
        assert live.until(last) == watch.seen
        assert idle.until(last) == watch.seen


def test_batches_go_on_through_a_restart_of_the_daemon(daemon: Daemon, scene: Scene) -> None:
    """From the last event that was seen, without gap or repeat."""
    task = daemon.create(scene.play(steps=60, gated=True), start=True)
    seen = list[event_pb2.Event]()
    for _ in range(3):
        batches = Batches(daemon, task.name, len(seen))
        scene.let_pass(20)
        seen += batches.until(len(seen) + 20)
        daemon.kill()
        daemon.start()
    last = daemon.wait(task.name, "COMPLETED").last_seq
    seen += Batches(daemon, task.name, len(seen)).until(last)
    assert seen == daemon.events(task.name)


def test_a_stream_that_is_closed_in_the_middle_gives_its_place_back(
    daemon: Daemon, scene: Scene
) -> None:
    """Also where the client reads nothing, and the daemon is about to send it something."""
    task = daemon.create(scene.play(steps=400), start=True)
    last = daemon.wait(task.name, "COMPLETED").last_seq
    many = [Batches(daemon, task.name) for _ in range(50)]
    for one in many[::2]:
        one.call.cancel()
    for one in many[1::2]:
        assert len(one.until(last)) == last
        one.call.cancel()
    request = system_service_pb2.GetSystemInfoRequest()

    def open_streams() -> int:
        limits = daemon.system.GetSystemInfo(request).limits
        return next(limit.used for limit in limits if limit.name == "open_streams")

    eventually(lambda: open_streams() == 0, "every place is free")
