"""Growth: what each rpc takes with 10,000 tasks and 5 million events, beside 100 tasks.

Two daemons of the same code on one machine, asked in turns for the same things: pages of the same
length, a task of the same size. Every rpc of the API is in it, but Shutdown.
"""

from __future__ import annotations

import itertools
import shutil
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import history
import psutil
from google.protobuf import field_mask_pb2
from table import Options, Part, Row

import tiny
from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)

BAR = 1.5
SMALL = history.Size(tasks=100, events=340_000, long_tasks=3, templates=10)
BIG = history.Size(tasks=10_000, events=5_000_000, long_tasks=10, templates=1000)
QUICK = (
    history.Size(tasks=100, events=20_000, long_tasks=3, templates=10, long_events=2000),
    history.Size(tasks=500, events=60_000, long_tasks=3, templates=50, long_events=2000),
)

LEFT_OUT = frozenset({"Shutdown"})
"""It ends what is measured."""

_CALLS = 30
"""Of each rpc a round and daemon."""
_WAITING = 20
"""Tasks in the queue of each."""

Calls = Iterator[tuple[str, Callable[[], object]]]


class Side:
    """One daemon, and what is asked of it."""

    def __init__(self, name: str, folder: Path, size: history.Size) -> None:
        self.name, self.size = name, size
        self.scene = Scene(folder / "scene")
        self.daemon = Daemon(folder, "--backup-hours", "0")
        self.database = self.daemon.paths.state_dir / "finetuned.db"
        history.write(self.database, size, self.scene.model, self.scene.data)
        self.tiny = tiny.make_model(folder / "tiny")
        self.bytes = self.database.stat().st_size
        self._numbers = itertools.count()
        self.made: list[str] = []
        self.stopped: list[str] = []
        self.checkpoints: list[str] = []
        self.templates: list[str] = []

    # --- life

    def start(self) -> float:
        """Starts the daemon; seconds until it serves."""
        began = time.monotonic()
        self.daemon.start()
        return time.monotonic() - began

    def stage(self, checkpoints: int) -> None:
        """A task with real checkpoints; one that holds the device; some that wait."""
        parameters = self.scene.play(steps=checkpoints, save_steps=1)
        self.saved = self.daemon.create(parameters, start=True).name
        self.daemon.wait(self.saved, "COMPLETED")
        request = task_service_pb2.ListCheckpointsRequest(parent=self.saved, page_size=1000)
        self.checkpoints = [
            one.name for one in self.daemon.tasks.ListCheckpoints(request).checkpoints
        ]
        holder = self.daemon.create(self.scene.play(hold="TRAINING"), start=True)
        self.daemon.wait(holder.name, "RUNNING")
        self.waiting = [self._create(start=True).name for _ in range(_WAITING)]

    @property
    def memory(self) -> int:
        """Resident bytes of the daemon."""
        assert self.daemon.process is not None
        return int(psutil.Process(self.daemon.process.pid).memory_info().rss)

    def close(self) -> None:
        """Ends the daemon and what it runs."""
        self.daemon.close()
        self.scene.close()

    # --- what is asked

    def _create(self, *, start: bool = False) -> task_pb2.Task:
        parameters = self.scene.parameters()
        parameters.data.output_dir = str(self.scene.root / f"out-{next(self._numbers)}")
        return self.daemon.create(parameters, start=start)

    def create(self, names: list[str], *, start: bool) -> None:
        """CreateTask."""
        names.append(self._create(start=start).name)

    def calls(self) -> Calls:
        """Each unary rpc, in an order in which each finds what it needs; one call each."""
        tasks, templates = self.daemon.tasks, self.daemon.templates
        parameters, system = self.daemon.parameters, self.daemon.system
        t, p, m, s = (
            task_service_pb2,
            parameter_service_pb2,
            template_service_pb2,
            system_service_pb2,
        )
        probe = f"tasks/{history.PROBE}"
        given = self.scene.parameters()
        sft = task_pb2.TRAINING_TYPE_SFT
        yield "GetTask", lambda: tasks.GetTask(t.GetTaskRequest(name=probe))
        yield "ListTasks", lambda: tasks.ListTasks(t.ListTasksRequest(page_size=90))
        some = [task_pb2.TASK_STATE_FAILED, task_pb2.TASK_STATE_COMPLETED]
        request = t.ListTasksRequest(page_size=50, states=some)
        yield "ListTasks, of two states", lambda: tasks.ListTasks(request)
        yield (
            "ListRuns",
            lambda: tasks.ListRuns(t.ListRunsRequest(parent=probe)),
        )
        yield (
            "ListEvents",
            lambda: tasks.ListEvents(
                t.ListEventsRequest(parent=probe, after_seq=100, page_size=100)
            ),
        )
        long = f"tasks/{history.long_task(0)}"
        yield (
            "ListEvents, of a long task",
            lambda: tasks.ListEvents(
                t.ListEventsRequest(
                    parent=long, after_seq=self.size.long_events // 2, page_size=100
                )
            ),
        )
        yield (
            "GetMetrics",
            lambda: tasks.GetMetrics(t.GetMetricsRequest(name=probe, max_points=200)),
        )
        yield (
            "GetMetrics, of a long task",
            lambda: tasks.GetMetrics(t.GetMetricsRequest(name=long, max_points=200)),
        )
        yield (
            "ListCheckpoints",
            lambda: tasks.ListCheckpoints(t.ListCheckpointsRequest(parent=self.saved, page_size=9)),
        )
        yield (
            "DeleteCheckpoint",
            lambda: tasks.DeleteCheckpoint(t.DeleteCheckpointRequest(name=self.checkpoints.pop())),
        )
        yield (
            "ExportTaskConfig",
            lambda: tasks.ExportTaskConfig(t.ExportTaskConfigRequest(name=probe)),
        )
        yield "CreateTask", lambda: self.create(self.made, start=False)
        edited = t.UpdateTaskRequest(
            task=task_pb2.Task(display_name=f"x{next(self._numbers)}"),
            update_mask=field_mask_pb2.FieldMask(paths=["display_name"]),
        )
        yield "UpdateTask", lambda: tasks.UpdateTask(self._named(edited, self.made[-1]))
        yield "StartTask", lambda: tasks.StartTask(t.StartTaskRequest(name=self.made[-1]))
        yield "MoveTask", lambda: tasks.MoveTask(t.MoveTaskRequest(name=self.made[-1], position=3))
        yield "PauseTask", lambda: tasks.PauseTask(t.PauseTaskRequest(name=self.made[-1]))
        yield "ResumeTask", lambda: tasks.ResumeTask(t.ResumeTaskRequest(name=self.made[-1]))
        yield (
            "GetTask, of one that waits",
            lambda: tasks.GetTask(t.GetTaskRequest(name=self.made[-1])),
        )
        yield "StopTask", lambda: tasks.StopTask(t.StopTaskRequest(name=self.made[-1]))
        yield "DeleteTask", lambda: tasks.DeleteTask(t.DeleteTaskRequest(name=self.made.pop()))
        number = next(self._numbers)
        template = m.Template(display_name=f"of bench {number}", training_type=sft)
        yield (
            "CreateTemplate",
            lambda: self.templates.append(
                templates.CreateTemplate(m.CreateTemplateRequest(template=template)).template.name
            ),
        )
        yield (
            "GetTemplate",
            lambda: templates.GetTemplate(m.GetTemplateRequest(name=self.templates[-1])),
        )
        yield "ListTemplates", lambda: templates.ListTemplates(m.ListTemplatesRequest(page_size=9))
        renamed = m.Template(display_name=f"of bench, edited {number}")
        yield (
            "UpdateTemplate",
            lambda: templates.UpdateTemplate(self._template(renamed, self.templates[-1])),
        )
        yield (
            "DeleteTemplate",
            lambda: templates.DeleteTemplate(m.DeleteTemplateRequest(name=self.templates.pop())),
        )
        yield (
            "GetParameterSchema",
            lambda: parameters.GetParameterSchema(p.GetParameterSchemaRequest(training_type=sft)),
        )
        yield (
            "ValidateParameters",
            lambda: parameters.ValidateParameters(
                p.ValidateParametersRequest(training_type=sft, parameters=given, device="cpu")
            ),
        )
        yield "GetSystemInfo", lambda: system.GetSystemInfo(s.GetSystemInfoRequest())
        yield "CheckEnvironment", lambda: system.CheckEnvironment(s.CheckEnvironmentRequest())
        yield "ListDevices", lambda: system.ListDevices(s.ListDevicesRequest())
        yield "GetQuota", lambda: system.GetQuota(s.GetQuotaRequest())
        watched = t.WatchTaskRequest(name=probe)
        yield "WatchTask", lambda: _first(tasks.WatchTask(watched))
        yield "WatchDevices", lambda: _first(system.WatchDevices(s.WatchDevicesRequest()))

    def slow_calls(self) -> Calls:
        """Those that start a process; asked once a round."""
        sft, given = task_pb2.TRAINING_TYPE_SFT, self.scene.parameters(max_steps=10)
        given.data.model_path = str(self.tiny)
        estimated = parameter_service_pb2.EstimateTaskRequest(
            training_type=sft, parameters=given, device="cpu"
        )
        yield "EstimateTask", lambda: self.daemon.parameters.EstimateTask(estimated)
        inspected = dataset_service_pb2.InspectDatasetRequest(
            path=str(self.scene.data), training_type=sft
        )
        yield "InspectDataset", lambda: list(self.daemon.datasets.InspectDataset(inspected))

    def _named(
        self, request: task_service_pb2.UpdateTaskRequest, name: str
    ) -> task_service_pb2.UpdateTaskRequest:
        request.task.name = name
        return request

    def _template(
        self, template: template_service_pb2.Template, name: str
    ) -> template_service_pb2.UpdateTemplateRequest:
        template.name = name
        mask = field_mask_pb2.FieldMask(paths=["display_name"])
        return template_service_pb2.UpdateTemplateRequest(template=template, update_mask=mask)

    def listing(self) -> float:
        """Seconds of WatchTasks a task, until all are listed."""
        began = time.perf_counter()
        stream = self.daemon.tasks.WatchTasks(task_service_pb2.WatchTasksRequest())
        for response in stream:
            if response.HasField("synced"):
                break
        seconds = time.perf_counter() - began
        stream.cancel()
        return seconds / response.synced.task_count

    def beside(self, work: Callable[[], object]) -> tuple[float, float]:
        """How long some work takes, and the slowest GetTask meanwhile, both in seconds."""
        request = task_service_pb2.GetTaskRequest(name=f"tasks/{history.PROBE}")
        worker = threading.Thread(target=work)
        began, worst = time.perf_counter(), 0.0
        worker.start()
        while worker.is_alive():
            asked = time.perf_counter()
            self.daemon.tasks.GetTask(request)
            worst = max(worst, time.perf_counter() - asked)
        return time.perf_counter() - began, worst


def _first(stream: Any) -> None:
    next(stream)
    stream.cancel()


def asked() -> set[str]:
    """Names of all rpcs that are measured."""
    return _names() | {"WatchTasks", "EstimateTask", "InspectDataset"}


def _names() -> set[str]:
    side = object.__new__(Side)
    side.scene = Scene.__new__(Scene)
    side.scene.root = Path("/nowhere")
    side.daemon = Daemon(Path("/nowhere"))
    side._numbers = itertools.count()
    side.made = side.templates = []
    return {name.split(",")[0] for name, _ in side.calls()}


def rpcs() -> set[str]:
    """Names of all rpcs of the API but those that are left out."""
    services = (
        *(task_service_pb2, template_service_pb2, parameter_service_pb2),
        *(dataset_service_pb2, system_service_pb2),
    )
    return {
        method.name
        for module in services
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    } - LEFT_OUT


def run(options: Options) -> Part:
    """Measures growth."""
    small, big = QUICK if options.quick else (SMALL, BIG)
    part = Part(
        name="growth",
        about=f"each rpc with {big.tasks:,} tasks and {big.events:,} events, beside {small.tasks} "
        "tasks",
    )
    sides = list[Side]()
    try:
        for name, size in (("small", small), ("big", big)):
            sides.append(Side(name, options.folder / name, size))
        measure(part, sides[0], sides[1], options)
    finally:
        for side in sides:
            side.close()
            shutil.rmtree(options.folder / side.name, ignore_errors=True)
    return part


def measure(part: Part, small: Side, big: Side, options: Options) -> None:
    """Adds all rows."""
    against = f"{small.size.tasks} tasks"
    calls = 5 if options.quick else _CALLS
    starts = defaultdict[str, list[float]](list)
    for _ in range(options.rounds):
        for side in (small, big):
            starts[side.name].append(side.start())
            side.daemon.stop()
    for side in (small, big):
        side.start()
        side.stage(calls * options.rounds + 5)
    first = [side.memory for side in (small, big)]
    seen = {side.name: defaultdict[str, list[float]](list) for side in (small, big)}
    for _ in range(calls * options.rounds):
        for (name, ask_small), (_, ask_big) in zip(small.calls(), big.calls(), strict=True):
            for side, ask in ((small, ask_small), (big, ask_big)):
                began = time.perf_counter()
                ask()
                seen[side.name][name].append(time.perf_counter() - began)
    for _ in range(options.rounds):
        for side in (small, big):
            for name, ask in side.slow_calls():
                began = time.perf_counter()
                ask()
                seen[side.name][name].append(time.perf_counter() - began)
            seen[side.name]["WatchTasks, a task of the listing"].append(side.listing())
    for name, times in seen["big"].items():
        base = seen["small"][name]
        part.rows.append(_row(name, statistics.median(times), statistics.median(base), against))
        if len(times) >= 20:
            worst, usual = _p99(times), _p99(base)
            part.rows.append(Row(f"{name}, 99 of 100", worst * 1e3, "ms", usual * 1e3, against))
    part.rows.append(
        Row(
            "start, to serving",
            statistics.median(starts["big"]),
            "s",
            statistics.median(starts["small"]),
            against,
        )
    )
    part.rows.append(Row("memory after the start", first[1] / 1e6, "MB", first[0] / 1e6, against))
    part.rows.append(Row("memory at the end", big.memory / 1e6, "MB", small.memory / 1e6, against))
    part.rows.append(Row("database", big.bytes / 1e6, "MB", small.bytes / 1e6, against))
    _beside(part, small, big, against)


def _beside(part: Part, small: Side, big: Side, against: str) -> None:
    """What takes long, and how long others wait meanwhile."""
    events = big.size.long_events
    works: tuple[tuple[str, Callable[[Side], object]], ...] = (
        (
            f"GetMetrics of {events:,} events, the first time",
            lambda side: side.daemon.tasks.GetMetrics(
                task_service_pb2.GetMetricsRequest(
                    name=f"tasks/{history.long_task(1)}", max_points=1000
                )
            ),
        ),
        (
            f"DeleteTask of {events:,} events",
            lambda side: side.daemon.tasks.DeleteTask(
                task_service_pb2.DeleteTaskRequest(name=f"tasks/{history.long_task(2)}")
            ),
        ),
    )
    for name, work in works:
        found = [side.beside(lambda side=side, work=work: work(side)) for side in (small, big)]  # type: ignore[misc]
        part.rows.append(_row(name, found[1][0], found[0][0], against))
        part.rows.append(
            Row(f"the slowest GetTask beside {name}", found[1][1] * 1e3, "ms", 50.0, "50 ms", 1.0)
        )


def _row(name: str, figure: float, limit: float, against: str) -> Row:
    return Row(name, figure * 1e3, "ms", limit * 1e3, against, BAR)


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[-1]
