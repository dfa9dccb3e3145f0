"""Rules for what parameters name in the world: data, output folder; model and checkpoint beside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

from finetuned_daemon.dataset.scan import Scan, scan
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import ModelFiles
from finetuned_daemon.planning.schedule import plan_schedule, split_sizes
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.checkpoint import (
    check_adapter,
    check_checkpoint,
    check_peft_config,
)
from finetuned_daemon.validation.model import check_model, check_tokenizer
from finetuned_daemon.validation.paths import (
    check_file,
    check_outside,
    check_path,
    unusable,
)
from finetuned_daemon.validation.rules import (
    check_evaluations,
    check_warmup,
    split_leaves_none,
)
from finetuned_daemon.validation.surroundings import Surroundings

_BAD_LINES_NAMED = 5
_DISK_RESERVE_BYTES = 64 << 20
"""Below this a disk counts as full, whatever is planned."""


def check_world(
    parameters: Parameters, training_type: TrainingType, surroundings: Surroundings
) -> Iterator[Violation]:
    """Judges every file and folder that is given."""
    inside = list(_check_outside(parameters, surroundings))
    yield from inside
    parameters = _without(parameters, {violation.field for violation in inside})
    data = parameters.data
    train: Scan | None = None
    if data.train_file:
        train = yield from _check_data(
            "data.train_file", data.train_file, training_type, data.max_samples
        )
    if data.eval_file:
        yield from _check_data("data.eval_file", data.eval_file, training_type)
    model: ModelFiles | None = None
    if data.model_path:
        model = yield from check_model(parameters, training_type, surroundings)
    if data.tokenizer_path:
        yield from check_tokenizer("data.tokenizer_path", data.tokenizer_path, training_type)
    elif data.model_path and model is not None:
        yield from check_tokenizer("data.model_path", str(model.path), training_type)
    if data.output_dir:
        yield from _check_output(parameters, surroundings)
    if data.resume_from_checkpoint:
        yield from check_checkpoint(parameters, training_type, model)
    elif data.attach_lora and data.model_path and _trains_lora(parameters, training_type):
        yield from check_adapter("data.attach_lora", Path(data.model_path), parameters, model)
    # Attached weights bring a configuration of their own: nobody reads the file then.
    reads_peft_config = _trains_lora(parameters, training_type) and not data.attach_lora
    if parameters.lora.peft_config_path and reads_peft_config:
        yield from check_peft_config(parameters.lora.peft_config_path, model)
    # Chats are samples. How many blocks documents make takes a tokenizer: an estimate knows.
    if train is not None and training_type is TrainingType.SFT:
        yield from _check_counts(parameters, train.samples)


_PATHS = (
    "data.train_file",
    "data.eval_file",
    "data.model_path",
    "data.tokenizer_path",
    "data.output_dir",
    "data.resume_from_checkpoint",
    "lora.peft_config_path",
)


def _check_outside(parameters: Parameters, surroundings: Surroundings) -> Iterator[Violation]:
    """No path leads to the daemon's database, token or run folders, to read or to write."""
    for field in _PATHS:
        section, name = field.split(".")
        text: str | None = getattr(getattr(parameters, section), name)
        if text:
            yield from check_outside(field, text, surroundings.own_folders)


def _without(parameters: Parameters, fields: set[str]) -> Parameters:
    """The parameters without these fields, of which all is said."""
    for field in fields:
        section, name = field.split(".")
        part = getattr(parameters, section).model_copy(update={name: None})
        parameters = parameters.model_copy(update={section: part})
    return parameters


def _trains_lora(parameters: Parameters, training_type: TrainingType) -> bool:
    return training_type is TrainingType.SFT and parameters.lora.use_lora


# --- data


def _check_data(
    field: str, text: str, training_type: TrainingType, max_samples: int = 0
) -> Generator[Violation, None, Scan | None]:
    found = check_file(field, text)
    if found:
        yield from found
        return None
    path = Path(text)
    try:
        seen = scan(path, training_type, max_samples)
    except OSError as error:
        why = error.strerror or str(error)
        sentence = Text(f"{text} can't be read: {why}", f"无法读取 {text}：{why}")
        yield Violation(field, sentence, "NOT_READABLE")
        return None
    if seen.bad_count:
        shown = seen.bad[:_BAD_LINES_NAMED]
        rest = seen.bad_count - len(shown)
        yield Violation(
            field,
            Text(
                f"{path.name}, "
                + "; ".join(f"line {line.line}: {line.message.en}" for line in shown)
                + (f"; and {rest} more" if rest else ""),
                f"{path.name}，"
                + "；".join(f"第 {line.line} 行：{line.message.zh}" for line in shown)
                + (f"；另有 {rest} 行" if rest else ""),
            ),
            "BAD_DATA_LINE",
        )
        return None
    if not seen.samples:
        sentence = Text(f"{path.name} holds no sample", f"{path.name} 中没有样本")
        yield Violation(field, sentence, "DATA_EMPTY")
        return None
    return seen


def _check_counts(p: Parameters, samples: int) -> Iterator[Violation]:
    """What follows from the number of chats."""
    training, ratio = p.training, p.data.eval_ratio
    evaluates = training.eval_strategy != "no" and bool(p.data.eval_file or ratio)
    if evaluates and 0 < ratio < 1 and not p.data.eval_file:
        rest, _ = split_sizes(samples, ratio)
        if not rest:
            yield split_leaves_none(samples)
            return
        samples = rest
    total = plan_schedule(training, samples, evaluates=evaluates).total_steps
    if training.max_steps <= 0:
        yield from check_warmup(training, total)
    if evaluates:
        yield from check_evaluations(training, total)


# --- output


def _check_output(p: Parameters, surroundings: Surroundings) -> Iterator[Violation]:
    field, text = "data.output_dir", p.data.output_dir or ""
    found = check_path(field, text)
    if found:
        yield from found
        return
    path = Path(text)
    try:
        nearest = _nearest(path)
        if path.is_symlink() and not path.exists():
            sentence = Text(f"{text} is a link that leads nowhere", f"{text} 是失效的链接")
            yield Violation(field, sentence, "NOT_A_FOLDER")
            return
        if not nearest.is_dir():
            sentence = (
                Text(f"must be a folder; {text} is a file", f"必须是文件夹；{text} 是文件")
                if nearest == path
                else Text(f"can't be made: {nearest} is a file", f"无法创建：{nearest} 是文件")
            )
            yield Violation(field, sentence, "NOT_A_FOLDER")
            return
        if not os.access(nearest, os.W_OK | os.X_OK) or _is_read_only(nearest):
            sentence = Text(f"no permission to write in {nearest}", f"没有权限写入 {nearest}")
            yield Violation(field, sentence, "NOT_WRITABLE")
            return
        resolved = path.resolve()
        model_path = p.data.model_path
        if model_path and Path(model_path).is_absolute() and "\0" not in model_path:
            model = Path(model_path).resolve()
            if resolved == model or model in resolved.parents:
                sentence = Text("must not lie in the model's folder", "不能位于模型目录内")
                yield Violation(field, sentence, "OUTPUT_IN_MODEL_FOLDER")
                return
        if surroundings.output_within:
            sentence = Text(
                f"lies in the results of a run of {surroundings.output_within}",
                f"位于 {surroundings.output_within} 某次运行的结果目录内",
            )
            yield Violation(field, sentence, "OUTPUT_IN_RESULTS")
            return
        owner = surroundings.output_owner
        if owner:
            # Each run has a folder of its own in there, so that nothing is overwritten.
            sentence = Text(
                f"holds results of {owner} already; those of this task go beside them",
                f"已包含 {owner} 的结果；本任务的结果将与其并列存放",
            )
            yield Violation(field, sentence, "OUTPUT_OF_ANOTHER_TASK", Severity.WARNING)
        usage = shutil.disk_usage(nearest)
        if not usage.total:  # such as /proc: nothing can be made there
            sentence = Text(f"nothing can be written in {nearest}", f"{nearest} 中无法写入")
            yield Violation(field, sentence, "NOT_WRITABLE")
            return
        free = usage.free
    except RuntimeError as error:  # a loop of links
        yield unusable(field, text, OSError(str(error)))
        return
    except OSError as error:  # a name too long
        yield unusable(field, text, error)
        return
    if free < _DISK_RESERVE_BYTES:
        sentence = Text(
            f"the disk of {nearest} is full: {free >> 20} MiB are free",
            f"{nearest} 所在磁盘已满：仅剩 {free >> 20} MiB",
        )
        yield Violation(field, sentence, "DISK_FULL")


def _nearest(path: Path) -> Path:
    """The folder that is there already, at `path` or above."""
    while not path.exists():
        path = path.parent
    return path


def _is_read_only(path: Path) -> bool:
    # Root may write anywhere, says access(), but not on a file system that is mounted read-only.
    return hasattr(os, "statvfs") and bool(os.statvfs(path).f_flag & os.ST_RDONLY)
