"""Peak memory of the runner, by its parts.

The peak lies in one of three moments: the weights are loaded, the largest batch has been computed
and goes backward, or the optimizer turns gradients into new weights. Measured on the CPU (torch
2.13, glibc 2.36) as VmHWM over models of 77 to 134 million parameters, LoRA and full, 128 to 2,048
tokens a batch: off by 15 % at most; a test repeats it in small. For a GPU the same tensors are
counted in the formats that they have there, which has not been measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.disk import optimizer_state_bytes
from finetuned_daemon.planning.model_files import ModelFiles
from finetuned_daemon.planning.setup import Setup

PartName = Literal["weights", "gradients", "optimizer", "activations", "logits", "runtime"]
Parts = dict[PartName, int]

_PAD_MULTIPLE = 8
"""Batches are padded to a multiple of this."""

_IMPORTS = 374_000_000
"""Resident bytes of Python, torch for the CPU, transformers and peft; 744 MB with torch for CUDA.

Where the training environment was asked, it has said how many.
"""
_FIRST_USE = 31_000_000
"""What they take beyond that in a run of a model of 40,000 weights."""
_CUDA_RUNTIME = 600_000_000
"""Bytes of a GPU that CUDA's context and the workspaces of cuBLAS take."""
_BITSANDBYTES = 110_000_000
"""Resident bytes of bitsandbytes, which is loaded where it is needed only."""
_TOKENIZER_FACTOR = 12
"""Resident bytes a byte of tokenizer.json: 10 with 150,000 words, 16 with 50,000."""

_LOGITS_COPIES = 3
"""Of batch x length x vocabulary in float32, when the loss goes backward.

The logarithm of the softmax, the gradient of the loss by it, and that by the logits.
"""
_LEFT_BEHIND_FULL, _LEFT_BEHIND_LORA = 0.6, 1.8
"""Shares of each module's output that stay behind as holes in the heap.

glibc's aligned allocations can't use again a hole of the same size; LoRA makes four temporary
tensors where a plain module makes one. Measured 0.4 to 0.9, and 1.3 to 2.4.
"""
_LARGEST_HOLE = 32 << 20
"""Bytes from which on glibc takes memory from the system and gives it back at once."""
_CUDA_SLACK = 1.08
"""torch's own allocator on a GPU keeps blocks in few sizes."""
_UPDATE_COPIES = 2
"""Temporary tensors of an update, of the largest weight's size."""
_NF4_BYTES = 0.516
"""A weight in 4 bits, with its doubly quantized scales (Dettmers et al., 2023)."""

_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory in bytes, and what it is made of."""

    parts: Parts

    @property
    def peak_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def plan_memory(
    parameters: Parameters,
    setup: Setup,
    longest: Sequence[int],
    samples: int,
    runtime_bytes: int = 0,
) -> Memory:
    """Peak memory of a run.

    Args:
        parameters: Of the run.
        setup: Its model.
        longest: Lengths in tokens of its longest samples, as cut.
        samples: How many there are.
        runtime_bytes: Of the training environment, once all is imported; 0: not known.
    """
    runtime = _runtime(parameters, setup, runtime_bytes or _IMPORTS)
    batch = _Batch.of(parameters, longest, samples)
    weights = _weights(setup)
    trained = 4 * setup.trained_parameters
    state = optimizer_state_bytes(setup)
    accumulates = parameters.training.gradient_accumulation_steps > 1
    loading: Parts = {"runtime": runtime, "weights": _loading(setup)}
    backward: Parts = {
        "runtime": runtime,
        "weights": weights,
        # Without accumulation they come into being as activations go.
        "gradients": trained if accumulates or setup.adapter is not None else 0,
        "optimizer": state,
        "activations": _activations(setup, batch),
        "logits": _logits(setup, batch),
    }
    # On a GPU all tensors are updated at once, on the CPU one after the other.
    largest = trained if setup.on_gpu else _UPDATE_COPIES * _largest(setup)
    update: Parts = {
        "runtime": runtime,
        "weights": weights,
        "gradients": trained,
        "optimizer": state + largest,
    }
    parts = max(loading, backward, update, key=lambda moment: sum(moment.values()))
    empty: Parts = {
        "weights": 0,
        "gradients": 0,
        "optimizer": 0,
        "activations": 0,
        "logits": 0,
        "runtime": 0,
    }
    return Memory(parts=empty | parts)


@dataclass(frozen=True)
class _Batch:
    samples: int
    length: int
    """Tokens, padding included."""

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @classmethod
    def of(cls, parameters: Parameters, longest: Sequence[int], samples: int) -> _Batch:
        """The largest there can be: the longest sample decides how far the others are padded."""
        length = max(longest, default=parameters.training.max_seq_length)
        padded = math.ceil(length / _PAD_MULTIPLE) * _PAD_MULTIPLE
        return cls(min(parameters.training.batch_size, samples), padded)


# --- the parts


def _runtime(parameters: Parameters, setup: Setup, imports: int) -> int:
    if setup.on_gpu:
        return _CUDA_RUNTIME
    folder = Path(parameters.data.tokenizer_path or setup.model.path)
    file = folder / "tokenizer.json"
    tokenizer = _TOKENIZER_FACTOR * file.stat().st_size if file.is_file() else 0
    needs = setup.four_bit or setup.optimizer == "adam_8bit"
    return imports + _FIRST_USE + tokenizer + (_BITSANDBYTES if needs else 0)


def _weights(setup: Setup) -> int:
    model = setup.model
    adapter = 4 * setup.adapter.parameters if setup.adapter is not None else 0
    embeddings = {model.input_embedding, model.output_embedding}
    if setup.four_bit:
        matrices = sum(
            a * b for name, (a, b) in model.modules.items() if name not in embeddings
        ) or int(0.9 * model.parameters)
        # What stays is made float32 for training.
        rest = 4 * (model.parameters - matrices)
        return int(_NF4_BYTES * matrices) + rest + adapter
    total = setup.weight_bytes * model.parameters
    if setup.on_gpu:
        # Mixed precision keeps a half copy of the matrices that it trains.
        return total + adapter + (2 * model.parameters if _makes_half_copies(setup) else 0)
    if setup.adapter is not None and model.dtype == "F32" and not model.tie_word_embeddings:
        # The file itself is the memory: of the embeddings only the rows that occur are read.
        a, b = model.modules.get(model.input_embedding, (0, 0))
        total -= 4 * a * b
    return total + adapter


def _makes_half_copies(setup: Setup) -> bool:
    return setup.compute_bytes == 2 and setup.weight_bytes == 4 and not setup.four_bit


def _loading(setup: Setup) -> int:
    """Weights of another format are converted while their file is held in memory."""
    model = setup.model
    if setup.on_gpu or model.dtype == "F32":
        return _weights(setup)
    return setup.weight_bytes * model.parameters + model.size_bytes


def _largest(setup: Setup) -> int:
    return 4 * max((math.prod(shape) for shape in setup.trained.values()), default=0)


def _logits(setup: Setup, batch: _Batch) -> int:
    model = setup.model
    words = model.modules.get(model.output_embedding, (model.vocab_size, 0))[0]
    halves = 2 if setup.on_gpu and setup.compute_bytes == 2 else 0
    return batch.tokens * words * (4 * _LOGITS_COPIES + halves)


def _activations(setup: Setup, batch: _Batch) -> int:
    """What the layers keep for the way back, and what their work leaves behind."""
    model = setup.model
    layer = _layer_bytes(setup, batch)
    if setup.checkpointing:  # the input of each layer is kept, one at a time is computed again
        kept = layer + batch.tokens * model.layers * model.hidden_size * setup.compute_bytes
    else:
        kept = layer * model.layers
    if setup.on_gpu:
        return int(kept * _CUDA_SLACK)
    return kept + _left_behind(setup, batch)


def _layer_bytes(setup: Setup, batch: _Batch) -> int:
    """Activations of one layer of a decoder, as torch was seen to keep them for the way back.

    In widths of the residual stream: input and output of both norms, with trained norms also what
    they scale; queries, keys, values and output of the attention, keys and values repeated to as
    many heads; and in the feed-forward its inner activations.
    """
    model = setup.model
    is_gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name in model.modules)
    norms = 4 if setup.adapter is not None else 6
    attention = 4 * model.heads * model.head_size
    inner = (4 if is_gated else 3) * model.intermediate_size
    # Norms compute in float32 whatever the rest does.
    floats = 4 * norms * model.hidden_size + setup.compute_bytes * (attention + inner)
    mask = 4 * batch.samples * batch.length**2
    return batch.tokens * floats + mask


def _left_behind(setup: Setup, batch: _Batch) -> int:
    adapted = set[str]()
    if setup.adapter is not None:
        adapted = {name.split(".lora_")[0] for name in setup.adapter.trained}
    total = 0.0
    for name, output in _outputs(setup.model):
        size = 4 * batch.tokens * output
        if size < _LARGEST_HOLE:
            has_lora = f"base_model.model.{name}" in adapted
            total += size * (_LEFT_BEHIND_LORA if has_lora else _LEFT_BEHIND_FULL)
    return int(total)


def _outputs(model: ModelFiles) -> list[tuple[str, int]]:
    """Width of the output of each matrix of the layers, by name."""
    return [(name, shape[0]) for name, shape in model.modules.items() if _LAYER.search(name)]
