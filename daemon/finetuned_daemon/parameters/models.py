"""The 49 parameters of a task, and the extensions, as pydantic models, by section.

Each stands once, as a field in the module of its section: type, default, range, choices, labels,
help, fold, unit and conditions. Field names and types are those of `finetuned/v1/parameters.proto`;
a test compares. Imported by daemon and runner.
"""

from __future__ import annotations

from pydantic import Field

from finetuned_daemon.parameters.data import DataParameters
from finetuned_daemon.parameters.extensions import ExtensionParameters
from finetuned_daemon.parameters.field import Section
from finetuned_daemon.parameters.general import GeneralParameters, LoggingParameters
from finetuned_daemon.parameters.lora import LoraParameters
from finetuned_daemon.parameters.optimization import OptimizationParameters
from finetuned_daemon.parameters.training import IntervalStrategy, TrainingParameters

__all__ = [
    "EXTENSIONS",
    "SECTIONS",
    "DataParameters",
    "ExtensionParameters",
    "GeneralParameters",
    "IntervalStrategy",
    "LoggingParameters",
    "LoraParameters",
    "OptimizationParameters",
    "Parameters",
    "TrainingParameters",
]


class Parameters(Section):
    """All parameters, in their sections. An absent field has its default."""

    data: DataParameters = Field(default_factory=DataParameters)
    training: TrainingParameters = Field(default_factory=TrainingParameters)
    lora: LoraParameters = Field(default_factory=LoraParameters)
    optimization: OptimizationParameters = Field(default_factory=OptimizationParameters)
    logging: LoggingParameters = Field(default_factory=LoggingParameters)
    general: GeneralParameters = Field(default_factory=GeneralParameters)
    extensions: ExtensionParameters = Field(default_factory=ExtensionParameters)


EXTENSIONS = "extensions"
"""The section of what goes beyond the specification; off by default."""

SECTIONS: dict[str, type[Section]] = {
    "data": DataParameters,
    "training": TrainingParameters,
    "lora": LoraParameters,
    "optimization": OptimizationParameters,
    "logging": LoggingParameters,
    "general": GeneralParameters,
    EXTENSIONS: ExtensionParameters,
}
"""Sections in the order of the form, by their name in the API."""
