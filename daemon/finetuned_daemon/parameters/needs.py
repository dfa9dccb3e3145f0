"""What parameters ask of the training environment, and which of them take effect.

Imported by daemon and runner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetuned_daemon.parameters.field import Condition, info_of
from finetuned_daemon.parameters.models import SECTIONS, Parameters

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


@dataclass(frozen=True)
class Package:
    """A package that training needs for an extension alone."""

    distributions: tuple[str, ...]
    """Names by which it is installed: any of them will do, the first is the usual one."""
    modules: tuple[str, ...]
    """Names by which they are imported."""

    @property
    def name(self) -> str:
        """The usual name."""
        return self.distributions[0]


FLASH_ATTENTION = Package(("flash-attn",), ("flash_attn",))
LIGER_KERNEL = Package(("liger-kernel",), ("liger_kernel",))
REPORT_TO = {
    "tensorboard": Package(("tensorboard", "tensorboardX"), ("tensorboard", "tensorboardX")),
    "wandb": Package(("wandb",), ("wandb",)),
    "mlflow": Package(("mlflow", "mlflow-skinny"), ("mlflow",)),
    "trackio": Package(("trackio",), ("trackio",)),
    "swanlab": Package(("swanlab",), ("swanlab",)),
}
"""By the value of `extensions.report_to`."""

EXTRA_PACKAGES = (FLASH_ATTENTION, LIGER_KERNEL, *REPORT_TO.values())


def extra_packages(parameters: Parameters) -> dict[str, Package]:
    """The packages that extensions need, by the path of the parameter that asks for them."""
    extensions = parameters.extensions
    needed = dict[str, Package]()
    if extensions.attn_implementation == "flash_attention_2":
        needed["extensions.attn_implementation"] = FLASH_ATTENTION
    if extensions.use_liger_kernel:
        needed["extensions.use_liger_kernel"] = LIGER_KERNEL
    if extensions.report_to != "none":
        needed["extensions.report_to"] = REPORT_TO[extensions.report_to]
    return needed


def in_effect(parameters: Parameters, training_type: str) -> dict[str, Any]:
    """Values by path, in the order of the form, of the parameters that the others leave a say.

    Args:
        parameters: All of them.
        training_type: `sft` or `pretrain`.
    """
    values: dict[str, Any] = {"training_type": training_type}
    fields = {}
    for section, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            fields[f"{section}.{name}"] = info_of(field)
            values[f"{section}.{name}"] = getattr(getattr(parameters, section), name)

    def holds(condition: Condition) -> bool:
        return (values[condition.field] in condition.values) is not condition.is_negated

    return {
        path: values[path]
        for path, info in fields.items()
        if all(map(holds, (*info.visible_when, *info.enabled_when)))
    }
