"""What the daemon says about parameters, shown: errors red, warnings yellow, notices blue."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from finetuned._violations import ParameterViolation
from finetuned.cli.output import console, value_text

_STYLES = {"error": "red", "warning": "yellow", "notice": "blue"}


def print_violations(violations: Sequence[ParameterViolation], *, to_stderr: bool = False) -> None:
    """A line for each, with the value that would be right where one is known."""
    out = _stderr() if to_stderr else console()
    width = max((len(violation.field) for violation in violations), default=0)
    for violation in violations:
        line = Text(f"{violation.severity:<7}", style=_STYLES[violation.severity])
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

    Empty where nothing is suggested.
    """
    grave = [violation for violation in violations if violation.severity != "notice"]
    found = dict.fromkeys(filter(None, map(assignment, grave)))
    sets = [word for suggestion in found for word in ("--set", suggestion)]
    kept = _without_sets(arguments, {suggestion.partition("=")[0] for suggestion in found})
    return shlex.join(["finetunectl", *kept, *sets]) if sets else ""


def _without_sets(arguments: Sequence[str], fields: set[str]) -> list[str]:
    """The arguments without `--set` of these fields."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--set":
            assigned = next(words, "")
            if assigned.partition("=")[0].strip() not in fields:
                kept += [word, assigned]
        elif word.removeprefix("--set=").partition("=")[0].strip() not in fields:
            kept.append(word)
    return kept


def as_json(violation: ParameterViolation) -> dict[str, Any]:
    """The violation for `--json`."""
    return dict(vars(violation))


def _stderr() -> Console:
    if sys.stderr.isatty():
        return Console(stderr=True, highlight=False)
    return Console(stderr=True, highlight=False, width=10_000, force_terminal=False)
