"""LoRA layers in as few passes over memory as their sum allows.

PEFT computes `base(x) + B(A(x)) * scaling` in four steps, each of which writes a tensor as large as
the output and keeps it for the backward pass. Here the product with B is added in place, and the
backward pass is written out: the same sums, less memory, a twentieth of the time less on a CPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear


class _LoraLinear(torch.autograd.Function):
    """`x W^T + bias + scaling (x A^T) B^T`, with W and bias frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        out.addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        rows, inner, weight, a, b = ctx.saved_tensors
        out = gradient.reshape(-1, gradient.shape[-1])
        to_inner = (out @ b).mul_(ctx.scaling)
        to_b = (out.T @ inner).mul_(ctx.scaling)
        to_a = to_inner.T @ rows
        to_x = None
        if ctx.needs_input_grad[0]:
            to_x = (out @ weight).addmm_(to_inner, a).view(ctx.shape)
        return to_x, None, None, to_a, to_b, None


def fuse(model: PeftModel) -> int:
    """Lets the LoRA layers of a model compute that way where it is the same; returns how many do.

    A layer with dropout, DoRA, quantized weights or anything else of its own stays PEFT's.
    """
    fused = 0
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.forward = _forward_of(module)  # type: ignore[method-assign]
            fused += 1
    return fused


def _is_plain(layer: Any) -> bool:
    names = list(layer.lora_A.keys())
    if len(names) != 1 or type(layer.base_layer) is not torch.nn.Linear:
        return False
    (name,) = names
    dropout = layer.lora_dropout[name]
    return (
        (isinstance(dropout, torch.nn.Identity) or getattr(dropout, "p", 1.0) == 0.0)
        and not layer.use_dora.get(name, False)
        and not layer.lora_variant
        and type(layer.lora_A[name]) is type(layer.lora_B[name]) is torch.nn.Linear
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and not layer.fan_in_fan_out
        and not any(parameter.requires_grad for parameter in layer.base_layer.parameters())
    )


def _forward_of(layer: Any) -> Any:
    peft_forward, apply = layer.forward, cast("Any", _LoraLinear.apply)
    (name,) = layer.lora_A.keys()

    def forward(x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        base, a, b = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        if (
            arguments
            or options
            or layer.disable_adapters
            or layer.merged
            or not x.dtype == base.weight.dtype == a.dtype == b.dtype
            or torch.is_autocast_enabled(x.device.type)
        ):
            return cast("torch.Tensor", peft_forward(x, *arguments, **options))
        scaling = layer.scaling[name]
        result: torch.Tensor = apply(x, base.weight, base.bias, a, b, scaling)
        return result

    return forward
