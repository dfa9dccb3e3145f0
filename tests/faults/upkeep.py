"""`kill -9` of the daemon in what it does by itself: start, migration, backup, shutdown."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from daemon_process import TESTS, Daemon, eventually
from faults.oracle import all_tasks
from faults.registry import World, fault
from faults.stage import LiveRun, arm, cut, disarm, killed, new_task
from finetuned.v1 import system_service_pb2

DATABASES = TESTS / "data" / "databases"


@fault("daemon killed at its own start", short_rounds=2)
def daemon_killed_at_its_own_start(world: World) -> None:
    """Each next daemon finds what the last one has begun to recover, wherever that was cut."""
    told = world.root / "lines"
    daemon = world.daemon()
    arm(world, daemon, "main.py:main", until="instance.py:announce", tell=str(told))
    daemon.start()
    live = LiveRun(world, daemon)
    live.go(3)
    waiting = world.scene("waiting")
    request = new_task(waiting.parameters(), "waiting-task")
    request.start = True
    world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
    lines = int(told.read_text())
    daemon.kill()
    # A start with something to recover has a few lines more.
    for place in (world.spread, world.rng.random()):
        live.go(2)
        arm(world, daemon, "main.py:main", lines=1 + int(place * 1.2 * lines))
        process = daemon.spawn()
        eventually(
            lambda process=process: process.poll() is not None or _serves(daemon, process.pid),  # type: ignore[misc]
            "the strike, or that it serves",
        )
        process.kill()
        process.wait()
    since = time.monotonic()
    disarm(world)
    live.adopt(since)
    live.finish()
    daemon.wait("tasks/waiting-task", "COMPLETED")
    world.oracle.check(daemon)


def _serves(daemon: Daemon, pid: int) -> bool:
    endpoint = daemon.paths.endpoint
    return endpoint.exists() and f'"pid": {pid}' in endpoint.read_text()


@fault("daemon killed in Shutdown")
def daemon_killed_in_shutdown(world: World) -> None:
    """A shutdown that is cut off leaves nothing that hinders the next daemon, and no run ends."""
    told = world.root / "lines"
    daemon = world.daemon()
    arm(world, daemon, "log.py:wake_all", until="instance.py:close", tell=str(told))
    daemon.start()
    live = LiveRun(world, daemon)
    shut_down = system_service_pb2.ShutdownRequest()
    daemon.system.Shutdown(shut_down, timeout=30)
    assert daemon.process is not None
    daemon.process.wait(20)
    lines = int(told.read_text())
    arm(world, daemon, "log.py:wake_all", lines=1 + int(world.spread * 1.2 * lines))
    live.adopt(time.monotonic())
    live.go(3)
    cut(lambda: daemon.system.Shutdown(shut_down, timeout=30))
    daemon.process.wait(20)
    disarm(world)
    live.adopt(time.monotonic())
    live.finish()
    world.oracle.check(daemon)


@fault("daemon killed in migration")
def daemon_killed_in_migration(world: World) -> None:
    """A database of any earlier version is of that version or the next, and all is in it."""
    dumps = sorted(DATABASES.glob("schema-*.sql"))
    if not dumps:
        world.skip("there is no database of an earlier version")
    dump = world.rng.choice(dumps)
    told = world.root / "lines"
    learns, daemon = world.daemon(root=world.root / "learns"), world.daemon()
    for one in (learns, daemon):
        one.paths.state_dir.parent.mkdir(exist_ok=True)
        one.paths.state_dir.mkdir(mode=0o700)
        with contextlib.closing(sqlite3.connect(_database(one))) as connection:
            connection.executescript(dump.read_text())
        _database(one).chmod(0o600)
    window = {"at": "opening.py:open_for_serving", "until": "app.py:__init__"}
    arm(world, learns, **window, tell=str(told))
    learns.start()
    # What a migration that nobody disturbs makes of it; test_db.py holds that against the old.
    for task in all_tasks(learns):
        world.oracle.created(task)
        for event in learns.events(task.name):
            world.oracle.saw(task.name, event)
    world.oracle.steps_are_dense = False
    learns.kill()
    for place in (world.spread, world.rng.random()):
        arm(world, daemon, **window, lines=1 + int(place * 1.05 * int(told.read_text())))
        process = daemon.spawn()
        eventually(
            lambda process=process: process.poll() is not None or _serves(daemon, process.pid),  # type: ignore[misc]
            "the strike, or that it serves",
        )
        process.kill()
        process.wait()
    disarm(world)
    daemon.start()
    world.oracle.check(daemon, outputs=False)
    _check_backups(world, daemon)


def _database(daemon: Daemon) -> Path:
    return daemon.paths.state_dir / "finetuned.db"


@fault("daemon killed in backup")
def daemon_killed_in_backup(world: World) -> None:
    """A backup is whole or not there; what was begun is not left behind."""
    daemon = world.daemon("--backup-hours", "0.00002", "--backup-keep", "2")
    arm(
        world,
        daemon,
        "backup.py:make",
        nth=world.rng.randint(1, 3),
        place=world.spread,
    )
    daemon.start()
    live = LiveRun(world, daemon)
    assert daemon.process is not None
    process = daemon.process
    deadline = time.monotonic() + 10
    while process.poll() is None and time.monotonic() < deadline:
        if live.left > 8:
            live.go(1)
        time.sleep(0.05)
    world.oracle.must(process.poll() is not None, "no backup was struck")
    live.adopt(killed(world, daemon))
    live.finish()
    world.oracle.check(daemon)
    daemon.stop()
    _check_backups(world, daemon)


def _check_backups(world: World, daemon: Daemon) -> None:
    folder = daemon.paths.state_dir / "backups"
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue  # what a killed one was about to write; the next backup removes it
        with contextlib.closing(
            sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        ) as connection:
            (said,) = connection.execute("PRAGMA integrity_check").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
        world.oracle.must(said == "ok" and version, f"{path.name}: {said}, schema {version}")
