"""What is exported: the settings of a task, or of one of its runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from finetuned_daemon.parameters.field import info_of
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.parameters.needs import in_effect
from finetuned_daemon.runs.contract import TrainingType


@dataclass(frozen=True)
class Settings:
    """A task's settings, or those that one of its runs had."""

    task: str
    """Display name."""
    run: int
    """Number of the run; 0: the task as it is now."""
    training_type: TrainingType
    parameters: Parameters
    device: str
    """`cpu`, `cuda:N`; empty: the first GPU, else the CPU."""

    @property
    def origin(self) -> str:
        """Whose settings they are, as part of a sentence."""
        task = f'task "{self.task.replace(chr(34), chr(39))}"'
        whose = f"run {self.run} of {task}" if self.run else task
        return "".join(c if c.isprintable() else " " for c in whose).replace("\\", "/")

    @property
    def file_stem(self) -> str:
        """What a file of them is called, without its suffix."""
        name = re.sub(r"[^\w-]+", "_", self.task).strip("_") or "task"
        return f"{name}-run-{self.run}" if self.run else name

    @cached_property
    def in_effect(self) -> dict[str, Any]:
        """Values by path of what takes effect."""
        return in_effect(self.parameters, self.training_type.value.lower())

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """Values by path of what is not at its default, whether it takes effect or not."""
        return {path: value for path, value in self._values() if value != default_of(path)}

    def _values(self) -> list[tuple[str, Any]]:
        return [
            (f"{section}.{name}", getattr(getattr(self.parameters, section), name))
            for section, model in SECTIONS.items()
            for name in model.model_fields
        ]


def default_of(path: str) -> Any:
    """The default of a parameter."""
    section, _, name = path.partition(".")
    return SECTIONS[section].model_fields[name].get_default()


def label_of(path: str) -> str:
    """What a form calls a parameter, in English."""
    section, _, name = path.partition(".")
    return info_of(SECTIONS[section].model_fields[name]).label.en
