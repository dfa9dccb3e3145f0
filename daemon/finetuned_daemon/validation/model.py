"""Rules for the model and its tokenizer, from the files of their folders."""

from __future__ import annotations

import functools
import re
import reprlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import (
    ModelFiles,
    ModelUnreadable,
    lora_target_names,
    read_model,
)
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.paths import (
    check_folder,
    check_path,
    read_json,
    starts_with,
    unusable,
)
from finetuned_daemon.validation.surroundings import Surroundings

_FIELD = "data.model_path"
_WANTED = Text(
    "training needs a folder in Hugging Face format, with config.json and safetensors",
    "训练需要 Hugging Face 格式的目录，包含 config.json 和 safetensors 权重",
)
_PROJECTS_EMBEDDINGS = ("opt", "albert", "electra")
"""Their embeddings may have another width than their layers."""
_LAYER = re.compile(
    r"(?:model\.|transformer\.|gpt_neox\.)?(?:decoder\.)?(?:layers|h|blocks)\.(\d+)\."
)
_brief = reprlib.repr
_SHORTEST = 128
"""Least `training.max_seq_length`."""


def check_model(
    p: Parameters, training_type: TrainingType, surroundings: Surroundings
) -> Generator[Violation, None, ModelFiles | None]:
    """Judges `data.model_path`; returns the model where it can be read."""
    text = p.data.model_path or ""
    found = check_path(_FIELD, text) or _check_no_file(text) or check_folder(_FIELD, text)
    if found:
        yield from found
        return None
    path = Path(text)
    if not (path / "config.json").is_file():
        base = yield from _check_adapter_folder(path, attaches=p.data.attach_lora)
        if base is None:
            return None
        path = base
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        sentence = Text("its config.json is no JSON object", "其 config.json 不是 JSON 对象")
        yield Violation(_FIELD, sentence, "MODEL_WITHOUT_CONFIG")
        return None
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        sentence = Text(
            f"{path} has no weights in *.safetensors; {_WANTED.en}",
            f"{path} 中没有 *.safetensors 权重；{_WANTED.zh}",
        )
        yield Violation(_FIELD, sentence, "MODEL_WITHOUT_WEIGHTS")
        return None
    try:
        model = read_model(path)
    except ModelUnreadable as error:
        yield Violation(_FIELD, error.text, "MODEL_UNREADABLE")
        return None
    if model.format == "bin":
        sentence = Text(
            f"{path.name} has its weights in the old .bin format; they are loaded without running "
            "code in them, but safetensors load faster and can be checked beforehand",
            f"{path.name} 的权重是旧的 .bin 格式；加载时不会执行其中的代码，但 safetensors "
            "加载更快，且可提前检查",
        )
        yield Violation(_FIELD, sentence, "MODEL_WITHOUT_SAFETENSORS", Severity.WARNING)
    yield from _check_architecture(config, surroundings)
    yield from _check_shapes(config, model)
    yield from _check_length(p, model)
    if training_type is TrainingType.SFT and p.lora.use_lora and model.modules:
        yield from _check_targets(p, model)
    return model


def _check_no_file(text: str) -> list[Violation]:
    path = Path(text)
    try:
        if not path.is_file():
            return []
        if path.suffix.lower() == ".gguf" or starts_with(path, b"GGUF"):
            return [_gguf(f"{path.name} is a GGUF file", f"{path.name} 是 GGUF 文件")]
    except OSError as error:
        return [unusable(_FIELD, text, error)]
    sentence = Text(f"{text} is a file; {_WANTED.en}", f"{text} 是文件；{_WANTED.zh}")
    return [Violation(_FIELD, sentence, "NOT_A_FOLDER")]


def _check_adapter_folder(path: Path, *, attaches: bool) -> Generator[Violation, None, Path | None]:
    """A folder without config.json; returns the base model's where it holds LoRA weights."""
    if any(path.glob("*.gguf")):
        yield _gguf(f"{path} holds GGUF files alone", f"{path} 中只有 GGUF 文件")
        return None
    adapter = read_json(path / "adapter_config.json")
    if not isinstance(adapter, dict):
        sentence = Text(
            f"{path} has no config.json; {_WANTED.en}", f"{path} 中没有 config.json；{_WANTED.zh}"
        )
        yield Violation(_FIELD, sentence, "MODEL_WITHOUT_CONFIG")
        return None
    base = str(adapter.get("base_model_name_or_path") or "")
    if not attaches:
        sentence = Text(
            f"{path} holds LoRA weights alone; give the folder of their base model ({base})",
            f"{path} 中只有 LoRA 权重；请填写其基础模型的目录（{base}）",
        )
        is_there = Path(base).is_absolute() and Path(base).is_dir()
        yield Violation(_FIELD, sentence, "MODEL_IS_ADAPTER", suggested=base if is_there else None)
        return None
    # A relative one, such as a name on the hub, would mean another folder to each process.
    if not Path(base).is_absolute() or not (Path(base) / "config.json").is_file():
        sentence = Text(
            f"the base model of the LoRA weights in {path} is not there: {base}",
            f"{path} 中 LoRA 权重的基础模型不存在：{base}",
        )
        yield Violation(_FIELD, sentence, "BASE_MODEL_NOT_FOUND")
        return None
    return Path(base)


def _gguf(en: str, zh: str) -> Violation:
    sentence = Text(
        f"{en}, which is for inference; {_WANTED.en}", f"{zh}，只能用于推理；{_WANTED.zh}"
    )
    return Violation(_FIELD, sentence, "MODEL_IS_GGUF")


def _check_architecture(config: dict[str, Any], surroundings: Surroundings) -> Iterator[Violation]:
    kind, known = config.get("model_type"), surroundings.model_types
    if not isinstance(kind, str):
        sentence = Text(
            f"its config.json names no model_type, but {_brief(kind)}",
            f"其 config.json 中的 model_type 不是名称，而是 {_brief(kind)}",
        )
        yield Violation(_FIELD, sentence, "MODEL_TYPE_UNKNOWN")
        return
    is_known = None if known is None else kind in known
    if is_known is False:
        own = bool(config.get("auto_map"))
        sentence = Text(
            f"the installed transformers knows no causal language model of type {kind!r}"
            + (", and code in a model's folder is never run" if own else "; a newer one may"),
            f"已安装的 transformers 不支持 {kind!r} 类型的因果语言模型"
            + ("，且绝不会运行模型目录中的代码" if own else "；可尝试更新版本"),
        )
        yield Violation(_FIELD, sentence, "MODEL_NEEDS_ITS_CODE" if own else "MODEL_TYPE_UNKNOWN")
    elif config.get("auto_map"):
        sentence = Text(
            "its folder brings code of its own (auto_map), which is not run; transformers' own "
            "implementation is used",
            "其目录自带代码（auto_map），不会被运行；将使用 transformers 自带的实现",
        )
        yield Violation(_FIELD, sentence, "MODEL_CODE_NOT_RUN", Severity.WARNING)


def _check_shapes(config: dict[str, Any], model: ModelFiles) -> Iterator[Violation]:
    """Whether config.json speaks of the weights that are there."""
    wrong = list[tuple[str, int, int]]()
    words, width = model.modules.get(model.input_embedding, (0, 0))
    if words and model.model_type not in _PROJECTS_EMBEDDINGS:
        wrong += [
            ("vocab_size", model.vocab_size, words),
            ("hidden_size", model.hidden_size, width),
        ]
    layers = {int(match[1]) for name in model.tensors if (match := _LAYER.match(name))}
    if layers and model.layers > max(layers) + 1:
        wrong.append(("num_hidden_layers", model.layers, max(layers) + 1))
    differing = [(name, says, is_) for name, says, is_ in wrong if says != is_]
    if differing:
        en = ", ".join(f"{name} {says}, the weights {is_}" for name, says, is_ in differing)
        zh = "，".join(f"{name} 为 {says}，权重为 {is_}" for name, says, is_ in differing)
        sentence = Text(
            f"config.json and the weights don't belong together: it says {en}",
            f"config.json 与权重不符：其中 {zh}",
        )
        yield Violation(_FIELD, sentence, "MODEL_CONTRADICTS_ITSELF")
    quantized = config.get("quantization_config")
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        sentence = Text(
            f"its weights are quantized ({_brief(method)}), which is for inference; get the "
            "model in its original precision (optimization.use_qlora loads it in 4 bits)",
            f"其权重已量化（{_brief(method)}），只能用于推理；请获取原始精度的模型"
            "（optimization.use_qlora 会以 4-bit 加载）",
        )
        yield Violation(_FIELD, sentence, "MODEL_IS_QUANTIZED")


def _check_length(p: Parameters, model: ModelFiles) -> Iterator[Violation]:
    positions, wanted = model.max_position_embeddings, p.training.max_seq_length
    if not positions or positions >= wanted:
        return
    sentence = Text(
        f"the model has {positions} positions; samples are cut there instead of at {wanted}",
        f"模型只有 {positions} 个位置；样本将在该处而不是 {wanted} 处截断",
    )
    fitting = positions - positions % 8
    yield Violation(
        "training.max_seq_length",
        sentence,
        "MAX_SEQ_LENGTH_ABOVE_MODEL",
        Severity.WARNING,
        suggested=fitting if fitting >= _SHORTEST else None,
    )


def _check_targets(p: Parameters, model: ModelFiles) -> Iterator[Violation]:
    if p.lora.peft_config_path or p.data.attach_lora:
        return  # their own targets hold
    there = lora_target_names(model)
    missing = [name for name in p.lora.lora_target_modules if name.rpartition(".")[2] not in there]
    if not missing:
        return
    fitting = tuple(n for n in p.lora.lora_target_modules if n not in missing)
    names, known = ", ".join(missing), ", ".join(there)
    yield Violation(
        "lora.lora_target_modules",
        Text(
            f"the model has no module {names}; it has {known}",
            f"模型中没有模块 {names}；可用的有 {known}",
        ),
        "TARGET_MODULE_MISSING",
        suggested=fitting or tuple(n for n in there if n not in ("embed_tokens", "lm_head")),
    )


def check_tokenizer(field: str, text: str, training_type: TrainingType) -> Iterator[Violation]:
    """A folder with a tokenizer and, for chats, its template."""
    found = check_folder(field, text)
    if found:
        yield from found
        return
    path = Path(text)
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        sentence = Text(
            f"{text} has no tokenizer (tokenizer.json); give its folder as data.tokenizer_path",
            f"{text} 中没有分词器（tokenizer.json）；请用 data.tokenizer_path 指定其目录",
        )
        yield Violation(field, sentence, "TOKENIZER_NOT_FOUND")
    elif broken := _broken_file(path):
        sentence = Text(
            f"{broken} in {text} can't be read; get the tokenizer's files again",
            f"无法读取 {text} 中的 {broken}；请重新获取分词器文件",
        )
        yield Violation(field, sentence, "TOKENIZER_UNUSABLE")
    elif training_type is TrainingType.SFT and not _has_chat_template(path):
        sentence = Text(
            f"the tokenizer in {text} has no chat template (chat_template.jinja), which "
            "supervised fine-tuning needs; a base model wants the tokenizer of its chat model",
            f"{text} 中的分词器没有对话模板（chat_template.jinja），监督微调需要它；"
            "基础模型请使用其对话版本的分词器",
        )
        yield Violation(field, sentence, "CHAT_TEMPLATE_MISSING")


def _broken_file(path: Path) -> str:
    """Name of a tokenizer's file that is not what it should be; empty: all are."""
    for name, key in (("tokenizer.json", "model"), ("tokenizer_config.json", "")):
        file = path / name
        if file.is_file():
            status = file.stat()
            if not _is_object(file, key, status.st_size, status.st_mtime_ns):
                return name
    return ""


@functools.lru_cache(64)
def _is_object(file: Path, key: str, _size: int, _changed: int) -> bool:
    """Whether a file is a JSON object with a key; size and time are those it is remembered for."""
    content = read_json(file)
    return isinstance(content, dict) and (not key or key in content)


def _has_chat_template(path: Path) -> bool:
    jinja = path / "chat_template.jinja"
    if (jinja.is_file() and jinja.stat().st_size) or (path / "chat_template.json").is_file():
        return True
    config = read_json(path / "tokenizer_config.json")
    return isinstance(config, dict) and bool(config.get("chat_template"))
