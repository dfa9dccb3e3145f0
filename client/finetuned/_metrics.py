"""Curves of runs: what came of GetMetrics, and the methods of both clients."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from finetuned._caller import Caller
from finetuned._calls import TASK_SERVICE, Call, Steps, T, items, resolve
from finetuned._checks import check_numbers, check_texts
from finetuned._html import curve_svg
from finetuned.v1.task_service_pb2 import GetMetricsRequest, GetMetricsResponse

if TYPE_CHECKING:
    import pandas as pd

_TIME = "time"
_EPOCH = "epoch"
_DRAWN = 500
"""Points of a curve that are drawn, about."""


@dataclass
class Series:
    """One curve of a run. The lists are of equal length, in ascending order of steps."""

    name: str
    """Such as `loss`."""
    steps: list[int] = field(default_factory=list[int])
    """Optimizer steps."""
    values: list[float] = field(default_factory=list[float])
    """Values at these steps; not a number and infinity are possible."""
    epochs: list[float] = field(default_factory=list[float])
    """Passes over the training data at these steps, with fraction."""
    times: list[float] = field(default_factory=list[float])
    """When they were measured, in seconds since 1970 (Unix time)."""
    point_count: int = 0
    """Points that the run has; more than are here where the curve was thinned out."""

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        if not self.steps:
            return f"Series({self.name!r}, no points)"
        points = "1 point" if len(self) == 1 else f"{len(self)} points"
        return f"Series({self.name!r}, {points}, {self.values[-1]:.6g} at step {self.steps[-1]})"

    def to_pandas(self) -> pd.Series:
        """The values as a pandas `Series`, by step.

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _pandas()
        index = pandas.Index(self.steps, dtype="int64", name="step")
        series: pd.Series = pandas.Series(self.values, index=index, name=self.name, dtype="float64")
        return series


@dataclass
class Metrics:
    """The curves of one run, by name."""

    run: int
    """Number of the run; 0 where the task has none yet."""
    series: dict[str, Series] = field(default_factory=dict[str, Series])
    """Each value that was measured, such as `loss` or `eval_loss`."""

    def __repr__(self) -> str:
        return f"Metrics(run={self.run}, series={list(self.series.values())})"

    def to_pandas(self) -> pd.DataFrame:
        """A pandas `DataFrame` with a row for each step.

        Columns are `epoch`, `time` (UTC), and one for each value; where a value was not measured at
        a step, such as `eval_loss` at most of them, it is NaN there. A value that is itself named
        `epoch` or `time` has the column `epoch_value` or `time_value`.

        >>> task = client.task("greetings").start().wait()
        >>> task.metrics().to_pandas()[["epoch", "loss"]].round(2)
              epoch  loss
        step
        1      0.33  1.00
        2      0.67  0.50
        3      1.00  0.33

        Raises:
            ImportError: pandas is not installed.
        """
        pandas = _pandas()
        epochs = dict[int, float]()
        times = dict[int, float]()
        for series in self.series.values():
            epochs.update(zip(series.steps, series.epochs, strict=True))
            times.update(zip(series.steps, series.times, strict=True))
        steps = sorted(epochs)
        columns: dict[str, Any] = {
            _EPOCH: pandas.array([epochs[step] for step in steps], dtype="float64"),
            _TIME: pandas.to_datetime(
                pandas.array([times[step] for step in steps], dtype="float64"), unit="s", utc=True
            ),
        }
        index = pandas.Index(steps, dtype="int64", name="step")
        frame: pd.DataFrame = pandas.DataFrame(columns, index=index)
        for name, series in self.series.items():
            frame[f"{name}_value" if name in (_EPOCH, _TIME) else name] = (
                series.to_pandas().reindex(index)
            )
        return frame

    def _repr_html_(self) -> str:
        """What notebooks show: the losses, or the first curve where there are none."""
        names = [name for name in ("loss", "eval_loss") if name in self.series]
        drawn = names or list(self.series)[:1]
        curves = {
            name: _thinned(self.series[name].steps, self.series[name].values) for name in drawn
        }
        return f"<div>{escape(repr(self))}{curve_svg(curves)}</div>"


def _thinned(steps: list[int], values: list[float]) -> dict[int, float]:
    """Points that look the same in a drawing: of each stretch the lowest and the highest."""
    points = list(zip(steps, values, strict=True))
    if len(points) <= _DRAWN:
        return dict(points)
    kept = {points[0], points[-1]}
    width = -(-len(points) // (_DRAWN // 2))
    for begin in range(0, len(points), width):
        stretch = [point for point in points[begin : begin + width] if math.isfinite(point[1])]
        if stretch:
            kept.add(min(stretch, key=lambda point: point[1]))
            kept.add(max(stretch, key=lambda point: point[1]))
    return dict(sorted(kept))


def _add(metrics: Metrics, answer: GetMetricsResponse) -> None:
    """Add a page, whose points go on where those of the page before ended."""
    metrics.run = answer.run
    for page in answer.series:
        series = metrics.series.setdefault(page.metric, Series(page.metric))
        series.steps.extend(page.steps)
        series.values.extend(page.values)
        series.epochs.extend(page.epochs)
        series.times.extend(page.times)
        series.point_count = page.point_count
    metrics.series = dict(sorted(metrics.series.items()))


def metrics(
    name: str, run: int, names: str | Iterable[str], after_step: int, max_points: int
) -> Steps[Metrics]:
    """GetMetrics, all pages."""
    wanted = items(names)
    check_texts(**{f"names[{place}]": text for place, text in enumerate(wanted)})
    check_numbers(run=run, max_points=max_points)
    check_numbers(64, after_step=after_step)
    request = GetMetricsRequest(
        name=(yield from resolve(name)),
        run=run,
        metrics=wanted,
        after_step=after_step,
        max_points=max_points,
    )
    result = Metrics(run)
    while True:
        answer: GetMetricsResponse = yield Call(TASK_SERVICE, "GetMetrics", request)
        _add(result, answer)
        if not answer.next_page_token:
            return result
        # The pages are of one run, whatever is started meanwhile.
        request.run = answer.run
        request.page_token = answer.next_page_token


def _pandas() -> Any:
    """The package, which is optional.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module("pandas")
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ImportError(
            "to_pandas() needs pandas: pip install 'finetuned[notebook]'", name="pandas"
        ) from error


class Curves(Caller):
    """What `Client` tells of measured values."""

    def metrics(
        self,
        name: str,
        run: int = 0,
        *,
        names: str | Iterable[str] = (),
        after_step: int = 0,
        max_points: int = 0,
    ) -> Metrics:
        """The curves of a run: every value that was measured, in order of steps.

        Args:
            name: The task.
            run: Number of the run. 0: the newest that trained or trains, probes left out.
            names: Names of the values wanted, such as `loss`. None given: all.
            after_step: Only steps after this one.
            max_points: Points a curve at most, 2 to 10000: of each stretch its lowest and highest
                value stay. 0: every point.

        Raises:
            NotFound: No such task, or no such run.
            InvalidArgument: A number is out of its range.
        """
        return self._run(metrics(name, run, names, after_step, max_points))


class AsyncCurves:
    """What `AsyncClient` tells of measured values."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def metrics(
        self,
        name: str,
        run: int = 0,
        *,
        names: str | Iterable[str] = (),
        after_step: int = 0,
        max_points: int = 0,
    ) -> Metrics:
        return await self._run(metrics(name, run, names, after_step, max_points))

    metrics.__doc__ = Curves.metrics.__doc__
