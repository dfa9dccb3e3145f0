"""The tree of commands. Light: what a command needs it imports when it runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from finetuned._version import __version__
from finetuned.cli import (
    check,
    completion,
    daemon,
    dataset,
    device,
    doctor,
    form,
    probe,
    queue,
    support,
    task,
    template,
    train,
    ui,
)
from finetuned.cli.group import Group
from finetuned.cli.settings import keep_address

app = typer.Typer(
    cls=Group,
    add_completion=False,  # `finetunectl completion` knows names of tasks, too
    # Rich help costs 60 ms at every --help; tracebacks are for developers, who have Python's own.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models with the daemon of this machine.",
    epilog="Exit status: 0 done, 1 failed, 2 bad input, 3 no daemon, 4 stopped, 130 Ctrl-C.",
)
app.command("train")(train.train)
app.command("check")(check.check)
app.command("estimate")(check.estimate)
app.command("probe")(probe.probe)
app.command("queue")(queue.queue)
app.command("ui")(ui.ui)
app.command("params")(form.params)
app.add_typer(task.app, name="task")
app.add_typer(template.app, name="template")
app.add_typer(dataset.app, name="dataset")
app.add_typer(device.app, name="device")
app.add_typer(daemon.app, name="daemon")
app.command("doctor")(doctor.doctor)
app.command("support-bundle")(support.support_bundle)
app.add_typer(completion.app, name="completion")

_COLORS = {"always": ("FORCE_COLOR", "NO_COLOR"), "never": ("NO_COLOR", "FORCE_COLOR")}


@app.command("help")
def show_help(
    ctx: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Such as `task start`.")
    ] = None,
) -> None:
    """Show the help of a command: the same as COMMAND --help."""
    # `quick.expanded` makes the other command of it; what comes here has options in it.
    raise typer.BadParameter(f"commands only, not {' '.join(words or ())!r}", param_hint="help")


def _show_version(value: bool) -> None:
    if value:
        print(f"finetunectl {__version__}")
        raise typer.Exit


def _choose_color(value: str) -> str:
    if value in _COLORS:
        on, off = _COLORS[value]
        os.environ[on] = "1"
        os.environ.pop(off, None)
    elif value != "auto":
        raise typer.BadParameter("one of auto, always, never")
    return value


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]
    ctx: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="FINETUNED_ADDRESS",
            metavar="ADDRESS",
            help="Where the daemon serves: unix:/path or host:port. Default: this user's daemon.",
        ),
    ] = None,
    color: Annotated[
        str,
        typer.Option(
            "--color",
            metavar="WHEN",
            callback=_choose_color,
            show_default=False,
            help="auto (on a terminal), always, never; NO_COLOR and FORCE_COLOR hold, too. [auto]",
        ),
    ] = "auto",
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    source = ctx.get_parameter_source("address")
    keep_address(ctx, address, is_typed=source is not None and source.name == "COMMANDLINE")
