"""A front-end that knows only the schema draws, fills, validates, creates and starts both types."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from conftest import REPOSITORY, Scene
from daemon_process import TESTS, Daemon
from finetuned.v1 import parameters_pb2, task_pb2
from schema_front_end import Form, Language

SFT, PRETRAIN = task_pb2.TRAINING_TYPE_SFT, task_pb2.TRAINING_TYPE_PRETRAIN


def said(picture: str) -> dict[str, list[str]]:
    """The messages in a drawn form, by the label of the field that they stand below."""
    messages: dict[str, list[str]] = {}
    label = ""
    for line in picture.splitlines():
        if line.startswith("      "):
            messages.setdefault(label, []).append(line.strip())
        else:
            label = line[4:].partition(": ")[0]
    return messages


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


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", [SFT, PRETRAIN])
def test_the_form_is_drawn_as_it_was(
    daemon: Daemon, language: Language, kind: task_pb2.TrainingType.ValueType
) -> None:
    """The pictures are there to be looked at; a change of one is a change of every front-end."""
    name = "sft" if kind == SFT else "pretrain"
    picture: Path = REPOSITORY / f"tests/data/form-{name}-{language}.txt"
    assert Form(daemon.channel, kind, language).draw() == picture.read_text()


def test_a_user_fills_the_form_of_a_fine_tuning_and_starts_it(daemon: Daemon, scene: Scene) -> None:
    form = Form(daemon.channel, SFT, "en")
    assert not form.validate("cpu")
    assert form.draw().count("error: is required to start") == 3
    form.enter("Training data file path", str(scene.data))
    form.enter("Training model path", str(scene.model))
    form.enter("Training output directory", str(scene.output))
    form.enter("Tokenizer path", "a name")
    form.enter("Batch size", 1000)
    form.enter("Max sequence length", 1001)
    form.enter("Save strategy", "epoch")
    form.enter("Evaluation strategy", "steps")
    form.enter("LoRA target modules", ["q_proj", "query"])
    form.enter("Use BF16 mixed precision (NVIDIA GPU)", True)
    assert not form.validate("cpu")
    assert said(form.draw()) == {
        "Tokenizer path": ["error: must be an absolute path, not 'a name'"],
        "Batch size": ["error: must be from 1 to 128, not 1000"],
        "Max sequence length": ["error: must be a multiple of 8, not 1001"],
        "Evaluation strategy": [
            "error: needs evaluation data: give data.eval_file or data.eval_ratio, or set it to no"
        ],
        "LoRA target modules": [
            "error: the model has no module query; it has embed_tokens, lm_head, q_proj, k_proj, "
            "v_proj, o_proj, gate_proj, up_proj, down_proj"
        ],
        "Use BF16 mixed precision (NVIDIA GPU)": [
            "error: excludes fp16; set optimization.fp16 to false"
        ],
    }
    assert "Save steps: ~[ 100 ]" in form.draw(), "without effect while each epoch is saved"
    form.enter("Tokenizer path", "")
    for violation in [v for v in form.violations if v.HasField("suggested_value")]:
        form.take_suggestion(violation.field)
    assert form.validate("cpu")
    assert form.violations == []
    task = form.start("cpu")
    assert form.state(task) == "Completed (green)"
    assert task.parameters.training.batch_size == 128
    assert task.parameters.training.max_seq_length == 1000
    assert task.parameters.training.save_strategy == "epoch"
    assert task.parameters.training.eval_strategy == "no"
    assert task.parameters.lora.lora_target_modules.values[0] == "q_proj"
    assert task.parameters.optimization.fp16 is False


def test_a_user_fills_the_form_of_a_pretraining_in_chinese_and_starts_it(
    daemon: Daemon, scene: Scene
) -> None:
    text = scene.root / "text.txt"
    text.write_text("从前有座山。")
    form = Form(daemon.channel, PRETRAIN, "zh")
    assert "LoRA 配置" not in form.draw()
    assert "文本" in form.ask("最大序列长度")
    form.enter("训练数据文件路径", str(scene.root / "没有"))
    form.enter("训练模型目录", str(scene.model))
    form.enter("训练输出目录", str(scene.output))
    form.enter("训练轮数", 300)
    assert not form.validate("cpu")
    assert said(form.draw()) == {
        "训练数据文件路径": [f"error: 文件 {scene.root / '没有'} 不存在"],
        "训练轮数": ["error: 必须在 1 到 100 之间，而不是 300"],
        "使用FP16混合精度": ["notice: cpu 不支持 fp16 训练：将以 float32 计算"],
    }
    form.enter("训练数据文件路径", str(text))
    form.enter("训练轮数", 3)
    with pytest.raises(AssertionError, match="can't be changed"):
        form.enter("使用 QLoRA", True)
    assert form.validate("cpu")
    task = form.start("cpu")
    assert form.state(task) == "已完成 (green)"
    assert task.training_type == PRETRAIN
    assert task.parameters.training.num_train_epochs == 3
