"""What every command shares: exit statuses, global options, and how errors are shown.

Beside the statuses of `Exit`, a command that is ended from outside has 128 and the signal's number,
as in a shell: 141 where the reader of its output has enough (`| head`), 143 and 129 where SIGTERM
or SIGHUP ends a live view. In all these the run goes on.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuned._errors import InvalidArgument, NotFound

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
    template: str = ""
    """The template that it is about, likewise."""

    def client(self, *, start: bool = False) -> Client:
        """A client for one command; `start`: starts the daemon first, if none runs."""
        from finetuned._client import Client
        from finetuned._launch import start_daemon

        if start:
            start_daemon(
                self.address, on_start=lambda log: say(f"starting the daemon (log: {log})")
            )
        return Client(self.address)


class WithNext(InvalidArgument):
    """Bad input, with the very command that would be right."""

    def __init__(self, message: str, next_command: str, *, reason: str) -> None:
        super().__init__(message, reason=reason)
        self.next_command = next_command


class NotStarted(NotFound):
    """There are tasks, and none has run: with the command that starts one."""

    def __init__(self, message: str, next_command: str) -> None:
        super().__init__(message, reason="NOT_STARTED")
        self.next_command = next_command


# Of this process: global options that a command to be copied has to have, too.
_global_options: list[str] = []


def settings(ctx: typer.Context) -> Settings:
    """The global options of this call."""
    return ctx.ensure_object(Settings)


def keep_address(ctx: typer.Context, address: str | None, *, is_typed: bool) -> None:
    """Take the address for this call; commands to be copied repeat it where it was typed."""
    settings(ctx).address = address
    _global_options[:] = ["--address", address] if address and is_typed else []


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


WatchOption = Annotated[
    bool,
    typer.Option("-w", "--watch", help="Go on showing it while it changes, until Ctrl-C."),
]
WatchRunOption = Annotated[bool, typer.Option("-w", "--watch", help="Watch it to its end.")]
DetachOption = Annotated[
    bool, typer.Option("--detach", help="Return at once, as without --watch.", hidden=True)
]
"""Of commands that return at once anyway, for those who know it of `train`."""


def check_detach(watch: bool, detach: bool) -> None:
    """Refuse both at once."""
    if watch and detach:
        raise typer.BadParameter("goes without --watch", param_hint="--detach")


def _remember_task(ctx: typer.Context, value: str) -> str:
    settings(ctx).task = value
    return value


def _remember_optional_task(ctx: typer.Context, value: str | None) -> str | None:
    settings(ctx).task = value or ""
    return value


TaskArgument = Annotated[
    str,
    typer.Argument(metavar="TASK", callback=_remember_task, help="Display name or id of the task."),
]
NewestTaskArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[TASK]",
        callback=_remember_optional_task,
        help="Display name or id of the task. [the one that runs, waits or has run last]",
    ),
]


def _remember_template(ctx: typer.Context, value: str) -> str:
    settings(ctx).template = value
    return value


TemplateArgument = Annotated[
    str,
    typer.Argument(
        metavar="TEMPLATE",
        callback=_remember_template,
        help="Display name or id of the template.",
    ),
]


def task_word(task: Task) -> str:
    """The name that a user has for the task."""
    return task.display_name or task.name


def command_line(*words: str) -> str:
    """A command of this program at the same daemon, to be copied into a shell."""
    return shlex.join(["finetunectl", *_global_options, *words])


def resource_command(noun: str, verb: str, name: str, *options: str) -> str:
    """A command on a task or template, to be copied into a shell."""
    words = [*options, "--", name] if name.startswith("-") else [name, *options]
    return command_line(noun, verb, *words)


def task_command(verb: str, task: Task | str, *options: str) -> str:
    """A command on a task, to be copied into a shell."""
    name = task if isinstance(task, str) else task_word(task)
    return resource_command("task", verb, name, *options)


def template_command(verb: str, name: str, *options: str) -> str:
    """A command on a template, to be copied into a shell."""
    return resource_command("template", verb, name, *options)


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
    return WithNext(why, command, reason="NO_TERMINAL")


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
