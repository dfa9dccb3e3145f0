"""Disks that are full, read-only, or gone."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from daemon_process import Daemon, Watch, eventually
from faults import real
from faults.mounts import Disk, with_mounts
from faults.registry import World, fault
from faults.stage import LiveRun, run_of
from finetuned._paths import paths
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2
from finetuned_runner.checkpoint import verify_checkpoint

_MOST_CREATED = 2000
_ENDS = ("COMPLETED", "FAILED", "STOPPED")


# --- the database


@fault("disk full under the database", short_rounds=1)
@with_mounts
def disk_full_under_the_database(world: World) -> None:
    """Reads are answered, writes are refused with the reason, and all goes on with room."""
    disk = Disk(world.root / "disk")
    daemon = world.daemon()
    daemon.paths = paths(disk.path / "state", world.root / "run")
    _play_full_database(world, daemon, disk.fill, disk.make_room, restarts=True)


@fault("file size limit under the database", short_rounds=1)
def file_size_limit_under_the_database(world: World) -> None:
    """The same where a limit of the process is what stops it, as a quota does."""
    daemon = world.daemon()

    def limit(size: int) -> None:
        assert daemon.process is not None
        hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def fill() -> None:
        database = daemon.paths.state_dir / "finetuned.db"
        limit(database.with_name(f"{database.name}-wal").stat().st_size)

    _play_full_database(world, daemon, fill, lambda: limit(resource.RLIM_INFINITY), restarts=False)


def _play_full_database(
    world: World,
    daemon: Daemon,
    fill: Callable[[], None],
    make_room: Callable[[], None],
    *,
    restarts: bool,
) -> None:
    daemon.start()
    live = LiveRun(world, daemon)
    _create(world, daemon, world.rng.randint(0, 20))
    live.until_quiet()  # the fake runner can't wait for room
    fill()
    refused = None
    for _ in range(_MOST_CREATED):  # what is left of the log's room is used up first
        refused = _create(world, daemon, 1)
        if refused is not None:
            break
    world.oracle.must(refused, "a full disk takes everything")
    if refused is not None:
        world.oracle.must(
            refused == ("RESOURCE_EXHAUSTED", "DISK_FULL"), f"a write was refused with {refused}"
        )
    assert daemon.process is not None
    world.oracle.must(daemon.process.poll() is None, "the daemon has ended on a full disk")
    _reads(daemon, live.name)
    if restarts and world.rng.random() < 0.5:
        daemon.kill()
        _serves_or_says_why(world, daemon)
        make_room()
        live.adopt()
    else:
        make_room()
    world.oracle.must(_create(world, daemon, 3) is None, "a write was refused with room again")
    live.finish()
    world.oracle.check(daemon)


def _serves_or_says_why(world: World, daemon: Daemon) -> None:
    """A daemon that is started on a full disk; without a byte to write it may refuse to begin."""
    process = daemon.process = daemon.spawn()

    def has_begun() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if json.loads(daemon.paths.endpoint.read_bytes())["pid"] == process.pid:
                return True
        return process.poll() is not None

    eventually(has_begun, "the daemon serves, or ends", 60)
    if process.poll() is not None:
        last = daemon.log.read_text().splitlines()[-1]
        world.oracle.must("Nothing is lost" in last, f"a start on a full disk ends with: {last}")


def _create(world: World, daemon: Daemon, count: int) -> tuple[str, str] | None:
    """Creates tasks; code and reason of the first refusal."""
    for _ in range(count):
        name = f"tasks/room-{uuid.uuid4().hex[:12]}"
        world.oracle.tried_create(name)
        try:
            task = daemon.create(
                parameters_pb2.Parameters(),
                task_id=name.removeprefix("tasks/"),
            )
        except grpc.RpcError as error:
            return _refusal(error)
        world.oracle.created(task)
    return None


def _refusal(error: grpc.RpcError) -> tuple[str, str]:
    """Code and reason; the sentence where there is no reason."""
    call: Any = error
    metadata = dict(call.trailing_metadata())
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(info)
    return call.code().name, info.reason or call.details()


def _reads(daemon: Daemon, name: str) -> None:
    """Each kind of read is answered."""
    daemon.get(name)
    daemon.events(name)
    daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(page_size=10), timeout=20)
    with daemon.watch(name):
        pass


# --- run folder and output folder, with the real runner


@fault("disk full under a real run", short_rounds=1)
@with_mounts
def disk_full_under_a_real_run(world: World) -> None:
    """It waits in memory, or is paused when that lasts, and goes on by itself with room."""
    is_output = world.rng.random() < 0.6
    pauses = world.rng.random() < 0.5
    options = ("--disk-wait-seconds", "1" if pauses else "600", "--disk-look-seconds", "0.5")
    daemon = world.daemon(*options, runner_module="finetuned_runner")
    disk = Disk(world.root / ("out" if is_output else "state/runs"))
    daemon.paths.state_dir.mkdir(mode=0o700, exist_ok=True)
    daemon.paths.state_dir.chmod(0o700)
    daemon.start()
    task = _train(world, daemon)
    with daemon.watch(task.name) as watch:
        watch.until_step(world.rng.randint(1, 20))
        disk.fill()
        if is_output:
            watch.until(
                lambda event: event.phase_change.phase == task_pb2.RUN_PHASE_WAITING_FOR_SPACE
            )
        else:
            _until_quiet(watch, disk, daemon, task.name)
        _reads(daemon, task.name)
        if pauses and is_output:
            _paused(world, daemon, task.name)
        elif world.rng.random() < 0.3:
            daemon.kill()
            daemon.start()
        disk.make_room()
    task = daemon.wait(task.name, *_ENDS)
    world.oracle.must(
        task.state == task_pb2.TASK_STATE_COMPLETED,
        f"it has not gone on when there was room: {task.end_message}",
    )
    _verify_all(world, Path(run_of(daemon, task.name).output_dir))
    world.oracle.must(
        (Path(run_of(daemon, task.name).output_dir) / "final").is_dir(), "it left no result"
    )
    world.oracle.check(daemon)


def _until_quiet(watch: Watch, disk: Disk, daemon: Daemon, name: str) -> None:
    """Waits until a run writes nothing for some heartbeats: it can't, and is not gone."""
    quiet, last = 0, -1
    while quiet < 4:
        before = len(watch.heartbeats)
        for response in watch.call:
            if response.HasField("heartbeat"):
                watch.heartbeats.append(response.heartbeat.last_seq)
                break
        assert len(watch.heartbeats) > before, "the watch ended"
        quiet = quiet + 1 if watch.heartbeats[-1] == last else 0
        last = watch.heartbeats[-1]
    assert daemon.get(name).state != task_pb2.TASK_STATE_FAILED, daemon.get(name).end_message


def _paused(world: World, daemon: Daemon, name: str) -> None:
    """It is paused because of the disk, the device is free, and what it saved is whole."""
    task = daemon.wait(name, "PAUSED", *_ENDS)
    world.oracle.must(
        task.state == task_pb2.TASK_STATE_PAUSED
        and task.pause_reason == task_pb2.PAUSE_REASON_DISK_FULL,
        f"a full disk did not pause it: {task}",
    )
    _verify_all(world, Path(run_of(daemon, name).output_dir))


@fault("output folder lost under a real run", short_rounds=1)
@with_mounts
def output_folder_lost_under_a_real_run(world: World) -> None:
    """Read-only, taken away or removed in mid-run: it ends with a reason, and others go on."""
    daemon = world.daemon(runner_module="finetuned_runner")
    disk = Disk(world.root / "out")
    daemon.start()
    task = _train(world, daemon)
    way = world.rng.choice(("protected", "taken away", "removed"))
    with daemon.watch(task.name) as watch:
        watch.until_step(world.rng.randint(1, 20))
        output = Path(run_of(daemon, task.name).output_dir)
        match way:
            case "protected":
                disk.protect()
            case "taken away":
                disk.take_away()
            case _:
                shutil.rmtree(output, ignore_errors=True)
    task = daemon.wait(task.name, *_ENDS)
    run = run_of(daemon, task.name)
    if task.state == task_pb2.TASK_STATE_COMPLETED:  # it made the folder anew
        world.oracle.must(way != "protected", "it is COMPLETED on a read-only disk")
        result = Path(run.output_dir) / "final"
        world.oracle.must(result.is_dir(), f"it is COMPLETED, and there is no {result}")
    else:
        world.oracle.must(
            str(output) in task.end_message or str(disk.path) in task.end_message,
            f"{way}: its end does not name the folder: {task.end_message!r}",
        )
    if way == "protected":
        _verify_all(world, output)
    world.oracle.check(daemon)
    listed = daemon.tasks.ListCheckpoints(task_service_pb2.ListCheckpointsRequest(parent=task.name))
    for checkpoint in listed.checkpoints:
        world.oracle.must(
            not checkpoint.is_whole or Path(checkpoint.path).is_dir(),
            f"{checkpoint.path} is said to be whole, and is not there",
        )


def _train(world: World, daemon: Daemon) -> task_pb2.Task:
    """Starts a real run that saves every ten steps."""
    parameters = real.parameters(
        world, world.root / "out", max_steps=60, save_steps=10, save_total_limit=3
    )
    task = daemon.create(parameters, start=True)
    world.oracle.created(task)
    world.oracle.steps_are_dense = False  # after a pause it repeats what was not saved
    return task


def _verify_all(world: World, output: Path) -> None:
    """Every checkpoint that bears its name is whole."""
    for folder in output.glob("checkpoint-*"):
        try:
            verify_checkpoint(folder)
        except Exception as error:  # noqa: BLE001 - whatever it is, the checkpoint is not whole
            world.oracle.must(False, f"{folder} is not whole: {error}")
