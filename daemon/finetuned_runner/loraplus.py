"""LoRA+ (https://arxiv.org/abs/2402.12354): the B matrices learn faster than the A matrices."""

from __future__ import annotations

from typing import Any

import torch


def speed_up_b(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """Gives the B matrices groups of their own, with `ratio` times the learning rate.

    Weight decay and all else stay as they are. They come last, so that the rate that is reported,
    the first group's, is the one that was asked for. LoRA on embeddings has no B in this sense.

    Args:
        optimizer: Before its first step and before its schedule is made.
        model: Whose parameters it has.
        ratio: From 1 on.
    """
    of_b = {id(p) for name, p in model.named_parameters() if ".lora_B." in name}
    more: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        fast = [p for p in group["params"] if id(p) in of_b]
        if fast:
            group["params"] = [p for p in group["params"] if id(p) not in of_b]
            more.append({**group, "params": fast, "lr": group["lr"] * ratio})
    for group in more:
        optimizer.add_param_group(group)
