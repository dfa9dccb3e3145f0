"""What parameters ask of the training environment. Imported by daemon and runner."""

from __future__ import annotations

from finetuned_daemon.parameters.models import Parameters


def needs_bitsandbytes(parameters: Parameters) -> bool:
    """Whether they ask for 4-bit weights or an 8-bit optimizer."""
    optimization = parameters.optimization
    return (
        optimization.use_qlora
        or optimization.use_8bit_optimizer
        or parameters.training.optimizer.endswith("8bit")
    )
