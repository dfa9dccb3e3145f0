"""Real tools of `extensions.report_to` get a run's curves, also over a pause.

Each is read back by the tool's own reader. Those that are not installed are skipped.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_service_pb2
from pauses import pause, resume
from tiny import chats, make_model, write_jsonl

STEPS = 60
KEY = "a1b2c3d4e5f6a7b8c9d0e1f2a3b4c5d6e7f8a9b0"

# Each prints [[name of the run, {parameter: value}, {tag: {step: value}}], ...].
READERS = {
    "tensorboard": """
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(folder)
events.Reload()
text = events.Tensors("parameters/text_summary")[-1].tensor_proto.string_val[0].decode()
rows = [line.strip("| ").split(" | ") for line in text.splitlines()[2:]]
runs = [["", dict(rows), {
    tag: {s.step: s.value for s in events.Scalars(tag)} for tag in events.Tags()["scalars"]
}]]
""",
    "mlflow": """
import mlflow
has_database = os.path.exists(f"{folder}/mlflow.db")
uri = f"sqlite:///{folder}/mlflow.db" if has_database else "file://" + folder
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
client = mlflow.MlflowClient(uri)
experiment = client.get_experiment_by_name("finetuned")
runs = [[run.info.run_name, run.data.params, {
    tag: {m.step: m.value for m in client.get_metric_history(run.info.run_id, tag)}
    for tag in run.data.metrics
}] for run in client.search_runs([experiment.experiment_id])]
""",
    "trackio": """
os.environ["TRACKIO_DIR"] = folder
from trackio.sqlite_storage import SQLiteStorage as storage
runs = []
for name in storage.get_runs("finetuned"):
    curves = {}
    for row in storage.get_logs("finetuned", name):
        for tag, value in row.items():
            if tag not in ("step", "timestamp"):
                curves.setdefault(tag, {})[row["step"]] = value
    runs.append([name, storage.get_run_config("finetuned", name), curves])
""",
    "wandb": """
import glob
from wandb.proto import wandb_internal_pb2

def records(data):  # wandb has no reader any more: LevelDB's log, with 7 bytes before it
    position, whole = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, part = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if part in (1, 4):
            yield whole
            whole = b""

runs = {}
for path in sorted(glob.glob(folder + "/wandb/offline-run-*/run-*.wandb")):
    for data in records(open(path, "rb").read()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            run = runs.setdefault(record.run.run_id, [record.run.display_name, {}, {}])
            run[1].update(config)
        if record.WhichOneof("record_type") == "history":
            row = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            for tag, value in row.items():
                if not tag.startswith("_") and tag != "step":
                    run[2].setdefault(tag, {})[row["step"]] = value
runs = list(runs.values())
""",
}


def read(tool: str, folder: Path) -> list[Any]:
    """What the tool's own reader finds."""
    script = f"import json, os, sys\nfolder = sys.argv[1]\n{READERS[tool]}\nprint(json.dumps(runs))"
    result = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    root = tmp_path_factory.mktemp("studio")
    make_model(root / "model", layers=1)
    write_jsonl(root / "chats.jsonl", chats(32))
    return root


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a user's keys in its environment, and nothing that asks for an upload."""
    daemon = Daemon(tmp_path_factory.mktemp("trackers"), runner_module="finetuned_runner")
    daemon.environment = {"WANDB_API_KEY": KEY, "SWANLAB_API_KEY": KEY}
    yield daemon.start()
    daemon.close()


def parameters(studio: Path, output: Path, tool: str) -> parameters_pb2.Parameters:
    return parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(studio / "chats.jsonl"),
            model_path=str(studio / "model"),
            output_dir=str(output),
            dataloader_num_workers=0,
            eval_ratio=0.2,
        ),
        training=parameters_pb2.TrainingParameters(
            batch_size=2,
            gradient_accumulation_steps=1,
            max_seq_length=128,
            max_steps=STEPS,
            eval_strategy="steps",
            eval_steps=20,
        ),
        lora=parameters_pb2.LoraParameters(lora_r=4),
        optimization=parameters_pb2.OptimizationParameters(gradient_checkpointing=False),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
        extensions=parameters_pb2.ExtensionParameters(report_to=tool),
    )


@pytest.mark.parametrize("tool", READERS)
def test_the_curves_arrive_and_go_on_after_a_pause(
    daemon: Daemon, studio: Path, tmp_path: Path, tool: str
) -> None:
    """One run of the tool, with its name, its parameters, and of each step the log's value."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    task = daemon.create(parameters(studio, tmp_path / "out", tool), start=True)
    with daemon.watch(task.name) as watch:
        watch.until_step(15)
    pause(daemon, task.name)
    daemon.wait(task.name, "PAUSED")
    resume(daemon, task.name)
    ended = daemon.wait(task.name, "COMPLETED", "FAILED")
    events = daemon.events(task.name)
    assert [e.notice.message for e in events if e.notice.field == "extensions.report_to"] == (
        [] if tool != "wandb" else [_second_folder(events)]
    )
    assert ended.progress.step == STEPS
    losses = {e.metrics.step: e.metrics.values["loss"] for e in events if e.HasField("metrics")}
    scored = {
        e.evaluation.step: e.evaluation.values["eval_loss"]
        for e in events
        if e.HasField("evaluation")
    }
    folder = tmp_path / "out" / "run-1" / tool
    copy = shutil.copytree(folder, tmp_path / "copy")  # some readers write
    ((name, config, curves),) = read(tool, copy)
    if tool != "tensorboard":  # which calls it by its folder
        assert name == f"{task.display_name} run 1"
    assert str(config["training.max_steps"]) == str(STEPS)
    assert config["data.model_path"] == "model"
    assert str(studio) not in json.dumps(config)
    assert _by_step(curves["train/loss"]) == pytest.approx(losses)
    assert _by_step(curves["eval/loss"]) == pytest.approx(scored)
    for path in (*folder.rglob("*"), *daemon.paths.state_dir.rglob("*")):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name, delete_outputs=True))
    assert not [path for path in folder.rglob("*") if not path.is_dir()]


def _by_step(curve: dict[str, float]) -> dict[int, float]:
    return {int(step): value for step, value in curve.items()}


def _second_folder(events: list[Any]) -> str:
    (said,) = [e.notice.message for e in events if e.notice.reason == "TRACKER_SPLIT"]
    assert "wandb sync" in said
    return str(said)


def test_a_server_that_is_down_costs_a_run_a_notice(
    daemon: Daemon, studio: Path, tmp_path: Path
) -> None:
    """Neither the run nor its end waits for it; the password in its address is told to nobody."""
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    other = Daemon(tmp_path, runner_module="finetuned_runner")
    other.environment = {
        "MLFLOW_TRACKING_URI": "http://me:pass-word-of-me@127.0.0.1:9/",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    try:
        other.start()
        task = other.create(parameters(studio, tmp_path / "out", "mlflow"), start=True)
        other.wait(task.name, "COMPLETED")
        events = other.events(task.name)
        (said,) = [e.notice for e in events if e.notice.field == "extensions.report_to"]
        assert said.reason == "TRACKER_FAILED"
        assert "goes on without mlflow" in said.message
        for path in other.paths.state_dir.rglob("*"):
            if path.is_file():
                assert b"pass-word-of-me" not in path.read_bytes(), path
    finally:
        other.close()


def test_swanlab_gets_the_curves_offline(daemon: Daemon, studio: Path, tmp_path: Path) -> None:
    """It has no reader of its own for these files: names and parameters are there, and no key."""
    if importlib.util.find_spec("swanlab") is None:
        pytest.skip("swanlab is not installed")
    task = daemon.create(parameters(studio, tmp_path / "out", "swanlab"), start=True)
    daemon.wait(task.name, "COMPLETED")
    events = daemon.events(task.name)
    assert [e.notice for e in events if e.notice.field == "extensions.report_to"] == []
    (folder,) = (tmp_path / "out" / "run-1" / "swanlab").glob("run-*")
    (file,) = folder.glob("*.swanlab")
    content = file.read_bytes()
    assert b"train/loss" in content
    assert b"eval/loss" in content
    assert "training.max_steps" in (folder / "files" / "config.yaml").read_text()
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
