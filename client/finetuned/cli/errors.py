"""How errors are shown, and what exit status they have."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from finetuned._errors import (
    DaemonUnavailable,
    FieldViolation,
    FinetunedError,
    InternalError,
    InvalidArgument,
)
from finetuned.cli.next_step import explanation, next_command
from finetuned.cli.settings import Exit, Settings, json_text, say


def show_error(error: FinetunedError, as_json: bool, options: Settings | None = None) -> None:
    """The error on stderr, with every wrong field, and with the command to type next.

    Args:
        error: What went wrong.
        as_json: Write JSON.
        options: The global options; None: none were given.
    """
    options = options or Settings()
    if as_json:
        show_json(
            error.message,
            code=error.code,
            reason=error.reason,
            violations=[vars(violation) for violation in getattr(error, "violations", ())],
            request_id=error.request_id,
            command=next_command(error, options),
        )
        return
    if isinstance(error, InvalidArgument) and error.violations:
        say("error: " + ("a field is wrong" if len(error.violations) == 1 else "fields are wrong"))
        shown = [(_short(violation), violation.description) for violation in error.violations]
        width = max(len(field) for field, _ in shown)
        for field, description in shown:
            say(f"  {field:<{width}}  {description}")
    else:
        say(f"error: {error.message}")
    if isinstance(error, InternalError):
        call = f"request {error.request_id}" if error.request_id else "the call has no id"
        say(f"please report it, with what the next command collects ({call})")
    for line in filter(None, (explanation(error, options),)):
        say(line)
    show_next(next_command(error, options))


def show_next(command: str) -> None:
    """The command to type next, if there is one: always the last line."""
    if command:
        say(f"next: {command}")


def show_json(
    message: str,
    *,
    code: str = "",
    reason: str = "",
    violations: Sequence[dict[str, Any]] = (),
    request_id: str = "",
    command: str = "",
) -> None:
    """An error as one JSON object on stderr; every key is always there."""
    content = {
        "code": code,
        "reason": reason,
        "message": message,
        "violations": list(violations),
        "request_id": request_id,
        "next": command,
    }
    say(json_text({"error": content}, sys.stderr.encoding))


def show_trouble(message: str, *, reason: str, command: str, as_json: bool, code: str = "") -> None:
    """An error that no daemon has to do with."""
    if as_json:
        show_json(message, code=code, reason=reason, command=command)
    else:
        say(f"error: {message}")
        show_next(command)


def status_of(error: FinetunedError) -> Exit:
    """The exit status."""
    if isinstance(error, DaemonUnavailable):
        return Exit.UNREACHABLE
    return Exit.USAGE if isinstance(error, InvalidArgument) else Exit.FAILED


def os_trouble(error: OSError) -> str:
    """The sentence of an error of the system."""
    try:
        os.getcwd()  # noqa: PTH109 (Path.cwd() is the same call)
    except FileNotFoundError:
        return "the current folder is gone; change to another one, or give absolute paths"
    except OSError:
        pass
    return str(error)


def _short(violation: FieldViolation) -> str:
    return violation.field.removeprefix("task.").removeprefix("parameters.") or "request"
