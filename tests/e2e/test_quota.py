"""The training quota: one a checkpoint, in a ledger that survives everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import system_service_pb2, task_pb2
from finetuned.v1 import task_service_pb2 as pb2


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that allows three checkpoints."""
    daemon = Daemon(tmp_path, "--training-quota", "3").start()
    yield daemon
    daemon.close()


def quota(daemon: Daemon) -> tuple[int, int, int]:
    """Limit, used, reserved."""
    answer = daemon.system.GetQuota(system_service_pb2.GetQuotaRequest())
    return answer.limit, answer.used, answer.reserved


def test_a_run_that_uses_the_last_one_ends_cleanly_with_a_whole_checkpoint(
    daemon: Daemon, scene: Scene
) -> None:
    # It is planned to save one, at its end, and saves after every step.
    task = daemon.create(scene.play(steps=9, save_steps=1), start=True)
    task = daemon.wait(task.name, "STOPPED", "COMPLETED", "FAILED")
    assert task.end_reason == task_pb2.END_REASON_QUOTA_USED_UP
    assert task.state == task_pb2.TASK_STATE_STOPPED
    assert task.last_checkpoint.endswith("checkpoint-3")
    assert (Path(task.last_checkpoint) / "manifest.json").is_file()
    assert quota(daemon) == (3, 3, 0)


def test_what_is_used_stays_used(daemon: Daemon, scene: Scene) -> None:
    """Neither a deletion with all outputs nor a restart gives anything back."""
    task = daemon.create(scene.play(steps=2, save_steps=2), start=True)
    task = daemon.wait(task.name, "COMPLETED")
    assert quota(daemon) == (3, 2, 0)
    daemon.tasks.DeleteTask(pb2.DeleteTaskRequest(name=task.name, delete_outputs=True))
    daemon.kill()
    daemon.start()
    assert quota(daemon) == (3, 2, 0)


def test_a_plan_beyond_what_is_left_is_refused_before_the_start(
    daemon: Daemon, scene: Scene
) -> None:
    scene.data.write_text(scene.data.read_text() * 64)  # 8 steps an epoch
    task = daemon.create(scene.parameters(save_steps=4, num_train_epochs=2))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.StartTask(pb2.StartTaskRequest(name=task.name))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "training.save_steps" in caught.value.details()
    assert "4 checkpoints" in caught.value.details()
    assert quota(daemon) == (3, 0, 0)
    assert daemon.get(task.name).state == task_pb2.TASK_STATE_PENDING


def test_what_one_run_was_planned_to_save_is_not_promised_to_another(
    daemon: Daemon, scene: Scene
) -> None:
    scene.data.write_text(scene.data.read_text() * 64)
    scene.play(gated=True)
    first = daemon.create(scene.parameters(save_steps=8, num_train_epochs=2), start=True)
    assert quota(daemon) == (3, 0, 2)
    second = daemon.create(scene.parameters(save_steps=8, num_train_epochs=2))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.StartTask(pb2.StartTaskRequest(name=second.name))
    assert "1 is left" in caught.value.details()
    daemon.tasks.StopTask(pb2.StopTaskRequest(name=first.name, discard=True))
    daemon.wait(first.name, "STOPPED")
    assert quota(daemon) == (3, 0, 0)


def test_without_a_quota_nothing_is_limited_and_all_is_counted(
    tmp_path: Path, scene: Scene
) -> None:
    daemon = Daemon(tmp_path).start()
    try:
        task = daemon.create(scene.play(steps=4, save_steps=1), start=True)
        daemon.wait(task.name, "COMPLETED")
        answer = daemon.system.GetQuota(system_service_pb2.GetQuotaRequest())
        assert not answer.HasField("limit")
        assert answer.used == 5
    finally:
        daemon.close()


def test_tasks_that_start_at_once_get_no_more_than_is_left(daemon: Daemon, scene: Scene) -> None:
    scene.play(gated=True)
    tasks = [daemon.create(scene.parameters(save_steps=1, max_steps=1)) for _ in range(8)]

    def start(task: task_pb2.Task) -> grpc.StatusCode:
        try:
            daemon.tasks.StartTask(pb2.StartTaskRequest(name=task.name))
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
        return grpc.StatusCode.OK

    with ThreadPoolExecutor(8) as pool:
        codes = Counter(pool.map(start, tasks))
    assert codes == {grpc.StatusCode.OK: 3, grpc.StatusCode.INVALID_ARGUMENT: 5}
    assert quota(daemon) == (3, 0, 3)


def test_a_stop_always_saves_and_uses_no_more_than_there_is(daemon: Daemon, scene: Scene) -> None:
    """A run that plans to save nothing has one reserved for it all the same."""
    scene.play(gated=True)
    parameters = scene.parameters(save_strategy="no")
    for used in (1, 2, 3):
        task = daemon.create(parameters, start=True)
        with daemon.watch(task.name) as watch:
            scene.let_pass(1)
            watch.until_step(1)
        daemon.tasks.StopTask(pb2.StopTaskRequest(name=task.name))
        assert daemon.wait(task.name, "STOPPED").last_checkpoint
        assert quota(daemon) == (3, used, 0)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.create(parameters, start=True)
    assert "0 are left" in caught.value.details()
