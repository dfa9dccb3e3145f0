"""The tree of commands. Light: what a command needs it imports when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from finetuned._version import __version__
from finetuned.cli import (
    check,
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
)
from finetuned.cli.settings import Group, settings

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
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
app.command("params")(form.params)
app.command("doctor")(doctor.doctor)
app.command("support-bundle")(support.support_bundle)
app.add_typer(task.app, name="task")
app.add_typer(template.app, name="template")
app.add_typer(dataset.app, name="dataset")
app.add_typer(daemon.app, name="daemon")
app.add_typer(device.app, name="device")


def _show_version(value: bool) -> None:
    if value:
        print(f"finetunectl {__version__}")
        raise typer.Exit


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
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    settings(ctx).address = address
