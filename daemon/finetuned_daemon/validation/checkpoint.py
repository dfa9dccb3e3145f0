"""Rules for what a run begins from: a checkpoint to resume, LoRA weights, a PEFT configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import ModelFiles, ModelUnreadable, read_tensors
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import MANIFEST, STATE_FILES, Manifest
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.paths import check_file, check_folder, read_json

_FIELD = "data.resume_from_checkpoint"
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
        yield from check_adapter(_FIELD, folder)
        return
    lacking = _what_lacks(folder)
    if lacking:
        yield Violation(
            _FIELD,
            Text(
                f"{text} is no whole checkpoint: {lacking.en}",
                f"{text} 不是完整的检查点：{lacking.zh}",
            ),
            "NOT_A_CHECKPOINT",
        )
        return
    yield from _check_shape(p, folder, model, trains_lora=trains_lora)


def check_adapter(field: str, folder: Path) -> Iterator[Violation]:
    """A folder with LoRA weights to attach."""
    if (folder / _ADAPTER_CONFIG).is_file() and (folder / _ADAPTER_WEIGHTS).is_file():
        return
    names = f"{_ADAPTER_CONFIG}, {_ADAPTER_WEIGHTS}"
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


def check_peft_config(text: str) -> Iterator[Violation]:
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
        return
    yield Violation(field, sentence, "BAD_PEFT_CONFIG")


def _what_lacks(folder: Path) -> Text | None:
    """What keeps a folder from being a whole checkpoint, by its manifest and the files' sizes."""
    values = read_json(folder / MANIFEST)
    if values is None:
        return Text(f"it has no {MANIFEST}", f"没有 {MANIFEST}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError:
        return Text(f"its {MANIFEST} can't be read", f"无法读取其 {MANIFEST}")
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
    if unlisted or other:
        names = ", ".join(unlisted + other)
        return Text(f"{names} is not what was written", f"{names} 与写入时不一致")
    return None


def _check_shape(
    p: Parameters, folder: Path, model: ModelFiles | None, *, trains_lora: bool
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
            suggested=has_lora,
            suggested_field="lora.use_lora",
        )
        return
    if not trains_lora:
        if model is not None:
            yield from _check_full_model(folder, model)
        return
    made = read_json(folder / _ADAPTER_CONFIG)
    if not isinstance(made, dict):
        sentence = Text(f"its {_ADAPTER_CONFIG} can't be read", f"无法读取其 {_ADAPTER_CONFIG}")
        yield Violation(_FIELD, sentence, "NOT_A_CHECKPOINT")
        return
    if not p.lora.peft_config_path:
        yield from _check_lora(p, made)
    yield from _check_base(p, made, folder, model)


def _check_lora(p: Parameters, made: dict[str, Any]) -> Iterator[Violation]:
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
    p: Parameters, made: dict[str, Any], folder: Path, model: ModelFiles | None
) -> Iterator[Violation]:
    """Whether the adapter's matrices have the widths of the model's."""
    if model is not None and model.tensors:
        try:
            adapter = read_tensors(folder / _ADAPTER_WEIGHTS)
        except ModelUnreadable as error:
            yield Violation(_FIELD, error.text, "NOT_A_CHECKPOINT")
            return
        for name, tensor in adapter.items():
            head, mark, _ = name.partition(".lora_A.")
            base = model.tensors.get(f"{head.removeprefix('base_model.model.')}.weight")
            if mark and base and len(base.shape) == 2 and tensor.shape[-1] not in base.shape:
                yield _of_other_model(str(made.get("base_model_name_or_path") or ""))
                return
    there, here = made.get("base_model_name_or_path"), p.data.model_path
    if isinstance(there, str) and there and here and Path(there) != Path(here):
        sentence = Text(
            f"was made with the model in {there}; go on with the same weights, or the result is "
            "of no use",
            f"是以 {there} 中的模型训练的；请使用相同的权重继续，否则结果没有意义",
        )
        yield Violation(
            _FIELD,
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
        yield _of_other_model("")


def _of_other_model(name: str) -> Violation:
    return Violation(
        _FIELD,
        Text(
            f"was made with another model{f' ({name})' if name else ''}: its weights don't fit",
            f"是以另一个模型{f'（{name}）' if name else ''}训练的：权重形状不符",
        ),
        "CHECKPOINT_OF_OTHER_MODEL",
        suggested=name if name and Path(name).is_dir() else None,
        suggested_field="data.model_path",
    )
