"""PiSSA (https://arxiv.org/abs/2404.02948): LoRA that begins with the principal components.

They move from the frozen weights W into the adapter, W = R + s B₀A₀, so that the trained adapter BA
belongs to R and not to the model that everybody has. What is saved is therefore the difference to
where it began, as one LoRA of twice the rank for the original model:

    R + s BA = W + s (BA - B₀A₀) = W + s [B, -B₀] [A; A₀]

Nothing of PiSSA is left in it: every program that knows LoRA can use it. It also holds all that a
resumed run needs, to the bit: A, B, and with A₀ and B₀ the same R.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import load_file, save_file

from finetuned_daemon.runs.contract import EndReason
from finetuned_runner.failures import RunFailed

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_logger = logging.getLogger(__name__)

_ADAPTER = "default"
_NITER = "pissa_niter_"


def is_pissa(config: LoraConfig) -> bool:
    """Whether a configuration asks for it: `pissa`, or `pissa_niter_N` for an SVD of N rounds."""
    init: object = config.init_lora_weights
    return isinstance(init, str) and init.startswith("pissa")


def begin(model: PeftModel, init: str, *, resumes: bool) -> None:
    """Moves the principal components of the weights into the adapter.

    Args:
        model: With a fresh adapter.
        init: As in the configuration.
        resumes: `restore` will do it, with the components of a checkpoint.

    Raises:
        RunFailed: MODEL_UNLOADABLE, if the adapter is on something else than a linear layer.
    """
    for name, layer in _layers(model):
        weight = _weight(layer)
        if not isinstance(layer, Linear) or not weight.is_floating_point():
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"PiSSA can't begin with {name}: it takes linear layers that are not quantized; "
                "leave it out of lora.lora_target_modules, or set extensions.lora_init to default.",
            )
        down, up = _matrices(layer)
        if not resumes:
            _logger.info("decomposing the weight of %s", name)
            first, second = _components(layer, init)
            down.data, up.data = first, second
        # Buffers move to the device with the model, and are in no state dict.
        layer.register_buffer("pissa_a", down.data.clone(), persistent=False)
        layer.register_buffer("pissa_b", up.data.clone(), persistent=False)
        if not resumes:
            _take_out(layer)


def is_used(model: object) -> bool:
    """Whether a model's adapter began so."""
    return isinstance(model, PeftModel) and any(_is_begun(layer) for _, layer in _layers(model))


def convert(model: object, folder: Path) -> None:
    """Turns an adapter that was saved into one for the original model; no other is touched."""
    if not isinstance(model, PeftModel) or not is_used(model):
        return
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, layer in _layers(model):
        first, second = _begun(layer)
        down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        tensors[down] = torch.cat([tensors[down], first.to(tensors[down])], dim=0)
        tensors[up] = torch.cat([tensors[up], -second.to(tensors[up])], dim=1)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_bytes())
    path.write_text(json.dumps(config | converted(config), indent=2, sort_keys=True))


def converted(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that are others once the adapter is converted."""
    # The scale stays: alpha / r, or alpha / sqrt(r).
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {k: 2 * v for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: factor * v for k, v in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }


def converted_shape(name: str, shape: list[int]) -> list[int]:
    """The shape of a tensor of the adapter once it is converted."""
    if name.endswith("lora_A.weight"):
        return [2 * shape[0], *shape[1:]]
    return [shape[0], 2 * shape[1]] if name.endswith("lora_B.weight") else shape


def restore(model: PeftModel, folder: Path) -> None:
    """Brings adapter and frozen weights to where they were when a converted adapter was saved.

    The frozen weights must be the original ones.
    """
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for name, layer in _layers(model):
            down, up = _matrices(layer)
            first, second = _begun(layer)
            rank = len(down)
            saved_down, saved_up = (
                tensors[f"{name}.lora_A.weight"],
                tensors[f"{name}.lora_B.weight"],
            )
            down.copy_(saved_down[:rank])
            up.copy_(saved_up[:, :rank])
            first.copy_(saved_down[rank:])
            second.copy_(-saved_up[:, rank:])
            _take_out(layer)


# --- layers


def _layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _weight(layer: LoraLayer) -> torch.Tensor:
    base: Any = layer.get_base_layer()
    weight: torch.Tensor = base.weight
    return weight


def _matrices(layer: LoraLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A, of shape (rank, inputs), and B, of shape (outputs, rank)."""
    down: Any = layer.lora_A[_ADAPTER]
    up: Any = layer.lora_B[_ADAPTER]
    return down.weight, up.weight


def _is_begun(layer: LoraLayer) -> bool:
    return hasattr(layer, "pissa_a")


def _begun(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ and B₀."""
    buffers = cast("Any", layer)
    return buffers.pissa_a, buffers.pissa_b


def _components(layer: Linear, init: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A₀ and B₀: the largest singular components, shared out equally between the two."""
    weight = _weight(layer).detach()
    # The decomposition of a large matrix takes a CPU minutes and a GPU seconds.
    device = torch.device("cuda") if torch.cuda.is_available() else weight.device
    matrix = (weight.T if layer.fan_in_fan_out else weight).to(device, torch.float32)
    rank = len(_matrices(layer)[0])
    if init.startswith(_NITER):
        left, values, right = torch.svd_lowrank(matrix, rank, niter=int(init[len(_NITER) :]))
        right = right.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = torch.sqrt(values[:rank] / layer.scaling[_ADAPTER])
    first, second = root[:, None] * right[:rank], left[:, :rank] * root
    return first.contiguous().to(weight.device), second.contiguous().to(weight.device)


def _take_out(layer: LoraLayer) -> None:
    """Leaves in the frozen weights what A₀ and B₀ don't hold; the same to the bit at every call."""
    weight = _weight(layer)
    first, second = _begun(layer)
    product = layer.scaling[_ADAPTER] * (second.float() @ first.float())
    if cast("Any", layer).fan_in_fan_out:
        product = product.T
    weight.data = (weight.data.float() - product).to(weight.dtype)
