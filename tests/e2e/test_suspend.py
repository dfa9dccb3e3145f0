"""Before the machine sleeps every run saves: with a private bus, and a logind made for the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, task_pb2, task_service_pb2

jeepney = pytest.importorskip("jeepney")
blocking = pytest.importorskip("jeepney.io.blocking")

PATH, NAME = "/org/freedesktop/login1", "org.freedesktop.login1"
BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow send_destination="*"/> <allow receive_sender="*"/> <allow own="*"/>
  </policy>
</busconfig>
"""


class Logind:
    """A logind with one lock to give: it says when the lock is taken, and when it is let go."""

    def __init__(self, delay_seconds: float) -> None:
        self.delay = int(delay_seconds * 1e6)
        self.asked: list[tuple[str, ...]] = []
        self._bus = blocking.open_dbus_connection("SYSTEM", enable_fds=True)
        reply = self._bus.send_and_get_reply(jeepney.message_bus.RequestName(NAME))
        assert reply.body == (1,), "the name is ours"
        self._ends: list[int] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                call = self._bus.receive()
            except (OSError, ValueError):
                return
            member = call.header.fields.get(jeepney.HeaderFields.member)
            if member == "Inhibit":
                ours, theirs = os.pipe()
                answer = jeepney.new_method_return(call, "h", (theirs,))
                self._bus.send(answer)
                os.close(theirs)
                self._ends.append(ours)
                self.asked.append(call.body)
            elif member == "Get":
                assert call.body[1] == "InhibitDelayMaxUSec"
                self._bus.send(jeepney.new_method_return(call, "v", (("t", self.delay),)))

    def say(self, member: str, *, is_about_to: bool) -> None:
        emitter = jeepney.DBusAddress(PATH, interface=f"{NAME}.Manager")
        self._bus.send(jeepney.new_signal(emitter, member, "b", (is_about_to,)))

    def wait_for_lock(self, number: int) -> None:
        eventually(lambda: len(self.asked) >= number, "the lock is taken")

    def wait_for_release(self) -> None:
        """Reads to the end of the pipe: nobody has its other end any more."""
        assert os.read(self._ends[-1], 1) == b""

    def close(self) -> None:
        self._bus.close()
        for end in self._ends:
            os.close(end)


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A bus of the test's own, where there is a program for one."""
    if shutil.which("dbus-daemon") is None:
        pytest.skip("there is no dbus-daemon here")
    path = tmp_path / "bus"
    (tmp_path / "bus.conf").write_text(BUS.format(socket=path))
    process = subprocess.Popen(
        ["dbus-daemon", f"--config-file={tmp_path / 'bus.conf'}", "--nofork", "--print-address"],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline(), "it is there once it says where"
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={path}")
    yield
    process.terminate()
    process.wait()


@pytest.fixture
def logind(bus: None) -> Iterator[Logind]:
    logind = Logind(30)
    yield logind
    logind.close()


def saved(daemon: Daemon, name: str) -> list[event_pb2.CheckpointSaved]:
    return [e.checkpoint_saved for e in daemon.events(name) if e.HasField("checkpoint_saved")]


@pytest.mark.parametrize("signal", ["PrepareForSleep", "PrepareForShutdown"])
def test_each_run_has_saved_when_the_machine_may_sleep(
    logind: Logind, daemon: Daemon, scene: Scene, signal: str
) -> None:
    """The lock delays sleep and shutdown; it is let go after the checkpoint, and taken again."""
    logind.wait_for_lock(1)
    what, who, _, mode = logind.asked[0]
    assert (set(what.split(":")), who, mode) == ({"sleep", "shutdown"}, "finetuned", "delay")
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    queued = daemon.create(scene.parameters(), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
        for number, step in enumerate((2, 3), start=1):
            logind.say(signal, is_about_to=True)
            logind.wait_for_release()
            there = saved(daemon, task.name)
            assert [c.cause for c in there] == ["suspend"] * number
            assert Path(there[-1].path).is_dir()
            assert there[-1].step == step
            logind.say(signal, is_about_to=False)
            logind.wait_for_lock(number + 1)
            scene.let_pass(1)
            watch.until_step(step + 1)
        scene.let_pass(5)
        watch.until_end()
    assert daemon.get(task.name).state == task_pb2.TASK_STATE_COMPLETED, "it goes on as before"
    assert daemon.get(queued.name).state != task_pb2.TASK_STATE_FAILED


def test_a_run_that_does_not_save_holds_up_the_machine_no_longer_than_it_may(
    bus: None, tmp_path: Path, scene: Scene
) -> None:
    """The lock is let go before logind's own time is over, which it gives as a property."""
    logind = Logind(0.5)
    daemon = Daemon(tmp_path).start()
    try:
        logind.wait_for_lock(1)
        task = daemon.create(scene.play(steps=1, gated=True), start=True)
        with daemon.watch(task.name) as watch:
            training = task_pb2.RUN_PHASE_TRAINING
            watch.until(lambda e: e.phase_change.phase == training)
            logind.say("PrepareForSleep", is_about_to=True)  # nothing is trained yet
            logind.wait_for_release()
            assert saved(daemon, task.name) == []
            scene.let_pass(1)
            watch.until_end()
    finally:
        daemon.close()
        logind.close()


def test_a_run_adopted_by_the_next_daemon_saves_too(
    logind: Logind, daemon: Daemon, scene: Scene
) -> None:
    """The wish is counted on from what the runner was told by the daemon before."""
    logind.wait_for_lock(1)
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    logind.say("PrepareForSleep", is_about_to=True)
    logind.wait_for_release()
    daemon.kill()
    daemon.start()
    logind.wait_for_lock(2)
    logind.say("PrepareForSleep", is_about_to=True)
    logind.wait_for_release()
    assert len(saved(daemon, task.name)) == 2
    scene.let_pass(8)
    daemon.wait(task.name, "COMPLETED")


def test_what_others_say_on_the_bus_is_not_believed(
    logind: Logind, daemon: Daemon, scene: Scene
) -> None:
    """Anybody may send a signal to the daemon's connection; only logind's counts."""
    logind.wait_for_lock(1)
    task = daemon.create(scene.play(steps=2, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        stranger: Any = blocking.open_dbus_connection("SYSTEM")
        emitter = jeepney.DBusAddress(PATH, interface=f"{NAME}.Manager")
        stranger.send(jeepney.new_signal(emitter, "PrepareForSleep", "b", (True,)))
        stranger.send_and_get_reply(jeepney.message_bus.GetId())  # the bus has passed it on
        stranger.close()
        logind.say("PrepareForSleep", is_about_to=True)
        logind.say("PrepareForSleep", is_about_to=False)
        logind.wait_for_lock(2)  # all three have been heard
        assert [c.cause for c in saved(daemon, task.name)] == ["suspend"]
        scene.let_pass(1)
        watch.until_end()


@pytest.mark.parametrize("address", ["unix:path=/no/such/bus", "nonsense"])
def test_without_a_bus_the_daemon_serves_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    daemon = Daemon(tmp_path).start()
    try:
        request = task_service_pb2.ListTasksRequest()
        assert list(daemon.tasks.ListTasks(request).tasks) == []
        text = eventually(lambda: "no logind" in logs(daemon) and logs(daemon), "it is said")
        assert text.count("no logind") == 1
        assert "Traceback" not in text
    finally:
        daemon.close()


def test_a_bus_without_logind_is_no_trouble(bus: None, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path).start()
    try:
        eventually(lambda: "no logind" in logs(daemon), "it is said")
        assert daemon.stop() == 0
    finally:
        daemon.close()


def logs(daemon: Daemon) -> str:
    written = [daemon.log, *daemon.paths.state_dir.rglob("*.log")]
    return "".join(path.read_text() for path in written if path.is_file())
