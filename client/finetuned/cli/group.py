"""Groups of commands: their help, other names of commands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import difflib
import errno
import shlex
import sys
from collections.abc import Generator
from typing import Any

import typer
import typer.core

from finetuned._errors import FinetunedError, InvalidArgument
from finetuned.cli.errors import os_trouble, show_error, show_trouble, status_of
from finetuned.cli.next_step import command_words, with_word
from finetuned.cli.quick import ALIASES, child, load, option
from finetuned.cli.settings import Exit, Settings, command_line, say

# Typer has a copy of click in it, or needs click, as its version goes: the class is the one of
# both that is above this one.
_UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(typer.core.TyperGroup):
    """A group of commands."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or of that other name."""
        return super().get_command(ctx, cmd_name) or super().get_command(
            ctx, ALIASES.get(cmd_name, "")
        )

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments; without any, the help is shown."""
        if not args and not ctx.resilient_parsing:
            say(ctx.get_help())
            raise typer.Exit(Exit.USAGE)
        return super().parse_args(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands, each with its whole first sentence."""
        shown = [
            (name, summary(command))
            for name, command in self.commands.items()
            if not command.hidden
        ]
        with formatter.section("Commands"):
            formatter.write_dl(shown)


class Group(Commands):
    """The root command: shows errors, and turns them into exit statuses."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Reads the arguments; help and version are written here."""
        with _quiet_pipes(), _plain_usage():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        options: Settings = ctx.ensure_object(Settings)
        with _quiet_pipes(), _plain_usage():
            try:
                return super().invoke(ctx)
            except FinetunedError as error:
                show_error(error, options.json, options)
                raise typer.Exit(status_of(error)) from error
            except OSError as error:
                if error.errno == errno.EPIPE:
                    raise
                show_trouble(os_trouble(error), reason="OS_ERROR", command="", as_json=options.json)
                raise typer.Exit(Exit.FAILED) from error
            except typer.Abort as error:
                say("")  # the cursor stands behind the question
                # Ctrl-D, an end of the input, is a no; typer makes the same of both.
                is_interrupt = isinstance(error.__context__, KeyboardInterrupt)
                raise typer.Exit(Exit.INTERRUPTED if is_interrupt else Exit.FAILED) from None
            except KeyboardInterrupt:
                raise typer.Exit(Exit.INTERRUPTED) from None


def summary(command: Any) -> str:
    """The first sentence of a command's help."""
    first = " ".join((command.short_help or command.help or "").split("\n\n")[0].split())
    return first.partition(". ")[0].rstrip(".") + "."


@contextlib.contextmanager
def _quiet_pipes() -> Generator[None]:
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(Exit.PIPE_CLOSED) from None


@contextlib.contextmanager
def _plain_usage() -> Generator[None]:
    """Shows what is wrong with the arguments as every other error."""
    try:
        yield
    except _UsageError as error:
        show_trouble(
            _sentence(error),
            code=InvalidArgument.code,
            reason="USAGE",
            command=_next_after(error),
            as_json="--json" in sys.argv,
        )
        raise typer.Exit(Exit.USAGE) from error


def _sentence(error: Any) -> str:
    text = str(error.format_message()).strip()
    return text[:1].lower() + text[1:].rstrip(".")


def _next_after(error: Any) -> str:
    """The command as it was probably meant, else the help of the one that was understood."""
    possible = list(getattr(error, "possibilities", None) or ())
    wrong = str(getattr(error, "option_name", "") or "")
    if wrong and error.ctx is not None and hasattr(error.ctx.command, "commands"):
        moved = _moved(wrong)
        if moved:
            return moved
    if not wrong and error.ctx is not None and hasattr(error.ctx.command, "commands"):
        # An unknown command: the only word that its message quotes first.
        wrong = str(error.message).partition("'")[2].partition("'")[0]
        possible = difflib.get_close_matches(wrong, error.ctx.command.commands, n=1)
    if wrong and possible:
        close = difflib.get_close_matches(wrong, possible, n=1, cutoff=0) or possible
        command = with_word(wrong, close[0])
        if command:
            return command
    # The one that did not understand: what follows may be right.
    path = error.ctx.command_path.split()[1:] if error.ctx is not None else command_words()
    return command_line(*path, "--help")


def _moved(name: str) -> str:
    """This command with an option of it that stood before it; empty where it has none such."""
    node = load()
    for word in command_words():
        node = child(node, word) or node
    known = option(node, name)
    words = list(sys.argv[1:])
    at = next((n for n, word in enumerate(words) if word.partition("=")[0] == name), None)
    if known is None or at is None or "commands" in node:
        return ""
    size = 2 if known["value"] and words[at] == name else 1
    moved, words[at : at + size] = words[at : at + size], []
    end = words.index("--") if "--" in words else len(words)
    return shlex.join(["finetunectl", *words[:end], *moved, *words[end:]])
