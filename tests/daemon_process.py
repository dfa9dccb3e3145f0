"""Real daemon processes for tests: started, killed, started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
import psutil

from finetuned._paths import paths
from finetuned.v1 import (
    dataset_service_pb2_grpc,
    event_pb2,
    parameter_service_pb2_grpc,
    parameters_pb2,
    system_service_pb2_grpc,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
    template_service_pb2_grpc,
)

TESTS = Path(__file__).parent
T = TypeVar("T")


def eventually(look: Callable[[], T | None], what: str, seconds: float = 20.0) -> T:
    """The first true answer of `look`; fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        answer = look()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not seen within {seconds} s: {what}")
        time.sleep(0.01)


def python_path() -> str:
    """The fake runner's folder, before what the tests were started with."""
    return os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


class Daemon:
    """One state folder, and the daemon that serves it at present."""

    def __init__(self, root: Path, *options: str, runner_module: str = "fake_runner") -> None:
        # In a deep folder the socket lies elsewhere: its path must be short.
        self.paths = paths(root / "state", root / "run")
        self._root = root
        # Most tests have no use for a standby; many would wait for the core that it warms up on.
        own = ["--runner-module", runner_module, "--standby-idle-minutes", "0"]
        self.options = [*own, "--heartbeat-seconds", "0.3", *options]
        self.environment = dict[str, str]()
        """For the daemon, beside that of the tests."""
        self.log = root / "daemon.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._spawned = list[subprocess.Popen[bytes]]()
        self._channel: grpc.Channel | None = None

    def start(self) -> Daemon:
        """Starts a daemon and waits until it serves."""
        self.process = self.spawn()
        try:
            eventually(self._serves, "the daemon serves", 60)  # also where others load the machine
        except AssertionError:
            self.close()
            raise
        return self

    def spawn(self) -> subprocess.Popen[bytes]:
        """Starts a daemon process and does not wait."""
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "finetuned_daemon.main", "serve"),
                    *("--state-dir", str(self.paths.state_dir)),
                    *("--runtime-dir", str(self.paths.runtime_dir)),
                    *self.options,
                ],
                env={**os.environ, "PYTHONPATH": python_path(), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._spawned.append(process)
        return process

    def _serves(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended:\n{self.log.read_text()}")
        try:
            endpoint = json.loads(self.paths.endpoint.read_bytes())
        except (FileNotFoundError, ValueError):  # not yet, or what a damaged one has left
            return False
        return isinstance(endpoint, dict) and endpoint.get("pid") == self.process.pid

    def kill(self) -> None:
        """`kill -9`."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self._forget_channel()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(20)
        self._forget_channel()
        return status

    def close(self) -> None:
        """Ends the daemon and every runner that is left."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for one in self._spawned:  # one that should have ended by itself, and did not
            if one.poll() is None:
                one.kill()
                one.wait()
        for process in psutil.process_iter(["cmdline"]):
            command = [part for part in process.info["cmdline"] or [] if part] or [""]
            if command[-1].startswith(str(self.paths.state_dir)):
                process.kill()
        if not self.paths.runtime_dir.is_relative_to(self._root):
            shutil.rmtree(self.paths.runtime_dir, ignore_errors=True)
        self._forget_channel()

    @property
    def address(self) -> str:
        """Of the unix socket."""
        return f"unix:{self.paths.socket}"

    @property
    def channel(self) -> grpc.Channel:
        """A channel to the present daemon."""
        if self._channel is None:
            self._channel = grpc.insecure_channel(
                self.address, options=[("grpc.use_local_subchannel_pool", 1)]
            )
        return self._channel

    def _forget_channel(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    @property
    def tasks(self) -> task_service_pb2_grpc.TaskServiceStub:
        """Bare stub, as a front-end has it that knows nothing but the protos."""
        return task_service_pb2_grpc.TaskServiceStub(self.channel)

    @property
    def templates(self) -> template_service_pb2_grpc.TemplateServiceStub:
        """Bare stub."""
        return template_service_pb2_grpc.TemplateServiceStub(self.channel)

    @property
    def parameters(self) -> parameter_service_pb2_grpc.ParameterServiceStub:
        """Bare stub."""
        return parameter_service_pb2_grpc.ParameterServiceStub(self.channel)

    @property
    def datasets(self) -> dataset_service_pb2_grpc.DatasetServiceStub:
        """Bare stub."""
        return dataset_service_pb2_grpc.DatasetServiceStub(self.channel)

    @property
    def system(self) -> system_service_pb2_grpc.SystemServiceStub:
        """Bare stub."""
        return system_service_pb2_grpc.SystemServiceStub(self.channel)

    def create(
        self, parameters: parameters_pb2.Parameters, *, start: bool = False, **fields: object
    ) -> task_pb2.Task:
        """Creates an SFT task on the CPU."""
        task = task_pb2.Task(
            training_type=task_pb2.TRAINING_TYPE_SFT, parameters=parameters, device="cpu"
        )
        request = task_service_pb2.CreateTaskRequest(task=task, start=start, **fields)  # type: ignore[arg-type]
        return self.tasks.CreateTask(request).task

    def get(self, name: str) -> task_pb2.Task:
        """The task as it stands."""
        return self.tasks.GetTask(task_service_pb2.GetTaskRequest(name=name)).task

    def events(self, name: str) -> list[event_pb2.Event]:
        """All events so far."""
        request = task_service_pb2.ListEventsRequest(parent=name, page_size=1000)
        return list(self.tasks.ListEvents(request).events)

    def watch(self, name: str, after_seq: int = 0) -> Watch:
        """A watch stream."""
        return Watch(self.tasks, name, after_seq)

    def wait(self, name: str, *states: str) -> task_pb2.Task:
        """Waits, by watching, until the task is in one of these states."""
        wanted = {task_pb2.TaskState.Value(f"TASK_STATE_{state}") for state in states}
        with self.watch(name) as watch:
            task = watch.snapshot
            if task.state in wanted:
                return task
            for event in watch:
                if event.state_change.new_state in wanted and event.seq > task.last_seq:
                    return self.get(name)
        raise AssertionError("the stream ended")


class Watch:
    """A watch stream; iterates over events. Fails rather than hangs."""

    def __init__(
        self, stub: task_service_pb2_grpc.TaskServiceStub, name: str, after_seq: int
    ) -> None:
        request = task_service_pb2.WatchTaskRequest(name=name, after_seq=after_seq)
        self.call = stub.WatchTask(request, timeout=60)
        first = next(self.call)
        assert first.HasField("snapshot"), "the first message is the snapshot"
        self.snapshot = first.snapshot.task
        self.log_epoch = first.snapshot.log_epoch
        self.seen: list[event_pb2.Event] = []
        self.heartbeats: list[int] = []

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()

    def __iter__(self) -> Watch:
        return self

    def __next__(self) -> event_pb2.Event:
        for response in self.call:
            if response.HasField("heartbeat"):
                self.heartbeats.append(response.heartbeat.last_seq)
                continue
            self.seen.append(response.event)
            return response.event
        raise StopIteration

    def until(self, is_it: Callable[[event_pb2.Event], bool]) -> event_pb2.Event:
        """Reads on to the first event that is it."""
        for event in self:
            if is_it(event):
                return event
        raise AssertionError("the stream ended")

    def until_step(self, step: int) -> event_pb2.Event:
        """Reads on to the progress of a step."""
        return self.until(lambda e: e.HasField("progress") and e.progress.step >= step)

    def until_end(self) -> event_pb2.Event:
        """Reads on to the end of the run."""
        ends = (
            task_pb2.TASK_STATE_COMPLETED,
            task_pb2.TASK_STATE_STOPPED,
            task_pb2.TASK_STATE_FAILED,
        )
        return self.until(lambda e: e.state_change.new_state in ends)

    @property
    def seqs(self) -> list[int]:
        """Sequence numbers seen."""
        return [event.seq for event in self.seen]
