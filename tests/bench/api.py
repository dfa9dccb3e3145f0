"""What a unary call takes, beside a bare grpc.aio server that says the same.

Daemon and bare server run at the same time and are asked in turns, by one client that sends ready
bytes and does not parse the answer: what it costs is half of what one call takes, and is the same
for both. The daemon is as it is started, with its log file, and has a hundred tasks.

While nothing is written, the daemon answers from what it has encoded before. So some calls are
measured once more with an edit of the task that is asked for, which is not timed, before each.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import backlog
import psutil
import streams
from bare import message_class
from google.protobuf.message import Message
from grpc import aio
from grpc_health.v1 import health_pb2
from table import Options, Part, Row

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import (
    parameter_service_pb2,
    parameters_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)

BAR = 0.5
"""Calls a second: the daemon's to the bare server's, at least."""
MANY = 50
"""Calls at once."""

_TASKS = 120
_STEPS = 400
"""Of the run that has been, which is two metrics and a progress each."""
_PACKAGE = "finetuned.v1"
_AFTER_AN_EDIT = ("GetTask", "ListTasks", "ListEvents", "GetMetrics")
_TURNS = 4
"""Of each server, a round."""


@dataclass(frozen=True)
class Asked:
    """One method, and what it is asked."""

    method: str
    request: Message
    answer: str
    """Name of the answer's message."""

    @property
    def name(self) -> str:
        """Without package and service."""
        return self.method.rpartition("/")[2]


@dataclass
class Turns:
    """What a server did in its turns."""

    rates: list[float] = field(default_factory=list)
    """Calls a second, of each turn."""
    seconds: list[float] = field(default_factory=list)
    """What each call took."""
    cpu: float = 0.0
    """Seconds of the server's processor time."""

    @property
    def rate(self) -> float:
        """Calls a second."""
        return statistics.median(self.rates)

    def told(self) -> str:
        """Latencies, and what a call costs the server."""
        ordered = sorted(self.seconds)
        middle, late = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        each = self.cpu / len(ordered) * 1e6
        return f"p50 {middle * 1e3:.2f} p99 {late * 1e3:.2f} ms, {each:.0f} us CPU"


@dataclass(frozen=True)
class Server:
    """One of the two, over one kind of socket."""

    channel: aio.Channel
    process: psutil.Process
    metadata: tuple[tuple[str, str], ...] = ()

    def call(self, asked: Asked) -> Callable[[], Awaitable[bytes]]:
        """Asks once. The bytes are not looked at."""
        method: Any = self.channel.unary_unary(asked.method)
        request, metadata = asked.request.SerializeToString(), self.metadata
        return lambda: method(request, metadata=metadata)

    def cpu(self) -> float:
        """Seconds that its process has used."""
        times = self.process.cpu_times()
        return times.user + times.system


def run(options: Options) -> Part:
    """Asks both servers in turns, and the daemon for one stream."""
    part = Part("api", "calls a second of the daemon, to those of a bare grpc.aio server")
    # Its own short folder: a socket's path may have no more than 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ft-") as short:
        scene = Scene(options.folder / "scene")
        daemon = Daemon(options.folder, "--listen", "127.0.0.1:0").start()
        try:
            reads, writes, others = _prepare(daemon, scene, quick=options.quick)
            _answers(daemon, [*reads, *writes, *others], writes, options.folder)
            command = [sys.executable, str(Path(__file__).with_name("bare.py"))]
            socket = Path(short) / "bare.sock"
            bare = subprocess.Popen([*command, str(options.folder), str(socket)])
            try:
                measured = _measure(daemon, options, socket, reads, writes, others)
                part.rows += asyncio.run(measured)
            finally:
                bare.kill()
                bare.wait()
        finally:
            daemon.close()
            scene.close()
    part.rows += streams.stream_rows(options)
    part.rows += backlog.backlog_rows(options)
    return part


def _prepare(
    daemon: Daemon, scene: Scene, *, quick: bool
) -> tuple[list[Asked], list[Asked], list[Asked]]:
    """A task with a run behind it, and many others; what is read, written, and looked up."""
    scene.play(steps=20 if quick else _STEPS, save_steps=100)
    ran = daemon.create(_parameters(scene), start=True).name
    daemon.wait(ran, "COMPLETED")
    for _ in range(_TASKS):
        daemon.create(_parameters(scene))
    service, parameters = "TaskService", "ParameterService"
    reads = [
        _asked("SystemService", "GetSystemInfo", system_service_pb2.GetSystemInfoRequest()),
        _asked(service, "GetTask", task_service_pb2.GetTaskRequest(name=ran)),
        _asked(service, "ListTasks", task_service_pb2.ListTasksRequest(page_size=100)),
        _asked(service, "ListRuns", task_service_pb2.ListRunsRequest(parent=ran)),
        _asked(
            service, "ListEvents", task_service_pb2.ListEventsRequest(parent=ran, page_size=100)
        ),
        _asked(service, "GetMetrics", task_service_pb2.GetMetricsRequest(name=ran, max_points=500)),
        _asked("TemplateService", "ListTemplates", template_service_pb2.ListTemplatesRequest()),
        _asked(
            parameters,
            "GetParameterSchema",
            parameter_service_pb2.GetParameterSchemaRequest(
                training_type=task_pb2.TRAINING_TYPE_SFT
            ),
        ),
        _asked("SystemService", "ListDevices", system_service_pb2.ListDevicesRequest()),
        _asked("SystemService", "GetQuota", system_service_pb2.GetQuotaRequest()),
        Asked(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest(),
            "grpc.health.v1.HealthCheckResponse",
        ),
    ]
    template = daemon.templates.ListTemplates(template_service_pb2.ListTemplatesRequest())
    request = template_service_pb2.GetTemplateRequest(name=template.templates[0].name)
    reads.append(_asked("TemplateService", "GetTemplate", request))
    task = task_pb2.Task(
        training_type=task_pb2.TRAINING_TYPE_SFT, parameters=_parameters(scene), device="cpu"
    )
    changed = daemon.create(_parameters(scene))
    changed.ClearField("etag")
    changed.parameters.training.batch_size = 3
    writes = [
        _asked(service, "CreateTask", task_service_pb2.CreateTaskRequest(task=task)),
        _asked(service, "UpdateTask", task_service_pb2.UpdateTaskRequest(task=changed)),
    ]
    lookups = [
        _asked(service, "ListCheckpoints", task_service_pb2.ListCheckpointsRequest(parent=ran)),
        _asked(service, "ExportTaskConfig", task_service_pb2.ExportTaskConfigRequest(name=ran)),
        _asked(
            parameters,
            "ValidateParameters",
            parameter_service_pb2.ValidateParametersRequest(
                training_type=task_pb2.TRAINING_TYPE_SFT, parameters=_parameters(scene)
            ),
        ),
    ]
    return reads, writes, lookups


def _parameters(scene: Scene) -> parameters_pb2.Parameters:
    """What somebody who has been through the form gives."""
    parameters = scene.parameters(
        batch_size=2,
        gradient_accumulation_steps=4,
        num_train_epochs=3,
        learning_rate=2e-4,
        max_seq_length=512,
    )
    parameters.logging.logging_steps = 1
    return parameters


def _asked(service: str, name: str, request: Message) -> Asked:
    full = f"{_PACKAGE}.{service}"
    return Asked(f"/{full}/{name}", request, f"{_PACKAGE}.{name}Response")


def _answers(daemon: Daemon, asked: list[Asked], writes: list[Asked], folder: Path) -> None:
    """Asks the daemon once, for what the bare server is to say."""
    said = {}
    for each in asked:
        method = daemon.channel.unary_unary(
            each.method,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_class(each.answer).FromString,
        )
        said[each.method] = {
            "request": each.request.DESCRIPTOR.full_name,
            "answer": each.answer,
            "bytes": method(each.request).SerializeToString().hex(),
            "is_write": each in writes,
        }
    (folder / "answers.json").write_text(json.dumps(said))


async def _measure(
    daemon: Daemon,
    options: Options,
    socket: Path,
    reads: list[Asked],
    writes: list[Asked],
    others: list[Asked],
) -> list[Row]:
    assert daemon.process is not None
    ready = options.folder / "ready.json"
    await asyncio.to_thread(eventually, ready.exists, "the bare server serves")
    said = json.loads(ready.read_text())
    addresses = json.loads(daemon.paths.endpoint.read_bytes())["addresses"]
    tcp = next(address for address in addresses if not address.startswith("unix:"))
    token = daemon.paths.token.read_text().strip()
    processes = psutil.Process(daemon.process.pid), psutil.Process(said["pid"])
    metadata = (("authorization", f"Bearer {token}"),)
    rows = list[Row]()
    for kind, ours, theirs, shown in (
        ("unix", daemon.address, f"unix:{socket}", ()),
        ("TCP", tcp, f"127.0.0.1:{said['port']}", metadata),
    ):
        async with (
            aio.insecure_channel(ours) as one,
            aio.insecure_channel(theirs) as other,
        ):
            # The same metadata to both, so that the client does the same.
            pair = Server(one, processes[0], shown), Server(other, processes[1], shown)
            for at_once in (1, MANY):
                clients = "one client" if at_once == 1 else f"{at_once} at once"
                for asked in reads:
                    turns = await _turns(pair, asked, at_once, options)
                    rows.append(_row(f"{asked.name}, {kind}, {clients}", turns, BAR))
            if kind == "TCP":
                continue
            edit = _edits(pair[0], reads)
            for asked in reads:
                if asked.name in _AFTER_AN_EDIT:
                    turns = await _turns(pair, asked, 1, options, edit)
                    rows.append(_row(f"{asked.name}, each after an edit, {kind}", turns, None))
            for asked in others:
                turns = await _turns(pair, asked, 1, options)
                rows.append(_row(f"{asked.name}, reads files, {kind}, one client", turns, None))
            for asked in writes:
                turns = await _turns(pair, asked, 1, options)
                against = "bare grpc.aio + SQLite FULL"
                rows.append(_row(f"{asked.name}, {kind}, one client", turns, None, against))
    return rows


def _edits(server: Server, reads: list[Asked]) -> Callable[[], Awaitable[bytes]]:
    """Gives the task that is read another name, each time."""
    asked: Any = next(each.request for each in reads if each.name == "GetTask")
    name = asked.name
    method: Any = server.channel.unary_unary(f"/{_PACKAGE}.TaskService/UpdateTask")
    numbers = itertools.count()

    def edit() -> Awaitable[bytes]:
        request = task_service_pb2.UpdateTaskRequest()
        request.task.name, request.task.display_name = name, f"edited {next(numbers)}"
        request.update_mask.paths.append("display_name")
        answer: Awaitable[bytes] = method(request.SerializeToString(), metadata=server.metadata)
        return answer

    return edit


def _row(
    what: str, turns: tuple[Turns, Turns], bar: float | None, against: str = "bare grpc.aio"
) -> Row:
    ours, theirs = turns
    detail = f"{ours.told()}; bare {theirs.told()}"
    rates = ours.rate, "calls/s", theirs.rate
    return Row(what, *rates, against, bar, is_cost=False, detail=detail)


async def _turns(
    pair: tuple[Server, Server],
    asked: Asked,
    at_once: int,
    options: Options,
    edit: Callable[[], Awaitable[bytes]] | None = None,
) -> tuple[Turns, Turns]:
    """Both in turns, so that what else the machine does meets both.

    Before each call comes `edit`, if there is one, to the daemon, whichever is asked.
    """
    seconds = 0.02 if options.quick else 0.2
    count = 1 if options.quick else _TURNS * options.rounds
    found = Turns(), Turns()
    calls = [server.call(asked) for server in pair]
    for call in calls:  # connects, and fills what is filled once
        for _ in range(3):
            await call()
    for number in range(count):
        # Each goes first as often: a processor's speed changes with what it did before.
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            if edit is None:
                await _turn(pair[place], calls[place], at_once, seconds, found[place])
            else:
                await _turn_with_edits(pair[place], calls[place], edit, seconds, found[place])
    return found


async def _turn_with_edits(
    server: Server,
    call: Callable[[], Awaitable[bytes]],
    edit: Callable[[], Awaitable[bytes]],
    seconds: float,
    into: Turns,
) -> None:
    taken = list[float]()
    until = time.perf_counter() + 3 * seconds
    while not taken or time.perf_counter() < until:
        await edit()
        used, before = server.cpu(), time.perf_counter()
        await call()
        taken.append(time.perf_counter() - before)
        into.cpu += server.cpu() - used
    into.rates.append(len(taken) / sum(taken))
    into.seconds += taken


async def _turn(
    server: Server, call: Callable[[], Awaitable[bytes]], at_once: int, seconds: float, into: Turns
) -> None:
    taken = list[float]()
    used = server.cpu()
    began = time.perf_counter()

    async def ask() -> None:
        before = began
        while before < began + seconds:
            await call()
            now = time.perf_counter()
            taken.append(now - before)
            before = now

    if at_once == 1:
        await ask()
    else:
        await asyncio.gather(*(ask() for _ in range(at_once)))
    into.rates.append(len(taken) / (time.perf_counter() - began))
    into.cpu += server.cpu() - used
    into.seconds += taken
