"""Pauses: the device is free, the same run goes on later, and no kill -9 in between matters."""

from __future__ import annotations

import json
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import system_service_pb2, task_pb2, task_service_pb2
from pauses import (
    PAUSED,
    QUEUED,
    REQUESTED,
    begun,
    change_to,
    checkpoints,
    only_run,
    pause,
    paused,
    real_parameters,
    refused,
    results,
    resume,
    spec_of,
    stop,
)
from tiny import chats, make_model, weights, write_jsonl

# --- what a pause is


def test_a_pause_saves_frees_the_device_and_the_same_run_goes_on(
    daemon: Daemon, scene: Scene
) -> None:
    task = begun(daemon, scene, 2)
    waiting = daemon.create(scene.parameters(), start=True)
    started = daemon.get(task.name).start_time
    with daemon.watch(task.name) as watch:
        asked = pause(daemon, task.name)
        assert asked.state == task_pb2.TASK_STATE_RUNNING
        assert asked.phase == task_pb2.RUN_PHASE_PAUSING
        pausing = watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_PAUSING)
        assert pausing.phase_change.deadline_seconds > 0, "a user can see how long it may take"
        change = change_to(watch, PAUSED)
    now = daemon.get(task.name)
    newest = str(scene.output / "run-1" / "checkpoint-2")
    assert newest in change.message
    assert change.end_reason == task_pb2.END_REASON_UNSPECIFIED
    assert (now.pause_reason, now.last_checkpoint, now.run) == (REQUESTED, newest, 1)
    assert (now.phase, now.end_reason, now.end_time.seconds) == (0, 0, 0)
    assert results(daemon, task.name) == [], "it has not ended"
    stopping = task_pb2.RUN_PHASE_STOPPING
    assert not [e for e in daemon.events(task.name) if e.phase_change.phase == stopping]
    daemon.wait(waiting.name, "RUNNING")

    again = resume(daemon, task.name)
    assert (again.state, again.queue_position, again.progress.step) == (QUEUED, 1, 2)
    assert again.last_checkpoint == newest
    scene.let_pass(9)
    daemon.wait(waiting.name, "COMPLETED")
    with daemon.watch(task.name) as watch:
        scene.let_pass(7)
        watch.until_end()
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_COMPLETED
    assert (ended.progress.step, ended.start_time) == (9, started)
    run = only_run(daemon, task.name)
    assert (run.number, run.attempt, run.output_dir) == (1, 2, str(scene.output / "run-1"))
    assert run.start_time == started
    assert not run.parameters.data.HasField("resume_from_checkpoint"), "its own stay"
    spec = spec_of(run)
    assert spec["parameters"]["data"]["resume_from_checkpoint"] == newest
    assert spec["run_parameters"]["data"]["resume_from_checkpoint"] is None
    assert spec["disk_wait_seconds"] == 600, "so long it waits for room by itself"
    steps = [e.progress.step for e in daemon.events(task.name) if e.HasField("progress")]
    assert steps == list(range(1, 10)), "nothing was done twice, and nothing is missing"
    assert [r.end_reason for r in results(daemon, task.name)] == [task_pb2.END_REASON_FINISHED]


@pytest.mark.parametrize("phase", ["STARTING", "LOADING_MODEL", "PREPARING_DATA"])
def test_a_run_that_is_paused_before_it_trains_begins_anew(
    daemon: Daemon, scene: Scene, phase: str
) -> None:
    task = daemon.create(scene.play(hold=phase), start=True)
    wanted = task_pb2.RunPhase.Value(f"RUN_PHASE_{phase}")
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == wanted)
        pause(daemon, task.name)
        assert "begins anew" in change_to(watch, PAUSED).message
    scene.play(steps=2)
    resume(daemon, task.name)
    assert daemon.wait(task.name, "COMPLETED").run == 1
    run = only_run(daemon, task.name)
    assert run.attempt == 2
    assert spec_of(run)["parameters"]["data"]["resume_from_checkpoint"] is None


def test_a_queued_task_is_paused_at_once_and_keeps_its_first_attempt(
    daemon: Daemon, scene: Scene
) -> None:
    first = begun(daemon, scene, 1)
    queued = daemon.create(scene.parameters(), start=True)
    third = daemon.create(scene.parameters(), start=True)
    now = pause(daemon, queued.name)
    assert (now.state, now.queue_position, now.pause_reason) == (PAUSED, 0, REQUESTED)
    assert daemon.get(third.name).queue_position == 1
    again = resume(daemon, queued.name)
    assert (again.state, again.queue_position) == (QUEUED, 2), "behind the others"
    assert only_run(daemon, queued.name).attempt == 1
    scene.play(steps=1)
    scene.let_pass(8)
    for task in (first, third, queued):
        daemon.wait(task.name, "COMPLETED")
    assert only_run(daemon, queued.name).attempt == 1


def test_a_pause_after_a_pause_counts_on(daemon: Daemon, scene: Scene) -> None:
    task = paused(daemon, scene, 2)
    for attempt in (2, 3):
        resume(daemon, task.name)
        with daemon.watch(task.name, daemon.get(task.name).last_seq) as watch:
            scene.let_pass(1)
            watch.until_step(attempt + 1)
            pause(daemon, task.name)
            change_to(watch, PAUSED)
        assert only_run(daemon, task.name).attempt == attempt
    names = [Path(c.path).name for c in checkpoints(daemon, task.name)]
    assert names == ["checkpoint-4", "checkpoint-3", "checkpoint-2"], "those of all attempts"
    assert Path(only_run(daemon, task.name).run_dir, "attempt-3", "spec.json").is_file()
    stop(daemon, task.name)
    deleted = daemon.tasks.DeleteTask(
        task_service_pb2.DeleteTaskRequest(name=task.name, delete_outputs=True)
    )
    assert list(deleted.left_output_dirs) == []
    assert not (scene.output / "run-1").exists(), "and all of them are deleted"


# --- what else can happen to a run that is pausing


def test_a_run_that_ends_while_it_pauses_has_ended(daemon: Daemon, scene: Scene) -> None:
    """Completed by itself, or crashed: there is nothing to go on with."""
    task = begun(daemon, scene, 1, steps=2, deaf=True)
    assert pause(daemon, task.name).phase == task_pb2.RUN_PHASE_PAUSING
    scene.let_pass(1)
    daemon.wait(task.name, "COMPLETED")
    task = begun(daemon, scene, 1, exit=[2, 3], deaf=True)
    pause(daemon, task.name)
    scene.let_pass(1)
    ended = daemon.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_CRASHED
    assert ended.pause_reason == task_pb2.PAUSE_REASON_UNSPECIFIED


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Daemon]:
    deadlines = ("--save-deadline-seconds", "0.3", "--kill-deadline-seconds", "0.3")
    daemon = Daemon(tmp_path, *deadlines).start()
    yield daemon
    daemon.close()


def test_a_run_that_hears_nothing_is_paused_by_force(impatient: Daemon, scene: Scene) -> None:
    """It goes on from its newest checkpoint, in its own output folder."""
    task = begun(impatient, scene, 3, deaf=True, save_steps=2)
    with impatient.watch(task.name) as watch:
        pause(impatient, task.name)
        message = change_to(watch, PAUSED).message
    assert "by force" in message
    assert str(scene.output / "run-1" / "checkpoint-2") in message
    assert only_run(impatient, task.name).signal == "SIGKILL"
    scene.play(steps=3)
    resume(impatient, task.name)
    impatient.wait(task.name, "COMPLETED")
    run = only_run(impatient, task.name)
    assert (run.attempt, run.signal) == (2, "")
    assert [c.step for c in checkpoints(impatient, task.name)] == [3, 2]


def test_the_folder_of_a_run_that_is_paused_by_force_is_not_given_to_another(
    impatient: Daemon, scene: Scene
) -> None:
    """Nothing is in it yet, and two runs must never write into one folder."""
    task = begun(impatient, scene, 1, deaf=True)
    pause(impatient, task.name)
    impatient.wait(task.name, "PAUSED")
    other = impatient.create(scene.play(steps=1), start=True)
    impatient.wait(other.name, "COMPLETED")
    assert only_run(impatient, other.name).output_dir == str(scene.output / "run-2")
    resume(impatient, task.name)
    impatient.wait(task.name, "COMPLETED")
    assert only_run(impatient, task.name).output_dir == str(scene.output / "run-1")


@pytest.mark.parametrize("discard", [False, True])
def test_a_stop_wins_over_a_pause_and_what_was_to_be_saved_is_saved(
    daemon: Daemon, scene: Scene, discard: bool
) -> None:
    task = begun(daemon, scene, 1)
    pid = only_run(daemon, task.name).pid
    os.kill(pid, signal.SIGSTOP)
    pause(daemon, task.name)
    assert pause(daemon, task.name).phase == task_pb2.RUN_PHASE_PAUSING, "a repeat is safe"
    assert stop(daemon, task.name, discard=discard).phase == task_pb2.RUN_PHASE_STOPPING
    assert refused(pause, daemon, task.name) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "TASK_STOPPING",
    )
    os.kill(pid, signal.SIGCONT)
    ended = daemon.wait(task.name, "STOPPED")
    assert ended.last_checkpoint.endswith("checkpoint-1")
    assert ended.end_reason == task_pb2.END_REASON_STOPPED_BY_USER


def test_a_paused_task_is_stopped_at_once(daemon: Daemon, scene: Scene) -> None:
    task = paused(daemon, scene)
    now = stop(daemon, task.name)
    assert now.state == task_pb2.TASK_STATE_STOPPED
    assert now.pause_reason == task_pb2.PAUSE_REASON_UNSPECIFIED
    (result,) = results(daemon, task.name)
    assert task.last_checkpoint in result.message, "what remains is named"
    assert result.step == 2
    first = begun(daemon, scene, 1)
    queued = daemon.create(scene.parameters(), start=True)
    pause(daemon, queued.name)
    assert "before it began" in stop(daemon, queued.name).end_message
    stop(daemon, first.name, discard=True)


def test_what_can_not_be_paused_says_why(daemon: Daemon, scene: Scene) -> None:
    wrong = grpc.StatusCode.FAILED_PRECONDITION
    task = daemon.create(scene.play(gated=True))
    assert refused(pause, daemon, task.name) == (wrong, "TASK_NOT_ACTIVE")
    assert refused(resume, daemon, task.name) == (wrong, "TASK_NOT_PAUSED")
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name, probe=True))
    assert refused(pause, daemon, task.name) == (wrong, "TASK_PROBING")
    assert refused(resume, daemon, task.name) == (wrong, "TASK_NOT_PAUSED")
    assert refused(pause, daemon, "tasks/none")[0] is grpc.StatusCode.NOT_FOUND
    assert refused(resume, daemon, "tasks/none")[0] is grpc.StatusCode.NOT_FOUND


def test_a_paused_task_is_left_alone(daemon: Daemon, scene: Scene) -> None:
    """No edit, start or deletion: it would go on with something else than it was paused with."""
    task = paused(daemon, scene)
    assert pause(daemon, task.name).state == PAUSED, "a repeat is safe"
    stub, wrong = daemon.tasks, (grpc.StatusCode.FAILED_PRECONDITION, "TASK_PAUSED")
    edit = task_pb2.Task(name=task.name, display_name="other")
    named = checkpoints(daemon, task.name)[0].name
    for call, request in (
        (stub.UpdateTask, task_service_pb2.UpdateTaskRequest(task=edit)),
        (stub.StartTask, task_service_pb2.StartTaskRequest(name=task.name)),
        (stub.DeleteTask, task_service_pb2.DeleteTaskRequest(name=task.name)),
        (stub.DeleteCheckpoint, task_service_pb2.DeleteCheckpointRequest(name=named)),
    ):
        assert refused(call, request) == wrong
    listed = stub.ListTasks(task_service_pb2.ListTasksRequest(states=[PAUSED])).tasks
    assert [(t.name, t.pause_reason) for t in listed] == [(task.name, REQUESTED)]


# --- resume


def test_a_repeated_resume_gets_the_first_answer_and_a_stale_etag_nothing(
    daemon: Daemon, scene: Scene
) -> None:
    task = paused(daemon, scene)
    assert refused(resume, daemon, task.name, etag='"0-0"')[0] is grpc.StatusCode.ABORTED
    asked = {"etag": task.etag, "request_id": str(uuid.uuid4())}
    first = resume(daemon, task.name, **asked)
    daemon.kill()
    daemon.start()
    assert resume(daemon, task.name, **asked) == first
    assert only_run(daemon, task.name).attempt == 2


def test_a_broken_checkpoint_is_passed_over_aloud(daemon: Daemon, scene: Scene) -> None:
    """Same size, other content: only the hashes tell."""
    task = paused(daemon, scene, 3, save_steps=2)
    file = Path(task.last_checkpoint, "optimizer.pt")
    file.write_bytes(bytes(len(file.read_bytes())))
    resume(daemon, task.name)
    notice = next(e.notice for e in daemon.events(task.name) if e.HasField("notice"))
    assert notice.reason == "CHECKPOINT_PASSED_OVER"
    assert "checkpoint-3" in notice.message
    two = str(scene.output / "run-1" / "checkpoint-2")
    assert two in notice.message
    with daemon.watch(task.name) as watch:
        scene.let_pass(7)
        watch.until_end()
    assert (
        spec_of(only_run(daemon, task.name))["parameters"]["data"]["resume_from_checkpoint"] == two
    )


def test_a_checkpoint_that_is_gone_is_said_and_not_named_any_more(
    daemon: Daemon, scene: Scene
) -> None:
    """The run goes on from the one before, and where there is none, begins anew; both aloud."""
    task = paused(daemon, scene, 3, save_steps=2)
    two = str(scene.output / "run-1" / "checkpoint-2")
    for gone, left, how in ((task.last_checkpoint, two, two), (two, "", "begins anew")):
        shutil.rmtree(gone)
        again = resume(daemon, task.name)
        assert again.last_checkpoint == left
        assert only_run(daemon, task.name).last_checkpoint == left
        said = [e.notice for e in daemon.events(task.name) if e.HasField("notice")][-1]
        assert said.reason == "CHECKPOINT_GONE"
        assert f"{gone} is gone" in said.message
        assert how in said.message
        pause(daemon, task.name)
        daemon.wait(task.name, "PAUSED")


def test_a_resume_is_checked_as_a_start_is(daemon: Daemon, scene: Scene) -> None:
    task = paused(daemon, scene)
    data = scene.data.read_text()
    scene.data.unlink()
    assert refused(resume, daemon, task.name) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "FILE_NOT_FOUND",
    )
    assert daemon.get(task.name).state == PAUSED
    scene.data.write_text(data)
    resume(daemon, task.name)
    scene.let_pass(7)
    daemon.wait(task.name, "COMPLETED")


def test_what_a_run_went_on_from_originally_is_kept_for_it(daemon: Daemon, scene: Scene) -> None:
    """Paused before it saved anything, it goes on from there, and nobody deletes it meanwhile."""
    other = daemon.create(scene.play(steps=2, save_steps=2), start=True)
    daemon.wait(other.name, "COMPLETED")
    source = checkpoints(daemon, other.name)[0]
    parameters = scene.play(hold="LOADING_MODEL")
    parameters.data.resume_from_checkpoint = source.path
    parameters.data.output_dir = str(scene.output.with_name("other"))
    task = daemon.create(parameters, start=True)
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_LOADING_MODEL)
        pause(daemon, task.name)
        assert source.path in change_to(watch, PAUSED).message
    delete = task_service_pb2.DeleteCheckpointRequest(name=source.name)
    assert refused(daemon.tasks.DeleteCheckpoint, delete)[1] == "CHECKPOINT_IN_USE"
    scene.play(steps=3)
    resume(daemon, task.name)
    daemon.wait(task.name, "COMPLETED")
    data = spec_of(only_run(daemon, task.name))["parameters"]["data"]
    assert data["resume_from_checkpoint"] == source.path


def test_the_checkpoints_of_a_paused_run_stay_reserved(tmp_path: Path, scene: Scene) -> None:
    """What a pause saves counts as well, and a resume plans with what is left."""
    daemon = Daemon(tmp_path, "--training-quota", "3").start()

    def quota() -> tuple[int, int]:
        answer = daemon.system.GetQuota(system_service_pb2.GetQuotaRequest())
        return answer.used, answer.reserved

    try:
        scene.data.write_text(scene.data.read_text() * 64)  # 8 steps an epoch
        scene.play(steps=9, gated=True)
        task = daemon.create(scene.parameters(save_steps=8, num_train_epochs=2), start=True)
        assert quota() == (0, 2)
        with daemon.watch(task.name) as watch:
            scene.let_pass(1)
            watch.until_step(1)
        pause(daemon, task.name)
        daemon.wait(task.name, "PAUSED")
        assert quota() == (1, 1)
        resume(daemon, task.name)
        assert quota() == (1, 2), "two are still to come"
        assert spec_of(only_run(daemon, task.name))["checkpoint_quota"] == 2
        stop(daemon, task.name, discard=True)
        daemon.wait(task.name, "STOPPED")
        assert quota() == (1, 0)
    finally:
        daemon.close()


# --- kill -9 of the daemon


def test_a_daemon_that_is_killed_in_a_pause_leaves_it_to_the_next(
    daemon: Daemon, scene: Scene
) -> None:
    """The wish is durable before the runner hears of it; without its file it is told again."""
    task = begun(daemon, scene, 2)
    run = only_run(daemon, task.name)
    os.kill(run.pid, signal.SIGSTOP)
    pause(daemon, task.name)
    daemon.kill()
    (Path(run.run_dir) / "control.json").unlink()  # as if killed between wish and file
    daemon.start()
    assert daemon.get(task.name).phase == task_pb2.RUN_PHASE_PAUSING
    assert only_run(daemon, task.name).pid == run.pid, "adopted"
    os.kill(run.pid, signal.SIGCONT)
    now = daemon.wait(task.name, "PAUSED")
    assert now.last_checkpoint.endswith("checkpoint-2")


def test_a_run_that_ended_as_wished_while_no_daemon_was_there_is_paused(
    daemon: Daemon, scene: Scene
) -> None:
    task = begun(daemon, scene, 2)
    run = only_run(daemon, task.name)
    os.kill(run.pid, signal.SIGSTOP)
    pause(daemon, task.name)
    daemon.kill()
    os.kill(run.pid, signal.SIGCONT)
    eventually(lambda: (Path(run.run_dir) / "result.json").exists(), "the runner has ended")
    daemon.start()
    assert daemon.wait(task.name, "PAUSED").last_checkpoint.endswith("checkpoint-2")


def test_pauses_and_resumes_survive_a_daemon(daemon: Daemon, scene: Scene) -> None:
    task = paused(daemon, scene, 2)
    daemon.kill()
    daemon.start()
    now = daemon.get(task.name)
    assert (now.state, now.pause_reason, now.progress.step) == (PAUSED, REQUESTED, 2)
    first = daemon.create(scene.parameters(), start=True)  # the device is busy: it has to wait
    resume(daemon, task.name)
    daemon.kill()
    daemon.start()
    now = daemon.get(task.name)
    assert (now.state, now.queue_position, now.progress.step) == (QUEUED, 1, 2)
    stop(daemon, first.name, discard=True)
    daemon.wait(first.name, "STOPPED")  # or it would take the step
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(3)
        run = only_run(daemon, task.name)
        assert run.attempt == 2
        daemon.kill()
    scene.let_pass(6)  # it goes on by itself, and its second folder is read on from where it was
    daemon.start()
    daemon.wait(task.name, "COMPLETED")
    steps = [e.progress.step for e in daemon.events(task.name) if e.HasField("progress")]
    assert steps == list(range(1, 10))


# --- real


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


def test_a_real_run_that_was_paused_is_the_run_that_was_not(real: Daemon, tmp_path: Path) -> None:
    """Losses of every step, weights bit for bit, checkpoints, record and card."""
    make_model(tmp_path / "model", layers=1)
    write_jsonl(tmp_path / "chats.jsonl", chats(64))
    whole = real.create(real_parameters(tmp_path, "whole"), start=True)
    done = real.wait(whole.name, "COMPLETED", "FAILED", "PAUSED")
    assert done.state == task_pb2.TASK_STATE_COMPLETED, done.end_message
    task = real.create(real_parameters(tmp_path, "paused"), start=True)
    at = list[int]()
    for step in (3, 20):
        with real.watch(task.name, real.get(task.name).last_seq) as watch:
            watch.until_step(step)
            pause(real, task.name)
            change_to(watch, PAUSED)
        at.append(real.get(task.name).progress.step)
        assert resume(real, task.name).progress.step == at[-1]
    ended = real.wait(task.name, "COMPLETED", "FAILED", "PAUSED")
    assert ended.state == task_pb2.TASK_STATE_COMPLETED, ended.end_message
    run = only_run(real, task.name)
    assert (run.attempt, run.number) == (3, 1)
    assert 3 <= at[0] < at[1] < 40, "it was paused between its steps"

    def losses(name: str, kind: str, key: str) -> dict[int, float]:
        found = [getattr(e, kind) for e in real.events(name) if e.HasField(kind)]
        return {f.step: f.values[key] for f in found if key in f.values}

    for kind, key in (("metrics", "loss"), ("evaluation", "eval_loss")):
        expected = losses(whole.name, kind, key)
        assert losses(task.name, kind, key) == expected
        assert len(expected) == (40 if kind == "metrics" else 10)
    finals = [tmp_path / folder / "run-1" / "final" for folder in ("whole", "paused")]
    a, b = map(weights, finals)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)

    kept = [[c.step for c in checkpoints(real, t.name, verify=True)] for t in (whole, task)]
    best = [[c.step for c in checkpoints(real, t.name) if c.is_best] for t in (whole, task)]
    assert kept[0] == kept[1], "as many are kept, and the same"
    assert best[0] == best[1]
    folders = sorted(p.name for p in finals[1].parent.iterdir())
    assert folders == sorted(["final", *(f"checkpoint-{step}" for step in kept[1])])

    records = [json.loads((final / "training_record.json").read_text()) for final in finals]
    for name in ("num_tokens", "step", "epoch", "train_losses", "eval_losses", "files"):
        assert records[0][name] == records[1][name], name
    assert records[1]["resumed_from"] is None, "it is one run, which began anew"
    assert records[1]["parameters"]["data"]["resume_from_checkpoint"] is None
    cards = [(final / "README.md").read_text() for final in finals]
    assert "checkpoint-" not in cards[1]
    exported = real.tasks.ExportTaskConfig(
        task_service_pb2.ExportTaskConfigRequest(name=task.name, run=1)
    )
    assert "/checkpoint-" not in exported.content, "it is the run that somebody started"

    kept_one = checkpoints(real, task.name)[-1]
    answer = real.tasks.DeleteCheckpoint(
        task_service_pb2.DeleteCheckpointRequest(name=kept_one.name)
    )
    assert not answer.folder_left
    real.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name, delete_outputs=True))
    assert not finals[1].parent.exists(), "everything that its processes wrote is deleted"
