"""Curves: each step once, with the value it has now, whole by pages or thinned out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import event_pb2, task_service_pb2
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.store.database import Database

LONG_STEPS = 30_000
LONG_NAMES = ("grad_norm", "learning_rate", "loss", "tokens_per_second")
PEAK_STEP = 12_345

Series = dict[str, list[tuple[int, float]]]


def metrics(step: int, **values: float) -> event_pb2.Event:
    event = event_pb2.Event(
        run=1, metrics=event_pb2.Metrics(step=step, epoch=step / 10, values=values)
    )
    event.time.FromMicroseconds(1_700_000_000_500_000 + step)
    return event


def evaluation(step: int, **values: float) -> event_pb2.Event:
    return event_pb2.Event(
        run=1, evaluation=event_pb2.Evaluation(step=step, epoch=step / 10, values=values)
    )


def long_curves() -> Iterator[event_pb2.Event]:
    for step in range(1, LONG_STEPS + 1):
        loss = 99.0 if step == PEAK_STEP else 2 + math.cos(step)
        values = dict.fromkeys(LONG_NAMES, float(step)) | {"loss": loss}
        yield event_pb2.Event(run=1, metrics=event_pb2.Metrics(step=step, values=values))


TAKEN_BACK = [
    metrics(1, loss=9.0),
    evaluation(1, eval_loss=8.0),
    metrics(2, loss=7.0),
    event_pb2.Event(run=1, log_line=event_pb2.LogLine(text="x" * 60_000)),
    metrics(3, loss=6.0),
    evaluation(3, eval_loss=5.5),
    # Back to the checkpoint of step 1.
    metrics(2, loss=6.5),
    metrics(3, loss=math.nan),
]
"""A run whose process was killed, and that took its steps 2 and 3 again."""

LARGE = [metrics(1, **{f"name_{n:03}": float(n) for n in range(300)}), metrics(2, name_000=1.0)]
"""A measurement larger than any usual event."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with runs in its database that no fake runner would bring about."""
    root = tmp_path_factory.mktemp("metrics")
    daemon = Daemon(root).start()
    scene = Scene(root / "scene")
    daemon.create(scene.parameters(), task_id="new-task")
    for task_id in ("back", "long", "large", "short"):
        task = daemon.create(scene.play(), start=True, task_id=task_id)
        daemon.wait(task.name, "COMPLETED")
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name="tasks/short", probe=True))
    daemon.wait("tasks/short", "COMPLETED")
    daemon.stop()
    database = Database(daemon.paths.state_dir / "finetuned.db")
    for task_id, events in (("back", TAKEN_BACK), ("long", list(long_curves())), ("large", LARGE)):
        row = database.query_one("SELECT key FROM tasks WHERE task_id = ?", task_id)
        assert row is not None
        with database.transaction(durable=False) as connection:
            # What the fake runner has measured itself would mix with it.
            connection.execute("DELETE FROM events WHERE task_key = ?", (row["key"],))
            EventLog(database).append(connection, row["key"], events)
    database.close()
    daemon.start()
    yield daemon
    scene.close()
    daemon.close()


def get(daemon: Daemon, name: str, **asked: Any) -> task_service_pb2.GetMetricsResponse:
    return daemon.tasks.GetMetrics(task_service_pb2.GetMetricsRequest(name=name, **asked))


def curves(answer: task_service_pb2.GetMetricsResponse) -> Series:
    for series in answer.series:
        lengths = {len(x) for x in (series.steps, series.values, series.epochs, series.times)}
        assert len(lengths) == 1, series.metric
    return {s.metric: list(zip(s.steps, s.values, strict=True)) for s in answer.series}


def by_pages(daemon: Daemon, name: str, **asked: Any) -> tuple[Series, list[int]]:
    """All pages put together, and how many points each had."""
    whole, sizes, token = Series(), list[int](), ""
    while True:
        answer = get(daemon, name, page_token=token, **asked)
        page = curves(answer)
        sizes.append(sum(map(len, page.values())))
        for metric, points in page.items():
            whole.setdefault(metric, []).extend(points)
        token = answer.next_page_token
        if not token:
            return whole, sizes


def violations(daemon: Daemon, **asked: Any) -> Sequence[tuple[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        get(daemon, "tasks/back", **asked)
    status, found = rpc_status.from_call(caught.value), error_details_pb2.BadRequest()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert status is not None
    assert any(detail.Unpack(found) for detail in status.details)
    return sorted((v.field, v.reason) for v in found.field_violations)


def test_a_run_has_what_it_measured(daemon: Daemon) -> None:
    answer = get(daemon, "tasks/short")
    assert (answer.run, answer.next_page_token) == (1, ""), "a probe is not the newest run"
    (loss,) = answer.series
    assert (loss.metric, list(loss.steps), loss.point_count) == ("loss", [1, 2, 3], 3)
    assert list(loss.values) == [1.0, 1 / 2, 1 / 3]
    assert list(loss.epochs) == pytest.approx([1 / 3, 2 / 3, 1.0])
    event = next(e for e in daemon.events("tasks/short") if e.HasField("metrics"))
    assert loss.times[0] == pytest.approx(event.time.ToMicroseconds() / 1e6, abs=1e-5)


def test_a_step_that_was_taken_again_has_the_value_it_has_now(daemon: Daemon) -> None:
    answer = get(daemon, "tasks/back")
    eval_loss, loss = answer.series
    assert (eval_loss.metric, loss.metric) == ("eval_loss", "loss"), "by name"
    assert list(loss.steps) == [1, 2, 3]
    assert list(loss.values)[:2] == [9.0, 6.5]
    assert math.isnan(loss.values[2])
    assert list(eval_loss.steps) == [1], "what lies behind the checkpoint is measured anew"
    assert loss.times[0] == pytest.approx(1_700_000_000.500001, abs=1e-6)
    assert list(loss.epochs) == pytest.approx([0.1, 0.2, 0.3])


def test_what_is_asked_for_comes_and_no_more(daemon: Daemon) -> None:
    assert set(curves(get(daemon, "tasks/back", metrics=["eval_loss", "nothing"]))) == {"eval_loss"}
    answer = get(daemon, "tasks/back", after_step=2)
    assert [(s.metric, list(s.steps), s.point_count) for s in answer.series] == [("loss", [3], 1)]
    assert get(daemon, "tasks/back", after_step=3, run=1).run == 1


def test_the_pages_are_the_whole(daemon: Daemon) -> None:
    whole, sizes = by_pages(daemon, "tasks/long")
    assert sizes == [50_000, 50_000, 20_000]
    assert set(whole) == set(LONG_NAMES)
    for name, points in whole.items():
        assert [step for step, _ in points] == list(range(1, LONG_STEPS + 1)), name
    small, sizes = by_pages(daemon, "tasks/long", page_size=7_777, after_step=20_000)
    assert max(sizes) <= 7_777
    assert small == {name: points[20_000:] for name, points in whole.items()}


@pytest.mark.parametrize("size", [1, 3, 299, 300, 301, 1000])
def test_a_page_may_end_within_a_step(daemon: Daemon, size: int) -> None:
    whole, sizes = by_pages(daemon, "tasks/large", page_size=size)
    assert max(sizes) <= size
    assert whole == {f"name_{n:03}": [(1, float(n))] + [(2, 1.0)] * (n == 0) for n in range(300)}


def test_thinned_out_no_peak_is_lost(daemon: Daemon) -> None:
    answer = get(daemon, "tasks/long", max_points=100)
    whole, _ = by_pages(daemon, "tasks/long")
    assert not answer.next_page_token
    for series in answer.series:
        assert 50 < len(series.steps) <= 100, series.metric
        assert (series.steps[0], series.steps[-1]) == (1, LONG_STEPS)
        assert list(series.steps) == sorted(set(series.steps))
        assert series.point_count == LONG_STEPS
        points = whole[series.metric]
        assert set(zip(series.steps, series.values, strict=True)) <= set(points)
        assert min(series.values) == min(value for _, value in points)
        assert max(series.values) == max(value for _, value in points)
    assert PEAK_STEP in next(s for s in answer.series if s.metric == "loss").steps
    assert curves(get(daemon, "tasks/back", max_points=3))["loss"][:2] == [(1, 9.0), (2, 6.5)]


def test_all_curves_together_have_their_bound(daemon: Daemon) -> None:
    answer = get(daemon, "tasks/long", max_points=10_000)
    assert [len(series.steps) for series in answer.series] == [10_000] * 4
    answer = get(daemon, "tasks/large", max_points=2)
    assert len(answer.series) == 300


def test_the_curves_of_a_run_grow_with_it(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=4, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        for step in range(1, 5):
            scene.let_pass(1)
            watch.until_step(step)
            assert [s for s, _ in curves(get(daemon, task.name))["loss"]] == [*range(1, step + 1)]
        watch.until_end()
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name))
    with pytest.raises(grpc.RpcError) as caught:
        get(daemon, task.name)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_without_a_run_there_are_no_curves(daemon: Daemon) -> None:
    answer = get(daemon, "tasks/new-task")
    assert (answer.run, list(answer.series)) == (0, [])
    for name, run in (("tasks/no-such", 0), ("tasks/back", 2), ("nonsense", 0)):
        with pytest.raises(grpc.RpcError) as caught:
            get(daemon, name, run=run)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.RpcError, match="there is no run 'tasks/back/runs/77'"):
        get(daemon, "tasks/back", page_token="metrics-77-1-")


def test_every_wrong_field_is_named(daemon: Daemon) -> None:
    assert violations(
        daemon, run=-1, after_step=-1, max_points=1, page_size=50_001, page_token="x"
    ) == [
        ("after_step", "OUT_OF_RANGE"),
        ("max_points", "OUT_OF_RANGE"),
        ("page_size", "NOT_WITH_MAX_POINTS"),
        ("page_size", "OUT_OF_RANGE"),
        ("page_token", "BAD_PAGE_TOKEN"),
        ("page_token", "NOT_WITH_MAX_POINTS"),
        ("run", "OUT_OF_RANGE"),
    ]
    token = get(daemon, "tasks/back", page_size=1).next_page_token
    assert violations(daemon, run=2, page_token=token) == [("page_token", "BAD_PAGE_TOKEN")]
    assert violations(daemon, page_token="tasks-1") == [("page_token", "BAD_PAGE_TOKEN")]


def test_others_get_their_turn_while_a_long_run_is_read(daemon: Daemon) -> None:
    """Between the slices of a log that is read, other calls are answered."""
    daemon.stop()
    daemon.start()  # which has nothing in memory
    request = task_service_pb2.GetMetricsRequest(name="tasks/long", max_points=10)
    reading = daemon.tasks.GetMetrics.future(request)  # type: ignore[attr-defined]
    answered = 0
    while not reading.done():
        daemon.get("tasks/back")
        answered += 1
    assert len(reading.result().series) == 4
    assert answered > 3
