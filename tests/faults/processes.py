"""Other daemons, what dead ones leave behind, and children that outlive their runner."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from daemon_process import Daemon, eventually
from faults.oracle import is_alive
from faults.registry import World, fault
from faults.stage import LiveRun, run_of
from finetuned._paths import paths
from finetuned.v1 import task_pb2, task_service_pb2

EXIT_ALREADY_SERVING = 3


@fault("two daemons on one folder")
def two_daemons_on_one_folder(world: World) -> None:
    """The second refuses with the address of the first, whose clients notice nothing."""
    first = world.daemon().start()
    live = LiveRun(world, first)
    live.go(2)
    mine, other = first.paths, world.root / "other"
    for state_dir, runtime_dir in (
        (mine.state_dir, mine.runtime_dir),
        (mine.state_dir, other / "run"),
        (other / "state", mine.runtime_dir),
    ):
        second = world.daemon()
        second.paths = paths(state_dir, runtime_dir)
        second.log = world.root / "second.log"
        _refused(world, second, first.address)
        live.go(2)
    live.finish()
    world.oracle.must(
        live.watcher.connections == 1, f"a watcher had {live.watcher.connections} connections"
    )
    world.oracle.check(first)


def _refused(world: World, daemon: Daemon, address: str) -> None:
    process = daemon.spawn()
    daemon.process = process
    world.oracle.must(
        process.wait(30) == EXIT_ALREADY_SERVING,
        f"a second daemon ended with {process.returncode}: {daemon.log.read_text()}",
    )
    world.oracle.must(
        f"already serves on {address}" in daemon.log.read_text().splitlines()[-1],
        f"it does not say where the first serves: {daemon.log.read_text()}",
    )


@fault("daemons started at the same instant")
def daemons_started_at_the_same_instant(world: World) -> None:
    """Exactly one serves, with what there was; the others say where."""
    daemon = world.daemon()
    live = None
    since = time.monotonic()
    if world.rng.random() < 0.7:  # else they make everything anew, the database too
        daemon.start()
        live = LiveRun(world, daemon)
        live.go(3)
        daemon.kill()  # with its socket and endpoint left behind
        since = time.monotonic()
    rivals = []
    for number in range(3):
        rival = world.daemon()
        rival.log = world.root / f"rival-{number}.log"
        rival.process = rival.spawn()
        rivals.append(rival)
        time.sleep(world.rng.choice([0, 0, 0.01, 0.1]))
    eventually(lambda: sum(_ended(rival) for rival in rivals) == 2, "two of three give up")
    winner = next(rival for rival in rivals if not _ended(rival))
    eventually(winner._serves, "the third serves")
    for rival in rivals:
        if rival is not winner:
            assert rival.process is not None
            world.oracle.must(
                rival.process.returncode == EXIT_ALREADY_SERVING
                and f"already serves on {winner.address} (pid {_pid(winner)})"
                in rival.log.read_text(),
                f"exit status {rival.process.returncode}: {rival.log.read_text()}",
            )
    if live is not None:
        request = task_service_pb2.ListRunsRequest(parent=live.name)
        run = winner.tasks.ListRuns(request, timeout=30, wait_for_ready=True).runs[0]
        world.oracle.must(run.pid == live.pid, "the run was not adopted")
        world.adopted(time.monotonic() - since)
        live.use(winner)
        live.finish()
    world.oracle.check(winner)


def _ended(daemon: Daemon) -> bool:
    assert daemon.process is not None
    return daemon.process.poll() is not None


def _pid(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.pid


@fault("stale socket, lock and endpoint")
def stale_socket_lock_and_endpoint(world: World) -> None:
    """What a killed daemon left, whole or damaged, hinders no next one."""
    daemon = world.daemon().start()
    live = LiveRun(world, daemon)
    live.go(3)
    daemon.kill()
    since = time.monotonic()
    where, rng = daemon.paths, world.rng

    def socket_is_a_file() -> None:
        where.socket.unlink()
        where.socket.write_bytes(rng.randbytes(20))

    def socket_is_a_link_to_nothing() -> None:
        where.socket.unlink()
        where.socket.symlink_to(world.root / "nothing")

    def socket_is_another_dead_one() -> None:
        where.socket.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(where.socket))

    def endpoint_is_garbage() -> None:
        where.endpoint.write_bytes(rng.choice([b"", b"{", b"\0" * 64, b"[1]", rng.randbytes(40)]))

    def endpoint_names_another_process() -> None:
        content = json.loads(where.endpoint.read_bytes())
        where.endpoint.write_text(json.dumps(content | {"pid": os.getpid()}))

    def locks_hold_garbage() -> None:
        for lock in (where.lock, where.state_dir / "lock"):
            lock.write_bytes(rng.randbytes(100))

    def locks_are_gone() -> None:
        for lock in (where.lock, where.state_dir / "lock"):
            lock.unlink()

    def temporary_files_are_left() -> None:
        for folder in (where.state_dir, where.runtime_dir):
            (folder / f".{where.endpoint.name}.{rng.randrange(99999)}.tmp").write_bytes(b"{")

    def nothing_at_all() -> None:
        for path in where.runtime_dir.iterdir():
            path.unlink()

    damages: list[Callable[[], None]] = [
        socket_is_a_file,
        socket_is_a_link_to_nothing,
        socket_is_another_dead_one,
        endpoint_is_garbage,
        endpoint_names_another_process,
        locks_hold_garbage,
        locks_are_gone,
        temporary_files_are_left,
        nothing_at_all,
    ]
    damages[int(world.spread * len(damages))]()
    live.adopt(since)
    live.finish()
    world.oracle.check(daemon)


@fault("socket of another live program")
def socket_of_another_live_program(world: World) -> None:
    """Whoever listens in our place keeps his socket, also where he is too busy to answer."""
    daemon = world.daemon().start()
    live = LiveRun(world, daemon)
    live.go(3)
    daemon.kill()
    since = time.monotonic()
    path = daemon.paths.socket
    path.unlink()
    is_busy = world.spread < 0.5
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as waiting:
        other.bind(str(path))
        other.listen(0)
        if is_busy:
            waiting.connect(str(path))  # and fills its queue
        else:
            threading.Thread(target=_accept, args=(other,), daemon=True).start()
        inode = path.stat().st_ino
        refused = daemon.spawn()
        daemon.process = refused
        world.oracle.must(refused.wait(30) == EXIT_ALREADY_SERVING, "it took the socket away")
        world.oracle.must(
            f"somebody serves on {path}" in daemon.log.read_text(), "it does not say why"
        )
        world.oracle.must(path.exists() and path.stat().st_ino == inode, "the socket is gone")
        other.shutdown(socket.SHUT_RDWR)
    live.adopt(since)
    live.finish()
    world.oracle.check(daemon)


def _accept(listener: socket.socket) -> None:
    try:
        while True:
            listener.accept()[0].close()
    except OSError:  # it was shut down
        return


@fault("children that are left over", short_rounds=3)
def children_that_are_left_over(world: World) -> None:
    """What a runner has started ends with it: watched, adopted, or gone while nobody looked."""
    daemon = world.daemon().start()
    scene = world.scene()
    scene.play(gated=True, steps=2, child=world.rng.choice([True, "group"]))
    task = daemon.create(scene.parameters(), start=True)
    world.oracle.created(task)
    run = eventually(lambda: _with_pid(daemon, task.name), "it has a process")
    note = Path(run.run_dir) / "child"
    eventually(lambda: note.exists() and note.read_text(), "its child is there")
    child = int(note.read_text())
    world.finally_(lambda: _end(child))
    stranger = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    world.finally_(stranger.wait)
    world.finally_(stranger.kill)
    way = ("watched", "adopted", "unseen")[int(world.spread * 3)]
    if way == "adopted":
        world.restart(daemon, lives=(task.name, run.pid))
    elif way == "unseen":
        daemon.kill()
    if world.rng.random() < 0.5:
        os.kill(run.pid, signal.SIGKILL)
    else:
        scene.let_pass(2)
    eventually(lambda: not is_alive(run.pid), "the runner is gone")
    if way == "unseen":
        world.oracle.must(is_alive(child), "its child ended by itself, and shows nothing")
        daemon.start()
    daemon.wait(task.name, "COMPLETED", "FAILED")
    try:
        eventually(lambda: not is_alive(child), "its child has ended", 5)
    except AssertionError:
        world.oracle.must(False, f"a child is left of a run that was {way}")
    world.oracle.must(is_alive(stranger.pid), "a stranger was ended")
    world.oracle.check(daemon)


def _with_pid(daemon: Daemon, name: str) -> task_pb2.Run | None:
    run = run_of(daemon, name)
    return run if run.pid else None


def _end(pid: int) -> None:
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
