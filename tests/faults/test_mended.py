"""What the faults have found once, held quickly and every time."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from faults.oracle import is_alive
from faults.stage import pid_of, run_of
from finetuned._paths import paths
from finetuned_daemon.runs import deleted
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import EventLine, LogLine
from finetuned_daemon.runs.reports import Ahead
from finetuned_daemon.store import wal

_WRITER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("CREATE TABLE IF NOT EXISTS t (a)")
for _ in range(30):
    connection.execute("INSERT INTO t VALUES (?)", (os.urandom(900),))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database whose writer was killed, all of it in its log."""
    path = tmp_path / "one.db"
    subprocess.run([sys.executable, "-c", _WRITER, str(path)], check=False)
    return path


def test_a_log_that_is_whole_has_no_problem_and_neither_has_none(database: Path) -> None:
    assert not wal.problem(database)
    sqlite3.connect(database).close()
    assert not wal.problem(database)


def _flip(log: Path, at: int) -> None:
    data = bytearray(log.read_bytes())
    data[at] ^= 16
    log.write_bytes(data)


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda log: _flip(log, 20),  # the header
        lambda log: _flip(log, 32 + 9),  # the first frame's salt
        lambda log: _flip(log, log.stat().st_size // 2),
        lambda log: _flip(log, log.stat().st_size - 100),
        lambda log: os.truncate(log, log.stat().st_size - 5000),
        lambda log: os.truncate(log, 0),
        lambda log: log.unlink(),
    ],
    ids=["header", "salt", "middle", "last frame", "end cut off", "empty", "gone"],
)
def test_a_log_that_has_lost_something_is_noticed(
    database: Path, damage: Callable[[Path], None], has_index: bool, request: pytest.FixtureRequest
) -> None:
    damage(database.with_name("one.db-wal"))
    if not has_index:
        database.with_name("one.db-shm").unlink()
    # Without its index nobody knows where a log has ended.
    hidden = not has_index and request.node.callspec.id.startswith(
        ("last frame", "end cut off", "empty", "gone")
    )
    assert bool(wal.problem(database)) is not hidden


def test_a_damaged_log_is_refused_with_the_way_back_and_again_the_second_time(
    daemon: Daemon, scene: Scene
) -> None:
    daemon.create(scene.parameters())
    daemon.kill()
    log = daemon.paths.state_dir / "finetuned.db-wal"
    _flip(log, 5000)
    before = log.read_bytes()
    for _ in range(2):
        assert daemon.spawn().wait(60) == 1
        assert "finetuned db rebuild" in daemon.log.read_text()
    assert log.read_bytes() == before


def lines(*seqs: int) -> list[EventLine]:
    return [EventLine.make(seq, LogLine(level="info", text="x")) for seq in seqs]


def test_a_number_out_of_place_is_damage_and_a_gap_is_none() -> None:
    assert Ahead(lines(900, 6, 7)).is_out_of_place(0, 5), "6 follows, so 900 was no event"
    assert not Ahead(lines(8, 9)).is_out_of_place(0, 5)
    assert not Ahead(lines(20_000, 20_001)).is_out_of_place(0, 5), "a long gap"
    assert Ahead(lines(20_000)).is_out_of_place(0, 5), "nothing speaks for it"


def test_an_event_file_that_was_cut_is_read_from_its_beginning(tmp_path: Path) -> None:
    whole = b"".join(line.model_dump_json().encode() + b"\n" for line in lines(1, 2, 3))
    (tmp_path / "events.jsonl").write_bytes(whole)
    end = Bundle(tmp_path).read_events(0).end
    (tmp_path / "events.jsonl").write_bytes(whole[: whole.index(b"\n") + 9])
    new = Bundle(tmp_path).read_events(end)
    assert new.was_cut
    assert [line.seq for line in new.lines] == [1]


def test_events_written_twice_or_beyond_all_bounds_are_said_and_do_not_stop_the_run(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=3, gated=True, save_steps=1), start=True)
    scene.let_pass(1)
    with daemon.watch(task.name) as watch:
        watch.until(lambda event: event.HasField("checkpoint_saved"))
    events = Path(run_of(daemon, task.name).run_dir) / "events.jsonl"
    strange = {"time": 1e308, "kind": "progress", "payload": {"step": 10**30}}
    with open(events, "ab") as file:
        file.write(events.read_bytes())
        file.writelines(json.dumps({"seq": n} | strange).encode() + b"\n" for n in (10**30, 10**6))
    scene.let_pass(2)
    daemon.wait(task.name, "COMPLETED")
    steps = [e.progress.step for e in daemon.events(task.name) if e.HasField("progress")]
    assert steps == [1, 2, 3]
    saved = [e for e in daemon.events(task.name) if e.HasField("checkpoint_saved")]
    assert len({event.checkpoint_saved.path for event in saved}) == len(saved) - 1, "3, and the end"


def test_a_folder_in_place_of_a_file_ends_the_run_with_a_reason(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=2, gated=True), start=True)
    folder = Path(run_of(daemon, task.name).run_dir)
    pid_of(daemon, task.name)
    eventually((folder / "events.jsonl").exists, "it reports")
    for name in ("events.jsonl", "console.log", "result.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    scene.let_pass(2)
    assert daemon.wait(task.name, "FAILED").end_message


@pytest.mark.parametrize("way", ["adopted", "unseen"])
@pytest.mark.parametrize("child", [True, "group"])
def test_the_children_of_a_run_that_is_no_child_of_ours_end_with_it(
    daemon: Daemon, scene: Scene, way: str, child: bool | str
) -> None:
    task = daemon.create(scene.play(gated=True, child=child), start=True)
    run = eventually(lambda: run_of(daemon, task.name), "it runs")
    note = Path(run.run_dir) / "child"
    eventually(lambda: note.exists() and note.read_text(), "its child is there")
    left, pid = int(note.read_text()), pid_of(daemon, task.name)
    daemon.kill()
    if way == "adopted":
        daemon.start()
    os.kill(pid, signal.SIGKILL)
    if way == "unseen":
        eventually(lambda: not is_alive(pid), "the runner is gone")
        daemon.start()
    daemon.wait(task.name, "FAILED")
    eventually(lambda: not is_alive(left), "its child has ended")


def test_a_daemon_on_the_same_state_folder_is_named_whatever_its_runtime_folder(
    daemon: Daemon, tmp_path: Path
) -> None:
    address = daemon.address
    second = Daemon(tmp_path)
    second.paths = paths(daemon.paths.state_dir, tmp_path / "other")
    assert second.spawn().wait(60) == 3
    assert f"already serves on {address}" in second.log.read_text()


def test_a_listener_that_is_too_busy_to_answer_keeps_its_socket(daemon: Daemon) -> None:
    daemon.kill()
    path = daemon.paths.socket
    path.unlink()
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as waiting:
        busy.bind(str(path))
        busy.listen(0)
        waiting.connect(str(path))
        assert daemon.spawn().wait(60) == 3
        assert path.is_socket()


def test_a_deletion_that_was_cut_off_is_ended_or_undone(tmp_path: Path) -> None:
    for name in ("sft-gone", "sft-there"):
        (tmp_path / name / "1").mkdir(parents=True)
        deleted.put_away(tmp_path / name)
    deleted.recover(tmp_path, lambda task_id: task_id == "sft-there")
    assert [path.name for path in tmp_path.iterdir()] == ["sft-there"]
    assert (tmp_path / "sft-there" / "1").is_dir()
