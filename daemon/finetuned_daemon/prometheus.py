"""What the daemon tells Prometheus: tasks, live runs, devices, bounds, calls, and itself.

Imported only where it is asked for: prometheus-client is an extra.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from finetuned._version import __version__
from finetuned_daemon.app import App
from finetuned_daemon.devices import Look
from finetuned_daemon.limits import LIMITS
from finetuned_daemon.runs.contract import EndReason
from finetuned_daemon.scrape import Body
from finetuned_daemon.store.database import Database
from finetuned_daemon.tasks import Run, Task, TaskState

_SAME_MOMENT_SECONDS = 0.5
_MOST_RUNS = 100
"""Live runs that are told of: as many as there are devices, in truth."""


class Metrics:
    """Makes what is answered to a scrape."""

    def __init__(
        self,
        app: App,
        database: Database,
        calls: Mapping[tuple[str, str], int],
        seconds: Mapping[str, tuple[int, float]],
    ) -> None:
        """Takes what is told of.

        Args:
            app: The daemon.
            database: Its file is measured.
            calls: Calls that were answered, by gRPC's name for the method and the status' name.
            seconds: Number and duration of those that were answered once, by the same name.
        """
        self._app = app
        self._database = database
        self._calls = calls
        self._seconds = seconds
        # Of this process; what it reads lies in /proc, and nothing comes where there is none.
        self._process = ProcessCollector(registry=None)
        self._lock = asyncio.Lock()
        self._told = dict[bool, tuple[float, Body]]()

    async def render(self, accept: str) -> Body:
        """The metrics, in the format that a scraper takes; at the same moment to all the same."""
        async with self._lock:
            is_open = "application/openmetrics-text" in accept
            until, body = self._told.get(is_open, (0.0, None))
            if body is None or time.monotonic() > until:
                look = await self._app.looks.look()
                families = [*self._tasks(), *self._runs(), *_devices(look, self._app)]
                families += [*self._bounds(), *self._counters(), *self._storage()]
                collector = _Collected(families, self._process)
                body = await asyncio.to_thread(_encode, collector, is_open)
                self._told[is_open] = (time.monotonic() + _SAME_MOMENT_SECONDS, body)
            return body

    def _tasks(self) -> Iterator[Metric]:
        counts = self._app.manager.records.counts()
        yield _gauge(
            "finetuned_tasks",
            "Tasks by state.",
            ("state",),
            [((state.lower(),), counts.get(state, 0)) for state in TaskState],
        )
        info = {"version": __version__, "python_version": platform.python_version()}
        yield InfoMetricFamily("finetuned_build", "The daemon.", value=info)

    def _runs(self) -> Iterator[Metric]:
        records = self._app.manager.records
        tasks = records.tasks(
            limit=_MOST_RUNS, before_key=0, states=[TaskState.RUNNING], display_name=""
        )
        found = [(task, records.run(task.key, task.run)) for task in tasks]
        live = [(task, run) for task, run in found if run is not None]
        info = GaugeMetricFamily(
            "finetuned_run_info",
            "A live run: its value is 1, and its labels say what it is.",
            labels=("task", "run", "display_name", "training_type", "device", "phase"),
        )
        for task, run in live:
            kind, phase = task.training_type.lower(), task.phase.lower() if task.phase else ""
            info.add_metric((*_of(task, run), task.display_name, kind, run.device, phase), 1)
        yield info
        for name, text, values in (
            ("step", "Optimizer step.", [t.progress.step for t, _ in live]),
            ("total_steps", "Steps that it will take.", [t.progress.total_steps for t, _ in live]),
            ("epoch", "Passes over the data.", [t.progress.epoch for t, _ in live]),
            ("loss", "Training loss, in nats a token.", [t.progress.loss for t, _ in live]),
            ("learning_rate", "Learning rate.", [t.progress.learning_rate for t, _ in live]),
            ("tokens", "Tokens it has seen.", [t.progress.num_tokens for t, _ in live]),
            ("tokens_per_second", "Speed.", [t.progress.tokens_per_second for t, _ in live]),
            ("eta_seconds", "Time to its end.", [t.progress.eta_seconds for t, _ in live]),
            ("start_timestamp_seconds", "When it began.", [r.start_time / 1e6 for _, r in live]),
        ):
            samples = [
                (_of(task, run), value)
                for (task, run), value in zip(live, values, strict=True)
                if value is not None
            ]
            yield _gauge(f"finetuned_run_{name}", f"Of a live run: {text}", _RUN, samples)

    def _bounds(self) -> Iterator[Metric]:
        limits = self._app.limits
        used = [(limit.name, limits.used(limit.name)) for limit in LIMITS]
        yield _gauge(
            "finetuned_limit",
            "Bounds of the daemon, 0 for none.",
            ("limit",),
            [((limit.name,), limits[limit.name]) for limit in LIMITS],
        )
        yield _gauge(
            "finetuned_limit_used",
            "What of a bound is in use.",
            ("limit",),
            [((name,), value) for name, value in used if value is not None],
        )
        yield _gauge(
            "finetuned_open_streams",
            "Watches and other streams of clients.",
            (),
            [((), limits.used("open_streams") or 0)],
        )

    def _counters(self) -> Iterator[Metric]:
        tally = self._app.manager.tally
        yield _counter(
            "finetuned_runs_ended",
            "Runs that ended, since the daemon began.",
            ("end_reason",),
            [((reason.lower(),), tally.ends[reason]) for reason in EndReason],
        )
        yield _counter(
            "finetuned_events_written",
            "Events written into the logs of tasks, since the daemon began.",
            ("kind",),
            [((kind,), count) for kind, count in sorted(tally.events.items())],
        )
        yield _counter(
            "finetuned_grpc_calls",
            "Calls that were answered, and streams that ended, since the daemon began.",
            ("service", "method", "code"),
            [((*_method(name), code), n) for (name, code), n in sorted(self._calls.items())],
        )
        seconds = SummaryMetricFamily(
            "finetuned_grpc_call_duration_seconds",
            "How long calls took; streams are not in it.",
            labels=("service", "method"),
        )
        for name, (count, total) in sorted(self._seconds.items()):
            seconds.add_metric(_method(name), count, total)
        yield seconds

    def _storage(self) -> Iterator[Metric]:
        path = self._database.path
        sizes = {"database": path, "wal": path.with_name(f"{path.name}-wal")}
        yield _gauge(
            "finetuned_database_size_bytes",
            "Size of the database, and of its log.",
            ("file",),
            [((name,), _size(file)) for name, file in sizes.items()],
        )
        backup = self._app.backups.last_time
        yield _gauge(
            "finetuned_last_backup_timestamp_seconds",
            "When the newest backup of the database was made; absent: never.",
            (),
            [] if backup is None else [((), backup / 1e6)],
        )


class _Collected(Collector):
    """What was gathered on the event loop; what /proc says is read by whoever encodes it."""

    def __init__(self, families: Iterable[Metric], process: Collector) -> None:
        self._families = families
        self._process = process

    def collect(self) -> Iterable[Metric]:
        yield from self._families
        yield from self._process.collect()


def _encode(collector: Collector, is_open: bool) -> Body:
    """The text: OpenMetrics, or the older format. No name of ours needs what is newer in either."""
    if is_open:
        data: bytes = openmetrics.generate_latest(collector)  # type: ignore[no-untyped-call]
        return Body(openmetrics.CONTENT_TYPE_LATEST, data)
    return Body("text/plain; version=0.0.4; charset=utf-8", generate_latest(collector))


_Samples = Sequence[tuple[Sequence[str], float]]

_RUN = ("task", "run")


def _of(task: Task, run: Run) -> tuple[str, str]:
    return task.name, str(run.number)


def _devices(look: Look, app: App) -> Iterator[Metric]:
    occupancy = app.manager.records.occupancy()
    devices = look.devices
    names = [(device.id,) for device in devices]
    yield _gauge(
        "finetuned_device_info",
        "A device: its value is 1, and its labels say what it is.",
        ("device", "product_name"),
        [((device.id, device.product_name), 1) for device in devices],
    )
    for name, text, values in (
        ("memory_total_bytes", "All memory.", [d.memory_total_bytes for d in devices]),
        ("memory_free_bytes", "Free memory.", [d.memory_free_bytes for d in devices]),
        ("utilization_ratio", "Use, from 0 to 1.", [d.utilization for d in devices]),
        ("temperature_celsius", "Temperature.", [d.temperature_celsius for d in devices]),
        ("power_watts", "Power drawn.", [d.power_watts for d in devices]),
        ("busy", "1: a run has it.", [bool(occupancy.get(d.id, ("", 0))[0]) for d in devices]),
    ):
        samples = [
            (labels, value)
            for labels, value in zip(names, values, strict=True)
            if value is not None
        ]
        yield _gauge(f"finetuned_device_{name}", f"Of a device: {text}", ("device",), samples)
    waiting = {device.id: 0 for device in devices} | {d: n for d, (_, n) in occupancy.items()}
    yield _gauge(
        "finetuned_queue_length",
        "Runs that wait for a device.",
        ("device",),
        [((device,), number) for device, number in sorted(waiting.items())],
    )


def _gauge(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _counter(name: str, text: str, labels: Sequence[str], samples: _Samples) -> Metric:
    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family


def _method(name: str) -> tuple[str, str]:
    """Service and rpc of gRPC's name for a method, `/package.Service/Rpc`."""
    service, _, rpc = name.rpartition("/")
    return service.rpartition(".")[2], rpc


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
