"""Checkpoints of a task: listed, chosen, deleted, and resumed with a plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameter_service_pb2, parameters_pb2, task_pb2, task_service_pb2
from tiny import chats, make_model, write_jsonl

NEWEST = task_pb2.RESUME_CHOICE_NEWEST_CHECKPOINT
BEST = task_pb2.RESUME_CHOICE_BEST_CHECKPOINT


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests: each has a task of its own."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon")).start()
    yield daemon
    daemon.close()


def listed(daemon: Daemon, name: str, **asked: Any) -> list[task_pb2.Checkpoint]:
    request = task_service_pb2.ListCheckpointsRequest(parent=name, **asked)
    return list(daemon.tasks.ListCheckpoints(request).checkpoints)


def start(daemon: Daemon, name: str, **asked: Any) -> task_pb2.Task:
    return daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=name, **asked)).task


def runs(daemon: Daemon, name: str) -> list[task_pb2.Run]:
    return list(daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs)


def notices(daemon: Daemon, name: str, run: int) -> list[str]:
    events = daemon.events(name)
    return [e.notice.message for e in events if e.run == run and e.HasField("notice")]


def reason_of(error: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    """Status code and stable reason; of wrong fields the first one's."""
    status = rpc_status.from_call(error)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    reason = bad.field_violations[0].reason if bad.field_violations else info.reason
    return error.code(), reason


def done(daemon: Daemon, scene: Scene, **scenario: Any) -> task_pb2.Task:
    """A task whose first run has ended: 6 steps, a checkpoint at each even one."""
    parameters = scene.play(**{"steps": 6, "save_steps": 2, **scenario})
    return daemon.wait(daemon.create(parameters, start=True).name, "COMPLETED")


def damage(checkpoint: str) -> None:
    """Another content of the same size: the sizes alone look right."""
    file = Path(checkpoint, "optimizer.pt")
    file.write_bytes(bytes(len(file.read_bytes())))


# --- the list


def test_checkpoints_of_all_runs_are_listed_newest_first_with_the_best_marked(
    daemon: Daemon, scene: Scene
) -> None:
    task = done(daemon, scene, eval_losses={"2": 1.0, "4": 0.5, "6": 0.75})
    scene.play(steps=4, save_steps=2, eval_losses={"2": 2.0, "4": 3.0})
    start(daemon, task.name)
    daemon.wait(task.name, "COMPLETED")
    found = listed(daemon, task.name)
    assert [(c.run, c.step) for c in found] == [(2, 4), (2, 2), (1, 6), (1, 4), (1, 2)]
    assert [(c.run, c.step) for c in found if c.is_newest] == [(2, 4)]
    assert [(c.run, c.step) for c in found if c.is_best] == [(1, 4)]
    assert [c.eval_loss for c in found] == [3.0, 2.0, 0.75, 0.5, 1.0]
    for checkpoint in found:
        assert checkpoint.is_whole
        folder = Path(checkpoint.path)
        assert folder.name == f"checkpoint-{checkpoint.step}"
        files = [file for file in folder.iterdir() if file.name != "manifest.json"]
        assert checkpoint.size_bytes == sum(file.stat().st_size for file in files)
        changed = (folder / "manifest.json").stat().st_mtime_ns // 1000 * 1000
        assert checkpoint.create_time.ToNanoseconds() == changed
        assert checkpoint.epoch == checkpoint.step / (6 if checkpoint.run == 1 else 4)


def test_what_is_not_whole_is_listed_as_such_and_a_removed_one_not_at_all(
    daemon: Daemon, scene: Scene
) -> None:
    task = done(daemon, scene)
    six, four, two = listed(daemon, task.name)
    Path(six.path, "rng_state.pth").unlink()
    damage(four.path)
    for file in Path(two.path).iterdir():
        file.unlink()
    Path(two.path).rmdir()
    six, four = listed(daemon, task.name)
    assert not six.is_whole
    assert "rng_state.pth" in six.problem
    assert four.is_whole, "by names and sizes it is"
    assert four.is_newest
    six, four = listed(daemon, task.name, verify=True)
    assert "optimizer.pt" in four.problem
    assert not four.is_newest


def test_a_list_comes_page_by_page(daemon: Daemon, scene: Scene) -> None:
    task = done(daemon, scene)
    seen, token = list[int](), ""
    while True:
        request = task_service_pb2.ListCheckpointsRequest(
            parent=task.name, page_size=2, page_token=token
        )
        page = daemon.tasks.ListCheckpoints(request)
        seen += [checkpoint.step for checkpoint in page.checkpoints]
        token = page.next_page_token
        if not token:
            break
        with pytest.raises(grpc.RpcError) as other:  # a token of another list
            daemon.tasks.ListRuns(
                task_service_pb2.ListRunsRequest(parent=task.name, page_token=token)
            )
        assert other.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert seen == [6, 4, 2]


# --- the choice


def test_the_newest_whole_checkpoint_is_resumed_and_a_broken_one_passed_over_aloud(
    daemon: Daemon, scene: Scene
) -> None:
    task = done(daemon, scene)
    six, four, _ = listed(daemon, task.name)
    damage(six.path)
    started = start(daemon, task.name, resume=NEWEST)
    daemon.wait(task.name, "COMPLETED")
    newest = runs(daemon, task.name)[0]
    assert newest.parameters.data.resume_from_checkpoint == four.path
    assert not started.parameters.data.HasField("resume_from_checkpoint"), "the task's own stay"
    (notice,) = notices(daemon, task.name, newest.number)
    assert six.path in notice
    assert "optimizer.pt" in notice
    assert four.path in notice


def test_the_best_checkpoint_is_resumed(daemon: Daemon, scene: Scene) -> None:
    task = done(daemon, scene, eval_losses={"2": 0.5, "4": 0.25, "6": 0.75})
    _, four, two = listed(daemon, task.name)
    start(daemon, task.name, resume=BEST)
    daemon.wait(task.name, "COMPLETED")
    newest = runs(daemon, task.name)[0]
    assert newest.parameters.data.resume_from_checkpoint == four.path
    assert not notices(daemon, task.name, newest.number)
    for checkpoint in listed(daemon, task.name):
        if checkpoint.step == 4:
            damage(checkpoint.path)
    start(daemon, task.name, resume=BEST)
    daemon.wait(task.name, "COMPLETED")
    assert runs(daemon, task.name)[0].parameters.data.resume_from_checkpoint == two.path


def test_where_there_is_none_to_choose_the_start_is_refused(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=2))
    with pytest.raises(grpc.RpcError) as nothing:
        start(daemon, task.name, resume=NEWEST)
    assert reason_of(nothing.value) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CHECKPOINT")
    task = done(daemon, scene)
    with pytest.raises(grpc.RpcError) as unevaluated:
        start(daemon, task.name, resume=BEST)
    assert reason_of(unevaluated.value) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_BEST_CHECKPOINT",
    )
    assert "eval_steps" in (unevaluated.value.details() or ""), "the next step is named"
    for checkpoint in listed(daemon, task.name):
        damage(checkpoint.path)
    with pytest.raises(grpc.RpcError) as broken:
        start(daemon, task.name, resume=NEWEST)
    assert reason_of(broken.value) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CHECKPOINT")
    assert len(runs(daemon, task.name)) == 1, "nothing was started"


def test_a_folder_is_resumed_only_where_every_hash_is_right(daemon: Daemon, scene: Scene) -> None:
    task = done(daemon, scene)
    four = listed(daemon, task.name)[1]
    for wrong in ({"resume": NEWEST, "resume_path": four.path}, {"resume": 9}):
        with pytest.raises(grpc.RpcError) as refused:
            start(daemon, task.name, **wrong)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    start(daemon, task.name, resume_path=four.path)
    daemon.wait(task.name, "COMPLETED")
    assert runs(daemon, task.name)[0].parameters.data.resume_from_checkpoint == four.path
    damage(four.path)
    with pytest.raises(grpc.RpcError) as changed:
        start(daemon, task.name, resume_path=four.path)
    assert reason_of(changed.value) == (grpc.StatusCode.INVALID_ARGUMENT, "NOT_A_CHECKPOINT")
    request = parameter_service_pb2.EstimateTaskRequest(task=task.name)
    request.parameters.data.resume_from_checkpoint = four.path
    with pytest.raises(grpc.RpcError) as planned:
        daemon.parameters.EstimateTask(request)
    assert reason_of(planned.value) == reason_of(changed.value), "a plan says what a start would"


def test_weights_attached_at_the_beginning_are_not_attached_anew(
    daemon: Daemon, scene: Scene
) -> None:
    """A resume of a task with data.attach_lora goes on; the checkpoint has its adapter's shape."""
    first = done(daemon, scene)
    parameters = scene.play(steps=4, save_steps=2)
    parameters.data.attach_lora = True
    parameters.data.resume_from_checkpoint = listed(daemon, first.name)[0].path
    parameters.data.output_dir = str(scene.output.with_name("other"))
    task = daemon.wait(daemon.create(parameters, start=True).name, "COMPLETED")
    newest = listed(daemon, task.name)[0]
    start(daemon, task.name, resume=NEWEST)
    daemon.wait(task.name, "COMPLETED")
    now = runs(daemon, task.name)[0].parameters
    assert now.data.resume_from_checkpoint == newest.path
    assert not now.data.attach_lora
    assert now.lora.peft_config_path == str(Path(newest.path, "adapter_config.json"))


# --- deletion


def test_a_deletion_takes_what_the_run_wrote_and_leaves_the_rest(
    daemon: Daemon, scene: Scene
) -> None:
    task = done(daemon, scene)
    six, four, two = listed(daemon, task.name)
    Path(six.path, "notes.txt").write_text("mine")
    delete = daemon.tasks.DeleteCheckpoint
    answer = delete(task_service_pb2.DeleteCheckpointRequest(name=six.name))
    assert answer.folder_left
    assert [file.name for file in Path(six.path).iterdir()] == ["notes.txt"]
    answer = delete(task_service_pb2.DeleteCheckpointRequest(name=two.name))
    assert not answer.folder_left
    assert answer.deleted_bytes >= two.size_bytes
    assert not Path(two.path).exists()
    whole = [checkpoint for checkpoint in listed(daemon, task.name) if checkpoint.is_whole]
    assert [checkpoint.path for checkpoint in whole] == [four.path]
    assert daemon.get(task.name).last_checkpoint == four.path
    gone = [e.checkpoint_deleted.step for e in daemon.events(task.name)]
    assert [step for step in gone if step] == [6, 2]
    odd = four.name.replace("/1/", "/01/"), four.name[:-1] + "0４"
    for name in (two.name, f"{task.name}/runs/1/checkpoints/3", *odd, "nonsense", ""):
        with pytest.raises(grpc.RpcError) as missing:
            delete(task_service_pb2.DeleteCheckpointRequest(name=name))
        assert missing.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_checkpoint_that_is_in_use_is_not_deleted(daemon: Daemon, scene: Scene) -> None:
    task = done(daemon, scene)
    four = listed(daemon, task.name)[1]
    request = task_service_pb2.DeleteCheckpointRequest(name=four.name)
    parameters = scene.play(steps=1, gated=True)
    parameters.data.resume_from_checkpoint = four.path
    parameters.data.output_dir = str(scene.output.with_name("other"))
    user = daemon.create(parameters, start=True)
    with pytest.raises(grpc.RpcError) as used:
        daemon.tasks.DeleteCheckpoint(request)
    assert reason_of(used.value) == (grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_IN_USE")
    everything = task_service_pb2.DeleteTaskRequest(name=task.name, delete_outputs=True)
    with pytest.raises(grpc.RpcError) as used:
        daemon.tasks.DeleteTask(everything)
    assert reason_of(used.value) == (grpc.StatusCode.FAILED_PRECONDITION, "CHECKPOINT_IN_USE")
    scene.let_pass(1)
    daemon.wait(user.name, "COMPLETED")
    start(daemon, task.name)
    with pytest.raises(grpc.RpcError) as active:
        daemon.tasks.DeleteCheckpoint(request)
    assert reason_of(active.value) == (grpc.StatusCode.FAILED_PRECONDITION, "TASK_ACTIVE")
    scene.let_pass(1)
    daemon.wait(task.name, "COMPLETED")
    assert Path(four.path, "manifest.json").is_file()


def test_a_pipe_in_place_of_a_manifest_holds_nobody_up(daemon: Daemon, scene: Scene) -> None:
    """Only files are read: what isn't one is no whole checkpoint, and other calls go on."""
    task = done(daemon, scene)
    six = listed(daemon, task.name)[0]
    manifest = Path(six.path, "manifest.json")
    manifest.unlink()
    os.mkfifo(manifest)
    assert not listed(daemon, task.name, verify=True)[0].is_whole
    daemon.tasks.DeleteCheckpoint(
        task_service_pb2.DeleteCheckpointRequest(name=six.name), timeout=20
    )
    assert daemon.get(task.name).name == task.name


# --- real


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


def test_a_resume_of_a_real_run_is_planned(real: Daemon, tmp_path: Path) -> None:
    """What goes on is named, and what has changed with what it means."""
    make_model(tmp_path / "model", layers=1)
    write_jsonl(tmp_path / "chats.jsonl", chats(16))
    parameters = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(tmp_path / "chats.jsonl"),
            model_path=str(tmp_path / "model"),
            output_dir=str(tmp_path / "out"),
            dataloader_num_workers=0,
            eval_ratio=0.25,
        ),
        training=parameters_pb2.TrainingParameters(
            batch_size=2,
            gradient_accumulation_steps=1,
            max_seq_length=128,
            max_steps=4,
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            learning_rate=1e-3,
        ),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )
    task = real.wait(real.create(parameters, start=True).name, "COMPLETED", "FAILED")
    assert task.state == task_pb2.TASK_STATE_COMPLETED, task.end_message
    found = listed(real, task.name, verify=True)
    assert [(c.step, c.is_newest, c.is_whole) for c in found] == [(4, True, True), (2, False, True)]
    assert min(found, key=lambda c: c.eval_loss).is_best
    change = parameters_pb2.Parameters(
        training=parameters_pb2.TrainingParameters(max_steps=6, save_steps=3, learning_rate=5e-4)
    )
    request = parameter_service_pb2.EstimateTaskRequest(
        task=task.name, parameters=change, resume=NEWEST
    )
    plan = real.parameters.EstimateTask(request).resume_plan
    assert (plan.checkpoint, plan.step, plan.total_steps) == (found[0].path, 4, 6)
    assert plan.epoch == pytest.approx(4 / 6)
    assert plan.num_tokens > 0
    effects = {
        item.field: parameter_service_pb2.ResumeEffect.Name(item.effect).removeprefix(
            "RESUME_EFFECT_"
        )
        for item in plan.items
    }
    assert effects == {
        "training.max_steps": "DIFFERENT_RUN",
        "training.learning_rate": "DIFFERENT_RUN",
        "training.save_steps": "MAY_CHANGE",
        "weights": "CONTINUES",
        "optimizer": "CONTINUES",
        "schedule": "CONTINUES",
        "random_state": "CONTINUES",
        "tokens": "CONTINUES",
        "data_position": "CONTINUES",
    }
    rate = next(item for item in plan.items if item.field == "training.learning_rate")
    assert (rate.then.number_value, rate.now.number_value) == (1e-3, 5e-4)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    start(real, task.name, resume=NEWEST)
    assert any(f"{config} was written to since" in text for text in notices(real, task.name, 2))
