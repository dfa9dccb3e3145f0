"""Notifications reach a real server, a real program and a real desktop service, whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import system_service_pb2, task_pb2, task_service_pb2
from receiver import Receiver

PROGRAM = """
import json, os, sys
said = {k: v for k, v in os.environ.items() if k.startswith("FINETUNED_")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([json.load(sys.stdin), said]) + "\\n")
"""
QUICKLY = ("--notify-retry-seconds", "0.02")


def notify(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`finetuned notify`."""
    return subprocess.run(
        [sys.executable, "-m", "finetuned_daemon.main", "notify", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def log_of(daemon: Daemon) -> list[dict[str, Any]]:
    """What `finetuned notify log` says, newest first."""
    result = notify("log", "--json", "--state-dir", str(daemon.paths.state_dir))
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def counts(daemon: Daemon) -> tuple[int, int]:
    """Pending and given up."""
    info = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    return info.pending_notifications, info.failed_notifications


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logged(daemon: Daemon) -> str:
    return daemon.paths.log_file.read_text()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notify")


@pytest.fixture(scope="module")
def secret(folder: Path) -> Path:
    assert notify("new-secret", str(folder / "secret")).returncode == 0
    return folder / "secret"


@pytest.fixture(scope="module")
def shared(folder: Path, receiver: Receiver, secret: Path) -> Iterator[Daemon]:
    """A daemon with every way of notification, some of which do not work."""
    (folder / "program.py").write_text(PROGRAM)
    webhook = "--notify-webhook"
    daemon = Daemon(
        folder,
        *("--notify-command", f"{sys.executable} {folder}/program.py {folder}/got"),
        *(webhook, f"{receiver.url.replace('//', '//me:pass-word-of-me@')}/good?key=secret-of-url"),
        *(webhook, f"{receiver.url}/flaky"),
        *("--notify-webhook-secret-file", str(secret)),
        *("--notify-on", "completed,failed,paused,needs_attention,quota_used_up,stopped"),
        *("--disk-look-seconds", "0.05", *QUICKLY),
    ).start()
    yield daemon
    daemon.close()


def test_the_end_of_a_run_is_told_once_on_each_way(
    shared: Daemon, receiver: Receiver, scene: Scene, folder: Path, secret: Path
) -> None:
    """Signed, with an id that is the same everywhere, and with no secret and no data in it."""
    task = shared.create(scene.play(steps=4), start=True)
    (post,) = receiver.wait("/good", task.name)
    content, data = post.content, post.content["data"]
    assert content["type"] == "run.completed"
    assert content["id"] == post.headers["webhook-id"]
    assert post.is_signed_by(secret.read_text().strip())
    assert (data["state"], data["reason"], data["run"]) == ("COMPLETED", "FINISHED", 1)
    assert (data["step"], data["total_steps"], data["loss"]) == (4, 4, 0.25)
    assert data["output_path"] == str(scene.output / "run-1" / "checkpoint-4")
    assert data["next"] == f"finetunectl task checkpoints {task.name.removeprefix('tasks/')}"
    ((told, environment),) = eventually(
        lambda: [g for g in lines(folder / "got") if g[0]["data"]["task"] == task.name],
        "the program got it",
    )
    assert told == content
    assert environment["FINETUNED_TYPE"] == "run.completed"
    assert environment["FINETUNED_TASK"] == task.name
    assert environment["FINETUNED_LOSS"] == "0.25"
    assert environment["FINETUNED_STATE_DIR"] == str(shared.paths.state_dir)
    assert len(receiver.wait("/good", task.name)) == 1


def test_a_user_in_the_address_is_sent_and_neither_that_nor_the_rest_is_logged(
    shared: Daemon, receiver: Receiver, scene: Scene
) -> None:
    task = shared.create(scene.play(steps=1), start=True)
    (post,) = receiver.wait("/good", task.name)
    assert post.headers["authorization"] == "Basic bWU6cGFzcy13b3JkLW9mLW1l"
    assert post.path == "/good?key=secret-of-url"
    text = logged(shared) + shared.log.read_text() + json.dumps(log_of(shared))
    assert receiver.url in text
    for part in ("pass-word-of-me", "secret-of-url", "bWU6cGFzcy13b3JkLW9mLW1l"):
        assert part not in text


def test_what_fails_is_sent_again_with_the_same_id_until_it_arrives(
    shared: Daemon, receiver: Receiver, scene: Scene, secret: Path
) -> None:
    receiver.answers["/flaky"] = [500, 503]
    task = shared.create(scene.play(steps=1), start=True)
    posts = receiver.wait("/flaky", task.name, 3)
    assert len({post.headers["webhook-id"] for post in posts}) == 1
    assert len({post.body for post in posts}) == 1
    assert all(post.is_signed_by(secret.read_text().strip()) for post in posts)
    # The next comes behind it on the same way, and no repeat between.
    after = shared.create(scene.play(steps=1), start=True)
    receiver.wait("/flaky", after.name)
    assert len(receiver.wait("/flaky", task.name)) == 3


def test_what_can_not_be_delivered_is_given_up_and_can_be_seen(
    tmp_path: Path, receiver: Receiver, scene: Scene
) -> None:
    """A port where nobody listens; a redirect, which is not followed; a receiver that is gone."""
    receiver.answers["/redirects"] = [302]
    receiver.answers["/gone"] = [410]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    urls = (f"{receiver.url}/redirects", f"{receiver.url}/gone", closed)
    daemon = Daemon(
        tmp_path,
        *(option for url in urls for option in ("--notify-webhook", url)),
        *("--notify-give-up-hours", "0.000001"),
    ).start()
    try:
        daemon.create(scene.play(steps=1), start=True)
        eventually(lambda: counts(daemon) == (0, 3), "all are given up")
        said = log_of(daemon)
        assert {delivery["state"] for delivery in said} == {"GIVEN_UP"}
        refused, redirect, gone = sorted(delivery["error"] for delivery in said)
        assert "refused" in refused
        assert gone == "status 410"
        assert redirect == "status 302: a redirect is not followed; give the URL itself"
        assert receiver.posts["/elsewhere"] == []
        assert logged(daemon).count("is given up after 1 attempts") == 3
    finally:
        daemon.close()


def test_one_who_is_gone_is_asked_once(shared: Daemon, receiver: Receiver, scene: Scene) -> None:
    """410 Gone is final, however much time there would be."""
    receiver.answers["/flaky"] = [410]
    first = shared.create(scene.play(steps=1), start=True)
    receiver.wait("/flaky", first.name)
    second = shared.create(scene.play(steps=1), start=True)
    receiver.wait("/flaky", second.name)
    assert len(receiver.wait("/flaky", first.name)) == 1
    eventually(lambda: counts(shared) == (0, 1), "it is given up")


def test_every_kind_is_told(shared: Daemon, receiver: Receiver, scene: Scene) -> None:
    """A failure, a pause for want of space, and a stop."""

    def told(name: str, number: int = 1) -> list[tuple[str, str]]:
        posts = receiver.wait("/good", name, number)
        return [(p.content["type"], p.content["data"]["reason"]) for p in posts]

    failure = {"step": 2, "reason": "LOSS_NOT_FINITE", "message": "The loss is nan."}
    task = shared.create(scene.play(fail=failure), start=True)
    assert told(task.name) == [("run.failed", "LOSS_NOT_FINITE")]
    full = {"step": 2, "reason": "DISK_FULL", "message": "No space is left.", "attempt": 1}
    task = shared.create(scene.play(steps=4, fail=full), start=True)
    assert told(task.name, 2) == [("run.paused", "DISK_FULL"), ("run.completed", "FINISHED")]
    task = shared.create(scene.play(hold="LOADING_MODEL"), start=True)
    shared.wait(task.name, "RUNNING")
    shared.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
    assert told(task.name) == [("run.stopped", "STOPPED_BY_USER")]


def test_a_run_that_gives_no_sign_of_life_needs_attention(
    tmp_path: Path, receiver: Receiver, scene: Scene
) -> None:
    """Told once within an hour, though it comes and goes."""
    daemon = Daemon(
        tmp_path,
        *("--notify-webhook", f"{receiver.url}/silent", "--hang-notice-seconds", "0.5", *QUICKLY),
    ).start()
    try:
        task = daemon.create(scene.play(steps=1, beats=True, gated=True), start=True)
        with daemon.watch(task.name) as watch:
            training = task_pb2.RUN_PHASE_TRAINING
            watch.until(lambda e: e.phase_change.phase == training)
            (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
            for _ in range(2):
                os.kill(run.pid, signal.SIGSTOP)
                watch.until(lambda e: e.notice.reason == "RUNNER_SILENT")
                os.kill(run.pid, signal.SIGCONT)
                watch.until(lambda e: e.notice.reason == "RUNNER_BACK")
            scene.let_pass(1)
            watch.until_end()
        eventually(lambda: counts(daemon) == (0, 0), "all is told")
        silent, end = receiver.wait("/silent", task.name, 2)
        assert silent.content["type"] == "run.needs_attention"
        assert silent.content["data"]["reason"] == "RUNNER_SILENT"
        assert end.content["type"] == "run.completed"
    finally:
        daemon.close()


def test_a_daemon_without_ways_makes_none_and_later_tells_nothing_of_then(
    tmp_path: Path, receiver: Receiver, scene: Scene
) -> None:
    """By default a stop of the user's own is no news either."""
    daemon = Daemon(tmp_path).start()
    try:
        old = daemon.create(scene.play(steps=1), start=True)
        daemon.wait(old.name, "COMPLETED")
        assert daemon.stop() == 0
        daemon.options += ["--notify-webhook", f"{receiver.url}/later"]
        daemon.start()
        stopped = daemon.create(scene.play(hold="LOADING_MODEL"), start=True)
        daemon.wait(stopped.name, "RUNNING")
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=stopped.name))
        daemon.wait(stopped.name, "STOPPED")
        new = daemon.create(scene.play(steps=1), start=True)
        receiver.wait("/later", new.name)
        assert [post.task for post in receiver.posts["/later"]] == [new.name]
        assert "webhook-signature" not in receiver.posts["/later"][0].headers
    finally:
        daemon.close()


def test_a_receiver_that_hangs_holds_up_no_run_no_other_way_and_no_stop(
    tmp_path: Path, receiver: Receiver, scene: Scene
) -> None:
    """Killed or stopped in the middle, the next daemon delivers what this one could not."""
    receiver.answers["/hangs"] = [0, 0, 0]
    daemon = Daemon(
        tmp_path,
        *("--notify-webhook", f"{receiver.url}/hangs", "--notify-webhook", f"{receiver.url}/works"),
        *("--notify-timeout-seconds", "600", *QUICKLY),
    ).start()
    try:
        tasks = []
        for _ in range(2):
            tasks.append(daemon.create(scene.play(steps=1), start=True).name)
            daemon.wait(tasks[-1], "COMPLETED")
            receiver.wait("/works", tasks[-1])
        receiver.wait("/hangs", tasks[0])
        assert counts(daemon) == (2, 0)
        daemon.kill()
        daemon.start()
        receiver.wait("/hangs", tasks[0], 2)
        assert daemon.stop() == 0
        assert "never retrieved" not in logged(daemon), "nor is that an error of the daemon's"
        live = "a run that ends while no daemon is there"
        daemon.start()
        receiver.wait("/hangs", tasks[0], 3)
        task = daemon.create(scene.play(steps=2, gated=True), start=True)
        with daemon.watch(task.name) as watch:
            scene.let_pass(1)
            watch.until_step(1)
        (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
        daemon.kill()
        scene.let_pass(1)
        eventually(lambda: not psutil.pid_exists(run.pid), live)
        daemon.start()
        for name in (*tasks, task.name):
            receiver.wait("/hangs", name, 4 if name == tasks[0] else 1)
        receiver.wait("/works", task.name)
        assert [p.task for p in receiver.posts["/works"]] == [*tasks, task.name], "each once"
        ids = {name: {p.content["id"] for p in receiver.wait("/hangs", name)} for name in tasks}
        assert all(len(found) == 1 for found in ids.values()), "repeats have the same id"
        eventually(lambda: counts(daemon) == (0, 0), "none is left")
    finally:
        receiver.let_go.set()
        daemon.close()


def test_a_program_that_takes_too_long_is_ended_with_its_children(
    tmp_path: Path, scene: Scene
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child\nwait\n")
    program.chmod(0o700)
    daemon = Daemon(
        tmp_path, "--notify-command", str(program), "--notify-timeout-seconds", "0.5", *QUICKLY
    ).start()
    try:
        daemon.create(scene.play(steps=1), start=True)
        eventually(lambda: "was ended after 0.5 s" in logged(daemon), "it is said")
        child = int((tmp_path / "child").read_text())
        eventually(lambda: not _runs(child), "its child is gone")
    finally:
        daemon.close()


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- the desktop

BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <listen>unix:path={socket}</listen>
  <policy context="default">
    <allow send_destination="*"/> <allow receive_sender="*"/> <allow own="*"/>
  </policy>
</busconfig>
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    """The address of a session bus of the test's own, where there is a program for one."""
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
    yield f"unix:path={path}"
    process.terminate()
    process.wait()


class Desktop:
    """Shows notifications, as a desktop does: keeps them."""

    def __init__(self, bus: str) -> None:
        self._jeepney: Any = pytest.importorskip("jeepney")
        self._bus: Any = pytest.importorskip("jeepney.io.blocking").open_dbus_connection(bus)
        name = self._jeepney.message_bus.RequestName("org.freedesktop.Notifications")
        assert self._bus.send_and_get_reply(name).body == (1,)
        self.shown: list[Any] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                call = self._bus.receive()
            except (OSError, ValueError):
                return
            if call.header.fields.get(self._jeepney.HeaderFields.member) == "Notify":
                self.shown.append(call.body)
                self._bus.send(self._jeepney.new_method_return(call, "u", (len(self.shown),)))

    def close(self) -> None:
        self._bus.close()


def test_the_desktop_shows_it_once_there_is_one(tmp_path: Path, bus: str, scene: Scene) -> None:
    """Without one it is said once, however often it is tried; the daemon goes on."""
    daemon = Daemon(tmp_path, "--notify-desktop", "--notify-language", "zh", *QUICKLY)
    daemon.environment["DBUS_SESSION_BUS_ADDRESS"] = bus
    daemon.start()
    try:
        task = daemon.create(scene.play(steps=1), start=True)
        daemon.wait(task.name, "COMPLETED")
        eventually(lambda: (log_of(daemon) or [{"attempts": 0}])[0]["attempts"] > 2, "it is tried")
        assert logged(daemon).count("notifications don't arrive: desktop") == 1
        desktop = Desktop(bus)
        shown = eventually(lambda: desktop.shown, "it is shown")
        application, _, _, title, text, _, hints, _ = shown[0]
        assert application == "finetuned"
        assert title == f"{task.display_name}: 已完成"
        assert text == "已完成全部轮数。"
        assert hints["urgency"] == ("y", 1)
        desktop.close()
    finally:
        daemon.close()


# --- the command line


def test_a_test_says_what_became_of_each_way(
    tmp_path: Path, receiver: Receiver, secret: Path, bus: str
) -> None:
    """Status 1 where one did not arrive, 2 where none is given."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho it went wrong >&2\nexit 3\n")
    program.chmod(0o700)
    desktop = Desktop(bus)
    os.environ["DBUS_SESSION_BUS_ADDRESS"] = bus
    webhook = ("--notify-webhook", f"{receiver.url}/test")
    signed = (*webhook, "--notify-webhook-secret-file", str(secret))
    try:
        good = notify("test", "--notify-desktop", *signed)
        bad = notify("test", *signed, "--notify-command", str(program))
    finally:
        del os.environ["DBUS_SESSION_BUS_ADDRESS"]
        desktop.close()
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.count("delivered") == 2
    assert [shown[3] for shown in desktop.shown] == ["finetuned: a test"]
    first, second = receiver.posts["/test"]
    assert first.content["type"] == "test"
    assert second.is_signed_by(secret.read_text().strip())
    assert bad.returncode == 1
    assert f"failed     command {program}: it ended with status 3: it went wrong" in bad.stdout
    assert f"delivered  webhook {receiver.url} (status 204" in bad.stdout
    none = notify("test")
    assert none.returncode == 2
    assert "--notify-command" in none.stderr


def test_a_secret_is_never_written_over(secret: Path) -> None:
    assert secret.stat().st_mode & 0o777 == 0o600
    before = secret.read_text()
    assert notify("new-secret", str(secret)).returncode == 1
    assert secret.read_text() == before


def test_the_log_of_a_daemon_that_sends_nothing_is_empty(tmp_path: Path) -> None:
    missing = notify("log", "--state-dir", str(tmp_path))
    assert missing.returncode == 1
    assert "there is no database" in missing.stderr
    daemon = Daemon(tmp_path).start()
    daemon.close()
    log = notify("log", "--state-dir", str(daemon.paths.state_dir))
    assert (log.returncode, log.stdout) == (0, "nothing was sent\n")
