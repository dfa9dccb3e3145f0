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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetuned_daemon.runs.contract import RESULT, EndReason, Progress

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux forks"),
    pytest.mark.timeout(900),
]

_ROOM = " " * 1024
_RUN = """
import os, random, signal, sys, threading, uuid
from finetuned_runner import standby
folder = standby.wait(sys.argv[2])
if folder is None:
    sys.exit(7)
import numpy, torch
for number in random.random(), numpy.random.rand(), torch.rand(1).item(), uuid.uuid4().hex:
    print(number)
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
print(os.environ.get("HF_DATASETS_OFFLINE"), signal.SIGTERM in blocked)
print("bitsandbytes" in sys.modules and sys.modules["bitsandbytes"] is None)
print(threading.active_count(), torch.cuda.is_initialized())
"""
"""A run that says what it finds."""
_RUNNER = "import sys; from finetuned_runner.__main__ import main; sys.exit(main(sys.argv[1:]))"
"""A run that trains."""


class Standby:
    """A standby, and the daemon's end of its socket."""

    def __init__(self, mode: str, folder: Path, *, packages: Path, run: str = _RUN) -> None:
        self.folder = folder
        self.control, theirs = socket.socketpair()
        environment = {"PYTHONPATH": str(packages), "TRAINING_RUN_DIR": _ROOM}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", run, "--standby", mode, "", _ROOM],
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
        run_dir.mkdir(exist_ok=True)
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
    assert len(first) == 7
    assert not set(first[:4]) & set(second[:4])
    # The first of them: what processes that the run has forked by then have inherited.
    assert first[4:] == second[4:] == ["1 True", "True", "1 False"]


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


def test_what_changes_in_place_while_it_imports_is_refused(tmp_path: Path) -> None:
    """A module that is written to after it was read, and before the standby is ready, is seen."""
    packages = tmp_path / "packages"
    packages.mkdir()
    module = packages / "sitecustomize.py"
    module.write_text("with open(__file__, 'a') as own:\n    own.write('# more')\n")
    standby = Standby("spare", tmp_path, packages=packages)
    assert standby.ready == "spare"
    assert f"{module} has changed" in standby.ask("run")["refused"]
    standby.close()


def test_sigterm_to_the_group_saves_while_tokens_are_made(
    shop: Any, large_file: Path, packages: Path
) -> None:
    """Processes that were forked ahead are not ended by it, and the run saves a checkpoint."""
    standby = Standby("fork", shop.root, packages=packages, run=_RUNNER)
    assert standby.ready == "fork"
    run = shop.make(data={"train_file": str(large_file)})
    pid = standby.ask(run.folder.name)["pid"]
    while not any(event.step for event in run.events(Progress)):
        assert not (run.folder / RESULT).exists(), run.result
        time.sleep(0.01)
    assert psutil.Process(pid).children(), "all tokens are made"
    os.killpg(pid, signal.SIGTERM)
    standby.said(run.folder.name, pid)
    assert run.result.end_reason is EndReason.STOPPED_BY_USER, run.result
    assert [saved.cause for saved in run.checkpoints()] == ["signal"]
    standby.close()
