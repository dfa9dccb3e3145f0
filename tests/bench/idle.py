"""The daemon at rest: how soon it serves, what it takes while nobody asks, and whether it grows.

Beside it a grpc.aio server of one unary and one stream method, `bare_idle.py`, started and asked in
turns with it. Both have their bytecode, as an installed program has; the first start of each makes
it and is not counted.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import grpc
import psutil
from table import Options, Part, Row

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, Paths, paths
from finetuned.v1 import (
    parameters_pb2,
    system_service_pb2,
    system_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)

START_MS = 500.0
MEMORY = 1.6
"""Of a bare server's."""
REST_PERCENT = 0.2
"""Of a core."""
GROWTH_BYTES = 300.0
"""For each call: a leaked context or message is more."""

_BARE = Path(__file__).with_name("bare_idle.py")
_SETTLED_SECONDS = 3.0
"""Two after what the daemon does a second after its start."""
_SCRAPE_SECONDS = 15.0
"""How often Prometheus asks, where nobody has said otherwise."""


@dataclass(frozen=True)
class _Sizes:
    rest_seconds: float
    connections: int
    calls: int
    watches: int
    scrapes: int


_FULL = _Sizes(rest_seconds=40.0, connections=1000, calls=10_000, watches=200, scrapes=40)
_QUICK = _Sizes(rest_seconds=4.0, connections=60, calls=500, watches=20, scrapes=5)


class _Server:
    """One process that serves the API, or as much of it as the bare one does."""

    def __init__(self, command: list[str], socket_path: Path, log: Path, pycache: Path) -> None:
        self.socket = socket_path
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        began = time.monotonic()
        with open(log, "ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, *command],
                env=environment | {"PYTHONPYCACHEPREFIX": str(pycache)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.pid = self._process.pid
        try:
            eventually(self._accepts, f"{command[:3]} listens", 60)
            with self.channel() as channel:
                stub = task_service_pb2_grpc.TaskServiceStub(channel)
                stub.ListTasks(task_service_pb2.ListTasksRequest(), timeout=60)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - began
        times = psutil.Process(self.pid).cpu_times()
        self.start_cpu_seconds = times.user + times.system

    def _accepts(self) -> bool:
        if self._process.poll() is not None:
            raise AssertionError("the server ended")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.socket))
            except OSError:
                return False
        return True

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        """A connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"unix:{self.socket}", options=options) as channel:
            yield channel

    def close(self) -> None:
        """SIGTERM, and waits."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class _Pair:
    """Starts daemons and bare servers in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # In a deep folder the socket lies elsewhere: its path must be short.
        self.paths: Paths = paths(folder / "state", folder / "run")
        self._pycache = folder / "pycache"

    def daemon(self, *options: str, fresh: bool = True) -> _Server:
        """A daemon as it is by default, with an empty state folder."""
        if fresh:
            shutil.rmtree(self.paths.state_dir, ignore_errors=True)
        folders = ("--state-dir", str(self.paths.state_dir))
        folders += ("--runtime-dir", str(self.paths.runtime_dir))
        command = ["-m", "finetuned_daemon", "serve", *folders, *options]
        return _Server(command, self.paths.socket, self.folder / "daemon.log", self._pycache)

    def bare(self) -> _Server:
        """The limit."""
        self.paths.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.paths.runtime_dir / "bare.sock"
        path.unlink(missing_ok=True)
        return _Server([str(_BARE), str(path)], path, self.folder / "bare.log", self._pycache)

    def by_command_line(self) -> float:
        """Seconds of `finetunectl daemon start`, from its own start to its end; then stops it."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environment |= {
            "PYTHONPYCACHEPREFIX": str(self._pycache),
            STATE_DIR_VARIABLE: str(self.paths.state_dir),
            RUNTIME_DIR_VARIABLE: str(self.paths.runtime_dir),
        }
        command = [sys.executable, "-m", "finetuned.cli", "daemon"]
        began = time.monotonic()
        subprocess.run([*command, "start"], env=environment, check=True, capture_output=True)
        seconds = time.monotonic() - began
        subprocess.run([*command, "stop"], env=environment, check=True, capture_output=True)
        return seconds

    def close(self) -> None:
        """Removes what lies elsewhere."""
        if not self.paths.runtime_dir.is_relative_to(self.folder):
            shutil.rmtree(self.paths.runtime_dir, ignore_errors=True)


@dataclass(frozen=True)
class _Use:
    """What a process has used of the processor."""

    seconds: float
    wakeups: int
    time: float

    @classmethod
    def of(cls, pid: int) -> _Use:
        """Until now, all threads together; to the nanosecond where the system counts so."""
        tasks = Path(f"/proc/{pid}/task")
        if not tasks.exists():
            times = psutil.Process(pid).cpu_times()
            return cls(times.user + times.system, 0, time.monotonic())
        nanoseconds = wakeups = 0
        for task in tasks.iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
            status = (task / "status").read_text()
            wakeups += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        return cls(nanoseconds / 1e9, wakeups, time.monotonic())

    def percent_since(self, before: _Use) -> float:
        """Percent of a core."""
        return 100 * (self.seconds - before.seconds) / (self.time - before.time)

    def wakeups_since(self, before: _Use) -> float:
        """A second."""
        return (self.wakeups - before.wakeups) / (self.time - before.time)


def run(options: Options) -> Part:
    """Measures it."""
    part = Part("idle", "the daemon at rest beside a bare grpc.aio server")
    sizes = _QUICK if options.quick else _FULL
    pair = _Pair(options.folder)
    try:
        _starts(part, pair, options.rounds)
        with ExitStack() as stack:
            ours, bare = (stack.enter_context(_serving(make)) for make in (pair.daemon, pair.bare))
            time.sleep(_SETTLED_SECONDS)
            _memory(part, ours, bare)
            _rest(part, ours, bare, sizes)
            _growth(part, ours, bare, sizes)
        _scrapes(part, pair, sizes)
        _quiet_run(part, options.folder / "run-of-a-task", sizes)
    finally:
        pair.close()
    part.notes += [
        "CPU shares of one process over all of its threads; gRPC's own threads wake up six to "
        "seven times a second in either server",
        "memory is what is resident (RSS), shared libraries included; PSS shares those out among "
        "the processes that have them",
    ]
    return part


@contextmanager
def _serving(make: Callable[[], _Server]) -> Iterator[_Server]:
    server = make()
    try:
        yield server
    finally:
        server.close()


def _starts(part: Part, pair: _Pair, rounds: int) -> None:
    """From exec to the first answer over the socket; in turns."""
    walls: dict[str, list[float]] = {"ours": [], "bare": [], "again": [], "cli": []}
    costs: dict[str, list[float]] = {"ours": [], "bare": [], "again": []}
    for number in range(rounds + 1):
        for name, make in (
            ("ours", pair.daemon),
            ("again", lambda: pair.daemon(fresh=False)),
            ("bare", pair.bare),
        ):
            with _serving(make) as server:
                if not number and name != "bare":
                    _use(server)  # so that there is bytecode of what is imported later too
                if number:
                    walls[name].append(1000 * server.start_seconds)
                    costs[name].append(1000 * server.start_cpu_seconds)
        seconds = pair.by_command_line()
        if number:
            walls["cli"].append(1000 * seconds)
    wall = {name: statistics.median(values) for name, values in walls.items()}
    cost = {name: statistics.median(values) for name, values in costs.items()}
    bare = "bare server's"
    part.rows += [
        Row("start to first answer", wall["again"], "ms", START_MS, "what is promised", 1.0),
        Row("start to first answer", wall["again"], "ms", wall["bare"], bare),
        Row("start to first answer, first ever", wall["ours"], "ms", wall["bare"], bare),
        Row("CPU time until then", cost["again"], "ms", cost["bare"], bare),
        Row("finetunectl daemon start, to its end", wall["cli"], "ms"),
    ]


def _use(server: _Server) -> None:
    with server.channel() as channel:
        _make_task(channel)
        system = system_service_pb2_grpc.SystemServiceStub(channel)
        system.ListDevices(system_service_pb2.ListDevicesRequest(), timeout=60)


def _memory(part: Part, ours: _Server, bare: _Server) -> None:
    mine, limit = (psutil.Process(server.pid).memory_full_info() for server in (ours, bare))
    against = "bare server's"
    part.rows.append(
        Row("memory at rest", mine.rss / 1e6, "MB", limit.rss / 1e6, against, bar=MEMORY)
    )
    for name in ("pss", "uss"):
        if hasattr(mine, name):
            figures = (getattr(of, name) / 1e6 for of in (mine, limit))
            part.rows.append(
                Row(f"memory at rest, {name.upper()}", next(figures), "MB", next(figures), against)
            )
    threads = (float(psutil.Process(server.pid).num_threads()) for server in (ours, bare))
    part.rows.append(Row("threads", next(threads), "", next(threads), against))


def _rest(part: Part, ours: _Server, bare: _Server, sizes: _Sizes) -> None:
    """Nobody is connected; then one watches; then one watches the devices."""
    mine, limit = _used((ours.pid, bare.pid), sizes.rest_seconds)
    promised = "what is promised"
    part.rows += [
        Row("CPU, nobody connected", mine[0], "% of a core", REST_PERCENT, promised, bar=1.0),
        Row("CPU, nobody connected", mine[0], "% of a core", limit[0], "bare server's"),
        Row("wakeups", mine[1], "1/s", limit[1], "bare server's"),
    ]
    with ours.channel() as channel, bare.channel() as other:
        name = _make_task(channel)
        watches = [_watch(channel, name), _watch(other, "")]
        mine, limit = _used((ours.pid, bare.pid), sizes.rest_seconds / 2)
        for watch in watches:
            watch.cancel()
    part.rows.append(
        Row("CPU, one watcher of a quiet task", mine[0], "% of a core", limit[0], "bare server's")
    )
    with ours.channel() as channel:
        system = system_service_pb2_grpc.SystemServiceStub(channel)
        devices = system.WatchDevices(system_service_pb2.WatchDevicesRequest())
        next(devices)
        mine, _ = _used((ours.pid, bare.pid), sizes.rest_seconds / 2)
        devices.cancel()
    part.rows.append(Row("CPU, one watcher of the devices", mine[0], "% of a core"))


def _used(pids: tuple[int, int], seconds: float) -> list[tuple[float, float]]:
    """Percent of a core and wakeups a second of each, at the same time."""
    before = [_Use.of(pid) for pid in pids]
    time.sleep(seconds)
    after = [_Use.of(pid) for pid in pids]
    return [
        (now.percent_since(then), now.wakeups_since(then))
        for then, now in zip(before, after, strict=True)
    ]


def _make_task(channel: grpc.Channel) -> str:
    """A task that waits to be started."""
    task = task_pb2.Task(
        training_type=task_pb2.TRAINING_TYPE_SFT,
        parameters=parameters_pb2.Parameters(),
        device="cpu",
    )
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    return stub.CreateTask(task_service_pb2.CreateTaskRequest(task=task), timeout=60).task.name


def _watch(channel: grpc.Channel, name: str) -> grpc.Call:
    """A watch that has its snapshot."""
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    call = stub.WatchTask(task_service_pb2.WatchTaskRequest(name=name))
    next(call)
    return call


def _growth(part: Part, ours: _Server, bare: _Server, sizes: _Sizes) -> None:
    """Memory after many clients; a leak shows in the second half, when all that fills is full."""
    with ours.channel() as channel:
        name = _make_task(channel)

    def connect(server: _Server) -> None:
        with server.channel() as channel:
            _list_tasks(channel)

    def watch(server: _Server) -> None:
        with server.channel() as channel:
            _watch(channel, name).cancel()

    for what, count, act in (
        ("connection", sizes.connections, connect),
        ("watch", sizes.watches, watch),
    ):
        grown = _grown(count, [(ours, act), (bare, act)])
        part.rows.append(
            Row(f"growth, each {what} of {count:,}", grown[0], "bytes", grown[1], "bare server's")
        )
    with ours.channel() as channel, bare.channel() as other:
        acts = [(ours, lambda _: _list_tasks(channel)), (bare, lambda _: _list_tasks(other))]
        grown = _grown(sizes.calls, acts)
    part.rows.append(
        Row(
            f"growth, each call of {sizes.calls:,}",
            grown[0],
            "bytes",
            GROWTH_BYTES,
            "what a leak would be",
            bar=1.0,
        )
    )
    rss = [psutil.Process(server.pid).memory_info().rss / 1e6 for server in (ours, bare)]
    part.rows.append(Row("memory after all of them", rss[0], "MB", rss[1], "bare server's"))


def _list_tasks(channel: grpc.Channel) -> None:
    stub = task_service_pb2_grpc.TaskServiceStub(channel)
    stub.ListTasks(task_service_pb2.ListTasksRequest(page_size=10), timeout=60)


def _grown(count: int, acts: list[tuple[_Server, Callable[[_Server], object]]]) -> list[float]:
    """Bytes by which each server has grown for each act of the second half of `count`."""
    result = list[float]()
    for server, act in acts:
        process = psutil.Process(server.pid)
        sizes = list[int]()
        for _ in range(2):
            for _ in range(count // 2):
                act(server)
            time.sleep(0.2)  # what the last ones have left is let go of
            sizes.append(process.memory_info().rss)
        result.append((sizes[1] - sizes[0]) / (count // 2))
    return result


def _scrapes(part: Part, pair: _Pair, sizes: _Sizes) -> None:
    if find_spec("prometheus_client") is None:
        part.notes.append("prometheus-client is not installed: no scrapes")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _serving(lambda: pair.daemon("--prometheus", f"127.0.0.1:{port}")) as server:
        before = _Use.of(server.pid)
        for _ in range(sizes.scrapes):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                answer.read()
        used = (_Use.of(server.pid).seconds - before.seconds) / sizes.scrapes
    what = f"CPU, scraped every {_SCRAPE_SECONDS:g} s"
    part.rows.append(Row(what, 100 * used / _SCRAPE_SECONDS, "% of a core"))


def _quiet_run(part: Part, folder: Path, sizes: _Sizes) -> None:
    """A run that is alive and has nothing to say, as one that loads a large model."""
    scene, daemon = Scene(folder / "scene"), Daemon(folder)
    try:
        daemon.start()
        task = daemon.create(scene.play(hold="TRAINING"), start=True)
        daemon.wait(task.name, "RUNNING")
        assert daemon.process is not None
        time.sleep(1.0)
        used, _ = _used((daemon.process.pid, daemon.process.pid), sizes.rest_seconds / 2)
    finally:
        daemon.close()
        scene.close()
    part.rows.append(Row("CPU, a quiet run, nobody connected", used[0], "% of a core"))
