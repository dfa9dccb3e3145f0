"""The language model's head and the loss, at trained positions alone and a few at a time.

With a vocabulary of 150,000, the logits of 4,096 tokens in float32 take 2.5 GB, their gradient as
much again. Prompts need none; and of the rest only some rows at a time: their loss and the gradient
that it sends back are computed at once, and the logits are gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

_LOGITS = 1 << 24
"""Most logits at a time: 64 MB in float32."""


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias` with `targets`, in float32.

    The same as `cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")`, in
    the memory of a few rows; under autocast the products are in its format.

    Args:
        hidden: (tokens, hidden size).
        weight: (vocabulary, hidden size).
        bias: (vocabulary), or None.
        targets: (tokens), int64.
    """
    apply: Any = _HeadLoss.apply
    result: torch.Tensor = apply(hidden, weight, bias, targets, torch.is_grad_enabled())
    return result


class _HeadLoss(torch.autograd.Function):
    """Computes gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        with_gradients: bool,
    ) -> torch.Tensor:
        wants = [with_gradients and wanted for wanted in ctx.needs_input_grad[:3]]
        to_hidden = torch.empty_like(hidden) if wants[0] else None
        to_weight = torch.zeros_like(weight) if wants[1] else None
        to_bias = torch.zeros_like(bias) if wants[2] and bias is not None else None
        rows = max(16, _LOGITS // weight.shape[0])
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            chosen_rows = slice(start, start + rows)
            part, wanted = hidden[chosen_rows], targets[chosen_rows]
            products = functional.linear(part, weight, bias)
            dtype = products.dtype
            logits = products.float()
            # All in place, down to the gradient: softmax, less 1 at the target.
            logits.sub_(logits.amax(dim=1, keepdim=True))
            chosen = logits.gather(1, wanted[:, None])
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if not any(wants):
                continue
            gradient = logits.div_(sums)
            gradient.scatter_add_(1, wanted[:, None], gradient.new_full((len(wanted), 1), -1.0))
            back = gradient.to(dtype)
            if to_hidden is not None:
                to_hidden[chosen_rows] = back @ weight
            if to_weight is not None:
                to_weight += (back.T @ part).to(to_weight.dtype)
            if to_bias is not None:
                to_bias += gradient.sum(dim=0).to(to_bias.dtype)
            # Else they would live on beside the next ones.
            del products, logits, gradient, back
        ctx.save_for_backward(*(t for t in (to_hidden, to_weight, to_bias) if t is not None))
        ctx.has = [tensor is not None for tensor in (to_hidden, to_weight, to_bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        saved = iter(ctx.saved_tensors)
        # In place: the graph is gone after this, and a second one of the head's size is a lot.
        found = [next(saved).mul_(gradient) if has else None for has in ctx.has]
        return *found, None, None
