"""The entrance: resolves defaults and judges everything at once, not up to the first mistake."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.field import info_of, limits_of
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.rules import check_across, check_device
from finetuned_daemon.validation.surroundings import Surroundings
from finetuned_daemon.validation.world import check_world

_SEVERITIES = list(Severity)


def check(
    given: Mapping[str, Mapping[str, Any]],
    training_type: TrainingType,
    surroundings: Surroundings,
    *,
    complete: bool,
) -> tuple[Parameters | None, list[Violation]]:
    """Resolves defaults and judges everything at once. Reads files.

    Not for the event loop's thread.

    Args:
        given: Values by section and name; absent ones get their default.
        training_type: Decides about data format and the LoRA section.
        surroundings: Device and machine that the run would use.
        complete: Demand what a start needs.

    Returns:
        The parameters, None where a field is wrong in itself, and all violations, gravest first.
    """
    parameters, violations, sound = _resolve(given)
    if complete:
        violations += _check_required(parameters, {v.field for v in violations})
    named = {violation.field for violation in violations}
    more = [
        *check_across(parameters, training_type),
        *check_device(parameters, training_type, surroundings),
        *check_world(parameters, training_type, surroundings),
    ]
    violations += [violation for violation in more if violation.field not in named]
    return (parameters if sound else None), by_severity(violations)


def check_fields(
    given: Mapping[str, Mapping[str, Any]], training_type: TrainingType
) -> tuple[Parameters | None, list[Violation]]:
    """What can be said of parameters without a device and without looking at files."""
    parameters, violations, sound = _resolve(given)
    named = {violation.field for violation in violations}
    violations += [v for v in check_across(parameters, training_type) if v.field not in named]
    return (parameters if sound else None), by_severity(violations)


def resolve(given: Mapping[str, Mapping[str, Any]]) -> Parameters:
    """The parameters with defaults for what is absent or wrong in itself."""
    return _resolve(given)[0]


def by_severity(violations: Iterable[Violation]) -> list[Violation]:
    """Errors, then warnings, then notices; otherwise in their order."""
    return sorted(violations, key=lambda violation: _SEVERITIES.index(violation.severity))


def errors(violations: Iterable[Violation]) -> list[Violation]:
    """Those with which nothing can be started."""
    return [violation for violation in violations if violation.severity is Severity.ERROR]


def _resolve(
    given: Mapping[str, Mapping[str, Any]],
) -> tuple[Parameters, list[Violation], bool]:
    good = {section: dict(values) for section, values in given.items()}
    try:
        return Parameters.model_validate(good), [], True
    except ValidationError as error:
        violations = list[Violation]()
        for detail in error.errors():
            violations.append(_violation(detail))
            section, name = str(detail["loc"][0]), str(detail["loc"][1])
            good[section].pop(name, None)
        # The rest is judged all the same: everybody gets all of their mistakes in one answer.
        return Parameters.model_validate(good), violations, False


def _check_required(parameters: Parameters, named: set[str]) -> list[Violation]:
    return [
        Violation(
            f"{section}.{name}", Text("is required to start", "启动训练前必须填写"), "REQUIRED"
        )
        for section, model in SECTIONS.items()
        for name, info in model.model_fields.items()
        if info_of(info).required and getattr(getattr(parameters, section), name) is None
        if f"{section}.{name}" not in named
    ]


# --- sentences for pydantic's errors


_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 60
_shown = _SHOWN.repr

_OFF = ("no", "off", "none", "never", "false")


def _nearest(given: object, choices: list[str], default: str) -> str:
    """The choice that was meant, where that can be told; else the default."""
    word = str(given)[:100].strip().lower()  # what it costs grows with the length
    if word in _OFF and "no" in choices:
        return "no"
    found = difflib.get_close_matches(word, choices, n=1, cutoff=0.75)
    return found[0] if found else default


_KINDS = {
    "bool_type": Text("true or false", "true 或 false"),
    "int_type": Text("a whole number", "整数"),
    "int_from_float": Text("a whole number", "整数"),
    "float_type": Text("a number", "数值"),
    "string_type": Text("a text", "文本"),
    "list_type": Text("a list of names", "名称列表"),
}


def _violation(detail: ErrorDetails) -> Violation:
    section, *rest = (str(part) for part in detail["loc"])
    field = ".".join([section, *rest])
    kind, given = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        return Violation(field, Text("is not a parameter", "没有这个参数"), "UNKNOWN_FIELD")
    info = SECTIONS[section].model_fields[rest[0]]
    limits = limits_of(info)
    suggested: Any = None
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(info.annotation)]
        text = Text(
            f"must be one of {', '.join(choices)}, not {_shown(given)}",
            f"必须是 {'、'.join(choices)} 之一，而不是 {_shown(given)}",
        )
        return Violation(
            field, text, "NOT_A_CHOICE", suggested=_nearest(given, choices, info.get_default())
        )
    if kind == "too_short":
        text = Text("must name at least one", "至少选择一个")
    elif kind == "too_long":
        text = Text("must name at most 256", "最多 256 个")
    elif kind == "multiple_of":
        step = limits["multiple_of"]
        text = Text(
            f"must be a multiple of {step}, not {given}", f"必须是 {step} 的倍数，而不是 {given}"
        )
        suggested = min(max(round(given / step) * step, limits["ge"]), limits["le"])
    elif kind in ("greater_than_equal", "less_than_equal", "finite_number"):
        low, high = limits["ge"], limits["le"]
        text = Text(
            f"must be from {low} to {high}, not {given}",
            f"必须在 {low} 到 {high} 之间，而不是 {given}",
        )
        if kind != "finite_number":
            suggested = low if kind == "greater_than_equal" else high
    else:
        wanted = _KINDS.get(kind, Text(str(detail["msg"]), str(detail["msg"])))
        text = Text(
            f"must be {wanted.en}, not {_shown(given)}",
            f"必须是{wanted.zh}，而不是 {_shown(given)}",
        )
        return Violation(field, text, "WRONG_TYPE")
    return Violation(field, text, "OUT_OF_RANGE", suggested=suggested)
