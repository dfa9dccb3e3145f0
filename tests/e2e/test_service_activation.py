"""A service manager that listens for the daemon and starts it, and is told how it is.

Its part is played by the tests: they hold the socket, hand it over as systemd does, and take what
the daemon tells. `test_service_systemd.py` has systemd itself.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually, python_path
from finetuned import Client
from finetuned.v1 import task_pb2, task_service_pb2

# Descriptor 3 and the number of the process itself, as sd_listen_fds(3) has it.
_HAND_OVER = """\
import os, sys
descriptor = int(sys.argv[1])
if descriptor != 3:
    os.dup2(descriptor, 3)
os.set_inheritable(3, True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


class Activated(Daemon):
    """Daemons that are handed one listening socket, which outlives them."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.paths.runtime_dir.mkdir(mode=0o700)
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(self.paths.socket))
        self.paths.socket.chmod(0o600)
        self.listening.listen(128)
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.settimeout(30)
        self.told.bind(f"\0finetuned-test-{os.getpid()}")
        self.environment = {
            "LISTEN_FDS": "1",
            "LISTEN_FDNAMES": "finetuned.socket",
            "NOTIFY_SOCKET": f"@finetuned-test-{os.getpid()}",
        }

    def spawn(self, handed: socket.socket | None = None) -> subprocess.Popen[bytes]:
        handed = handed or self.listening
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", _HAND_OVER, str(handed.fileno())),
                    *("-m", "finetuned_daemon.main", "serve"),
                    *("--state-dir", str(self.paths.state_dir)),
                    *("--runtime-dir", str(self.paths.runtime_dir)),
                    *self.options,
                ],
                env={**os.environ, "PYTHONPATH": python_path(), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[handed.fileno()],
            )
        self._spawned.append(process)
        return process

    def close(self) -> None:
        super().close()
        self.listening.close()
        self.told.close()


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[Activated]:
    daemon = Activated(tmp_path)
    yield daemon
    daemon.close()


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    return daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]


def test_a_run_and_its_watchers_live_through_daemons_that_share_one_socket(
    activated: Activated, scene: Scene
) -> None:
    """Stopped, and killed: the place stays the same, and no event is missed or comes twice."""
    place = activated.paths.socket.stat().st_ino
    activated.start()
    assert activated.told.recv(4096).startswith(b"READY=1\nSTATUS=serving on ")
    task = activated.create(scene.play(steps=6, gated=True), start=True)
    seen = list[int]()
    with activated.watch(task.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
        seen += watch.seqs
    pid = run_of(activated, task.name).pid
    variables = Path(f"/proc/{pid}/environ").read_bytes()
    assert not [name for name in (b"LISTEN_", b"NOTIFY_SOCKET") if name in variables], (
        "what was handed to the daemon is not its runners'"
    )
    opened = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    assert not [target for target in opened if target.startswith("socket:")]
    assert activated.stop() == 0
    assert activated.told.recv(4096).startswith(b"STOPPING=1")
    for step, end in ((4, activated.kill), (6, None)):
        assert activated.paths.socket.stat().st_ino == place, "nobody took the place away"
        activated.start()
        assert run_of(activated, task.name).pid == pid, "adopted"
        with activated.watch(task.name, seen[-1]) as watch:
            scene.let_pass(2)
            watch.until_step(step)
            if end is None:
                watch.until_end()
            seen += watch.seqs
        if end is not None:
            end()
    assert seen == list(range(1, len(seen) + 1))
    assert activated.get(task.name).state == task_pb2.TASK_STATE_COMPLETED


def test_a_call_that_comes_too_early_is_answered_and_later_ones_do_not_hinder_each_other(
    activated: Activated,
) -> None:
    """Calls wait in the socket's queue while no daemon is there; a quiet stream holds up nobody."""
    answers = list[int]()

    def ask() -> None:
        with Client(activated.address) as client:
            answers.append(client.system_info().pid)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    activated.start()
    for thread in asking:
        thread.join(30)
    assert activated.process is not None
    assert answers == [activated.process.pid] * 4
    shown = Path(activated.paths.endpoint).read_text()
    assert f'"unix:{activated.paths.socket}"' in shown, "clients are told of the one place alone"


def test_a_daemon_by_hand_does_not_take_the_place_of_one_that_is_listened_for(
    activated: Activated,
) -> None:
    by_hand = Daemon(activated.paths.state_dir.parent)
    process = by_hand.spawn()
    assert process.wait(30) == 3
    assert "finetuned service status" in by_hand.log.read_text()
    assert activated.paths.socket.is_socket()
    activated.start()


def test_a_socket_that_is_not_the_clients_is_refused(activated: Activated) -> None:
    """Neither another place, nor one that is open to others, nor TCP, which needs a token."""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as elsewhere,
    ):
        elsewhere.bind(str(activated.paths.runtime_dir / "other.sock"))
        elsewhere.listen()
        for handed in (tcp, elsewhere):
            assert activated.spawn(handed).wait(30) == 1
            assert f"ListenStream={activated.paths.socket}" in activated.log.read_text()
            activated.log.unlink()
    activated.paths.socket.chmod(0o666)
    assert activated.spawn().wait(30) == 1
    assert f"chmod 600 {activated.paths.socket}" in activated.log.read_text()
    assert not activated.paths.endpoint.exists()


@pytest.mark.skipif(
    not shutil.which("systemd-socket-activate"), reason="there is no systemd-socket-activate here"
)
def test_the_first_call_starts_the_daemon(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.paths.runtime_dir.mkdir(mode=0o700)
    serve = (
        *(sys.executable, "-m", "finetuned_daemon.main", "serve"),
        *("--state-dir", str(daemon.paths.state_dir)),
        *("--runtime-dir", str(daemon.paths.runtime_dir)),
    )
    with open(daemon.log, "ab") as log:
        process = subprocess.Popen(
            ["systemd-socket-activate", "-l", str(daemon.paths.socket), *serve],
            stdout=log,
            stderr=log,
        )
    daemon.process = process
    try:
        eventually(daemon.paths.socket.exists, "it listens")
        daemon.paths.socket.chmod(0o600)  # a socket unit does that by SocketMode
        assert not daemon.paths.endpoint.exists(), "nobody has called"
        with Client(daemon.address) as client:
            assert client.system_info().pid == process.pid
    finally:
        daemon.close()
