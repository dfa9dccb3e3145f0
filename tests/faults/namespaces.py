"""Pids that are given to somebody else while no daemon looks.

The round is played by a process of its own in a new pid namespace, where the next pid can be
chosen.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from daemon_process import TESTS, Daemon, eventually
from faults.oracle import is_alive
from faults.registry import CanNotBeDone, World, fault
from faults.stage import LiveRun
from finetuned.v1 import task_pb2

_NEXT_PID = Path("/proc/sys/kernel/ns_last_pid")


@fault("pid reused", short_rounds=1)
def pid_reused(world: World) -> None:
    """Another process has the runner's pid: it is no runner, and nobody signals it."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("unshare"):
        world.skip("needs Linux, root and unshare, for a pid namespace")
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode != 0:
        world.skip("no pid namespace can be made")
    answer = world.root / "answer.json"
    inner = [sys.executable, "-m", "faults.namespaces", str(world.root), str(answer)]
    done = subprocess.run(
        [*unshare, *inner, str(world.rng.random())],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(answer.read_text())
    if told["skipped"]:
        world.skip(told["skipped"])
    world.oracle.acknowledged += told["acknowledged"]
    world.oracle.lost += told["lost"]
    world.oracle.wrong += told["wrong"]


def _play(world: World) -> None:
    daemon = world.daemon().start()
    live = LiveRun(world, daemon)
    live.go(2)
    live.until_step(1)  # it has begun: one that has not is started again
    # The zombie of a runner that a dead daemon has left is ours to reap: we are its init.
    daemon.kill()
    os.kill(live.pid, signal.SIGKILL)
    eventually(lambda: _is_gone(live.pid), "the runner is gone")
    stranger = _start_as(world, live.pid, leads=world.rng.random() < 0.7)
    daemon.start()
    task = daemon.wait(live.name, "COMPLETED", "FAILED", "STOPPED")
    world.oracle.must(
        task.end_reason == task_pb2.END_REASON_INTERRUPTED,
        f"a run whose pid is another's has not ended as INTERRUPTED: {task}",
    )
    world.oracle.must(stranger.poll() is None, "a process that has a runner's old pid was killed")
    _stop_another(world, daemon)
    world.oracle.must(stranger.poll() is None, "a process that has a runner's old pid was killed")
    stranger.kill()
    stranger.wait()
    live.watcher.leave()
    world.oracle.check(daemon)


def _stop_another(world: World, daemon: Daemon) -> None:
    """The device is free for the next run."""
    task = daemon.create(world.scene("other").play(steps=2), start=True)
    world.oracle.created(task)
    daemon.wait(task.name, "COMPLETED")


def _start_as(world: World, pid: int, *, leads: bool) -> subprocess.Popen[bytes]:
    """A process with this very pid; `leads`: of a process group, as a runner does."""
    for _ in range(100):  # others may take the number
        _NEXT_PID.write_text(str(pid - 1))
        stranger = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.pause()"], start_new_session=leads
        )
        if stranger.pid == pid:
            return stranger
        stranger.kill()
        stranger.wait()
    world.skip("the pid could not be had again")
    raise AssertionError


def _is_gone(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return not is_alive(pid)
    return False


def _main() -> None:
    """Plays the round as init of the namespace."""
    root, answer, seed = sys.argv[1:]
    world = World(Path(root), random.Random(seed), 0.5)
    skipped = ""
    try:
        _play(world)
    except CanNotBeDone as error:
        skipped = str(error)
    finally:
        world.close()
    oracle = world.oracle
    told = {
        "acknowledged": oracle.acknowledged,
        "lost": oracle.lost,
        "wrong": oracle.wrong,
        "skipped": skipped,
    }
    Path(answer).write_text(json.dumps(told))


if __name__ == "__main__":
    _main()
