"""`finetuned db` and the start of a daemon: what is damaged or lost comes back, and says so."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned import Client, Event, LogReplaced, Snapshot, WatchItem
from finetuned.v1 import system_service_pb2, task_pb2, task_service_pb2
from pauses import begun, pause, paused, resume, stop

WATCHED = {"steps": 4, "save_steps": 2, "gated": True}


def db(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `finetuned db`."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "finetuned_daemon.main", "db", *arguments),
            *("--state-dir", str(daemon.paths.state_dir)),
            *("--runtime-dir", str(daemon.paths.runtime_dir)),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def done(daemon: Daemon, *arguments: str) -> Any:
    """What `finetuned db ... --json` says; it must succeed."""
    result = db(daemon, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def refusal(daemon: Daemon, *options: str) -> str:
    """What a daemon says that does not start."""
    daemon.log.unlink(missing_ok=True)
    daemon.options += options
    process = daemon.spawn()
    assert process.wait(60) == 1
    return daemon.log.read_text()


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that a database has, but for the index that SQLite makes anew."""
    return {
        path.name: path.read_bytes()
        for path in folder.glob("finetuned.db*")
        if not path.name.endswith("-shm")
    }


@contextlib.contextmanager
def opened(daemon: Daemon) -> Generator[sqlite3.Connection]:
    """The database, with no daemon at it."""
    connection = sqlite3.connect(daemon.paths.state_dir / "finetuned.db")
    try:
        yield connection
        connection.commit()
    finally:
        connection.close()


def garble(path: Path) -> None:
    """Damages the pages in the middle of a database."""
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = b"\xa5" * (len(data) - 4096 * 2)
    path.write_bytes(data)


def listed(daemon: Daemon) -> list[task_pb2.Task]:
    """Every task."""
    return list(daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(page_size=100)).tasks)


def shape(task: task_pb2.Task) -> task_pb2.Task:
    """A task without what a rebuild can't know: how often it was changed, and when last."""
    shape = task_pb2.Task()
    shape.CopyFrom(task)
    for name in ("etag", "update_time", "last_seq"):
        shape.ClearField(name)
    return shape


def runs(daemon: Daemon, name: str) -> list[task_pb2.Run]:
    """The runs of a task."""
    return list(daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs)


def reports(daemon: Daemon, name: str) -> list[str]:
    """The events of a task that its runners have reported, and its results."""
    kinds = ("state_change", "phase_change", "notice", "task_edited")
    events = daemon.events(name)
    return [
        f"{e.run} {getattr(e, e.WhichOneof('payload') or '')}"
        for e in events
        if e.WhichOneof("payload") not in kinds
    ]


# --- the start


def test_a_damaged_database_is_refused_with_the_ways_back_and_left_alone(
    daemon: Daemon, scene: Scene
) -> None:
    """Whoever starts the daemon reads what is wrong and what to type; nothing is changed."""
    for _ in range(3):
        daemon.create(scene.parameters())
    made = done(daemon, "backup")
    assert daemon.stop() == 0
    garble(daemon.paths.state_dir / "finetuned.db")
    before = files(daemon.paths.state_dir)

    text = refusal(daemon)
    assert "finetuned.db is damaged" in text
    assert f"finetuned db restore --state-dir {daemon.paths.state_dir}" in text
    assert f"finetuned db rebuild --state-dir {daemon.paths.state_dir}" in text
    assert made["time"][:19].replace("T", " ") in text, "the newest whole backup, with its time"
    assert files(daemon.paths.state_dir) == before


def test_events_that_are_missing_are_damage_too(daemon: Daemon, scene: Scene) -> None:
    """SQLite finds nothing wrong with a database that has lost rows."""
    task = daemon.create(scene.play(), start=True)
    daemon.wait(task.name, "COMPLETED")
    assert daemon.stop() == 0
    with opened(daemon) as connection:
        connection.execute("DELETE FROM events WHERE seq = 3")
    assert "1 events are missing" in refusal(daemon)


def test_a_missing_database_beside_run_folders_is_refused(daemon: Daemon, scene: Scene) -> None:
    """An empty one in its place would say that there were never any tasks."""
    task = daemon.create(scene.play(), start=True)
    daemon.wait(task.name, "COMPLETED")
    assert daemon.stop() == 0
    (daemon.paths.state_dir / "finetuned.db").unlink()
    text = refusal(daemon)
    assert "is missing" in text
    assert "finetuned db rebuild" in text
    assert not (daemon.paths.state_dir / "finetuned.db").exists()

    daemon.options.append("--new-database")
    daemon.start()
    assert listed(daemon) == []


def test_a_log_without_its_database_is_refused_and_never_thrown_away(
    daemon: Daemon, scene: Scene
) -> None:
    """SQLite would delete it, with all that is only in there."""
    daemon.create(scene.parameters())
    daemon.kill()
    (daemon.paths.state_dir / "finetuned.db").unlink()
    log = (daemon.paths.state_dir / "finetuned.db-wal").read_bytes()
    assert "finetuned.db-wal, a part of it" in refusal(daemon)
    assert (daemon.paths.state_dir / "finetuned.db-wal").read_bytes() == log

    daemon.options.append("--new-database")
    daemon.start()
    (kept,) = (daemon.paths.state_dir / "set-aside").glob("*-wal")
    assert kept.read_bytes() == log


# --- the log's epoch


def test_kill_9_keeps_the_log_and_a_loss_of_power_begins_a_new_one(
    daemon: Daemon, scene: Scene
) -> None:
    """Numbers that watchers have seen may be given again only in another log."""
    task = daemon.create(scene.parameters())
    first = daemon.watch(task.name).log_epoch
    daemon.kill()
    daemon.start()
    assert daemon.watch(task.name).log_epoch == first, "nothing is lost by kill -9"
    assert daemon.stop() == 0
    with opened(daemon) as connection:
        connection.execute("UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    daemon.start()
    assert daemon.watch(task.name).log_epoch == first, "nor by a reboot after an orderly end"
    daemon.kill()
    with opened(daemon) as connection:
        connection.execute("UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
    daemon.start()
    second = daemon.watch(task.name).log_epoch
    assert second != first

    request = task_service_pb2.WatchTaskRequest(name=task.name, log_epoch=first)
    with pytest.raises(grpc.RpcError) as caught:
        next(daemon.tasks.WatchTask(request, timeout=60))
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    daemon.kill()
    daemon.start()
    assert daemon.watch(task.name).log_epoch == second, "the new log is durable"


def test_watchers_go_on_in_the_new_log_and_are_told(
    daemon: Daemon, scene: Scene, tmp_path: Path
) -> None:
    """Power fails, and events that were seen are taken back: others come under their numbers."""
    task = daemon.create(scene.play(**WATCHED), start=True)
    seen = list[WatchItem]()
    with Client(daemon.address) as client:
        watch = client.watch(task.name, until_end=True)
        scene.let_pass(2)
        for item in watch:
            seen.append(item)
            if isinstance(item, Event) and item.progress.step == 2:
                break
        last = seen[-1]
        assert isinstance(last, Event)
        daemon.kill()
        with opened(daemon) as connection:
            connection.execute("UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")
            connection.execute("DELETE FROM events WHERE seq > 4")
            connection.execute("UPDATE tasks SET last_seq = 4")
            connection.execute("UPDATE runs SET ingested_bytes = 0, ingested_seq = 0")
        daemon.start()
        scene.let_pass(2)
        seen += list(watch)
    replaced = next(n for n, item in enumerate(seen) if isinstance(item, LogReplaced))
    before = [item.seq for item in seen[:replaced] if isinstance(item, Event)]
    assert before == list(range(1, before[-1] + 1))
    assert before[-1] >= last.seq, "what came in one message with it is told as well"
    assert seen[replaced] == LogReplaced(after_seq=before[-1])
    assert isinstance(seen[replaced + 1], Snapshot)
    after = [item for item in seen[replaced:] if isinstance(item, Event)]
    assert after == daemon.events(task.name), "all of the new log, each event once"


# --- backups


def test_a_backup_is_made_while_the_daemon_serves_and_comes_back(
    daemon: Daemon, scene: Scene, tmp_path: Path
) -> None:
    """Everything that was there at its time is there again, and watchers begin anew."""
    one = daemon.create(scene.parameters())
    epoch = daemon.watch(one.name).log_epoch
    made = done(daemon, "backup", str(tmp_path / "elsewhere"))
    assert Path(made["path"]).parent == tmp_path / "elsewhere"
    two = daemon.create(scene.parameters())
    refused = db(daemon, "restore", made["path"], "--yes")
    assert refused.returncode == 3, "a daemon serves"
    assert daemon.stop() == 0

    unasked = db(daemon, "restore", made["path"])
    assert (unasked.returncode, "--yes" in unasked.stderr) == (1, True)
    restored = db(daemon, "restore", made["path"], "--yes")
    assert restored.returncode == 0, restored.stderr
    daemon.start()
    assert [task.name for task in listed(daemon)] == [one.name]
    assert daemon.watch(one.name).log_epoch != epoch

    assert daemon.stop() == 0
    undo = [line for line in restored.stdout.splitlines() if line.startswith("  ")]
    subprocess.run("\n".join(undo), shell=True, check=True)
    daemon.start()
    assert [task.name for task in listed(daemon)] == [two.name, one.name]


def test_a_backup_is_made_when_the_newest_is_old_enough_and_few_stay(
    daemon: Daemon, scene: Scene
) -> None:
    """Of a daemon that runs for months there are always some, and never many."""
    folder = daemon.paths.state_dir / "backups"
    assert daemon.stop() == 0
    daemon.options += ["--backup-hours", str(0.2 / 3600), "--backup-keep", "2"]
    daemon.start()
    daemon.create(scene.parameters())
    seen = set[str]()

    def look() -> bool:
        seen.update(path.name for path in folder.glob("finetuned-*"))
        return len(seen) >= 4

    eventually(look, "four backups one after the other")
    eventually(lambda: len(list(folder.glob("finetuned-*"))) <= 2, "the old ones go")
    info = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    assert info.HasField("last_backup_time")
    assert all(backup["is_whole"] for backup in done(daemon, "check")["backups"])


def test_a_check_names_what_is_wrong_and_a_daemon_may_serve(daemon: Daemon, scene: Scene) -> None:
    """Damage, folders that are gone, folders of no task, backups that are damaged."""
    task = daemon.create(scene.play(), start=True)
    daemon.wait(task.name, "COMPLETED")
    made = done(daemon, "backup")
    checked = done(daemon, "check")
    assert (checked["is_whole"], checked["problems"], checked["notes"]) == (True, [], [])
    assert [backup["path"] for backup in checked["backups"]] == [made["path"]]

    run_dir = daemon.paths.state_dir / "runs" / task.name.removeprefix("tasks/")
    (run_dir / "1" / "events.jsonl").write_text("")
    garble(Path(made["path"]))
    result = db(daemon, "check", "--json")
    assert result.returncode == 1
    problems = json.loads(result.stdout)["problems"]
    assert ["its end is lost" in problem for problem in problems] == [True, False]
    assert made["path"] in problems[1]
    (run_dir / "1" / "events.jsonl").unlink()
    Path(made["path"]).unlink()
    assert "finetuned.db: 1 problem\n" in db(daemon, "check").stdout

    run_dir.rename(run_dir.with_name("sft-unknown"))
    found = json.loads(db(daemon, "check", "--json").stdout)
    assert "is gone" in found["problems"][0]
    assert "sft-unknown" in found["notes"][0]


def test_a_check_finds_nothing_wrong_with_a_run_at_any_point_of_its_pauses(
    daemon: Daemon, scene: Scene
) -> None:
    """Paused, queued again with no folder yet for its next process, paused there, stopped there."""
    one, two = paused(daemon, scene), paused(daemon, scene)
    begun(daemon, scene, 1)  # has the device from here on
    problems = [done(daemon, "check")["problems"]]
    for task in (one, two):
        resume(daemon, task.name)
    problems.append(done(daemon, "check")["problems"])
    pause(daemon, one.name)
    stop(daemon, two.name)
    problems.append(done(daemon, "check")["problems"])
    assert problems == [[], [], []]

    first = daemon.paths.state_dir / "runs" / one.name.removeprefix("tasks/") / "1"
    result = first / "result.json"
    result.write_text(result.read_text().replace("STOPPED_BY_USER", "FINISHED"))
    (problem,) = json.loads(db(daemon, "check", "--json").stdout)["problems"]
    assert f"{first} has a result FINISHED" in problem, "not of the present process"
    first.rename(first.with_name("elsewhere"))
    (problem,) = json.loads(db(daemon, "check", "--json").stdout)["problems"]
    assert f"{first} is gone" in problem


def test_a_check_accepts_a_stop_of_what_a_full_disk_has_paused(
    daemon: Daemon, scene: Scene
) -> None:
    """The process ended for want of room, the run because somebody gave it up."""
    full = {"step": 3, "reason": "DISK_FULL", "message": "No space is left."}
    task = daemon.create(scene.play(steps=4, save_steps=2, fail=full), start=True)
    daemon.wait(task.name, "PAUSED")
    assert done(daemon, "check")["problems"] == []
    stop(daemon, task.name)
    assert done(daemon, "check")["problems"] == []
    run_dir = daemon.paths.state_dir / "runs" / task.name.removeprefix("tasks/") / "1"
    result = run_dir / "result.json"
    result.write_text(result.read_text().replace("DISK_FULL", "FINISHED"))
    (problem,) = json.loads(db(daemon, "check", "--json").stdout)["problems"]
    assert "the database says STOPPED, and result.json FINISHED" in problem

    result.write_text(result.read_text().replace("FINISHED", "STOPPED_BY_USER"))
    assert daemon.stop() == 0
    with opened(daemon) as connection:
        connection.execute("UPDATE runs SET state = 'FAILED', end_reason = 'RUNNER_HUNG'")
    assert done(daemon, "check")["problems"] == [], "one that hung may wake up and save"


# --- rebuild, restore


def story(daemon: Daemon, scene: Scene) -> dict[str, task_pb2.Task]:
    """Tasks that completed, failed, were stopped and started again, and one that runs."""
    completed = daemon.create(scene.play(steps=4, save_steps=2), start=True)
    daemon.wait(completed.name, "COMPLETED")
    failed = daemon.create(
        scene.play(fail={"step": 2, "reason": "DATASET_INVALID", "message": "bad line"}), start=True
    )
    daemon.wait(failed.name, "FAILED")
    again = daemon.create(scene.play(hold="LOADING_MODEL"), start=True)
    daemon.wait(again.name, "RUNNING")
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=again.name))
    daemon.wait(again.name, "STOPPED")
    scene.play()
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=again.name))
    daemon.wait(again.name, "COMPLETED")
    live = daemon.create(scene.play(**WATCHED), start=True)
    with daemon.watch(live.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
        watch.until(lambda event: event.HasField("checkpoint_saved"))
    return {"completed": completed, "failed": failed, "again": again, "live": live}


def test_run_folders_alone_bring_back_every_task_that_ever_ran(
    daemon: Daemon, scene: Scene
) -> None:
    """Names, parameters, states, ends, events and the quota; a live runner goes on."""
    names = story(daemon, scene)
    tasks = {task.name: shape(task) for task in listed(daemon)}
    before_runs = {name: runs(daemon, name) for name in tasks}
    before = {name: reports(daemon, name) for name in tasks}
    order = [task.name for task in listed(daemon)]
    quota = daemon.system.GetQuota(system_service_pb2.GetQuotaRequest()).used
    daemon.kill()
    for path in daemon.paths.state_dir.glob("finetuned.db*"):
        path.write_bytes(b"nothing of it is left")

    report = done(daemon, "rebuild", "--yes")
    assert len(report["added_tasks"]) == len(tasks)
    assert report["live_runs"] == [f"{names['live'].name} run 1"]
    assert len(report["set_aside"]) >= 1
    daemon.start()
    assert {task.name: shape(task) for task in listed(daemon)} == tasks
    assert [task.name for task in listed(daemon)] == order
    assert {name: runs(daemon, name) for name in tasks} == before_runs
    assert {name: reports(daemon, name) for name in tasks} == before
    assert daemon.system.GetQuota(system_service_pb2.GetQuotaRequest()).used == quota
    scene.let_pass(2)
    daemon.wait(names["live"].name, "COMPLETED")
    scene.play()
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=names["failed"].name))
    daemon.wait(names["failed"].name, "COMPLETED")
    assert done(daemon, "check")["problems"] == []


def test_folders_of_earlier_versions_are_rebuilt_from_their_specs(
    daemon: Daemon, scene: Scene
) -> None:
    """They hold neither task.json nor ended.json: what the runner left decides."""
    task = daemon.create(scene.play(), start=True)
    daemon.wait(task.name, "COMPLETED")
    assert daemon.stop() == 0
    folder = daemon.paths.state_dir / "runs" / task.name.removeprefix("tasks/")
    (folder / "task.json").unlink()
    (folder / "1" / "ended.json").unlink()
    done(daemon, "rebuild", "--yes")
    daemon.start()
    (rebuilt,) = listed(daemon)
    assert (rebuilt.name, rebuilt.state) == (task.name, task_pb2.TASK_STATE_COMPLETED)
    assert rebuilt.parameters == task.parameters
    assert rebuilt.display_name


def test_a_restored_backup_takes_over_what_ran_since(daemon: Daemon, scene: Scene) -> None:
    """A queued task that has run since is not run again; a live runner is adopted."""
    first = daemon.create(scene.play(**WATCHED), start=True)
    queued = daemon.create(scene.play(**WATCHED), start=True)
    daemon.wait(first.name, "RUNNING")
    with daemon.watch(first.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    made = done(daemon, "backup")
    scene.let_pass(3)
    daemon.wait(first.name, "COMPLETED")
    with daemon.watch(queued.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
    unknown = daemon.create(scene.parameters(), start=True)
    done_before = runs(daemon, first.name)
    daemon.kill()

    report = done(daemon, "restore", made["path"], "--yes")
    assert sorted(report["updated_runs"]) == sorted(f"{t.name} run 1" for t in (first, queued))
    assert report["live_runs"] == [f"{queued.name} run 1"]
    daemon.start()
    assert runs(daemon, first.name) == done_before
    scene.let_pass(2)
    daemon.wait(queued.name, "COMPLETED")
    assert [run.number for run in runs(daemon, queued.name)] == [1]
    names = {task.name for task in listed(daemon)}
    assert names == {first.name, queued.name}, f"{unknown.name} never ran, and is in no folder"


def test_tasks_that_a_backup_does_not_know_are_reported_and_can_be_added(
    daemon: Daemon, scene: Scene
) -> None:
    """What is in the database stays as it is."""
    template = daemon.create(scene.parameters())
    made = done(daemon, "backup")
    later = daemon.create(scene.play(), start=True)
    daemon.wait(later.name, "COMPLETED")
    assert daemon.stop() == 0
    report = done(daemon, "restore", "--yes")
    assert [Path(folder).name for folder in report["unknown"]] == [later.name.split("/")[1]]
    assert Path(made["path"]).exists()

    report = done(daemon, "rebuild", "--add", "--yes")
    assert report["added_tasks"] == [later.name]
    daemon.start()
    assert {task.name for task in listed(daemon)} == {template.name, later.name}
    assert daemon.get(later.name).state == task_pb2.TASK_STATE_COMPLETED


def test_a_pause_outlives_the_database(daemon: Daemon, scene: Scene) -> None:
    """A paused run is paused after a rebuild, and the same run goes on when it is resumed."""
    task = daemon.create(scene.play(**WATCHED), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    daemon.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=task.name))
    daemon.wait(task.name, "PAUSED")
    paused = shape(daemon.get(task.name))
    assert daemon.stop() == 0
    done(daemon, "rebuild", "--yes")
    daemon.start()
    assert shape(daemon.get(task.name)) == paused

    daemon.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=task.name))
    scene.let_pass(4)
    daemon.wait(task.name, "COMPLETED")
    before = runs(daemon, task.name), reports(daemon, task.name)
    assert daemon.stop() == 0
    done(daemon, "rebuild", "--yes")
    daemon.start()
    assert (runs(daemon, task.name), reports(daemon, task.name)) == before


def test_a_probe_leaves_its_task_what_it_was_in_a_rebuild_too(daemon: Daemon, scene: Scene) -> None:
    """It was no run of the task."""
    task = daemon.create(scene.play())
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name, probe=True))
    with daemon.watch(task.name) as watch:
        watch.until(lambda event: event.HasField("result"))
    daemon.wait(task.name, "PENDING")
    before = shape(daemon.get(task.name)), runs(daemon, task.name)
    assert daemon.stop() == 0
    done(daemon, "rebuild", "--yes")
    daemon.start()
    assert (shape(daemon.get(task.name)), runs(daemon, task.name)) == before


def test_what_runs_by_the_database_is_left_to_the_next_daemon(daemon: Daemon, scene: Scene) -> None:
    """It adopts what lives, and says of what died why, with what would mend it."""
    lives = daemon.create(scene.play(**WATCHED), start=True)
    daemon.wait(lives.name, "RUNNING")
    with daemon.watch(lives.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    made = done(daemon, "backup")
    daemon.kill()
    report = done(daemon, "restore", made["path"], "--yes")
    assert (report["updated_runs"], report["live_runs"]) == ([], [f"{lives.name} run 1"])
    daemon.start()
    scene.let_pass(3)
    daemon.wait(lives.name, "COMPLETED")
    assert done(daemon, "check")["problems"] == []
