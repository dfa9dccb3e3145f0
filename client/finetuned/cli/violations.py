"""What the daemon says about parameters, shown: errors red, warnings yellow, notices blue."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from finetuned._violations import ParameterViolation
from finetuned.cli.output import console, value_text

# What is no parameter has an option of its own.
_OPTIONS = {"device": "--device", "training_type": "--type", "template": "--template"}
_STYLES = {"error": "red", "warning": "yellow", "notice": "blue"}


def print_violations(violations: Sequence[ParameterViolation], *, to_stderr: bool = False) -> None:
    """A line for each, with the value that would be right where one is known."""
    out = console(stderr=to_stderr)
    width = max((len(violation.field) for violation in violations), default=0)
    for violation in violations:
        line = Text(f"{violation.severity:<7}", style=_STYLES.get(violation.severity, ""))
        line.append(f"  {violation.field:<{width}}  ", style="default")
        line.append(violation.message, style="default")
        suggestion = assignment(violation)
        if suggestion:
            line.append(f"  (try {suggestion.replace('=', ' = ', 1)})", style="default")
        out.print(line, soft_wrap=True)


def assignment(violation: ParameterViolation) -> str:
    """The suggestion as `--set` takes it; empty where there is none."""
    if violation.suggested_value is None:
        return ""
    path = violation.suggested_field or violation.field
    return f"{path}={value_text(violation.suggested_value)}"


def with_suggestions(arguments: Sequence[str], violations: Sequence[ParameterViolation]) -> str:
    """The command with the suggestions that are no mere notice, to be copied into a shell.

    Empty where nothing is suggested, or where an error would remain.
    """
    if any(v.severity == "error" and v.suggested_value is None for v in violations):
        return ""
    grave = [violation for violation in violations if violation.severity != "notice"]
    found: dict[str, str] = {}
    for suggestion in filter(None, map(assignment, grave)):
        path, _, value = suggestion.partition("=")
        found.setdefault(path, value)
    kept = list(arguments)
    added: list[str] = []
    for path, value in found.items():
        option = _OPTIONS.get(path)
        if option is not None:
            kept = _without(kept, option)
            added += [option, value]
        else:
            added += ["--set", f"{path}={value}"]
    kept = _without(kept, "--set", set(found))
    return shlex.join(["finetunectl", *kept, *added]) if added else ""


def _without(arguments: Sequence[str], option: str, fields: set[str] | None = None) -> list[str]:
    """The arguments without the option; of `--set`, without those for these fields."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        is_apart = word == option
        if not is_apart and not word.startswith(f"{option}="):
            kept.append(word)
            continue
        value = next(words, "") if is_apart else word.partition("=")[2]
        if fields is not None and value.partition("=")[0].strip() not in fields:
            kept += [word, value] if is_apart else [word]
    return kept


def as_json(violation: ParameterViolation) -> dict[str, Any]:
    """The violation for `--json`."""
    return dict(vars(violation))
