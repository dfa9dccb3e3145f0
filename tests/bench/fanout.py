"""A thousand watchers, a hundred of them stalled: how late events reach the others.

A real daemon with runs of the fake runner, which write a hundred events a second between them, and
watchers in processes of their own: `watchers.py`. Each event's latency is from the time that its
run wrote it with to when a watcher's process had it in its hands, for each watcher that reads. The
limit of the same run is `pusher.py`, a bare grpc.aio server that sends as many messages of the same
events to as many streams: what it takes is what gRPC and the clients take on this machine.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from table import Options, Part, Row
from watchers import WATCH_TASK, WATCH_TASKS

from conftest import Scene
from daemon_process import Daemon, eventually, python_path
from finetuned.v1 import task_pb2, task_service_pb2

FOLDER = Path(__file__).parent

BAR_MS = 100.0
"""Of the 99th percentile of all latencies."""
BAR_MEMORY_MB = 64.0
"""By which the daemon may grow: the thousand streams themselves, and a hundred that are stalled."""

_EVENTS = 100.0
"""A second, of all tasks together. A step of the fake runner is two."""
_PROCESSES = 2
_CONNECTIONS = 10
"""Of each process."""
_GPUS = 10
_STREAM_SECONDS = 50e-6
_LONGEST_PAUSE = 0.05
"""The bare server, too, sends a stream no more messages than one in so many seconds, where there
are many streams: so much for each."""
_LATEST = 30.0
"""Seconds that are waited for what is late."""


@dataclass(frozen=True)
class Size:
    """How much."""

    watchers: int
    stalled: int
    seconds: float
    history: int
    """Events that each task has before; those that are stalled do not read them."""


@dataclass
class Seen:
    """What was measured of one server."""

    latencies: list[float] = field(default_factory=list)
    messages: int = 0
    deliveries: int = 0
    due: int = 0
    """Deliveries that there had to be: of each event to each watcher that reads."""
    wrong: int = 0
    behind: int = 0
    cpu: float = 0.0
    """Of the server, in cores."""
    others: float = 0.0
    """Of everybody else on the machine, clients included, in cores."""
    asked: list[float] = field(default_factory=list)
    """Of GetTask meanwhile, in seconds."""
    memory: list[int] = field(default_factory=list)
    """Resident bytes, twenty times a second."""

    def at(self, share: float, times: Sequence[float] | None = None) -> float:
        """A percentile, in milliseconds."""
        ordered = sorted(self.latencies if times is None else times)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] * 1000 if ordered else 0.0

    def told(self, seconds: float) -> str:
        """All else that is worth knowing."""
        return (
            f"p50 {self.at(0.5):.0f}, max {self.at(1):.0f} ms; {self.deliveries / seconds:,.0f} "
            f"events/s in {self.messages / seconds:,.0f} messages/s; "
            f"server {self.cpu:.2f} cores, all others {self.others:.2f}"
        )


def run(options: Options) -> Part:
    """Both shapes and the list of tasks."""
    part = Part("fanout", "latency of events to a thousand watchers, beside a bare grpc.aio server")
    size = Size(100, 10, 2.0, 500) if options.quick else Size(1000, 100, 15.0, 6000)
    with tempfile.TemporaryDirectory(prefix="ft-") as short:  # a socket's path must be short
        _alone(part, options, size)
        _one_shape(part, options, size, Path(short), tasks=1)
        _one_shape(part, options, size, Path(short), tasks=_GPUS)
        _list(part, options, size)
    part.notes += [
        f"{size.watchers:,} watchers on {_PROCESSES * _CONNECTIONS} connections of {_PROCESSES} "
        f"processes, {size.stalled} of which read the snapshot and no more, with {size.history:,} "
        "events of each task before them",
        "the daemon's default of 1,000 open streams is raised by 10, for the bench's own",
    ]
    return part


def _alone(part: Part, options: Options, size: Size) -> None:
    """One watcher in each process: what an event takes where nothing else is to be done."""
    folder = options.folder / "fanout-alone"
    folder.mkdir()
    alone = Size(_PROCESSES, 0, min(size.seconds, 5.0), 100)
    with _runs(folder, 1, alone) as (daemon, names, pacer):
        assert daemon.process is not None
        server = psutil.Process(daemon.process.pid)
        with _clients(daemon.address, WATCH_TASK, names, alone, folder) as clients:
            due = _due(daemon, names, alone)
            seen = _measure(clients, server, alone.seconds, folder, pacer, daemon, due)
            pacer.pause()
    if seen.deliveries != seen.due or seen.wrong:
        raise RuntimeError(f"{seen.deliveries} of {seen.due} events came, {seen.wrong} wrong")
    part.rows.append(
        Row(
            f"{alone.watchers} watchers, {_EVENTS:.0f} events/s: p99",
            *(seen.at(0.99), "ms"),
            detail=seen.told(alone.seconds),
        )
    )


def _one_shape(part: Part, options: Options, size: Size, short: Path, *, tasks: int) -> None:
    shape = "one task" if tasks == 1 else f"{tasks} tasks"
    rounds, limits = list[Seen](), list[Seen]()
    grown, after, resumed = 0.0, 0.0, {"behind": 0, "wrong": 0}
    quiet = 0.0
    for number in range(1 if options.quick else max(1, min(options.rounds, 2))):
        folder = options.folder / f"fanout-{tasks}-{number}"
        folder.mkdir()
        with _runs(folder, tasks, size) as (daemon, names, pacer):
            assert daemon.process is not None
            server = psutil.Process(daemon.process.pid)
            memory = server.memory_info().rss
            with _clients(daemon.address, WATCH_TASK, names, size, folder) as clients:
                due = _due(daemon, names, size)
                seen = _measure(clients, server, size.seconds, folder, pacer, daemon, due)
                rounds.append(seen)
                grown = max(grown, (max(seen.memory) - memory) / 1e6)
                pacer.pause()
                ends = {name: daemon.get(name).last_seq for name, _ in names}
                drained = clients.ask("drain " + json.dumps(ends))
                seen.behind = sum(answer["behind"] for answer in drained)
                seen.wrong = sum(answer["wrong"] for answer in drained)
                before = _cpu(server)
                time.sleep(min(size.seconds, 3.0))
                quiet = (_cpu(server) - before) / min(size.seconds, 3.0)
                for answer in clients.ask("resume " + json.dumps(ends)):
                    resumed = {key: resumed[key] + answer[key] for key in resumed}
            eventually(lambda: _open_streams(daemon) == 0, "all streams are closed")
            after = max(after, (server.memory_info().rss - memory) / 1e6)
        limits.append(_bare(size, short / f"{tasks}-{number}.sock", tasks, folder))
    ours = statistics.median(seen.at(0.99) for seen in rounds)
    middle = min(rounds, key=lambda seen: abs(seen.at(0.99) - ours))
    bare = statistics.median(seen.at(0.99) for seen in limits)
    usual = min(limits, key=lambda seen: abs(seen.at(0.99) - bare))
    lost = sum(seen.behind + seen.wrong for seen in rounds) + sum(resumed.values())
    asked = [seconds for seen in rounds for seconds in seen.asked]
    part.rows += [
        Row(
            f"{shape}, {_EVENTS:.0f} events/s: p99 to those who read",
            *(ours, "ms", BAR_MS, "what is promised", 1.0),
            detail=middle.told(size.seconds),
        ),
        Row(
            f"{shape}: the same, beside a bare server",
            *(ours, "ms", bare, "a bare server that pushes the same events"),
            detail=usual.told(size.seconds),
        ),
        Row(
            f"{shape}: CPU of the daemon, beside a bare server",
            *(statistics.median(seen.cpu for seen in rounds), "cores"),
            *(statistics.median(seen.cpu for seen in limits), "the same"),
        ),
        Row(
            f"{shape}: events that reached those who read, of all that were written meanwhile",
            *(sum(seen.deliveries for seen in rounds), "events"),
            *(sum(seen.due for seen in rounds), "each event to each of them", 1.0),
            is_cost=False,
        ),
        Row(
            f"{shape}: watchers that got each event once, stalled ones that read on among them",
            *(size.watchers * len(rounds) - lost, "watchers"),
            *(size.watchers * len(rounds), "all of them", 1.0),
            is_cost=False,
        ),
        Row(
            f"{shape}: memory while {size.stalled} are stalled, above that before any came",
            *(grown, "MB", BAR_MEMORY_MB, "what is promised", 1.0),
            detail=f"{after:.0f} MB once all have gone",
        ),
        Row(
            f"{shape}: GetTask meanwhile, p99",
            *(middle.at(0.99, asked), "ms"),
            detail=f"p50 {middle.at(0.5, asked):.1f} ms, {len(asked)} calls",
        ),
        Row(
            f"{shape}: CPU once the run is quiet",
            *(quiet, "cores"),
            detail="a heartbeat to each watcher every 5 s",
        ),
    ]


def _list(part: Part, options: Options, size: Size) -> None:
    """WatchTasks: a hundred tasks, of which one is renamed ten times a second."""
    folder = options.folder / "list"
    folder.mkdir()
    scene = Scene(folder / "scene")
    daemon = _daemon(folder, size)
    try:
        daemon.start()
        names = [daemon.create(scene.parameters()).name for _ in range(100)]
        assert daemon.process is not None
        server = psutil.Process(daemon.process.pid)
        readers = Size(size.watchers - size.stalled, 0, min(size.seconds, 8.0), 0)
        with _clients(daemon.address, WATCH_TASKS, [(names[0], 0)], readers, folder) as clients:
            pacer = _Renames(daemon, names[0])
            seen = _measure(clients, server, readers.seconds, folder, pacer, daemon, _any)
            pacer.pause()
    finally:
        daemon.close()
        scene.close()
    part.rows.append(
        Row(
            f"{readers.watchers} watchers of the list, 10 changes/s: p99",
            *(seen.at(0.99), "ms"),
            detail=seen.told(readers.seconds),
        )
    )


# --- the daemon and its runs


def _daemon(folder: Path, size: Size) -> Daemon:
    daemon = Daemon(folder, "--most-open-streams", str(size.watchers + 10))
    at = daemon.options.index("--heartbeat-seconds")
    daemon.options[at + 1] = "5"  # as it is by default, not as most tests have it
    return daemon


@contextlib.contextmanager
def _runs(
    folder: Path, tasks: int, size: Size
) -> Iterator[tuple[Daemon, list[tuple[str, int]], _Steps]]:
    """Running tasks with some history, and what lets them go on; names with their newest event."""
    daemon = _daemon(folder, size)
    if tasks > 1:
        _plug_in_gpus(daemon, folder, tasks)
    daemon.start()
    scenes, names = list[Scene](), list[str]()
    try:
        for number in range(tasks):
            scene = Scene(folder / f"scene-{number}")
            scenes.append(scene)
            parameters = scene.play(gated=True, steps=1_000_000)
            task = task_pb2.Task(
                training_type=task_pb2.TRAINING_TYPE_SFT,
                parameters=parameters,
                device="cpu" if tasks == 1 else f"cuda:{number}",
            )
            request = task_service_pb2.CreateTaskRequest(task=task, start=True)
            names.append(daemon.tasks.CreateTask(request).task.name)
        steps = _Steps(scenes, _EVENTS / 2 / tasks)
        steps.take(size.history // tasks // 2)
        eventually(
            lambda: all(daemon.get(name).last_seq >= size.history // tasks for name in names),
            "the history is there",
            120,
        )
        yield daemon, [(name, daemon.get(name).last_seq) for name in names], steps
    finally:
        daemon.close()
        for scene in scenes:
            scene.close()


class _Pacer:
    """Does something at a pace, in a thread, once it is told to."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def go(self) -> None:
        """Begins."""
        self._thread.start()

    def pause(self) -> None:
        """Ends."""
        self._stopped.set()
        self._thread.join()

    def act(self, number: int) -> None:
        """What is done."""
        raise NotImplementedError

    def _go_on(self) -> None:
        began = time.monotonic()
        for number in itertools.count(1):
            self.act(number)
            if self._stopped.wait(max(0.0, began + number * self._seconds - time.monotonic())):
                return


class _Steps(_Pacer):
    """Lets the runs of scenes take steps, so many a second each, spread over the second."""

    def __init__(self, scenes: list[Scene], pace: float) -> None:
        super().__init__(1 / pace / len(scenes))
        self._gates = [os.open(scene.model / "gate", os.O_RDWR) for scene in scenes]

    def take(self, steps: int) -> None:
        """So many of each at once."""
        for gate in self._gates:
            for _ in range(steps):
                os.write(gate, b".")

    def act(self, number: int) -> None:
        os.write(self._gates[number % len(self._gates)], b".")


class _Renames(_Pacer):
    """Gives a task the time for a name, ten times a second."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        super().__init__(0.1)
        self._daemon = daemon
        self._name = name

    def act(self, number: int) -> None:
        request = task_service_pb2.UpdateTaskRequest()
        request.task.name = self._name
        request.update_mask.paths.append("display_name")
        request.task.display_name = repr(time.time())
        self._daemon.tasks.UpdateTask(request)


def _plug_in_gpus(daemon: Daemon, folder: Path, count: int) -> None:
    """Stands in for so many GPUs: tasks of one device wait for each other."""
    (folder / "gpus").mkdir()
    (folder / "gpus/pynvml.py").write_text(_NVML.format(count=count))
    able = dict.fromkeys(
        ("supported", "bf16", "fp16", "tf32", "four_bit", "eight_bit_optimizer"), True
    )
    devices = [
        {"id": f"cuda:{number}", "name": "GPU", "compute_capability": "8.0", **able}
        for number in range(count)
    ]
    probe = {"cuda_build": "12.8", "devices": devices}
    (folder / "probe.json").write_text(json.dumps(probe))
    daemon.environment["FAKE_PROBE"] = str(folder / "probe.json")
    daemon.environment["PYTHONPATH"] = os.pathsep.join((str(folder / "gpus"), python_path()))


_NVML = """
from types import SimpleNamespace
class NVMLError(Exception): pass
NVML_TEMPERATURE_GPU = 0
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "550.54"
def nvmlDeviceGetCount(): return {count}
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetMemoryInfo(handle): return SimpleNamespace(total=80 << 30, free=80 << 30, used=0)
def nvmlDeviceGetCudaComputeCapability(handle): return 8, 0
def nvmlDeviceGetName(handle): return "GPU"
def nvmlDeviceGetUtilizationRates(handle): return SimpleNamespace(gpu=0)
def nvmlDeviceGetTemperature(handle, kind): return 30
def nvmlDeviceGetPowerUsage(handle): return 50_000
"""


def _open_streams(daemon: Daemon) -> int:
    from finetuned.v1 import system_service_pb2

    info = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    return next(limit.used for limit in info.limits if limit.name == "open_streams")


# --- the watchers


class _Clients:
    """The processes of watchers."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def ready(self) -> None:
        """Returns once every stream has begun."""
        for process in self._processes:
            self._line(process)

    def ask(self, line: str, *, numbered: bool = False) -> list[dict[str, Any]]:
        """Says something to each, and waits for all answers."""
        for number, process in enumerate(self._processes):
            assert process.stdin is not None
            process.stdin.write(f"{line}{number if numbered else ''}\n")
            process.stdin.flush()
        return [json.loads(self._line(process)) for process in self._processes]

    def _line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the watchers ended with {process.wait()}")
        return line


@contextlib.contextmanager
def _clients(
    address: str, method: str, tasks: list[tuple[str, int]], size: Size, folder: Path
) -> Iterator[_Clients]:
    """Watchers in processes, all streams open."""
    given = {
        "address": address,
        "method": method,
        "tasks": tasks,
        "watchers": size.watchers // _PROCESSES,
        "stalled": size.stalled // _PROCESSES,
        "connections": _CONNECTIONS,
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(FOLDER / "watchers.py"), json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(_PROCESSES)
    ]
    try:
        clients = _Clients(processes)
        clients.ready()
        yield clients
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _measure(
    clients: _Clients,
    server: psutil.Process,
    seconds: float,
    folder: Path,
    pacer: _Pacer | None,
    daemon: Daemon | None,
    due: Callable[[float, float], int],
) -> Seen:
    """Lets events come, and looks at how they arrive once that has settled.

    `due` says how many deliveries there have to be of the events between two times.

    Raises:
        RuntimeError: Nothing arrived.
    """
    seen = Seen()
    if pacer is not None:
        pacer.go()
    time.sleep(min(2.0, seconds))
    begin, began, cpu, busy = time.time(), time.monotonic(), _cpu(server), _busy()
    task = None if daemon is None else daemon.tasks.ListTasks(_ONE_TASK).tasks[0].name
    while time.monotonic() < began + seconds:
        if daemon is not None and task is not None:
            asked = time.perf_counter()
            daemon.get(task)
            seen.asked.append(time.perf_counter() - asked)
        seen.memory.append(server.memory_info().rss)
        time.sleep(0.05)
    end, lasted = time.time(), time.monotonic() - began
    seen.cpu = (_cpu(server) - cpu) / lasted
    seen.others = (_busy() - busy) / lasted - seen.cpu
    time.sleep(1.0)  # what was written last arrives
    path = folder / "latencies-"
    seen.due, until = due(begin, end), time.monotonic() + _LATEST
    while True:
        answers = clients.ask(f"report {begin} {end} {path}", numbered=True)
        seen.messages = sum(answer["messages"] for answer in answers)
        seen.deliveries = sum(answer["deliveries"] for answer in answers)
        seen.wrong = sum(answer["wrong"] for answer in answers)
        if seen.deliveries >= seen.due or time.monotonic() > until:
            break
        time.sleep(0.5)  # what is late counts as well
    if not seen.deliveries:
        raise RuntimeError("nothing arrived")
    for number in range(_PROCESSES):
        found = array.array("d")
        found.frombytes(Path(f"{path}{number}").read_bytes())
        seen.latencies.extend(found)
    return seen


def _due(daemon: Daemon, names: list[tuple[str, int]], size: Size) -> Callable[[float, float], int]:
    """Deliveries by what the daemon's log has."""

    def due(begin: float, end: float) -> int:
        total = 0
        for place, (name, after) in enumerate(names):
            mine = range(size.stalled // _PROCESSES, size.watchers // _PROCESSES)
            readers = _PROCESSES * sum(number % len(names) == place for number in mine)
            seq = after
            while True:
                request = task_service_pb2.ListEventsRequest(
                    parent=name, after_seq=seq, page_size=1000
                )
                events = daemon.tasks.ListEvents(request).events
                if not events:
                    break
                seq = events[-1].seq
                times = [event.time.seconds + event.time.nanos / 1e9 for event in events]
                total += readers * sum(begin <= at <= end for at in times)
        return total

    return due


def _any(begin: float, end: float) -> int:
    """Of the list: a task that changes faster than it is read may come once for several."""
    return 1


_ONE_TASK = task_service_pb2.ListTasksRequest(page_size=1)


def _bare(size: Size, socket: Path, tasks: int, folder: Path) -> Seen:
    """The same by a bare server, to those who read.

    Raises:
        RuntimeError: It lost some, so that it is no limit.
    """
    count = size.watchers - size.stalled
    pause = min(_LONGEST_PAUSE, count * _STREAM_SECONDS)
    command = [sys.executable, str(FOLDER / "pusher.py"), str(socket)]
    given = {"pace": _EVENTS, "pause": pause, "tasks": tasks}
    process = subprocess.Popen([*command, json.dumps(given)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        readers = Size(count, 0, size.seconds, 0)

        def due(begin: float, end: float) -> int:
            """A step of each task may lie at either edge."""
            return int(max(_EVENTS * (end - begin) - 4 * tasks, 1) * count / tasks)

        with _clients(f"unix:{socket}", "/bench/Push", [("", -1)], readers, folder) as clients:
            server = psutil.Process(process.pid)
            seen = _measure(clients, server, size.seconds, folder, None, None, due)
            if seen.deliveries < seen.due or seen.wrong:
                raise RuntimeError(f"the bare server lost some of {seen.due}, {seen.wrong} wrong")
            return seen
    finally:
        process.kill()
        process.wait()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _busy() -> float:
    """Seconds that all cores were busy."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq
