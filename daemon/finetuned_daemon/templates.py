"""Templates: what they are, and the two presets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import TrainingType


@dataclass(frozen=True, kw_only=True)
class Template:
    """A named set of parameters. Times are microseconds since the epoch; 0 for presets."""

    key: int = 0
    """Row of the database; 0: a preset."""
    template_id: str
    display_name: str
    training_type: TrainingType
    parameters: Parameters
    create_time: int = 0
    update_time: int = 0
    revision: int = 1

    @property
    def name(self) -> str:
        """Resource name."""
        return f"templates/{self.template_id}"

    @property
    def is_preset(self) -> bool:
        """It is always there and never changes."""
        return self.key == 0

    @property
    def etag(self) -> str:
        """Changes with every change."""
        return f'"{self.key}-{self.revision}"'


@cache
def presets() -> tuple[Template, ...]:
    """Always there, never changed; in the order in which they are listed.

    Made when they are asked for: a start of the daemon needs none.
    """
    return (
        Template(
            template_id="sft",
            display_name="SFT",
            training_type=TrainingType.SFT,
            parameters=Parameters(),
        ),
        Template(
            template_id="pretrain",
            display_name="Pretrain",
            training_type=TrainingType.PRETRAIN,
            parameters=Parameters.model_validate({"lora": {"use_lora": False}}),
        ),
    )


def preset_of(training_type: TrainingType) -> Template:
    """The preset of a training type."""
    return next(preset for preset in presets() if preset.training_type is training_type)
