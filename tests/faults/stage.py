"""What most faults play on: a daemon that is to be struck, and a run that goes on through it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from daemon_process import TESTS, Daemon, eventually
from faults.oracle import Watcher
from faults.registry import World
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2

T = TypeVar("T")

PRELOAD = TESTS / "faults" / "preload"
STEPS = 24
_AFTERMATH_SECONDS = 0.3
_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


def arm(world: World, daemon: Daemon, at: str, **strike: Any) -> None:
    """Lets the next daemon kill itself; see `preload/sitecustomize.py`."""
    path = world.root / "strike.json"
    path.write_text(json.dumps({"at": at, **strike}))
    daemon.environment |= {
        "FINETUNED_STRIKE": str(path),
        "PYTHONPATH": f"{PRELOAD}:{TESTS}",
    }


def arm_runner(world: World, daemon: Daemon, **strike: Any) -> None:
    """The same for the fake runners that a daemon starts, from the next on."""
    path = world.root / "strike-runner.json"
    path.write_text(json.dumps({"at": "fake_runner.py:__init__", **strike}))
    daemon.environment |= {"FAULTS_RUNNER": str(path), "PYTHONPATH": f"{PRELOAD}:{TESTS}"}


def disarm(world: World) -> None:
    """Later processes live on."""
    (world.root / "strike.json").unlink(missing_ok=True)
    (world.root / "strike-runner.json").unlink(missing_ok=True)


def cut(call: Callable[[], T]) -> T | None:
    """The answer to a call; None where the daemon died under it."""
    try:
        return call()
    except grpc.RpcError as error:
        if error.code() not in _GONE:
            raise
        return None


def killed(world: World, daemon: Daemon) -> float:
    """Waits for the strike; kills a daemon that has outlived it. When it died (monotonic)."""
    process = daemon.process
    assert process is not None
    deadline = time.monotonic() + _AFTERMATH_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    since = time.monotonic()
    daemon.kill()
    disarm(world)
    return since


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    """The newest run of a task."""
    request = task_service_pb2.ListRunsRequest(parent=name)
    return daemon.tasks.ListRuns(request, timeout=30).runs[0]


def pid_of(daemon: Daemon, name: str) -> int:
    """The process of the newest run, once it has one."""
    return int(eventually(lambda: run_of(daemon, name).pid, f"{name} has a process"))


def new_task(
    parameters: parameters_pb2.Parameters, task_id: str
) -> task_service_pb2.CreateTaskRequest:
    return task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(
            training_type=task_pb2.TRAINING_TYPE_SFT,
            parameters=parameters,
            device="cpu",
            display_name=f"the {task_id}",
        ),
        task_id=task_id,
        request_id=task_id,
    )


class LiveRun:
    """A run that goes on through the fault, and a watcher that sees all of it."""

    def __init__(self, world: World, daemon: Daemon) -> None:
        self._world = world
        self._daemon = daemon
        self.scene = world.scene("live")
        parameters = self.scene.play(steps=STEPS, gated=True, save_steps=7)
        task = daemon.create(parameters, start=True, task_id="live-run")
        world.oracle.created(task)
        self.name = task.name
        self.watcher = Watcher(world.oracle, daemon, self.name)
        self.watcher.start()
        world.finally_(self.watcher.leave)
        self.pid = pid_of(daemon, self.name)
        self.left = STEPS
        self.go(world.rng.randint(0, 5))

    def go(self, steps: int) -> None:
        """Lets it take so many steps, without waiting for them."""
        steps = min(steps, self.left)
        self.left -= steps
        if steps:
            self.scene.let_pass(steps)

    def until_step(self, step: int) -> None:
        """Waits until it has taken a step."""
        with self._daemon.watch(self.name) as watch:
            watch.until_step(step)

    def until_quiet(self) -> None:
        """Waits until it writes nothing any more: it has taken the steps that it may."""
        done = STEPS - self.left
        with self._daemon.watch(self.name) as watch:
            if done:
                watch.until_step(done)
            else:
                watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)

    def adopt(self, since: float | None = None) -> None:
        """The next daemon takes it over; killed first where it lives."""
        self._world.restart(self._daemon, lives=(self.name, self.pid), since=since)

    def use(self, daemon: Daemon) -> None:
        """Another daemon on the same folders has it now."""
        self._daemon = daemon

    def finish(self) -> None:
        """Lets it come to its end, and waits until the watcher has seen that."""
        self.go(STEPS)
        task = self._daemon.wait(self.name, "COMPLETED", "FAILED", "STOPPED")
        self._world.oracle.must(
            task.state == task_pb2.TASK_STATE_COMPLETED,
            f"the run that goes on ended otherwise: {task.end_message}",
        )
        self.watcher.until(self._daemon.get(self.name).last_seq)
        self.watcher.leave()
