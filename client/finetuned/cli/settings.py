"""What every command shares: exit statuses, global options, and how errors are shown.

Beside the statuses of `Exit`, a command that is ended from outside has 128 and the signal's number,
as in a shell: 141 where the reader of its output has enough (`| head`), 143 and 129 where SIGTERM
or SIGHUP ends a live view. In all these the run goes on.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import sys
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from finetuned._connect import ADDRESS_VARIABLE
from finetuned._errors import (
    DaemonNotStarted,
    DaemonUnavailable,
    FailedPrecondition,
    FieldViolation,
    FinetunedError,
    InternalError,
    InvalidArgument,
    NotFound,
    Unauthenticated,
)

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.v1.task_pb2 import Task


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
    PIPE_CLOSED = 141
    """Nobody reads the output any more; a run that was watched goes on."""


@dataclass
class Settings:
    """Global options."""

    address: str | None = None
    """As for `Client`."""
    json: bool = False
    """JSON on stdout, and errors as JSON on stderr."""
    task: str = ""
    """The task that the command is about, as it was typed."""

    def client(self, *, start: bool = False) -> Client:
        """A client for one command; `start`: starts the daemon first, if none runs."""
        from finetuned._client import Client
        from finetuned._launch import start_daemon

        if start:
            start_daemon(
                self.address, on_start=lambda log: say(f"starting the daemon (log: {log})")
            )
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


def _remember_task(ctx: typer.Context, value: str) -> str:
    settings(ctx).task = value
    return value


TaskArgument = Annotated[
    str,
    typer.Argument(metavar="TASK", callback=_remember_task, help="Display name or id of the task."),
]


class Group(typer.core.TyperGroup):
    """The root command: shows errors, and turns them into exit statuses."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Reads the arguments; help and version are written here."""
        with _quiet_pipes():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        with _quiet_pipes():
            try:
                return super().invoke(ctx)
            except FinetunedError as error:
                options = ctx.ensure_object(Settings)
                show_error(error, options.json, options)
                raise typer.Exit(_status(error)) from error
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                say(f"error: {_os_trouble(error)}")
                raise typer.Exit(Exit.FAILED) from error
            except typer.Abort as error:
                say("")  # the cursor stands behind the question
                # Ctrl-D, an end of the input, is a no; typer makes the same of both.
                is_interrupt = isinstance(error.__context__, KeyboardInterrupt)
                raise typer.Exit(Exit.INTERRUPTED if is_interrupt else Exit.FAILED) from None
            except KeyboardInterrupt:
                raise typer.Exit(Exit.INTERRUPTED) from None


@contextlib.contextmanager
def _quiet_pipes() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(Exit.PIPE_CLOSED) from None


def _os_trouble(error: OSError) -> str:
    try:
        os.getcwd()  # noqa: PTH109 (Path.cwd() is the same call)
    except FileNotFoundError:
        return "the current folder is gone; change to another one, or give absolute paths"
    except OSError:
        pass
    return str(error)


def task_word(task: Task) -> str:
    """The name that a user has for the task."""
    return task.display_name or task.name


def task_command(verb: str, task: Task | str, *options: str) -> str:
    """A command on a task, to be copied into a shell."""
    name = task if isinstance(task, str) else task_word(task)
    words = [*options, "--", name] if name.startswith("-") else [name, *options]
    return shlex.join(["finetunectl", "task", verb, *words])


def template_command(verb: str, name: str, *options: str) -> str:
    """A command on a template, to be copied into a shell."""
    words = [*options, "--", name] if name.startswith("-") else [name, *options]
    return shlex.join(["finetunectl", "template", verb, *words])


def confirm(question: str, command: str) -> bool:
    """Ask on the terminal.

    Args:
        question: Answered by yes or no; no is the default.
        command: The command with its yes.

    Raises:
        InvalidArgument: There is no terminal; it says which command needs no question.
    """
    if not sys.stdin.isatty():
        raise no_terminal("this needs a yes, and there is no terminal to ask on", command)
    return typer.confirm(question, err=True)


def no_terminal(why: str, command: str) -> InvalidArgument:
    """The error of a command that has nobody to ask, with the command that need not ask."""
    return InvalidArgument(f"{why}\nsay it: {command}", reason="NO_TERMINAL")


def one_file(argument: Path | None, option: Path | None) -> Path | None:
    """The file to read, which may be given as `FILE` or as `--file FILE`; `-` is stdin."""
    if argument is not None and option is not None:
        raise typer.BadParameter("is given twice, as FILE and as --file", param_hint="--file")
    return input_file(argument or option)


def input_file(file: Path | None) -> Path | None:
    """The file; stdin where it is `-`."""
    return Path("/dev/stdin") if file is not None and str(file) == "-" else file


def json_text(value: Any, encoding: str | None, indent: int | None = None) -> str:
    """JSON that is JSON in that encoding too."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def visible(text: str) -> str:
    """The text without what would steer the terminal: names of files and log lines may."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def say(text: str) -> None:
    """A line for people, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def show_error(error: FinetunedError, as_json: bool, options: Settings | None = None) -> None:
    """The error on stderr, with every wrong field and what to type next.

    Args:
        error: What went wrong.
        as_json: Write JSON.
        options: The global options; None: none were given.
    """
    if as_json:
        violations = [vars(violation) for violation in getattr(error, "violations", ())]
        content = {
            "code": error.code,
            "reason": error.reason,
            "message": error.message,
            "violations": violations,
            "request_id": error.request_id,
        }
        say(json_text({"error": content}, sys.stderr.encoding))
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
        say(f"please report it, with what this collects: finetunectl support-bundle ({_id(error)})")
    hint = _hint(error, options or Settings())
    if hint:
        say(hint)


def _short(violation: FieldViolation) -> str:
    return violation.field.removeprefix("task.").removeprefix("parameters.") or "request"


def _id(error: FinetunedError) -> str:
    return f"request {error.request_id}" if error.request_id else "the call has no id"


def _hint(error: FinetunedError, options: Settings) -> str:
    if isinstance(error, DaemonNotStarted):
        return ""  # its message says it
    if isinstance(error, DaemonUnavailable) and not error.reason:
        variable = os.environ.get(ADDRESS_VARIABLE)
        if options.address or variable:
            # The option's default is the variable.
            own = ADDRESS_VARIABLE if options.address in (None, variable) else "--address"
            # `daemon start` would look there too, and start nothing.
            return f"the address is that of {own}; without it, your own daemon is asked"
        return "start it: finetunectl daemon start"
    if isinstance(error, NotFound):
        noun = "template" if "TEMPLATE" in error.reason else "task"
        return f"{noun}s there are: finetunectl {noun} list"
    if isinstance(error, Unauthenticated):
        return "set FINETUNED_TOKEN to the daemon's token"
    if isinstance(error, FailedPrecondition) and error.violations:
        name = error.violations[0].subject
        if error.reason == "ENVIRONMENT_NOT_READY":
            return "what is missing: finetunectl doctor"
        if name.startswith("templates/"):
            return ""
        if name.startswith("tasks/"):
            name = options.task or name
        if error.reason == "TASK_PAUSED":
            return f"let it go on: {task_command('resume', name)}"
        if error.reason == "TASK_ACTIVE":
            return f"stop it: {task_command('stop', name, '--wait')}"
        return f"how it stands: {task_command('show', name)}"
    return ""


def _status(error: FinetunedError) -> Exit:
    if isinstance(error, DaemonUnavailable):
        return Exit.UNREACHABLE
    return Exit.USAGE if isinstance(error, InvalidArgument) else Exit.FAILED
