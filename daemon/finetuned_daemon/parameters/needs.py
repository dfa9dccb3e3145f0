"""What parameters ask of the training environment. Imported by daemon and runner."""

from __future__ import annotations

from finetuned_daemon.parameters.models import Parameters

_EIGHT_BIT_FORMS = {"adamw_torch": "adamw_8bit"}


def effective_optimizer(parameters: Parameters) -> str:
    """The optimizer that runs: the 8-bit form of the one chosen where that is asked for and is."""
    name: str = parameters.training.optimizer
    if parameters.optimization.use_8bit_optimizer:
        return _EIGHT_BIT_FORMS.get(name, name)
    return name


def needs_bitsandbytes(parameters: Parameters) -> bool:
    """Whether they ask for 4-bit weights or an 8-bit optimizer."""
    optimization = parameters.optimization
    return (
        optimization.use_qlora
        or optimization.use_8bit_optimizer
        or parameters.training.optimizer.endswith("8bit")
    )
