"""Files that were damaged or removed under the daemon: event lines, run folders, the database."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from daemon_process import Daemon, eventually
from faults.oracle import is_alive
from faults.registry import World, fault
from faults.stage import STEPS, LiveRun, run_of
from finetuned.v1 import task_pb2, task_service_pb2

ENDS = ("COMPLETED", "STOPPED", "FAILED")


@fault("torn and garbled event lines", short_rounds=2)
def torn_and_garbled_event_lines(world: World) -> None:
    """A run goes on whatever its event file holds; what is unreadable is said, not guessed."""
    daemon = world.daemon().start()
    live = LiveRun(world, daemon)
    events = Path(run_of(daemon, live.name).run_dir) / "events.jsonl"
    damages = (_garbage, _zeros, _repeated, _huge, _torn, _cut, _strange)
    number = int(world.spread * len(damages))
    world.oracle.steps_are_dense = damages[number] is not _cut  # what was cut off may be lost
    live.go(4)
    live.until_step(4)
    for damage in (damages[number], world.rng.choice(damages[:4])):
        damage(events, world.rng)
        live.go(3)
        if world.rng.random() < 0.4:
            live.adopt()
    live.finish()
    steps = [e.progress.step for e in daemon.events(live.name) if e.HasField("progress")]
    world.oracle.must(len(steps) == len(set(steps)), f"steps were taken over twice: {steps}")
    if damages[number] is not _cut:
        world.oracle.must(steps == list(range(1, STEPS + 1)), f"the steps are {steps}")
    world.oracle.check(daemon)


def _append(events: Path, data: bytes) -> None:
    with open(events, "ab") as file:
        file.write(data)


def _garbage(events: Path, rng: random.Random) -> None:
    _append(events, rng.randbytes(rng.randint(1, 3000)).replace(b"\n", b"") + b"\n")


def _zeros(events: Path, rng: random.Random) -> None:
    _append(events, bytes(rng.randint(1, 9000)) + b"\n")


def _repeated(events: Path, rng: random.Random) -> None:
    lines = events.read_bytes().splitlines(keepends=True)
    first = rng.randrange(len(lines))
    _append(events, b"".join(lines[first : first + rng.randint(1, 5)]))


def _huge(events: Path, rng: random.Random) -> None:
    _append(events, b"x" * rng.randint(1 << 20, 9 << 20) + b"\n")


def _torn(events: Path, rng: random.Random) -> None:
    """A line that was begun, and never ended: a writer that died and one that went on."""
    line = events.read_bytes().splitlines()[-1]
    _append(events, line[: rng.randrange(1, len(line))] + b"\n")


def _cut(events: Path, rng: random.Random) -> None:
    """The file loses its end, in the middle of a line or not."""
    os.truncate(events, rng.randrange(events.stat().st_size))


def _strange(events: Path, rng: random.Random) -> None:
    """JSON that is no event of ours."""
    strange: tuple[object, ...] = (
        {"seq": -1, "time": 0, "kind": "progress", "payload": {}},
        {"seq": "one"},
        [],
        {"seq": 1, "time": 1e308, "kind": "log_line", "payload": {"level": "loud", "text": 3}},
        {"seq": 1, "time": 0, "kind": "", "payload": {"a": {"b": [None]}}},
        {"seq": 10**6, "time": 1e308, "kind": "progress", "payload": {"step": 1}},
        {"seq": 10**6, "time": 0, "kind": "progress", "payload": {"step": 10**30}},
        {
            "seq": 10**6,
            "time": float("nan"),
            "kind": "metrics",
            "payload": {"step": 1, "values": {}},
        },
        {"seq": 10**30, "time": 0, "kind": "log_line", "payload": {"level": "info", "text": ""}},
    )
    _append(events, json.dumps(rng.choice(strange)).encode() + b"\n")


@fault("run folder removed", short_rounds=2)
def run_folder_removed(world: World) -> None:
    """The run ends, with a reason; the daemon serves on, and the queue goes on."""
    daemon = world.daemon().start()
    scene = world.scene()
    scene.play(gated=True, steps=6, save_steps=2)
    name = daemon.create(scene.parameters(), start=True).name
    world.oracle.created(daemon.get(name))
    waiting = world.scene("waiting")
    waiting.play(steps=1)
    behind = daemon.create(waiting.parameters(), start=True).name
    world.oracle.created(daemon.get(behind))
    scene.let_pass(2)
    with daemon.watch(name) as watch:
        watch.until_step(2)
    run = run_of(daemon, name)
    folder = Path(run.run_dir)
    is_down = world.rng.random() < 0.5
    if is_down:
        daemon.kill()

    def gone() -> None:
        shutil.rmtree(folder)

    def its_parent_too() -> None:
        shutil.rmtree(folder.parent)

    def a_file_instead() -> None:
        shutil.rmtree(folder)
        folder.write_text("no folder")

    def folders_for_files() -> None:
        for file in ("events.jsonl", "result.json", "console.log"):
            (folder / file).unlink(missing_ok=True)
            (folder / file).mkdir()

    def an_empty_one() -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    ways: list[Callable[[], None]] = [
        gone,
        its_parent_too,
        a_file_instead,
        folders_for_files,
        an_empty_one,
    ]
    ways[int(world.spread * len(ways))]()
    if is_down:
        daemon.start()
    if world.rng.random() < 0.5:
        try:
            daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=name), timeout=30)
            world.oracle.stop_wished(name)
        except grpc.RpcError as error:  # it has ended already
            world.oracle.must(error.code() is grpc.StatusCode.FAILED_PRECONDITION, str(error))
    scene.let_pass(4)
    ended = daemon.wait(name, *ENDS)
    says_so = (folder / "result.json").is_file()  # it found the empty folder, and wrote its result
    world.oracle.must(
        (ended.state != task_pb2.TASK_STATE_COMPLETED or says_so) and ended.end_message,
        f"without its folder it is {ended.state} {ended.end_message!r}",
    )
    eventually(lambda: not is_alive(run.pid), "the runner has ended")
    done = daemon.wait(behind, *ENDS)
    world.oracle.must(done.state == task_pb2.TASK_STATE_COMPLETED, f"behind it: {done.end_message}")
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=name), timeout=30)
    world.oracle.deleted(name)
    world.oracle.check(daemon)


@fault("records of a run damaged")
def records_of_a_run_damaged(world: World) -> None:
    """A spec, identity or result that can't be read is as if it were not there."""
    daemon = world.daemon().start()
    scene = world.scene()
    scene.play(gated=True, steps=4)
    name = daemon.create(scene.parameters(), start=True).name
    world.oracle.created(daemon.get(name))
    scene.let_pass(1)
    with daemon.watch(name) as watch:
        watch.until_step(1)
    run = run_of(daemon, name)
    folder = Path(run.run_dir)
    which = ("spec.json", "process.json", "result.json")[int(world.spread * 3)]
    damage = world.rng.choice([_emptied, _flipped, _halved, _other_json, _zeroed])
    if which == "result.json":
        daemon.kill()
        scene.let_pass(3)
        eventually(lambda: not is_alive(run.pid), "the run has ended unseen")
        before = (folder / which).read_bytes()
        damage(folder / which, world.rng)
        readable = _says_the_same(folder / which, before)
        daemon.start()
        ended = daemon.wait(name, *ENDS)
        world.oracle.must(
            readable or ended.state == task_pb2.TASK_STATE_FAILED,
            "a run whose result can't be read is called completed",
        )
    else:
        damage(folder / which, world.rng)
        world.restart(daemon, lives=(name, run.pid))
        scene.let_pass(3)
        ended = daemon.wait(name, *ENDS)
        world.oracle.must(ended.state == task_pb2.TASK_STATE_COMPLETED, ended.end_message)
    world.oracle.check(daemon)


def _says_the_same(path: Path, before: bytes) -> bool:
    """Whether a flipped byte hit a place that no reader looks at."""
    try:
        return bool(json.loads(path.read_bytes())["end_reason"] == json.loads(before)["end_reason"])
    except (ValueError, KeyError, TypeError):
        return False


def _emptied(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def _zeroed(path: Path, rng: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(8):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _halved(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def _other_json(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(["[]", "null", '{"identity": 3}', '{"end_reason": "FINISHING"}']))


@fault("damaged database", short_rounds=2)
def damaged_database(world: World) -> None:
    """It is refused with the way back, or everything acknowledged is found in it."""
    daemon = world.daemon().start()
    live = LiveRun(world, daemon)
    live.go(6)
    live.until_step(6)
    scene = world.scene()
    for number in range(3):
        request = task_service_pb2.CreateTaskRequest(
            task=task_pb2.Task(
                training_type=task_pb2.TRAINING_TYPE_SFT,
                parameters=scene.parameters(batch_size=number + 1),
                device="cpu",
            ),
            task_id=f"task-{number}",
        )
        world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
    live.go(4)
    live.until_step(10)
    is_clean = world.rng.random() < 0.3
    if is_clean:
        daemon.stop()
    else:
        daemon.kill()
    since = time.monotonic()
    database = daemon.paths.state_dir / "finetuned.db"
    wal = database.with_name(database.name + "-wal")
    there = [path for path in (database, wal) if path.exists() and path.stat().st_size]
    which = there[int(world.spread * len(there))]
    # SQLite knows its structure, and the log by checksums; of a value that is stored in the
    # database it can't know what it was.
    bytes_ = _some_bytes if which is wal else _some_structure
    world.rng.choice([bytes_, bytes_, _halved, _a_page_of_zeros])(which, world.rng)
    damaged = {path: path.read_bytes() for path in there}
    process = daemon.spawn()
    daemon.process = process
    eventually(lambda: process.poll() is not None or daemon._serves(), "it serves or refuses", 30)
    if process.poll() is None:
        world.restart(daemon, lives=(live.name, live.pid), since=since)
        live.finish()
        world.oracle.check(daemon)
        return
    said = daemon.log.read_text()
    world.oracle.must(process.returncode == 1, f"exit status {process.returncode}")
    world.oracle.must(str(database) in said, f"it does not say which file: {said[-500:]}")
    world.oracle.must("finetuned db rebuild" in said, f"it names no way back: {said[-500:]}")
    world.oracle.must(
        "Nothing was changed" not in said
        or all(path.read_bytes() == data for path, data in damaged.items()),
        "a refused file changed",
    )
    world.oracle.must(is_alive(live.pid), "the run ended with the daemon")
    _way_back(world, daemon, live, since)


def _way_back(world: World, daemon: Daemon, live: LiveRun, since: float) -> None:
    """The command that the daemon named brings back what is in run folders, and the run is adopted.

    Tasks that never ran are in the database alone, and in its backups.
    """
    command = [sys.executable, "-m", "finetuned_daemon.main", "db", "rebuild", "--yes"]
    command += ["--state-dir", str(daemon.paths.state_dir)]
    command += ["--runtime-dir", str(daemon.paths.runtime_dir)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    world.oracle.must(said.returncode == 0, f"no way back: {said.stdout}{said.stderr}")
    live.watcher.leave()
    world.restart(daemon, lives=(live.name, live.pid), since=since)
    live.go(STEPS)
    ended = daemon.wait(live.name, *ENDS)
    world.oracle.must(ended.state == task_pb2.TASK_STATE_COMPLETED, ended.end_message)


def _some_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 64)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _some_structure(path: Path, rng: random.Random) -> None:
    """Flips bits in the headers of a few pages, and where their rows are listed."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 8)):
        page = rng.randrange(max(1, len(data) // 4096)) * 4096
        at = min(page + rng.randrange(16), len(data) - 1)
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _a_page_of_zeros(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(data) // 4096)) * 4096
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)
