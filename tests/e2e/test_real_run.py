"""Client, daemon, runner, model: all real, all at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2
from tiny import chats, documents, make_model, write_jsonl


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    root = tmp_path_factory.mktemp("studio")
    make_model(root / "model", layers=1)
    write_jsonl(root / "chats.jsonl", chats(64))
    write_jsonl(root / "documents.jsonl", documents(16))
    return root


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


def parameters(studio: Path, output: Path, **training: object) -> parameters_pb2.Parameters:
    settings: dict[str, object] = {
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_seq_length": 128,
        **training,
    }
    return parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(studio / "chats.jsonl"),
            model_path=str(studio / "model"),
            output_dir=str(output),
            dataloader_num_workers=0,
        ),
        training=parameters_pb2.TrainingParameters(**settings),  # type: ignore[arg-type]
        lora=parameters_pb2.LoraParameters(lora_r=4),
        optimization=parameters_pb2.OptimizationParameters(gradient_checkpointing=False),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    return daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]


def assert_whole(checkpoint: str) -> None:
    """A checkpoint holds what its manifest lists, to the byte."""
    folder = Path(checkpoint)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, facts in manifest["files"].items():
        assert (folder / name).stat().st_size == facts["size"], name
    assert {"adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(
        manifest["files"]
    )


def test_a_run_outlives_its_daemon_and_ends_with_an_adapter(
    daemon: Daemon, studio: Path, tmp_path: Path
) -> None:
    task = daemon.create(
        parameters(studio, tmp_path / "out", max_steps=200, save_steps=50, learning_rate=1e-2),
        start=True,
    )
    seen = list[int]()
    with daemon.watch(task.name) as watch:
        watch.until_step(5)
        seen += watch.seqs
    pid = run_of(daemon, task.name).pid
    daemon.kill()
    daemon.start()
    with daemon.watch(task.name, seen[-1]) as watch:
        watch.until_end()
        seen += watch.seqs
    assert seen == list(range(1, len(seen) + 1))
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_COMPLETED
    assert ended.end_reason == task_pb2.END_REASON_STEP_LIMIT
    assert run_of(daemon, task.name).number == 1
    assert pid > 0
    events = daemon.events(task.name)
    losses = {e.metrics.step: e.metrics.values["loss"] for e in events if e.HasField("metrics")}
    assert list(losses) == list(range(1, 201))
    first, last = (sum(losses[n] for n in steps) / 20 for steps in (range(1, 21), range(181, 201)))
    assert last < 0.9 * first, "it learns"
    assert_whole(ended.last_checkpoint)
    (result,) = [e.result for e in events if e.HasField("result")]
    assert (Path(result.output_path) / "adapter_model.safetensors").is_file()
    (notice,) = [e.notice for e in events if e.notice.reason == "FP16_UNAVAILABLE_ON_CPU"]
    assert notice.field == "optimization.fp16"


def test_a_stop_in_mid_run_leaves_a_whole_checkpoint(
    daemon: Daemon, studio: Path, tmp_path: Path
) -> None:
    task = daemon.create(parameters(studio, tmp_path / "out", max_steps=10_000), start=True)
    with daemon.watch(task.name) as watch:
        watch.until_step(3)
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
        watch.until_end()
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_STOPPED
    assert ended.last_checkpoint.endswith(f"checkpoint-{ended.progress.step}")
    assert_whole(ended.last_checkpoint)


def test_a_stop_while_the_model_loads_is_prompt(
    daemon: Daemon, studio: Path, tmp_path: Path
) -> None:
    task = daemon.create(parameters(studio, tmp_path / "out", max_steps=10_000), start=True)
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_STARTING)
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
        watch.until_end()
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_STOPPED
    assert ended.end_reason == task_pb2.END_REASON_STOPPED_BY_USER
    assert ended.progress.step == 0


def test_a_killed_runner_is_failed_with_its_signal_and_its_checkpoint_named(
    daemon: Daemon, studio: Path, tmp_path: Path
) -> None:
    task = daemon.create(
        parameters(studio, tmp_path / "out", max_steps=10_000, save_steps=2), start=True
    )
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.HasField("checkpoint_saved"))
        killed = time.monotonic()
        os.kill(run_of(daemon, task.name).pid, signal.SIGKILL)
        watch.until_end()
        assert time.monotonic() - killed < 2
    ended = daemon.get(task.name)
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_KILLED
    assert "SIGKILL" in ended.end_message
    assert_whole(ended.last_checkpoint)


def test_pretraining_ends_with_a_model(daemon: Daemon, studio: Path, tmp_path: Path) -> None:
    settings = parameters(studio, tmp_path / "out", num_train_epochs=1)
    settings.data.train_file = str(studio / "documents.jsonl")
    request = task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(
            training_type=task_pb2.TRAINING_TYPE_PRETRAIN, parameters=settings, device="cpu"
        ),
        start=True,
    )
    task = daemon.tasks.CreateTask(request).task
    assert task.display_name.startswith("pretrain_")
    ended = daemon.wait(task.name, "COMPLETED", "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_FINISHED, ended.end_message
    (result,) = [e.result for e in daemon.events(task.name) if e.HasField("result")]
    assert (Path(result.output_path) / "model.safetensors").is_file()
    assert ended.progress.step == ended.progress.total_steps > 0
    assert ended.progress.num_tokens > 0


def test_a_run_in_4_and_8_bits_needs_no_gpu(daemon: Daemon, studio: Path, tmp_path: Path) -> None:
    given = parameters(studio, tmp_path / "out", max_steps=20, learning_rate=1e-2)
    given.optimization.use_qlora = given.optimization.use_8bit_optimizer = True
    task = daemon.create(given, start=True)
    ended = daemon.wait(task.name, "COMPLETED", "FAILED")
    assert ended.state == task_pb2.TASK_STATE_COMPLETED, ended.end_message
    events = daemon.events(task.name)
    losses = [e.metrics.values["loss"] for e in events if e.HasField("metrics")]
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    assert_whole(ended.last_checkpoint)
