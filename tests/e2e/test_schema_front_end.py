"""A front-end that knows only the schema draws, fills, validates, creates and starts both types."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from conftest import REPOSITORY, Scene
from daemon_process import TESTS, Daemon
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2
from schema_front_end import Form, Language

SFT, PRETRAIN = task_pb2.TRAINING_TYPE_SFT, task_pb2.TRAINING_TYPE_PRETRAIN


def start(daemon: Daemon, form: Form) -> task_pb2.Task:
    """Creates and starts the task of a form, and waits for its end."""
    task = task_pb2.Task(training_type=form.training_type, parameters=form.message(), device="cpu")
    request = task_service_pb2.CreateTaskRequest(task=task)
    task = daemon.tasks.CreateTask(request).task
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    return daemon.wait(task.name, "COMPLETED", "FAILED", "STOPPED")


def test_the_front_end_names_no_parameter() -> None:
    """It could not have been written with knowledge that the schema does not give."""
    names = {
        field.name
        for section in parameters_pb2.Parameters.DESCRIPTOR.fields
        for field in section.message_type.fields  # type: ignore[union-attr]
    }
    tree = ast.parse((TESTS / "schema_front_end.py").read_text())
    texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    assert not names & (texts | used)


@pytest.mark.parametrize(("language", "kind"), [("en", SFT), ("zh", SFT), ("en", PRETRAIN)])
def test_the_form_is_drawn_as_it_was(
    daemon: Daemon, language: Language, kind: task_pb2.TrainingType.ValueType
) -> None:
    """The pictures are there to be looked at; a change of one is a change of every front-end."""
    name = "sft" if kind == SFT else "pretrain"
    picture: Path = REPOSITORY / f"tests/data/form-{name}-{language}.txt"
    assert Form(daemon.parameters, kind, language).draw() == picture.read_text()


def test_a_user_fills_the_form_of_a_fine_tuning_and_starts_it(daemon: Daemon, scene: Scene) -> None:
    form = Form(daemon.parameters, SFT, "en")
    assert not form.validate("cpu")
    assert form.draw().count("error: is required to start") == 3
    form.enter("Training data file path", str(scene.data))
    form.enter("Training model path", str(scene.model))
    form.enter("Training output directory", str(scene.output))
    form.enter("Batch size", 1000)
    form.enter("Save strategy", "epoch")
    form.enter("Evaluation strategy", "steps")
    assert not form.validate("cpu")
    picture = form.draw()
    assert "error: must be from 1 to 128, not 1000" in picture
    assert "error: needs evaluation data" in picture
    assert "notice: cpu doesn't train in fp16" in picture
    assert "Save steps: ~[ 100 ]" in picture, "without effect while each epoch is saved"
    for violation in [v for v in form.violations if v.HasField("suggested_value")]:
        form.take_suggestion(violation.field)
    assert form.validate("cpu")
    assert form.violations == []
    task = start(daemon, form)
    assert task.state == task_pb2.TASK_STATE_COMPLETED
    assert task.parameters.training.batch_size == 128
    assert task.parameters.training.save_strategy == "epoch"
    assert task.parameters.optimization.fp16 is False


def test_a_user_fills_the_form_of_a_pretraining_in_chinese_and_starts_it(
    daemon: Daemon, scene: Scene
) -> None:
    text = scene.root / "text.txt"
    text.write_text("从前有座山。")
    form = Form(daemon.parameters, PRETRAIN, "zh")
    assert "LoRA" not in form.draw().replace("附加LoRA", "").replace("使用 QLoRA", "")
    form.enter("训练数据文件路径", str(scene.root / "没有"))
    form.enter("训练模型目录", str(scene.model))
    form.enter("训练输出目录", str(scene.output))
    form.enter("训练轮数", 3)
    assert not form.validate("cpu")
    assert "error: 文件" in form.draw()
    form.enter("训练数据文件路径", str(text))
    with pytest.raises(AssertionError, match="can't be changed"):
        form.enter("使用 QLoRA", True)
    assert form.validate("cpu")
    task = start(daemon, form)
    assert task.state == task_pb2.TASK_STATE_COMPLETED
    assert task.training_type == PRETRAIN
    assert task.parameters.training.num_train_epochs == 3
