"""The standby itself, talked to as the daemon does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux forks"),
    pytest.mark.timeout(900),
]

_ROOM = " " * 1024
_RUN = """
import os, random, sys, threading, uuid
from finetuned_runner import standby
folder = standby.wait(sys.argv[2])
if folder is None:
    sys.exit(7)
import numpy, torch
for number in random.random(), numpy.random.rand(), torch.rand(1).item(), uuid.uuid4().hex:
    print(number)
print("bitsandbytes" in sys.modules and sys.modules["bitsandbytes"] is None)
print(threading.active_count(), torch.cuda.is_initialized())
"""
"""A run that says what it finds."""


class Standby:
    """A standby, and the daemon's end of its socket."""

    def __init__(self, mode: str, folder: Path, *, packages: Path) -> None:
        self.folder = folder
        self.control, theirs = socket.socketpair()
        environment = {"PYTHONPATH": str(packages), "TRAINING_RUN_DIR": _ROOM}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _RUN, "--standby", mode, _ROOM],
            stdin=theirs.fileno(),
            env={**os.environ, **environment},
            start_new_session=True,
        )
        theirs.close()
        self.ready = self.hear().get("ready")

    def hear(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            part = self.control.recv(1 << 16)
            if not part:
                return {}
            line += part
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, name: str) -> dict[str, Any]:
        """Asks for a run in a folder of this name."""
        run_dir = self.folder / name
        run_dir.mkdir()
        request = {"run_dir": str(run_dir), "umask": 0o27, "env": dict(os.environ)}
        with open(run_dir / "console.log", "wb") as console:
            data = json.dumps(request).encode() + b"\n"
            socket.send_fds(self.control, [data], [console.fileno()])
        return self.hear()

    def said(self, name: str, pid: int) -> list[str]:
        """What the run of a folder has printed, once its process is gone."""
        with contextlib.suppress(ProcessLookupError):
            held = os.pidfd_open(pid)  # it tells of the end of somebody else's child, too
            looked = select.poll()
            looked.register(held, select.POLLIN)
            looked.poll()
            os.close(held)
        return (self.folder / name / "console.log").read_text().splitlines()

    def close(self) -> None:
        self.control.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.fixture(scope="module")
def standby(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Iterator[Standby]:
    """One that forks."""
    standby = Standby("fork", tmp_path_factory.mktemp("runs"), packages=packages)
    yield standby
    standby.close()


def test_each_run_has_random_numbers_of_its_own(standby: Standby) -> None:
    """Two runs that nobody has given a seed begin with other numbers, in every library."""
    assert standby.ready == "fork"
    first = standby.said("first", standby.ask("first")["pid"])
    second = standby.said("second", standby.ask("second")["pid"])
    assert len(first) == 6
    assert not set(first[:4]) & set(second[:4])
    assert first[4:] == second[4:] == ["True", "1 False"]


def test_it_is_nobodys_parent(standby: Standby) -> None:
    """A run is no child of the standby's, and leads a session of its own from the first moment."""
    pid = standby.ask("orphan")["pid"]
    children = Path(f"/proc/{standby.process.pid}/task/{standby.process.pid}/children")
    assert not children.read_text()
    standby.said("orphan", pid)


def test_what_has_changed_is_refused(tmp_path: Path, packages: Path) -> None:
    """After a change where modules are found it begins no run, says why, and ends."""
    standby = Standby("spare", tmp_path, packages=packages)
    assert standby.ready == "spare"
    (packages / "another.py").touch()
    assert "has changed" in standby.ask("run")["refused"]
    assert standby.process.wait(60) == 7
    standby.close()


def test_a_name_without_room_is_refused(tmp_path: Path, packages: Path) -> None:
    """A run folder whose name does not fit into the command line of its process is not begun."""
    folder = tmp_path.joinpath(*["deep" * 50] * 6)
    folder.mkdir(parents=True)
    standby = Standby("spare", folder, packages=packages)
    assert "too long" in standby.ask("run")["refused"]
    assert standby.process.wait(60) == 7
    standby.close()


def test_it_ends_with_its_daemon(tmp_path: Path, packages: Path) -> None:
    """When nobody holds the other end of its socket any more, it ends; SIGINT does not end it."""
    standby = Standby("fork", tmp_path, packages=packages)
    standby.process.send_signal(signal.SIGINT)
    standby.process.send_signal(signal.SIGHUP)
    standby.control.close()
    assert standby.process.wait(60) == 7
