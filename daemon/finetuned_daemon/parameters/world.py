"""Checks what parameters name in the world outside: data files, model, tokenizer, output folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from finetuned_daemon.errors import Violation
from finetuned_daemon.parameters.datafile import BadLine, read_chats, read_documents
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType

_BAD_LINES_NAMED = 5
_LARGEST_JSON = 64 << 20
"""A tokenizer_config.json of a real model has some hundred kilobytes."""


def check_world(parameters: Parameters, training_type: TrainingType) -> list[Violation]:
    """Judges every file and folder that is given."""
    data = parameters.data
    found = list[Violation]()
    if data.train_file:
        found += _check_data("data.train_file", data.train_file, training_type)
    if data.eval_file:
        found += _check_data("data.eval_file", data.eval_file, training_type)
    model_is_sound = False
    if data.model_path:
        violations = _check_model(data.model_path)
        model_is_sound = not violations
        found += violations
    if data.tokenizer_path:
        found += _check_tokenizer("data.tokenizer_path", data.tokenizer_path, training_type)
    elif data.model_path and model_is_sound:
        found += _check_tokenizer("data.model_path", data.model_path, training_type)
    if data.output_dir:
        found += _check_output(data.output_dir, data.model_path)
    if data.resume_from_checkpoint:
        found += _check_checkpoint(data.resume_from_checkpoint, attaches=data.attach_lora)
    if parameters.lora.peft_config_path and training_type is TrainingType.SFT:
        found += _check_peft_config("lora.peft_config_path", parameters.lora.peft_config_path)
    return found


def _check_path(field: str, text: str) -> list[Violation]:
    if "\0" in text:
        return [Violation(field, "holds a NUL character", "NOT_A_PATH")]
    if not Path(text).is_absolute():
        return [Violation(field, f"must be an absolute path, not {text!r}", "NOT_ABSOLUTE")]
    return []


def _check_file(field: str, text: str) -> list[Violation]:
    found = _check_path(field, text)
    if found:
        return found
    path = Path(text)
    try:
        if path.is_dir():
            return [Violation(field, f"must be a file; {text} is a folder", "NOT_A_FILE")]
        if not path.exists():
            return [Violation(field, f"there is no file {text}", "FILE_NOT_FOUND")]
        if not path.is_file():
            return [Violation(field, f"{text} is no ordinary file", "NOT_A_FILE")]
    except OSError as error:  # a name too long, a loop of links
        return [Violation(field, f"{text} can't be used: {error.strerror}", "NOT_A_PATH")]
    if not os.access(path, os.R_OK):
        return [Violation(field, f"{text} can't be read: no permission", "NOT_READABLE")]
    return []


def _check_folder(field: str, text: str) -> list[Violation]:
    found = _check_path(field, text)
    if found:
        return found
    path = Path(text)
    try:
        if not path.exists():
            return [Violation(field, f"there is no folder {text}", "FOLDER_NOT_FOUND")]
        if not path.is_dir():
            return [Violation(field, f"must be a folder; {text} is a file", "NOT_A_FOLDER")]
    except OSError as error:
        return [Violation(field, f"{text} can't be used: {error.strerror}", "NOT_A_PATH")]
    if not os.access(path, os.R_OK | os.X_OK):
        return [Violation(field, f"{text} can't be read: no permission", "NOT_READABLE")]
    return []


def _check_data(field: str, text: str, training_type: TrainingType) -> list[Violation]:
    found = _check_file(field, text)
    if found:
        return found
    path = Path(text)
    samples, bad = 0, list[BadLine]()
    reader = read_chats if training_type is TrainingType.SFT else read_documents
    try:
        for item in reader(path):
            if isinstance(item, BadLine):
                bad.append(item)
            else:
                samples += 1
    except OSError as error:
        return [Violation(field, f"{text} can't be read: {error.strerror}", "NOT_READABLE")]
    if bad:
        named = "; ".join(str(line) for line in bad[:_BAD_LINES_NAMED])
        more = f"; and {len(bad) - _BAD_LINES_NAMED} more" if len(bad) > _BAD_LINES_NAMED else ""
        return [Violation(field, f"{path.name}, {named}{more}", "BAD_DATA_LINE")]
    if not samples:
        return [Violation(field, f"{path.name} holds no sample", "DATA_EMPTY")]
    return []


def _check_model(text: str) -> list[Violation]:
    field = "data.model_path"
    found = _check_path(field, text)
    if found:
        return found
    path = Path(text)
    wanted = "training needs a folder in Hugging Face format, with config.json and safetensors"
    try:
        if path.is_file():
            if path.suffix.lower() == ".gguf" or _starts_with(path, b"GGUF"):
                return [Violation(field, f"{path.name} is a GGUF file; {wanted}", "MODEL_IS_GGUF")]
            return [Violation(field, f"{text} is a file; {wanted}", "NOT_A_FOLDER")]
    except OSError as error:
        return [Violation(field, f"{text} can't be used: {error.strerror}", "NOT_A_PATH")]
    found = _check_folder(field, text)
    if found:
        return found
    if not (path / "config.json").is_file():
        if any(path.glob("*.gguf")):
            return [Violation(field, f"{text} holds GGUF files alone; {wanted}", "MODEL_IS_GGUF")]
        return [Violation(field, f"{text} has no config.json; {wanted}", "MODEL_WITHOUT_CONFIG")]
    if not isinstance(_read_json(path / "config.json"), dict):
        return [Violation(field, "its config.json is no JSON object", "MODEL_WITHOUT_CONFIG")]
    if not any(path.glob("*.safetensors")):
        return [
            Violation(
                field,
                f"{text} has no weights in *.safetensors; {wanted}",
                "MODEL_WITHOUT_SAFETENSORS",
            )
        ]
    return []


def _check_tokenizer(field: str, text: str, training_type: TrainingType) -> list[Violation]:
    found = _check_folder(field, text)
    if found:
        return found
    path = Path(text)
    if not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        return [
            Violation(
                field,
                f"{text} has no tokenizer (tokenizer.json); give its folder as data.tokenizer_path",
                "TOKENIZER_NOT_FOUND",
            )
        ]
    if training_type is TrainingType.SFT and not _has_chat_template(path):
        return [
            Violation(
                field,
                f"the tokenizer in {text} has no chat template (chat_template.jinja), which "
                "supervised fine-tuning needs; a base model wants the tokenizer of its chat model",
                "CHAT_TEMPLATE_MISSING",
            )
        ]
    return []


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    config = _read_json(path / "tokenizer_config.json")
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _check_output(text: str, model_path: str | None) -> list[Violation]:
    field = "data.output_dir"
    found = _check_path(field, text)
    if found:
        return found
    path = Path(text)
    try:
        if path.exists() and not path.is_dir():
            return [Violation(field, f"must be a folder; {text} is a file", "NOT_A_FOLDER")]
        if path.is_symlink() and not path.exists():
            return [Violation(field, f"{text} is a link that leads nowhere", "NOT_A_FOLDER")]
        nearest = path
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return [Violation(field, f"can't be made: {nearest} is a file", "NOT_A_FOLDER")]
        if not os.access(nearest, os.W_OK | os.X_OK):
            return [Violation(field, f"no permission to write in {nearest}", "NOT_WRITABLE")]
        if model_path and Path(model_path).is_absolute():
            model = Path(model_path).resolve()
            if path.resolve() == model or model in path.resolve().parents:
                return [Violation(field, "must not lie in the model's folder", "CONFLICT")]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a loop of links
        return [Violation(field, f"{text} can't be used: {error}", "NOT_A_PATH")]
    return []


def _check_checkpoint(text: str, *, attaches: bool) -> list[Violation]:
    field = "data.resume_from_checkpoint"
    found = _check_folder(field, text)
    # To attach LoRA weights an adapter is enough; to resume takes all that a checkpoint holds.
    name = "adapter_config.json" if attaches else "manifest.json"
    if not found and not isinstance(_read_json(Path(text) / name), dict):
        kind = "adapter" if attaches else "whole checkpoint"
        return [Violation(field, f"{text} is no {kind}: it has no {name}", "NOT_A_CHECKPOINT")]
    return found


def _check_peft_config(field: str, text: str) -> list[Violation]:
    found = _check_file(field, text)
    if not found and not isinstance(_read_json(Path(text)), dict):
        return [Violation(field, f"{text} is not a JSON object", "BAD_PEFT_CONFIG")]
    return found


def _starts_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def _read_json(path: Path) -> Any:
    """The JSON in a file; None where there is none that can be read."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
