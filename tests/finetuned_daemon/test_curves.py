"""Curves, held against the plainest way to make them."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetuned.v1 import event_pb2
from finetuned_daemon.events import curves as module
from finetuned_daemon.events.curves import Curves, Place, Points, RunCurves
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Task

Measured = list[tuple[int, dict[str, float]]]

NUMBERS = st.one_of(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(-9, 9).map(float))
VALUES = st.dictionaries(st.sampled_from(["a", "b", "c"]), NUMBERS, max_size=3)
MANY = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=10), st.lists(NUMBERS, min_size=30, max_size=90)
)


@st.composite
def logs(draw: st.DrawFn) -> Measured:
    """Steps that go on, stay for an evaluation, and now and then go back to a checkpoint."""
    result, step = Measured(), 0
    for change in draw(st.lists(st.sampled_from([0, 0, 1, 1, 1, 2, -4]), max_size=40)):
        step = max(0, step + change)
        result.append((step, draw(VALUES)))
    return result


def made(measured: Measured) -> RunCurves:
    result = RunCurves()
    for number, (step, values) in enumerate(measured):
        result.add(step, step / 10, float(number), values)
    return result


def expected(measured: Measured) -> dict[str, dict[int, float]]:
    """By name and step, what stands once the whole log is read."""
    result = dict[str, dict[int, float]]()
    last = -1
    for step, values in measured:
        if step < last:
            result = {n: {s: v for s, v in c.items() if s < step} for n, c in result.items()}
        last = step
        for name, value in values.items():
            result.setdefault(name, {})[step] = value
    return {name: curve for name, curve in result.items() if curve}


def same(found: list[Points], wanted: dict[str, dict[int, float]]) -> bool:
    def show(curves: dict[str, dict[int, float]]) -> str:  # NaN is no other NaN
        return repr({name: sorted(curve.items()) for name, curve in sorted(curves.items())})

    joined = dict[str, dict[int, float]]()
    for piece in found:
        before = joined.setdefault(piece.metric, {})
        assert not before or max(before) < min(piece.steps), "they go on where the others end"
        assert piece.steps == sorted(set(piece.steps))
        assert piece.epochs == [step / 10 for step in piece.steps]
        before.update(zip(piece.steps, piece.values, strict=True))
    return show(joined) == show(wanted)


@settings(max_examples=300, deadline=None)
@given(logs(), st.sampled_from([1, 1, 2, 2, 3, 4, 7, 60]), st.integers(0, 6))
def test_pages_put_together_are_what_was_measured(
    measured: Measured, size: int, after_step: int
) -> None:
    curves, wanted = made(measured), expected(measured)
    if after_step:
        wanted = {n: {s: v for s, v in c.items() if s > after_step} for n, c in wanted.items()}
    found = list[Points]()
    place: Place | None = None
    while True:
        page, place = curves.page((), after_step, place, size)
        assert sum(len(piece.steps) for piece in page) <= size
        found += page
        for piece in page:
            assert piece.point_count == len(wanted[piece.metric])
        if place is None:
            break
        assert page, "no page is empty but the last"
    assert same(found, {name: curve for name, curve in wanted.items() if curve})


@settings(max_examples=300, deadline=None)
@given(MANY, st.integers(2, 12))
def test_what_is_thinned_out_keeps_its_ends_and_peaks(values: list[float], most: int) -> None:
    curves = made([(step, {"a": value}) for step, value in enumerate(values)])
    (points,) = asyncio.run(curves.thinned((), 0, most))
    assert len(points.steps) <= most
    assert points.steps == sorted(set(points.steps))
    assert (points.steps[0], points.steps[-1]) == (0, len(values) - 1)
    assert all(repr(values[s]) == repr(v) for s, v in zip(points.steps, points.values, strict=True))
    numbers = [value for value in values if not math.isnan(value)]
    if most >= 4 and numbers:
        kept = [value for value in points.values if not math.isnan(value)]
        assert (min(kept), max(kept)) == (min(numbers), max(numbers))


def test_those_asked_for_longest_ago_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the bound; the last one stays, and what was forgotten is read again."""
    monkeypatch.setattr(module, "_KEPT_POINTS", 15)
    database = Database(tmp_path / "finetuned.db")
    log, keys = EventLog(database), list[int]()
    for name in ("one", "two", "three"):
        with database.transaction(durable=False) as connection:
            task = Task(
                task_id=f"task-{name}",
                display_name=name,
                training_type=TrainingType.SFT,
                parameters=Parameters(),
            )
            keys.append(Records(database).insert_task(connection, task).key)
            log.append(
                connection,
                keys[-1],
                [
                    event_pb2.Event(run=1, metrics=event_pb2.Metrics(step=s, values={"loss": s}))
                    for s in range(10)
                ],
            )

    async def look() -> None:
        curves = Curves(database)
        first = list[RunCurves]()
        for key in (*keys, keys[-1], keys[0]):
            async with curves.of(key, 1) as found:
                assert found.point_count == 10
                first.append(found)
        assert first[3] is first[2], "it was kept"
        assert first[4] is not first[0], "it was forgotten"

    asyncio.run(look())
    database.close()


def test_runs_without_a_point_are_forgotten_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEPT_RUNS", 3)
    database = Database(tmp_path / "finetuned.db")

    async def look() -> None:
        curves = Curves(database)
        found = list[RunCurves]()
        for run in (1, 2, 3, 4, 2, 1):
            async with curves.of(1, run) as one:
                found.append(one)
        assert found[4] is found[1], "it was kept"
        assert found[5] is not found[0], "it was forgotten"

    asyncio.run(look())
    database.close()


async def test_of_a_curve_that_was_thinned_out_the_number_of_points_is_scaled() -> None:
    """All of them where all are asked for; behind a step about as many as there were, not more."""
    whole = made([(step, {"a": math.sin(step)}) for step in range(1, 10_001)])
    restored = RunCurves.restored(await whole.thinned((), 0, 1000))
    for after, there in ((0, 10_000), (2500, 7500), (9000, 1000), (9999, 1)):
        (points,) = await restored.thinned((), after, 1000)
        assert len(points.steps) <= points.point_count
        assert abs(points.point_count - there) <= 20
        (piece,), _ = restored.page((), after, None, 5000)
        assert piece.point_count == points.point_count
    assert (await restored.thinned((), 0, 1000))[0].point_count == 10_000
