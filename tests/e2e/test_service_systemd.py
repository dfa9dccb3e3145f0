"""The service under systemd itself: a user manager of its own, in namespaces of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import TESTS, Daemon, eventually
from finetuned.v1 import task_pb2, task_service_pb2
from user_manager import USER, UserManager, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "it can")


@dataclass
class Service:
    """A user with a systemd, and the daemon that it runs."""

    manager: UserManager
    daemon: Daemon
    scene: Scene

    def do(self, *words: str, status: int = 0) -> str:
        """`finetuned service`; what it prints."""
        done = self.manager.service(*words)
        assert done.returncode == status, done.stdout + done.stderr
        self.daemon._forget_channel()
        return done.stdout

    def install(self, *words: str, options: tuple[str, ...] = ()) -> str:
        """Installs it, for runs of the fake runner."""
        return self.do(
            *("install", "--env", f"PYTHONPATH={TESTS}", *words),
            *("--state-dir", str(self.daemon.paths.state_dir)),
            *("--runtime-dir", str(self.daemon.paths.runtime_dir)),
            *("--", *self.daemon.options, *options),
        )

    def status(self, exit_status: int = 0) -> dict[str, object]:
        shown: dict[str, object] = json.loads(self.do("status", "--json", status=exit_status))
        return shown

    def any_status(self) -> dict[str, object]:
        """Whatever the exit status."""
        shown: dict[str, object] = json.loads(self.manager.service("status", "--json").stdout)
        return shown

    def status_is_new(self, daemons: set[object]) -> bool:
        """Whether a daemon serves that is none of these."""
        shown = self.any_status()
        return bool(shown["addresses"]) and shown["pid"] not in daemons

    def finetunectl(self, *words: str) -> subprocess.CompletedProcess[str]:
        folders = self.daemon.paths
        return self.manager.run(
            *(sys.executable, "-m", "finetuned.cli", *words),
            FINETUNED_STATE_DIR=str(folders.state_dir),
            FINETUNED_RUNTIME_DIR=str(folders.runtime_dir),
        )

    def begin(self) -> tuple[task_pb2.Task, int]:
        """A task whose run takes its steps as the tests let it; and its process."""
        parameters = self.scene.play(steps=50, gated=True)
        for path in (self.scene.root, *self.scene.root.rglob("*")):
            os.chown(path, USER, USER)
        task = self.daemon.create(parameters, start=True)
        pid = eventually(lambda: self.run(task.name).pid, "the runner started")
        return task, pid

    def run(self, name: str) -> task_pb2.Run:
        return self.daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]

    def step(self, name: str, number: int) -> None:
        """Lets the run take one step, the `number`th, and sees it."""
        self.scene.let_pass(1)
        with self.daemon.watch(name) as watch:
            watch.until_step(number)

    def end(self, name: str) -> None:
        request = task_service_pb2.StopTaskRequest(name=name)
        self.daemon.tasks.StopTask(request)
        self.daemon.wait(name, "STOPPED")


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    # What units give a meaning to is in every path. Short: a socket's path may not be long.
    root = Path(tempfile.mkdtemp(prefix="ft %h$x"))
    manager = UserManager(root)
    scene = Scene(root / "scene")
    manager.start()
    daemon = Daemon(root)
    yield Service(manager, daemon, scene)
    scene.close()
    daemon.close()
    manager.close()
    shutil.rmtree(root)


def test_a_run_outlives_restart_upgrade_crash_stop_and_removal_of_the_service(
    service: Service,
) -> None:
    assert service.status(4)["next_command"] == "finetuned service install"
    service.install()
    shown = service.status()
    assert (shown["is_running"], shown["is_enabled"]) == (True, True)
    assert shown["addresses"] == [f"unix:{service.daemon.paths.socket}"]
    task, pid = service.begin()
    service.step(task.name, 1)
    daemons = {shown["pid"]}

    service.do("restart")
    daemons.add(service.status()["pid"])
    assert service.run(task.name).pid == pid, "adopted after a restart"
    service.step(task.name, 2)

    assert "replaced" in service.install(options=("--training-quota", "1000"))
    daemons.add(service.status()["pid"])
    assert service.run(task.name).pid == pid, "adopted after other settings"
    service.step(task.name, 3)

    service.manager.run("kill", "-9", str(service.status()["pid"]))
    service.daemon._forget_channel()
    eventually(lambda: service.status_is_new(daemons), "systemd starts it again", 60)
    assert service.run(task.name).pid == pid, "adopted after a crash"
    service.step(task.name, 4)

    service.do("stop")
    assert service.status(3)["next_command"] == "finetuned service start"
    service.scene.let_pass(1)
    service.do("start")
    assert service.run(task.name).pid == pid, "adopted after a stop"
    service.step(task.name, 6)

    service.do("uninstall")
    assert not list(service.manager.units.glob("finetuned*"))
    assert not list(service.manager.units.glob("*.wants/*"))
    service.scene.let_pass(1)
    service.install()
    assert service.run(task.name).pid == pid, "adopted by the next installation"
    service.step(task.name, 8)
    steps = [e.progress.step for e in service.daemon.events(task.name) if e.HasField("progress")]
    assert steps == list(range(1, 9)), "no gap, no repeat"
    service.end(task.name)
    service.do("uninstall")


def test_the_first_call_starts_a_daemon_that_is_listened_for(service: Service) -> None:
    service.install("--socket-activation")
    shown = service.status()
    assert (shown["is_running"], shown["waits_for_first_call"]) == (False, True)
    first = service.finetunectl("daemon", "status", "--json")
    assert first.returncode == 0, first.stderr
    pid = json.loads(first.stdout)["pid"]
    task, runner = service.begin()
    service.step(task.name, 1)

    service.manager.run("kill", "-9", str(pid))
    second = service.finetunectl("task", "show", task.name, "--json")
    assert second.returncode == 0, second.stderr
    service.daemon._forget_channel()
    assert service.run(task.name).pid == runner, "adopted"
    service.step(task.name, 2)

    stop = service.finetunectl("daemon", "stop")
    assert stop.returncode == 0, stop.stderr
    assert "finetuned service stop" in stop.stderr, "it says that the next call starts it again"
    service.daemon._forget_channel()
    service.step(task.name, 3)

    service.do("stop")
    assert service.status(3)["waits_for_first_call"] is False
    assert not service.daemon.paths.socket.exists(), "another daemon may have the place"
    service.do("start")
    service.end(task.name)
    assert not [name for name in service.do("uninstall").splitlines() if "kept" in name]
    assert not service.daemon.paths.socket.exists()


def test_what_goes_wrong_at_a_start_is_said_by_status(service: Service) -> None:
    folder = service.daemon.paths.state_dir
    folder.chmod(0o755)
    done = service.manager.service(
        *("install", "--state-dir", str(folder)),
        *("--runtime-dir", str(service.daemon.paths.runtime_dir)),
    )
    folder.chmod(0o700)
    assert done.returncode == 1
    assert "start finetuned.service has failed" in done.stderr
    shown = eventually(
        lambda: shown if (shown := service.any_status())["last_end"] else None,
        "it says how the last start ended",
    )
    assert shown["next_command"] == "finetuned service logs"
    service.do("uninstall")
