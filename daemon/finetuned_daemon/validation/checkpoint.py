"""Rules for what a run begins from: a checkpoint to resume, LoRA weights, a PEFT configuration."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import effective_optimizer
from finetuned_daemon.planning.model_files import (
    ModelFiles,
    ModelUnreadable,
    lora_target_names,
    read_tensors,
)
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import MANIFEST, STATE_FILES, Manifest, strange_names
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.extensions import as_begun, check_resumed
from finetuned_daemon.validation.paths import check_file, check_folder, read_json
from finetuned_daemon.validation.resume import (
    NOTHING_TRAINED,
    Effect,
    ResumeItem,
    changed_files,
    known_end,
)

_FIELD = "data.resume_from_checkpoint"
ADAPTER_CONFIG = "adapter_config.json"
FILES_CHANGED = "FILES_CHANGED_SINCE_CHECKPOINT"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_MOST_WHOLE = 1000
_whole = dict[Path, list[tuple[int, int, int]]]()
"""Checkpoints whose hashes were right, with inode, size and time of each file."""


def check_checkpoint(
    p: Parameters, training_type: TrainingType, model: ModelFiles | None
) -> Iterator[Violation]:
    """Judges `data.resume_from_checkpoint`; `model` is the model where it could be read."""
    text = p.data.resume_from_checkpoint or ""
    found = check_folder(_FIELD, text)
    if found:
        yield from found
        return
    folder = Path(text)
    trains_lora = training_type is TrainingType.SFT and p.lora.use_lora
    if trains_lora and p.data.attach_lora:
        # It gives the weights; nothing else of it counts.
        yield from check_adapter(_FIELD, folder, p, model)
        return
    lacking = what_lacks(folder)
    if lacking:
        yield _not_whole(text, lacking)
        return
    is_sft = training_type is TrainingType.SFT
    yield from _check_shape(p, folder, model, trains_lora=trains_lora, is_sft=is_sft)
    yield from _check_progress(p, folder, training_type)
    yield from _check_files(p, folder, training_type)


def check_hashes(p: Parameters, training_type: TrainingType) -> list[Violation]:
    """Compares the files of a checkpoint that is otherwise in order with their hashes.

    Takes as long as reading them: for a start, not for a check.
    """
    folder = resumed_folder(p, training_type)
    wrong = what_differs(folder) if folder else None
    return [_not_whole(str(folder), wrong)] if wrong else []


def resumed_folder(p: Parameters, training_type: TrainingType) -> Path | None:
    """The checkpoint that a run goes on from; None where it begins anew."""
    attaches = training_type is TrainingType.SFT and p.lora.use_lora and p.data.attach_lora
    text = p.data.resume_from_checkpoint
    return Path(text) if text and not attaches else None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint that was judged whole."""
    return Manifest.model_validate_json((folder / MANIFEST).read_bytes())


def check_adapter(
    field: str, folder: Path, p: Parameters, model: ModelFiles | None
) -> Iterator[Violation]:
    """A folder with LoRA weights to attach."""
    if (folder / ADAPTER_CONFIG).is_file() and (folder / _ADAPTER_WEIGHTS).is_file():
        made = read_json(folder / ADAPTER_CONFIG)
        yield from _check_base(field, p, made if isinstance(made, dict) else {}, folder, model)
        return
    names = f"{ADAPTER_CONFIG}, {_ADAPTER_WEIGHTS}"
    yield Violation(
        field,
        Text(
            f"there are no LoRA weights to attach in {folder} ({names}): data.attach_lora takes "
            "those of data.resume_from_checkpoint, else of the model's folder",
            f"{folder} 中没有可附加的 LoRA 权重（{names}）：data.attach_lora 取自 "
            "data.resume_from_checkpoint，否则取自模型目录",
        ),
        "ADAPTER_NOT_FOUND",
    )


def check_peft_config(text: str, model: ModelFiles | None) -> Iterator[Violation]:
    """A PEFT configuration of the LoRA family."""
    field = "lora.peft_config_path"
    found = check_file(field, text)
    if found:
        yield from found
        return
    values = read_json(Path(text))
    if not isinstance(values, dict):
        sentence = Text(f"{text} is not a JSON object", f"{text} 不是 JSON 对象")
    elif values.get("peft_type", "LORA") != "LORA":
        kind = values["peft_type"]
        sentence = Text(
            f"{text} is a configuration of {kind!r}, not of LORA",
            f"{text} 是 {kind!r} 的配置，而不是 LORA",
        )
    else:
        wrong = _wrong_settings(values)
        if not wrong:
            yield from _check_target_names(field, values, model)
            return
        names = ", ".join(wrong)
        sentence = Text(
            f"{text} can't be used: {names} is not what LoRA takes",
            f"无法使用 {text}：{names} 不是 LoRA 可用的值",
        )
    yield Violation(field, sentence, "BAD_PEFT_CONFIG")


def _wrong_settings(values: dict[str, Any]) -> list[str]:
    """Names of settings with values that no LoRA can have."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    checks: dict[str, Callable[[Any], bool]] = {
        "r": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 1,
        "lora_alpha": lambda v: is_number(v) and math.isfinite(v) and v > 0,
        "lora_dropout": lambda v: is_number(v) and 0 <= v < 1,
        "bias": lambda v: v in ("none", "all", "lora_only"),
        "target_modules": lambda v: v is None or _names_modules(v),
        "exclude_modules": lambda v: v is None or _names_modules(v),
        "rank_pattern": lambda v: (
            v is None
            or (
                isinstance(v, dict)
                and all(_is_pattern(k) and type(r) is int and r >= 1 for k, r in v.items())
            )
        ),
    }
    return [name for name, check in checks.items() if name in values and not check(values[name])]


def _names_modules(value: Any) -> bool:
    if isinstance(value, str):
        return _is_pattern(value)
    return isinstance(value, list) and bool(value) and all(isinstance(n, str) for n in value)


def _is_pattern(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError, RecursionError, OverflowError):
        return False
    return True


def _check_target_names(
    field: str, values: dict[str, Any], model: ModelFiles | None
) -> Iterator[Violation]:
    targets = values.get("target_modules")
    if model is None or not model.modules or not isinstance(targets, list):
        return
    there = lora_target_names(model)
    missing = [name for name in targets if name.rpartition(".")[2] not in there]
    if missing:
        names, known = ", ".join(missing), ", ".join(there)
        sentence = Text(
            f"the model has no module {names}; it has {known}",
            f"模型中没有模块 {names}；可用的有 {known}",
        )
        yield Violation(field, sentence, "TARGET_MODULE_MISSING")


def what_lacks(folder: Path) -> Text | None:
    """What keeps a folder from being a whole checkpoint, by its manifest and the files' sizes."""
    values = read_json(folder / MANIFEST)
    if values is None:
        return Text(f"it has no {MANIFEST}", f"没有 {MANIFEST}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError:
        return Text(f"its {MANIFEST} can't be read", f"无法读取其 {MANIFEST}")
    if strange := strange_names(folder, {*STATE_FILES, *manifest.files}):
        names = ", ".join(strange)
        return Text(f"{names} is no file of a checkpoint", f"{names} 不是检查点的文件")
    wanted = {*STATE_FILES, *manifest.files}
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        names = ", ".join(missing)
        return Text(f"it lacks {names}", f"缺少 {names}")
    unlisted = [name for name in STATE_FILES if name not in manifest.files]
    other = [
        name
        for name, entry in manifest.files.items()
        if (folder / name).stat().st_size != entry.size
    ]
    return _not_as_written(unlisted + other)


def what_differs(folder: Path) -> Text | None:
    """Which files of a checkpoint that lacks nothing are not what was written, by their hashes.

    Takes as long as reading them; a whole one is remembered while its files do not change.
    """
    files = Manifest.model_validate(read_json(folder / MANIFEST)).files
    try:
        statuses = [(folder / name).stat() for name in files]
        seen = [(status.st_ino, status.st_size, status.st_mtime_ns) for status in statuses]
        if _whole.get(folder) == seen:
            return None
        wrong = [name for name, entry in files.items() if _sha256(folder / name) != entry.sha256]
    except OSError as error:  # a disk that fails, or a checkpoint that goes away
        return Text(f"it can't be read: {error}", f"无法读取：{error}")
    if not wrong:
        if len(_whole) >= _MOST_WHOLE:
            _whole.clear()
        _whole[folder] = seen
    return _not_as_written(wrong)


def _not_whole(text: str, why: Text) -> Violation:
    sentence = Text(
        f"{text} is no whole checkpoint: {why.en}", f"{text} 不是完整的检查点：{why.zh}"
    )
    return Violation(_FIELD, sentence, "NOT_A_CHECKPOINT")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _not_as_written(names: list[str]) -> Text | None:
    if not names:
        return None
    shown = ", ".join(names)
    return Text(f"{shown} is not what was written", f"{shown} 与写入时不一致")


def _check_shape(
    p: Parameters, folder: Path, model: ModelFiles | None, *, trains_lora: bool, is_sft: bool
) -> Iterator[Violation]:
    """LoRA shape and model of a whole checkpoint."""
    has_lora = (folder / _ADAPTER_WEIGHTS).is_file()
    if has_lora != trains_lora:
        yield Violation(
            _FIELD,
            Text(
                "holds all weights, and this task trains LoRA weights"
                if trains_lora
                else "holds LoRA weights, and this task trains all weights",
                "保存的是全部权重，而本任务训练 LoRA 权重"
                if trains_lora
                else "保存的是 LoRA 权重，而本任务训练全部权重",
            ),
            "CHECKPOINT_OF_OTHER_LORA",
            suggested=has_lora if is_sft else None,
            suggested_field="lora.use_lora" if is_sft else "",
        )
        return
    if not trains_lora:
        if model is not None:
            yield from _check_full_model(folder, model)
        return
    made = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(made, dict):
        sentence = Text(f"its {ADAPTER_CONFIG} can't be read", f"无法读取其 {ADAPTER_CONFIG}")
        yield Violation(_FIELD, sentence, "NOT_A_CHECKPOINT")
        return
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    if not p.lora.peft_config_path:
        yield from _check_lora(p, as_begun(made, manifest))
    yield from check_resumed(_FIELD, p, made, manifest)
    yield from _check_base(_FIELD, p, made, folder, model)


def _check_files(p: Parameters, folder: Path, training_type: TrainingType) -> Iterator[Violation]:
    """Data and model files that are not what the checkpoint was made with: one finding for each."""
    by_field = dict[str, list[ResumeItem]]()
    for item in changed_files(read_manifest(folder), p, training_type):
        by_field.setdefault(item.field, []).append(item)
    for field, items in by_field.items():
        is_other = items[0].effect is Effect.DIFFERENT_RUN
        yield Violation(
            field,
            Text(
                f"is not as {folder} was made with: {'; '.join(i.message.en for i in items)}",
                f"与 {folder} 训练时不同：{'；'.join(i.message.zh for i in items)}",
            ),
            FILES_CHANGED,
            Severity.WARNING if is_other else Severity.NOTICE,
        )


def _check_progress(
    p: Parameters, folder: Path, training_type: TrainingType
) -> Iterator[Violation]:
    """The optimizer that the checkpoint is of, and whether anything is left to do."""
    manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    optimizer = effective_optimizer(p)
    if manifest.optimizer and manifest.optimizer != optimizer:
        yield Violation(
            _FIELD,
            Text(
                f"was made with the optimizer {manifest.optimizer}, whose state {optimizer} can't "
                "take over",
                f"是以优化器 {manifest.optimizer} 训练的，{optimizer} 无法接续其状态",
            ),
            "CHECKPOINT_OF_OTHER_OPTIMIZER",
            suggested=manifest.optimizer,
            suggested_field="training.optimizer",
        )
    end = known_end(manifest, p, training_type)
    if 0 < end <= manifest.step:
        yield nothing_left(manifest.step, end)


def nothing_left(step: int, total_steps: int) -> Violation:
    """The run to resume is over already."""
    return Violation(
        _FIELD,
        Text(
            f"is of step {step}, and the run ends at step {total_steps}: {NOTHING_TRAINED.en}",
            f"位于第 {step} 步，而训练在第 {total_steps} 步结束：{NOTHING_TRAINED.zh}",
        ),
        "NOTHING_LEFT_TO_TRAIN",
        Severity.WARNING,
    )


def _check_lora(p: Parameters, made: Mapping[str, Any]) -> Iterator[Violation]:
    lora = p.lora
    targets = made.get("target_modules")
    pairs: list[tuple[str, Any, Any]] = [
        ("lora_r", made.get("r"), lora.lora_r),
        ("lora_alpha", made.get("lora_alpha"), lora.lora_alpha),
    ]
    if isinstance(targets, list):
        pairs.append(
            ("lora_target_modules", tuple(sorted(targets)), tuple(sorted(lora.lora_target_modules)))
        )
    for name, there, here in pairs:
        if there != here:
            shown = ", ".join(there) if isinstance(there, tuple) else there
            yield Violation(
                _FIELD,
                Text(
                    f"was made with lora.{name} {shown}; to resume it, set the same",
                    f"是以 lora.{name} 为 {shown} 训练的；要恢复训练请设为相同的值",
                ),
                "CHECKPOINT_OF_OTHER_LORA",
                suggested=there,
                suggested_field=f"lora.{name}",
            )


def _check_base(
    field: str, p: Parameters, made: dict[str, Any], folder: Path, model: ModelFiles | None
) -> Iterator[Violation]:
    """Whether the adapter's matrices have the widths of the model's."""
    if model is not None and model.tensors:
        try:
            adapter = read_tensors(folder / _ADAPTER_WEIGHTS)
        except ModelUnreadable as error:
            yield Violation(field, error.text, "NOT_A_CHECKPOINT")
            return
        for name, tensor in adapter.items():
            head, mark, _ = name.partition(".lora_A.")
            base = model.tensors.get(f"{head.removeprefix('base_model.model.')}.weight")
            if mark and base and len(base.shape) == 2 and tensor.shape[-1] not in base.shape:
                yield _of_other_model(field, str(made.get("base_model_name_or_path") or ""))
                return
    there, here = made.get("base_model_name_or_path"), p.data.model_path
    if here and (Path(here) / ADAPTER_CONFIG).is_file():
        return  # the folder of the LoRA weights themselves
    if isinstance(there, str) and there and here and Path(there) != Path(here):
        sentence = Text(
            f"was made with the model in {there}; go on with the same weights, or the result is "
            "of no use",
            f"是以 {there} 中的模型训练的；请使用相同的权重继续，否则结果没有意义",
        )
        yield Violation(
            field,
            sentence,
            "CHECKPOINT_OF_OTHER_PATH",
            # The same model may have been moved.
            Severity.WARNING,
            suggested=there if Path(there).is_dir() else None,
            suggested_field="data.model_path",
        )


def _check_full_model(folder: Path, model: ModelFiles) -> Iterator[Violation]:
    try:
        shapes = {
            name: tensor.shape
            for file in folder.glob("*.safetensors")
            for name, tensor in read_tensors(file).items()
        }
    except ModelUnreadable as error:
        yield Violation(_FIELD, error.text, "NOT_A_CHECKPOINT")
        return
    common = shapes.keys() & model.tensors.keys()
    if model.tensors and (
        not common or any(shapes[name] != model.tensors[name].shape for name in common)
    ):
        yield _of_other_model(_FIELD, "")


def _of_other_model(field: str, name: str) -> Violation:
    return Violation(
        field,
        Text(
            f"was made with another model{f' ({name})' if name else ''}: its weights don't fit",
            f"是以另一个模型{f'（{name}）' if name else ''}训练的：权重形状不符",
        ),
        "CHECKPOINT_OF_OTHER_MODEL",
        suggested=name if name and Path(name).is_dir() else None,
        suggested_field="data.model_path",
    )
