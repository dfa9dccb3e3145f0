"""Bytes that a run leaves: checkpoints, the final model, the merged model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from finetuned_daemon.json_file import NotJson, parse_json
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import DTYPE_BITS, ModelFiles
from finetuned_daemon.planning.schedule import Schedule
from finetuned_daemon.planning.setup import Setup

_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
# Files about an adapter or a model, and a checkpoint's random state, schedule and manifest: sizes
# as peft 0.21 and transformers 5.24 write them, which differ by a few hundred bytes.
_ADAPTER_FILES = 6_400
_MODEL_FILES = 900
_STATE_FILES = 20_300
_NOTES = 6_900
"""Model card and record of a run, beside its results."""
_PEFT_CARD = 5_200
"""What peft writes in place of the card; it is among the files about an adapter."""
_NOTED_ENTRY = 30
"""Bytes of a loss in the record."""
_LOG_ENTRY = 190
"""Bytes in trainer_state.json of one entry of the log, as measured."""
_OPTIMIZER_FILE = 1_500
"""Bytes of an optimizer.pt without tensors."""
_OPTIMIZER_RECORD = 185
"""Bytes of optimizer.pt around one tensor: torch's archive aligns it to 64 and lists it twice."""
_LEAST_8BIT = 4096
"""Values from which on bitsandbytes keeps a tensor's state in 8 bits."""
_BLOCK_8BIT = 256
"""Values that share a float32 scale there."""


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes that a run leaves in its output folder."""

    checkpoint_bytes: int
    final_bytes: int
    merged_bytes: int
    kept_checkpoints: int

    @property
    def total_bytes(self) -> int:
        """Everything that is there at the end."""
        return self.checkpoint_bytes * self.kept_checkpoints + self.final_bytes + self.merged_bytes


def plan_disk(parameters: Parameters, setup: Setup, schedule: Schedule) -> Disk:
    """What the run of a schedule leaves.

    A checkpoint's log grows with the run; it is counted as it is at the end.
    """
    tokenizer = saved_tokenizer_bytes(
        Path(parameters.data.tokenizer_path or parameters.data.model_path or setup.model.path)
    )
    model = tokenizer + _model_bytes(setup)
    entries = log_entries(parameters, schedule)
    is_merged = setup.adapter is not None and parameters.lora.merge_lora
    notes = _NOTES + entries * _NOTED_ENTRY
    return Disk(
        checkpoint_bytes=model + _STATE_FILES + log_bytes(entries) + _optimizer_bytes(setup),
        final_bytes=model + notes - (_PEFT_CARD if setup.adapter is not None else 0),
        merged_bytes=_merged_bytes(setup) + tokenizer + _MODEL_FILES + notes if is_merged else 0,
        kept_checkpoints=schedule.kept_checkpoints,
    )


def log_entries(parameters: Parameters, schedule: Schedule) -> int:
    """Entries of the log of a run at its end."""
    return schedule.total_steps // parameters.logging.logging_steps + schedule.evaluations + 1


def log_bytes(entries: int) -> int:
    """What they take of a checkpoint."""
    return entries * _LOG_ENTRY


# --- weights


def _model_bytes(setup: Setup) -> int:
    """An adapter, or all weights, with the files about them."""
    if setup.adapter is None:
        return _MODEL_FILES + (
            _file_bytes(setup.trained, "F32") if setup.model.tensors else 4 * setup.model.parameters
        )
    base = "F32" if setup.weight_bytes == 4 else "BF16"
    return (
        _ADAPTER_FILES
        + _file_bytes(setup.adapter.saved, "F32")
        + _file_bytes(setup.adapter.base, base)
    )


def _merged_bytes(setup: Setup) -> int:
    model = setup.model
    if setup.four_bit:  # the base is loaded once more
        return model_bytes(model)
    shapes = {name: tensor.shape for name, tensor in model.weights.items()}
    return _file_bytes(shapes, "F32" if setup.weight_bytes == 4 else "BF16") or (
        model.parameters * setup.weight_bytes
    )


def model_bytes(model: ModelFiles) -> int:
    """All weights, in the format in which they are stored."""
    return model.parameters * DTYPE_BITS[model.dtype] // 8


def _file_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """A safetensors file with tensors of these shapes; 0 without any."""
    if not shapes:
        return 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end


# --- optimizer.pt


def _optimizer_bytes(setup: Setup) -> int:
    trained = setup.trained
    if not trained:  # the weights of .bin files, which have no names here
        return _OPTIMIZER_FILE + optimizer_state_bytes(setup)
    # Two moments and the step of each tensor; none of sgd without momentum.
    records = 0 if setup.optimizer == "sgd" else 3 * len(trained)
    return _OPTIMIZER_FILE + records * _OPTIMIZER_RECORD + optimizer_state_bytes(setup)


def optimizer_state_bytes(setup: Setup) -> int:
    """What the optimizer keeps about the trained weights."""
    shapes = setup.trained or {"": (setup.model.parameters,)}
    return sum(_state_bytes(name, shape, setup) for name, shape in shapes.items())


def _state_bytes(name: str, shape: tuple[int, ...], setup: Setup) -> int:
    size = math.prod(shape)
    match setup.optimizer:
        case "adam":
            return 8 * size
        case "adam_8bit":
            # transformers has the state of embeddings kept in float32.
            if size < _LEAST_8BIT or _is_embedding(name, setup):
                return 8 * size
            return 2 * (size + 4 * math.ceil(size / _BLOCK_8BIT))
        case "adafactor":  # the squares' mean by row and by column (Shazeer and Stern, 2018)
            return 4 * (size // shape[-1] + size // shape[-2] if len(shape) > 1 else size)
        case "sgd":
            return 0


def _is_embedding(name: str, setup: Setup) -> bool:
    """Whether a weight is that of the input embeddings, or of their copy beside an adapter."""
    module = setup.model.input_embedding
    return bool(module) and (name == f"{module}.weight" or f"{module}.modules_to_save." in name)


# --- tokenizer


def saved_tokenizer_bytes(folder: Path) -> int:
    """Bytes of a tokenizer's files as they are saved again: with line feeds and indents."""
    total = sum(_size(folder / name) for name in _TOKENIZER_FILES)
    file = folder / "tokenizer.json"
    if not _size(file):
        return total
    text = file.read_bytes()
    total += len(text)
    is_compact, has_old_merges = not text.startswith(b"{\n"), _has_old_merges(text)
    if is_compact or has_old_merges:
        words, merges = _count_entries(text)
        if is_compact:
            total += 8 * words  # a line feed, six blanks, one after the colon
        if has_old_merges:  # "a b" becomes a list of two, on four lines
            total += (36 if is_compact else 29) * merges
        elif is_compact:
            total += 33 * merges
    return total


def _count_entries(text: bytes) -> tuple[int, int]:
    """Words and merges of a tokenizer.json; none where it is damaged, which a check says."""
    try:
        model = parse_json(text)["model"]
        return len(model["vocab"]), len(model.get("merges") or ())
    except (NotJson, KeyError, TypeError, AttributeError):
        return 0, 0


def _has_old_merges(text: bytes) -> bool:
    """Whether the merges are strings, as before tokenizers 0.20."""
    start = text.find(b'"merges":')
    return start >= 0 and text[start + 9 : start + 40].split(b"[", 1)[-1].lstrip()[:1] == b'"'


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
