"""Peak memory of the runner, by its parts.

The peak lies in one of these moments: the weights are loaded, the logits of the largest batch are
made, the optimizer turns gradients into new weights, or on the CPU a model in 4 bits is merged.
Measured on the CPU (torch 2.13, glibc 2.36) as VmHWM of the runner's own process; the processes
that make tokens beside it for a while, of about 100 MB each, are not counted. For a GPU the same
tensors are counted in the formats that they have there, which has not been measured.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.disk import model_bytes, optimizer_state_bytes
from finetuned_daemon.planning.model_files import ModelFiles, is_lora_target
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
_BITSANDBYTES = 100_000_000
"""Resident bytes of bitsandbytes, which is loaded where it is needed only."""
_TOKENIZER_FACTOR = 12
"""Resident bytes a byte of tokenizer.json: 10 with 150,000 words, 16 with 50,000."""

_LOGITS_COPIES = 3
"""Of the logits in float32 where the model makes them all, when the loss goes backward.

The logarithm of the softmax, the gradient of the loss by it, and that by the logits.
"""
_LOGITS_AT_A_TIME, _LEAST_ROWS = 1 << 24, 16
"""Most logits that the runner makes at a time, and tokens that it makes them of at least."""
_LEFT_BEHIND = 0.8
_LEFT_BEHIND_FUSED, _LEFT_BEHIND_LORA, _LEFT_BEHIND_DROPOUT = 1.0, 1.8, 2.4
"""Shares of each module's output that stay behind as holes in the heap.

glibc's aligned allocations can't use again a hole of the same size, and PEFT's LoRA layers make
four temporary tensors where a plain module makes one. Measured 0.75 to 0.85, 0.9 to 1.2, 1.3 to 2.4
and 2.2 to 2.7.
"""
_LARGEST_HOLE = 32 << 20
"""Bytes from which on glibc takes memory from the system and gives it back at once."""
_CUDA_SLACK = 1.08
"""torch's own allocator on a GPU keeps blocks in few sizes."""
_UPDATE_COPIES, _UPDATE_COPIES_8BIT = 2, 6
"""Temporary tensors of an update, of the largest weight's size."""
_NF4_BYTES = 0.516
"""A weight in 4 bits, with its doubly quantized scales (Dettmers et al., 2023)."""
_QUANTIZING_COPIES = 4
"""Temporary float32 tensors, of the largest matrix' size, while weights are made 4 bits."""
_DEQUANTIZING_COPIES = 2
"""The same while they are computed with."""

_LAYER = re.compile(r"\.\d+\.")
_LAST_IN_BLOCK = frozenset(
    ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "dense_4h_to_h")
)
"""Modules that read what the others of their block have made."""
_MOST_SAMPLES = 4096
"""Of an optimizer step that are looked at."""


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
    *,
    learned_share: float = 1.0,
) -> Memory:
    """Peak memory of a run.

    Args:
        parameters: Of the run.
        setup: Its model.
        longest: Lengths in tokens of its longest samples, as cut, longest first.
        samples: How many there are.
        runtime_bytes: Of the training environment, once all is imported; 0: not known.
        learned_share: Of the tokens, those that are learned.
    """
    runtime = _runtime(parameters, setup, runtime_bytes or _IMPORTS)
    batch = _Batch.of(parameters, setup, longest, samples, learned_share)
    weights = _weights(setup)
    trained = 4 * setup.trained_parameters
    state = optimizer_state_bytes(setup)
    accumulates = parameters.training.gradient_accumulation_steps > 1
    activations = _activations(setup, batch) + _dequantized(setup)
    loading: Parts = {"runtime": runtime, "weights": _loading(setup)}
    head: Parts = {
        "runtime": runtime,
        "weights": weights,
        # Without accumulation they come into being as activations go.
        "gradients": trained if accumulates or setup.adapter is not None else 0,
        "optimizer": state,
        "activations": activations,
        "logits": _logits(setup, batch),
    }
    # On a GPU all tensors are updated at once, on the CPU one after the other.
    largest = trained if setup.on_gpu else _updating(setup)
    update: Parts = {
        "runtime": runtime,
        "weights": weights,
        "gradients": trained,
        "optimizer": state + largest,
        # The heap has grown, and what is free in it is not given back.
        "activations": 0 if setup.on_gpu else activations,
    }
    moments = [loading, head, update]
    if setup.four_bit and not setup.on_gpu and parameters.lora.merge_lora:
        # The model is loaded once more, beside what training leaves.
        whole = model_bytes(setup.model)
        left = _left_behind(setup, batch)
        merging: Parts = {"runtime": runtime, "weights": weights + whole, "optimizer": state}
        moments.append({**merging, "activations": left})
    parts = max(moments, key=lambda moment: sum(moment.values()))
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
    tokens: int
    """Padding included."""
    padded_length: int
    """Tokens of each sample; 0: they are not padded."""
    learned: int
    """Tokens whose logits are needed."""

    @classmethod
    def of(
        cls,
        parameters: Parameters,
        setup: Setup,
        longest: Sequence[int],
        samples: int,
        learned_share: float,
    ) -> _Batch:
        """The largest there is when the longest samples meet in one optimizer step."""
        training = parameters.training
        lengths = list(longest) or [training.max_seq_length]
        size = min(training.batch_size, samples)
        if not setup.in_rows:  # the longest sample decides how far the others are padded
            length = math.ceil(lengths[0] / _PAD_MULTIPLE) * _PAD_MULTIPLE
            return cls(size * length, length, size * length)
        step = min(size * training.gradient_accumulation_steps, samples, _MOST_SAMPLES)
        # Those whose lengths are not known are no longer than the last known.
        lengths = (lengths + [lengths[-1]] * step)[:step]
        tokens = _most_tokens(lengths, size)
        return cls(tokens, 0, math.ceil(tokens * learned_share))


def _most_tokens(lengths: Sequence[int], batch_size: int) -> int:
    """Tokens of the largest of the batches that the runner makes of an optimizer step's samples.

    The longest sample that is left goes to the batch with the fewest tokens that has room.
    """
    count = math.ceil(len(lengths) / batch_size)
    # Tokens, batch, room in it; the last batch is smaller where the samples don't fill it.
    batches = [(0, number, batch_size) for number in range(count)]
    batches[-1] = (0, count - 1, len(lengths) - batch_size * (count - 1))
    most = 0
    for length in lengths:
        tokens, number, room = heapq.heappop(batches)
        most = max(most, tokens + length)
        if room > 1:
            heapq.heappush(batches, (tokens + length, number, room - 1))
    return most


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
    if setup.four_bit and not setup.on_gpu:  # all of the file was read when the last are done
        quantizing = _QUANTIZING_COPIES * _largest_matrix(setup)
        return _weights(setup) + model.size_bytes + quantizing
    if setup.on_gpu or model.dtype == "F32":
        return _weights(setup)
    return setup.weight_bytes * model.parameters + model.size_bytes


def _largest_matrix(setup: Setup) -> int:
    """Bytes in float32 of the largest of the frozen matrices, embeddings apart."""
    model = setup.model
    embeddings = {model.input_embedding, model.output_embedding}
    sizes = (a * b for name, (a, b) in model.modules.items() if name not in embeddings)
    return 4 * max(sizes, default=0)


def _updating(setup: Setup) -> int:
    """Temporary tensors of the update of the largest weight."""
    sizes = {name: 4 * math.prod(shape) for name, shape in setup.trained.items()}
    if setup.optimizer != "adam_8bit":
        return _UPDATE_COPIES * max(sizes.values(), default=0)
    # That of the input embeddings is no update in 8 bits.
    embedding = sizes.pop(f"{setup.model.input_embedding}.weight", 0)
    return max(_UPDATE_COPIES * embedding, _UPDATE_COPIES_8BIT * max(sizes.values(), default=0))


def _logits(setup: Setup, batch: _Batch) -> int:
    model = setup.model
    words, width = model.modules.get(model.output_embedding, (model.vocab_size, model.hidden_size))
    halves = 2 if setup.on_gpu and setup.compute_bytes == 2 else 0
    if not setup.has_plain_head:
        return batch.learned * words * (4 * _LOGITS_COPIES + halves)
    rows = min(batch.learned, max(_LEAST_ROWS, _LOGITS_AT_A_TIME // max(1, words)))
    together = rows * words * (4 + 2 * halves)
    if setup.adapter is not None:
        return together
    # The gradient of the head itself is made here, part by part.
    gradient = 4 * words * width
    return together + 2 * gradient


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


def _dequantized(setup: Setup) -> int:
    """A 4-bit matrix becomes a whole one for as long as it is computed with."""
    return _DEQUANTIZING_COPIES * _largest_matrix(setup) if setup.four_bit else 0


def _layer_bytes(setup: Setup, batch: _Batch) -> int:
    """Activations of one layer of a decoder, as torch was seen to keep them for the way back.

    What both norms read, with trained norms also what they scale; what trained modules read; the
    attention's queries, keys, values and output; the feed-forward's inner activations.
    """
    model = setup.model
    is_gated = any(name.endswith(("gate_proj", "gate_up_proj")) for name in model.modules)
    norms = 2 if setup.adapter is not None else 4
    attention = 2 * (model.heads + model.kv_heads) * model.head_size
    inner = (3 if is_gated else 2) * model.intermediate_size
    # Norms compute in float32 whatever the rest does.
    floats = 4 * norms * model.hidden_size + setup.compute_bytes * (attention + inner)
    mask = 4 * batch.padded_length  # a row of it for each token
    return int(batch.tokens * (floats + mask + _read_bytes(setup) / max(1, model.layers)))


def _read_bytes(setup: Setup) -> int:
    """Bytes a token that the trained modules of all layers keep of what they read."""
    adapter, size = setup.adapter, setup.compute_bytes
    shared = dict[tuple[str, bool], int]()
    own = ranks = 0
    for name, (_, width) in _layer_modules(setup.model):
        if adapter is not None and name not in adapter.ranks:
            continue
        block, _, leaf = name.rpartition(".")
        # Modules that begin a block read the same.
        shared[block, leaf in _LAST_IN_BLOCK] = width
        own += width
        ranks += adapter.ranks[name] if adapter is not None else 0
    if adapter is None or not (adapter.dropout or (setup.on_gpu and not setup.is_fused)):
        return size * (sum(shared.values()) + ranks)
    # A copy for each; with dropout also which of it was dropped, on the CPU as numbers.
    mask = (1 if setup.on_gpu else 4) if adapter.dropout else 0
    return own * (size + mask) + size * ranks


def _left_behind(setup: Setup, batch: _Batch) -> int:
    adapter = setup.adapter
    of_adapted = _LEFT_BEHIND
    if adapter is not None:
        of_adapted = _LEFT_BEHIND_DROPOUT if adapter.dropout else _LEFT_BEHIND_LORA
        if setup.is_fused:
            of_adapted = _LEFT_BEHIND_FUSED
    total = 0.0
    for name, (width, _) in _layer_modules(setup.model):
        size = 4 * batch.tokens * width
        if size < _LARGEST_HOLE:
            is_adapted = adapter is not None and name in adapter.ranks
            total += size * (of_adapted if is_adapted else _LEFT_BEHIND)
    return int(total)


def _layer_modules(model: ModelFiles) -> Iterator[tuple[str, tuple[int, int]]]:
    """The matrices of the layers, by name: those that every token goes through."""
    for name, shape in model.modules.items():
        if _LAYER.search(name) and is_lora_target(name):
            yield name, shape
