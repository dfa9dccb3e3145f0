"""What it means to resume a checkpoint: what goes on, what may change, what makes another run.

One table says it of every parameter; a test counts its rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import effective_optimizer, in_effect
from finetuned_daemon.planning.schedule import plan_schedule
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import DataFile, Manifest
from finetuned_daemon.texts import Text


class Effect(StrEnum):
    """What a change means; names as in `finetuned.v1.ResumeEffect`, gravest first."""

    IMPOSSIBLE = "IMPOSSIBLE"
    """It can't be resumed like this: a check refuses it."""
    DIFFERENT_RUN = "DIFFERENT_RUN"
    """Allowed; the losses are no longer those of a run that was never interrupted."""
    MAY_CHANGE = "MAY_CHANGE"
    """What is learned stays the same."""
    CONTINUES = "CONTINUES"
    """It goes on as it was."""


@dataclass(frozen=True)
class Row:
    """What a change of a parameter means."""

    effect: Effect
    message: Text


@dataclass(frozen=True)
class ResumeItem:
    """One thing about a resume; fields as in `finetuned.v1.ResumeItem`."""

    field: str
    effect: Effect
    message: Text
    then: Any = None
    now: Any = None


@dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """What a resume will be; fields as in `finetuned.v1.ResumePlan`."""

    checkpoint: str
    step: int
    total_steps: int
    epoch: float
    num_tokens: int
    knows_parameters: bool
    items: tuple[ResumeItem, ...]


def _impossible(en: str, zh: str) -> Row:
    return Row(Effect.IMPOSSIBLE, Text(en, zh))


def _different(en: str, zh: str) -> Row:
    return Row(Effect.DIFFERENT_RUN, Text(en, zh))


def _free(en: str, zh: str) -> Row:
    return Row(Effect.MAY_CHANGE, Text(en, zh))


_SHAPE = _impossible(
    "the checkpoint's LoRA weights have another shape", "检查点的 LoRA 权重形状不同"
)
_DATA = _different(
    "other samples come, and their order and the place in it are others",
    "样本不同，顺序及在其中的位置也不同",
)
_BATCH = _different(
    "other samples make a step; the place in the data is counted in new steps, so that some "
    "samples of this epoch come twice or not at all",
    "每步由不同的样本组成；数据位置按新的步数计算，因此本轮中部分样本会重复或被跳过",
)
_RATE = _different("steps go another way from here", "从此处起更新的步伐不同")
_SCHEDULE = _different(
    "the learning rate follows another curve from here", "从此处起学习率沿另一条曲线变化"
)
_LENGTH = _different(
    "the end moves, and with it the curve of the learning rate from here on",
    "训练终点改变，学习率曲线自此处起也随之改变",
)
_PRECISION = _different("numbers are rounded in another way", "数值的舍入方式不同")
_ROUNDING = _free(
    "the same is learned but for the last digits of the numbers",
    "学到的内容相同，仅数值末位可能不同",
)
_SAVING = _free("decides only what is saved", "只决定保存什么")
_EVALUATION = _free(
    "the same is learned; each evaluation draws a random number, so that with dropout losses are "
    "not the same to the bit",
    "学到的内容相同；但每次评估会消耗一个随机数，因此使用 dropout 时损失不会逐位相同",
)
_END = _free("decides only when the run ends", "只决定训练何时结束")
_SPEED = _free("decides only about speed and memory", "只影响速度与内存")
_TOLD = _free("decides only what is told", "只决定输出哪些信息")
_AFTER = _free("counts at the end alone", "只在结束时起作用")

TABLE: dict[str, Row] = {
    "data.train_file": _DATA,
    "data.eval_file": _free(
        "the same is learned; evaluation losses can't be compared with those before",
        "学到的内容相同；评估损失无法与之前的比较",
    ),
    "data.output_dir": _free("the run has a folder of its own anyway", "每次运行本就有自己的目录"),
    "data.model_path": _different(
        "the weights there must be the same, or the result is of no use",
        "该处的权重必须相同，否则结果没有意义",
    ),
    "data.tokenizer_path": _different("samples have other tokens", "样本的 token 不同"),
    # What is resumed is no change of what was trained.
    "data.resume_from_checkpoint": Row(
        Effect.CONTINUES, Text("this is what is resumed", "恢复的正是它")
    ),
    "data.attach_lora": _free("the checkpoint has the weights already", "检查点中已包含这些权重"),
    "data.max_samples": _DATA,
    "data.eval_ratio": _DATA,
    "data.reshuffle": _DATA,
    "data.dataloader_num_workers": _SPEED,
    "data.dataloader_pin_memory": _SPEED,
    "training.batch_size": _BATCH,
    "training.gradient_accumulation_steps": _BATCH,
    "training.max_seq_length": _different("samples are cut elsewhere", "样本截断的位置不同"),
    "training.learning_rate": _RATE,
    "training.optimizer": _impossible(
        "the checkpoint has the state of another optimizer", "检查点保存的是另一种优化器的状态"
    ),
    "training.lr_scheduler_type": _SCHEDULE,
    "training.num_train_epochs": _LENGTH,
    "training.weight_decay": _RATE,
    "training.warmup_ratio": _SCHEDULE,
    "training.warmup_steps": _SCHEDULE,
    "training.max_grad_norm": _RATE,
    "training.max_steps": _LENGTH,
    "training.lr_num_cycles": _SCHEDULE,
    "training.save_strategy": _SAVING,
    "training.save_steps": _SAVING,
    "training.eval_strategy": _EVALUATION,
    "training.eval_steps": _EVALUATION,
    "training.save_total_limit": _SAVING,
    "training.save_interval_minutes": _SAVING,
    "training.early_stopping_patience": _END,
    "training.early_stopping_threshold": _END,
    "lora.use_lora": _impossible(
        "the checkpoint has either LoRA weights or all weights",
        "检查点保存的要么是 LoRA 权重，要么是全部权重",
    ),
    "lora.lora_r": _SHAPE,
    "lora.lora_alpha": _impossible(
        "the checkpoint's LoRA weights count with another factor", "检查点的 LoRA 权重缩放系数不同"
    ),
    "lora.lora_dropout": _different("other values are left out", "被丢弃的数值不同"),
    "lora.lora_target_modules": _SHAPE,
    "lora.merge_lora": _AFTER,
    "lora.peft_config_path": _different(
        "its rank, alpha and modules must be the checkpoint's", "其秩、alpha 与模块必须与检查点相同"
    ),
    "optimization.use_qlora": _PRECISION,
    "optimization.use_8bit_optimizer": _impossible(
        "the checkpoint has the state of another optimizer", "检查点保存的是另一种优化器的状态"
    ),
    "optimization.fp16": _PRECISION,
    "optimization.bf16": _PRECISION,
    "optimization.tf32": _PRECISION,
    "optimization.gradient_checkpointing": _SPEED,
    "logging.log_level": _TOLD,
    "logging.logging_steps": _TOLD,
    "general.seed": _different("order, dropout and split are others", "顺序、dropout 与划分都不同"),
    "extensions.packing": _DATA,
    "extensions.neftune_noise_alpha": _different("the noise is another", "噪声不同"),
    "extensions.use_rslora": _impossible(
        "the checkpoint's LoRA weights count with another factor", "检查点的 LoRA 权重缩放系数不同"
    ),
    "extensions.use_dora": _SHAPE,
    "extensions.lora_init": _impossible(
        "the frozen weights beside the checkpoint's are others", "与检查点配套的冻结权重不同"
    ),
    "extensions.loraplus_lr_ratio": _RATE,
    "extensions.attn_implementation": _ROUNDING,
    "extensions.use_liger_kernel": _ROUNDING,
    "extensions.torch_compile": _ROUNDING,
    "extensions.report_to": _TOLD,
    "extensions.retry_out_of_memory": _free(
        "decides only what follows a failure", "只决定失败之后如何处理"
    ),
}

NOTHING_TRAINED = Text(
    "nothing is left to train, and its weights are the result; raise training.num_train_epochs or "
    "training.max_steps",
    "没有剩余的训练，其权重就是结果；请增大 training.num_train_epochs 或 training.max_steps",
)
"""Of a checkpoint at the end of the run, or beyond."""

_CONSTANT = frozenset({"constant", "constant_with_warmup"})
_OTHER_POSITION = frozenset(path for path, row in TABLE.items() if row in (_DATA, _BATCH)) | {
    "general.seed"
}
"""What moves the place in the data."""
_SAMPLES = frozenset(path for path, row in TABLE.items() if row is _DATA) | {
    "training.max_seq_length",
    "data.tokenizer_path",
}
"""What explains another number of samples."""
_ORDER = list(Effect)


def plan_resume(
    folder: Path,
    manifest: Manifest,
    parameters: Parameters,
    training_type: TrainingType,
    *,
    total_steps: int,
    samples: int,
) -> ResumePlan:
    """What it means to go on from a checkpoint.

    Args:
        folder: Of the checkpoint.
        manifest: Of the checkpoint.
        parameters: Of the run that goes on.
        training_type: Of the run.
        total_steps: Optimizer steps in all, as the parameters are now.
        samples: Trained on in an epoch, as they are now.
    """
    then = _made_with(manifest)
    found = [] if then is None else list(_changes(manifest, then, parameters, training_type))
    if manifest.num_samples not in (0, samples) and all(i.field not in _SAMPLES for i in found):
        text = Text(
            f"an epoch has {samples} samples and had {manifest.num_samples}",
            f"每轮有 {samples} 个样本，而当时为 {manifest.num_samples} 个",
        )
        found.append(ResumeItem("data.train_file", Effect.DIFFERENT_RUN, text))
    items = [*found, *_what_goes_on(manifest, parameters, total_steps, found)]
    return ResumePlan(
        checkpoint=str(folder),
        step=manifest.step,
        total_steps=total_steps,
        epoch=manifest.epoch,
        num_tokens=manifest.num_tokens,
        knows_parameters=then is not None,
        items=tuple(sorted(items, key=lambda item: _ORDER.index(item.effect))),
    )


def changed_files(
    manifest: Manifest, now: Parameters, training_type: TrainingType
) -> list[ResumeItem]:
    """The files of data and model that were written to since, under the same names."""
    then = _made_with(manifest)
    found = [] if then is None else _changes(manifest, then, now, training_type)
    # Another value of a parameter is the user's will, and comes with both values.
    return [item for item in found if item.then is None and item.now is None]


def known_end(manifest: Manifest, now: Parameters, training_type: TrainingType) -> int:
    """Step at which a run that goes on ends, without reading the data; 0: not known."""
    if now.training.max_steps > 0:
        return now.training.max_steps
    then = _made_with(manifest)
    if then is None or not manifest.num_samples:
        return 0
    if any(item.field in _SAMPLES for item in _changes(manifest, then, now, training_type)):
        return 0
    return plan_schedule(now.training, manifest.num_samples, evaluates=False).total_steps


def _made_with(manifest: Manifest) -> Parameters | None:
    """The parameters of a checkpoint's run; None where they are not known."""
    if not manifest.parameters:
        return None
    try:
        return Parameters.model_validate(manifest.parameters)
    except ValidationError:  # of a version that had others
        return None


def _changes(
    manifest: Manifest, then: Parameters, now: Parameters, training_type: TrainingType
) -> Iterator[ResumeItem]:
    """Every parameter with another value that counts, and every data file that was changed."""
    kind = training_type.lower()
    counted = in_effect(then, kind).keys() | in_effect(now, kind).keys()
    for path, row in TABLE.items():
        there, here = _value(then, path), _value(now, path)
        if row.effect is Effect.CONTINUES or path not in counted:
            continue
        if there != here:
            effect = _effect(path, row.effect, then, now)
            yield ResumeItem(path, effect, row.message, there, here)
        elif there:
            for key, file in manifest.data_files.items():
                if key.partition("/")[0] == path:
                    yield from _file_changed(path, file)


def _effect(path: str, effect: Effect, then: Parameters, now: Parameters) -> Effect:
    """The table's effect, but where it depends on other parameters."""
    if path in ("training.optimizer", "optimization.use_8bit_optimizer"):
        is_same = effective_optimizer(then) == effective_optimizer(now)
        return Effect.MAY_CHANGE if is_same else effect
    if TABLE[path] is _LENGTH:
        types = {then.training.lr_scheduler_type, now.training.lr_scheduler_type}
        # A warm-up by its share is longer in a longer run.
        is_fixed = now.training.warmup_steps > 0 or now.training.lr_scheduler_type == "constant"
        if types <= _CONSTANT and (is_fixed or not now.training.warmup_ratio):
            return Effect.MAY_CHANGE
    if path == "extensions.loraplus_lr_ratio":
        is_split = bool(then.extensions.loraplus_lr_ratio) == bool(now.extensions.loraplus_lr_ratio)
        return effect if is_split else Effect.IMPOSSIBLE
    return effect


def _file_changed(path: str, then: DataFile) -> Iterator[ResumeItem]:
    now = DataFile.of(then.path)
    if now == then or now is None:
        return
    is_size = now.size != then.size
    text = Text(
        f"{then.path} was written to since: it has {now.size} bytes and had {then.size}"
        if is_size
        else f"{then.path} was written to since; its size is the same",
        f"{then.path} 之后被写入过：现为 {now.size} 字节，当时为 {then.size} 字节"
        if is_size
        else f"{then.path} 之后被写入过；大小相同",
    )
    yield ResumeItem(path, TABLE[path].effect, text)


def _what_goes_on(
    manifest: Manifest, now: Parameters, total_steps: int, changed: list[ResumeItem]
) -> Iterator[ResumeItem]:
    """What a run takes over from the checkpoint."""
    paths = {item.field for item in changed}
    step, epoch = manifest.step, manifest.epoch
    optimizer = manifest.optimizer or effective_optimizer(now)
    then, planned = "", ""
    if manifest.total_steps not in (0, total_steps):
        then = f"; it was made for {manifest.total_steps}"
        planned = f"；当时计划 {manifest.total_steps} 步"
    over = Text("", "")
    if step >= total_steps:
        over = Text(f": {NOTHING_TRAINED.en}", f"：{NOTHING_TRAINED.zh}")
    tokens = f"{manifest.num_tokens:,}"
    passes = f"{epoch:.2f} passes over the data; " if epoch else ""
    passed = f"已遍历数据 {epoch:.2f} 遍；" if epoch else ""
    goes_on = {
        "weights": Text(f"as they were at step {step}", f"与第 {step} 步时相同"),
        "optimizer": Text(f"the state of {optimizer}", f"{optimizer} 的状态"),
        "schedule": Text(
            f"at step {step} of {total_steps}{then}{over.en}",
            f"位于第 {step} 步，共 {total_steps} 步{planned}{over.zh}",
        ),
        "random_state": Text("all random generators", "所有随机数生成器"),
        "tokens": Text(f"counted on from {tokens}", f"从 {tokens} 继续计数"),
    }
    if not paths & _OTHER_POSITION:
        goes_on["data_position"] = Text(
            f"{passes}what this epoch has had does not come again",
            f"{passed}本轮已训练过的样本不会重复",
        )
    for name, text in goes_on.items():
        yield ResumeItem(name, Effect.CONTINUES, text)


def _value(parameters: Parameters, path: str) -> Any:
    section, name = path.split(".")
    value = getattr(getattr(parameters, section), name)
    return sorted(value) if isinstance(value, list) else value
