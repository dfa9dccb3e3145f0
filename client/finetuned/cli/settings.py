"""What every command shares: exit statuses, global options, and how errors are shown."""

from __future__ import annotations

import errno
import json
import sys
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from finetuned._errors import (
    DaemonNotStarted,
    DaemonUnavailable,
    FailedPrecondition,
    FieldViolation,
    FinetunedError,
    InvalidArgument,
    NotFound,
    Unauthenticated,
)

if TYPE_CHECKING:
    from finetuned._client import Client


class Exit(IntEnum):
    """Exit statuses."""

    OK = 0
    """The command succeeded; where a run was watched, it completed."""
    FAILED = 1
    """The run failed, or any other error."""
    USAGE = 2
    """Bad input: options, files, parameters."""
    UNREACHABLE = 3
    """No daemon answers."""
    STOPPED = 4
    """The watched run was stopped."""
    INTERRUPTED = 130
    """Ctrl-C; a run that was watched goes on."""


@dataclass
class Settings:
    """Global options."""

    address: str | None = None
    """As for `Client`."""
    json: bool = False
    """JSON on stdout, and errors as JSON on stderr."""

    def client(self) -> Client:
        """A client for one command."""
        from finetuned._client import Client

        return Client(self.address)


def settings(ctx: typer.Context) -> Settings:
    """The global options of this call."""
    return ctx.ensure_object(Settings)


def _remember_json(ctx: typer.Context, value: bool) -> bool:
    settings(ctx).json = value
    return value


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_remember_json,
        help="Write JSON to stdout: one object or array, or a line an event.",
    ),
]
TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", help="Display name or id of the task.")
]


class Group(typer.core.TyperGroup):
    """The root command: shows errors, and turns them into exit statuses."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except FinetunedError as error:
            show_error(error, ctx.ensure_object(Settings).json)
            raise typer.Exit(_status(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # a reader that has enough, such as `head`: typer ends quietly
            say(f"error: {error}")
            raise typer.Exit(Exit.FAILED) from error
        except KeyboardInterrupt:
            raise typer.Exit(Exit.INTERRUPTED) from None


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_error(error: FinetunedError, as_json: bool) -> None:
    """The error on stderr, with every wrong field and what to type next."""
    if as_json:
        violations = [vars(violation) for violation in getattr(error, "violations", ())]
        content = {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "violations": violations,
        }
        say(json.dumps({"error": content}, ensure_ascii=False))
        return
    if isinstance(error, InvalidArgument) and error.violations:
        say("error: " + ("a field is wrong" if len(error.violations) == 1 else "fields are wrong"))
        shown = [(_short(violation), violation.description) for violation in error.violations]
        width = max(len(field) for field, _ in shown)
        for field, description in shown:
            say(f"  {field:<{width}}  {description}")
    else:
        say(f"error: {error.message}")
    hint = _hint(error)
    if hint:
        say(hint)


def _short(violation: FieldViolation) -> str:
    return violation.field.removeprefix("task.").removeprefix("parameters.") or "request"


def _hint(error: FinetunedError) -> str:
    if isinstance(error, DaemonNotStarted):
        return ""  # its message says it
    if isinstance(error, DaemonUnavailable) and not error.reason:
        return "start it: finetunectl daemon start"
    if isinstance(error, NotFound):
        return "tasks there are: finetunectl task list"
    if isinstance(error, Unauthenticated):
        return "set FINETUNED_TOKEN to the daemon's token"
    if isinstance(error, FailedPrecondition) and error.violations:
        name = error.violations[0].subject
        if error.reason == "TASK_ACTIVE":
            return f"stop it: finetunectl task stop {name} --wait"
        return f"how it stands: finetunectl task show {name}"
    return ""


def _status(error: FinetunedError) -> Exit:
    if isinstance(error, DaemonUnavailable):
        return Exit.UNREACHABLE
    return Exit.USAGE if isinstance(error, InvalidArgument) else Exit.FAILED
