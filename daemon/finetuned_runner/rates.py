"""Learning rates and weight decays that a task sets, where a checkpoint has brought its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Those of an optimizer's groups of weights, as the parameters have made it.

    torch restores them with the optimizer's and the scheduler's state, so that a changed
    `training.learning_rate` or `training.weight_decay` would go unheard on a resume. Where they are
    unchanged, putting them back changes no bit.
    """

    groups: tuple[tuple[float, float], ...]
    """Peak learning rate and weight decay of each group."""

    @classmethod
    def of(cls, optimizer: Any) -> Rates:
        """Those of a new optimizer with its scheduler."""
        return cls(
            tuple((group["initial_lr"], group["weight_decay"]) for group in optimizer.param_groups)
        )

    def restore(self, optimizer: Any, scheduler: Any) -> None:
        """Puts them back, at the step of a schedule (a LambdaLR) that has been restored."""
        scheduler.base_lrs = [rate for rate, _ in self.groups]
        rates = [
            rate * factor(scheduler.last_epoch)
            for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, (peak, decay), rate in zip(
            optimizer.param_groups, self.groups, rates, strict=True
        ):
            group["initial_lr"], group["weight_decay"], group["lr"] = peak, decay, rate
        scheduler._last_lr = rates  # noqa: SLF001 - torch has no other way
