"""The tensors that LoRA adds to a model: which of them are trained, and which are saved beside."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finetuned_daemon.json_file import read_json_file
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import (
    ADAPTER_CONFIG,
    ModelFiles,
    ModelUnreadable,
    is_lora_target,
)
from finetuned_daemon.texts import Text

_ALL_LINEAR = "all-linear"
# peft saves the base layer of an embedding beside the LoRA weights on it, under these names alone.
_EMBEDDINGS = ("embed_tokens", "lm_head")
# What peft takes where a configuration names no modules: of the architectures that it knows, most.
_DEFAULT_TARGETS = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
_DEFAULT_RANK = 8
_PREFIX = "base_model.model."

_LONGEST_PATTERN = 500
_MOST_REPETITIONS = 2
_REPEATED_GROUP = re.compile(r"\)[*+{?]")
_REPETITION = re.compile(r"[*+{]")

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What LoRA adds to a model, by the names under which peft saves it."""

    trained: Mapping[str, Shape]
    """Tensors that are trained, in float32."""
    base: Mapping[str, Shape]
    """Frozen weights that are saved with them: embeddings that LoRA was put on."""
    is_converted: bool = False
    """Saved as an adapter of twice the rank, which the original weights take."""
    dropout: float = 0.0
    """Share of the layers' input that is dropped."""

    @property
    def saved(self) -> Mapping[str, Shape]:
        """The trained tensors, as they are saved."""
        if not self.is_converted:
            return self.trained
        return {
            name: (2 * shape[0], shape[1])
            if name.endswith(".lora_A.weight")
            else (shape[0], 2 * shape[1])
            if name.endswith(".lora_B.weight")
            else shape
            for name, shape in self.trained.items()
        }

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA adapter."""
        return any(name.endswith(".lora_magnitude_vector") for name in self.trained)

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Rank on each module that it changes, by the module's full name; 0: trained as a whole."""
        ranks = dict[str, int]()
        for name, shape in self.trained.items():
            module, _, kind = name.removeprefix(_PREFIX).removesuffix(".weight").partition(".lora_")
            ranks[module] = shape[0] if kind == "A" else ranks.get(module, 0)
        return ranks

    @property
    def parameters(self) -> int:
        """Number of trained values."""
        return sum(math.prod(shape) for shape in self.trained.values())


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """A LoRA configuration, as far as it decides on tensors."""

    rank: int
    targets: tuple[str, ...] | str | None
    """Names, a pattern, or None for the architecture's own."""
    ranks: Mapping[str, int] = field(default_factory=dict[str, int])
    excluded: tuple[str, ...] | str = ()
    saved_whole: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    has_magnitudes: bool = False
    """DoRA: a vector more for each module."""
    is_converted: bool = False
    """PiSSA: saved with twice the rank."""
    dropout: float = 0.0


def plan_adapter(parameters: Parameters, model: ModelFiles) -> Adapter:
    """The adapter that a run with LoRA trains.

    Raises:
        ModelUnreadable: The file with its configuration can't be read.
    """
    settings = _settings(parameters)
    trained: dict[str, Shape] = {}
    base: dict[str, Shape] = {}
    targets = [name for name in model.modules if _is_target(name, model, settings)]
    for name in targets:
        first, second = model.modules[name]
        rank, prefix = _rank(name, settings), _PREFIX + name
        # The weight of a Linear is (out, in), that of an Embedding (words, width).
        if name == model.input_embedding:
            trained[f"{prefix}.lora_embedding_A"] = (rank, first)
            trained[f"{prefix}.lora_embedding_B"] = (second, rank)
        else:
            trained[f"{prefix}.lora_A.weight"] = (rank, second)
            trained[f"{prefix}.lora_B.weight"] = (first, rank)
        if settings.has_magnitudes:
            size = second if name == model.input_embedding else first
            trained[f"{prefix}.lora_magnitude_vector"] = (size,)
        if name.rpartition(".")[2] in _EMBEDDINGS and _names_embedding(settings):
            base[f"{prefix}.base_layer.weight"] = (first, second)
    for name, shape in model.modules.items():
        if name.rpartition(".")[2] in settings.saved_whole:
            trained[f"{_PREFIX}{name}.weight"] = shape
    return Adapter(
        trained=trained,
        base=base,
        is_converted=settings.is_converted,
        dropout=settings.dropout,
    )


def _is_target(name: str, model: ModelFiles, settings: _Settings) -> bool:
    if not is_lora_target(name) or _fits(name, settings.excluded):
        return False
    if settings.layers:
        number = re.search(r"\.(\d+)\.", name)
        if number is None or int(number[1]) not in settings.layers:
            return False
    if settings.targets == _ALL_LINEAR:
        return name not in (model.input_embedding, model.output_embedding)
    if settings.targets is None:
        return name.rpartition(".")[2] in _DEFAULT_TARGETS
    return _fits(name, settings.targets)


def _fits(name: str, targets: tuple[str, ...] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _names_embedding(settings: _Settings) -> bool:
    """Whether peft sees that embeddings are among the targets: by name, or by a pattern."""
    if isinstance(settings.targets, str):
        return settings.targets != _ALL_LINEAR
    return any(name in (settings.targets or ()) for name in _EMBEDDINGS)


def _rank(name: str, settings: _Settings) -> int:
    for pattern, rank in settings.ranks.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return settings.rank


# --- where the configuration comes from


def _settings(parameters: Parameters) -> _Settings:
    """As the runner chooses it: that of attached weights, a file's, else the parameters'."""
    lora, data = parameters.lora, parameters.data
    if data.attach_lora:
        return _read(Path(data.resume_from_checkpoint or data.model_path or "") / ADAPTER_CONFIG)
    if lora.peft_config_path:
        return _read(Path(lora.peft_config_path))
    return _Settings(
        rank=lora.lora_r,
        targets=tuple(lora.lora_target_modules),
        has_magnitudes=parameters.extensions.use_dora,
        is_converted=parameters.extensions.lora_init == "pissa",
        dropout=lora.lora_dropout,
    )


def _read(file: Path) -> _Settings:
    try:
        values = read_json_file(file)
        if not isinstance(values, dict):
            raise TypeError("it is no JSON object")
        settings = _Settings(
            rank=int(values.get("r", _DEFAULT_RANK)),
            targets=_targets(values.get("target_modules")),
            ranks={str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
            excluded=_targets(values.get("exclude_modules")) or (),
            saved_whole=tuple(map(str, values.get("modules_to_save") or ())),
            layers=_layers(values.get("layers_to_transform")),
            has_magnitudes=bool(values.get("use_dora")),
            dropout=float(values.get("lora_dropout") or 0),
        )
        patterns: list[Any] = [settings.targets, settings.excluded, *settings.ranks]
        for pattern in patterns:
            if isinstance(pattern, str):
                re.compile(pattern)
                _check_pattern(pattern)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        sentence = Text(
            f"the LoRA configuration {file} can't be used: {error}",
            f"无法使用 LoRA 配置 {file}：{error}",
        )
        raise ModelUnreadable(sentence) from error
    return settings


def _check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that may take for ever: nothing can interrupt a match.

    Time grows with a power of a name's length for each repetition, and exponentially where what is
    repeated is a group.
    """
    if len(pattern) > _LONGEST_PATTERN or _REPEATED_GROUP.search(pattern):
        raise ValueError(f"the pattern {pattern[:60]!r} can't be evaluated before the run")
    if len(_REPETITION.findall(pattern)) > _MOST_REPETITIONS:
        raise ValueError(f"the pattern {pattern[:60]!r} repeats too much; name the modules instead")


def _targets(value: Any) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):
        return value
    return tuple(map(str, value))


def _layers(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(map(int, value))
