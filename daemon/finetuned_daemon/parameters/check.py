"""Checks parameters: ranges, rules across fields, and the files and folders they name.

Finds all violations, not the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetuned_daemon.errors import Violation
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.parameters.world import check_world
from finetuned_daemon.runs.contract import TrainingType

_8BIT = ("adamw_8bit", "paged_adamw_8bit")


def check(
    given: Mapping[str, Mapping[str, Any]],
    training_type: TrainingType,
    device: str,
    *,
    complete: bool,
) -> tuple[Parameters | None, list[Violation]]:
    """Resolves defaults and judges everything at once. Reads files.

    Not for the event loop's thread.

    Args:
        given: Values by section and name; absent ones get their default.
        training_type: Decides about data format and the LoRA section.
        device: Device that the run would use.
        complete: Demand what a start needs.

    Returns:
        The parameters, None where a field is wrong in itself, and all violations.
    """
    violations = list[Violation]()
    good = {section: dict(values) for section, values in given.items()}
    try:
        parameters = Parameters.model_validate(good)
        sound = True
    except ValidationError as error:
        sound = False
        for detail in error.errors():
            violations.append(_violation(detail))
            section, name = str(detail["loc"][0]), str(detail["loc"][1])
            good[section].pop(name, None)
        # The rest is judged all the same: everybody gets all of their mistakes in one answer.
        parameters = Parameters.model_validate(good)
    if complete:
        violations += [
            Violation(f"{section}.{name}", "is required to start", "REQUIRED")
            for section, model in SECTIONS.items()
            for name, info in model.model_fields.items()
            if _extra(info)["required"] and getattr(getattr(parameters, section), name) is None
            if not any(v.field == f"{section}.{name}" for v in violations)
        ]
    named = {violation.field for violation in violations}
    more = _check_rules(parameters, training_type, device) + check_world(parameters, training_type)
    violations += [violation for violation in more if violation.field not in named]
    return (parameters if sound else None), violations


def _check_rules(p: Parameters, training_type: TrainingType, device: str) -> list[Violation]:
    """Rules across fields."""
    found = list[Violation]()

    def add(field: str, message: str, reason: str) -> None:
        found.append(Violation(field, message, reason))

    is_sft = training_type is TrainingType.SFT
    if p.optimization.fp16 and p.optimization.bf16:
        add("optimization.bf16", "excludes fp16; set optimization.fp16 to false", "CONFLICT")
    if p.data.eval_file and p.data.eval_ratio:
        add("data.eval_ratio", "must be 0 where data.eval_file is given", "CONFLICT")
    if p.data.eval_ratio == 1:
        add(
            "data.eval_ratio", "must be less than 1, or nothing is left to train on", "OUT_OF_RANGE"
        )
    has_eval = bool(p.data.eval_file or p.data.eval_ratio)
    if p.training.eval_strategy != "no" and not has_eval:
        add(
            "training.eval_strategy",
            "needs evaluation data: give data.eval_file or data.eval_ratio, or set it to no",
            "EVAL_DATA_MISSING",
        )
    if p.training.early_stopping_patience and p.training.eval_strategy == "no":
        add(
            "training.early_stopping_patience",
            "counts evaluations: set training.eval_strategy to steps or epoch, or this to 0",
            "EVAL_STRATEGY_MISSING",
        )
    if p.training.max_steps == 0:
        add("training.max_steps", "must be -1 (unlimited) or at least 1, not 0", "OUT_OF_RANGE")
    if p.optimization.use_qlora and is_sft and not p.lora.use_lora:
        add("optimization.use_qlora", "needs lora.use_lora", "CONFLICT")
    if device == "cpu":
        for name in ("use_qlora", "use_8bit_optimizer"):
            if getattr(p.optimization, name):
                add(f"optimization.{name}", "needs an NVIDIA GPU, not the CPU", "DEVICE_LACKS_IT")
        if p.training.optimizer in _8BIT:
            add(
                "training.optimizer",
                f"{p.training.optimizer} needs an NVIDIA GPU; "
                "the CPU has adamw_torch, adafactor and sgd",
                "DEVICE_LACKS_IT",
            )
    if p.optimization.use_8bit_optimizer and p.training.optimizer not in ("adamw_torch", *_8BIT):
        add(
            "optimization.use_8bit_optimizer",
            f"{p.training.optimizer} has no 8-bit form; adamw_torch has",
            "CONFLICT",
        )
    return found


# --- sentences for pydantic's errors


def _violation(detail: ErrorDetails) -> Violation:
    section, *rest = (str(part) for part in detail["loc"])
    field = ".".join([section, *rest])
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return Violation(field, "is not a parameter", "UNKNOWN_FIELD")
    info = SECTIONS[section].model_fields[rest[0]]
    if kind == "literal_error":
        choices = ", ".join(str(choice) for choice in get_args(info.annotation))
        return Violation(field, f"must be one of {choices}, not {given!r}", "NOT_A_CHOICE")
    if kind == "too_short":
        return Violation(field, "must name at least one", "OUT_OF_RANGE")
    if kind == "too_long":
        return Violation(field, "must name at most 256", "OUT_OF_RANGE")
    if kind == "multiple_of":
        step = _constraints(info)["multiple_of"]
        return Violation(field, f"must be a multiple of {step}, not {given}", "OUT_OF_RANGE")
    if kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        limits = _constraints(info)
        return Violation(
            field, f"must be from {limits['ge']} to {limits['le']}, not {given}", "OUT_OF_RANGE"
        )
    return Violation(field, f"{detail['msg']}, not {given!r}", "WRONG_TYPE")


def _constraints(info: FieldInfo) -> dict[str, Any]:
    return {
        name: getattr(constraint, name)
        for constraint in info.metadata
        for name in ("ge", "le", "multiple_of")
        if hasattr(constraint, name)
    }


def _extra(info: FieldInfo) -> Mapping[str, Any]:
    assert isinstance(info.json_schema_extra, dict)
    return info.json_schema_extra
