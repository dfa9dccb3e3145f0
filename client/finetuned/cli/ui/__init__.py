"""`finetunectl ui`: the full-screen view. Needs the extra `ui`."""

from __future__ import annotations

import importlib.util
import sys
from typing import Annotated

import typer

from finetuned.cli.errors import show_trouble
from finetuned.cli.settings import Exit, command_line, say, settings

__all__ = ["ui"]


def ui(
    ctx: typer.Context,
    light: Annotated[
        bool | None,
        typer.Option(
            "--light/--dark", help="Colours for a light or dark terminal. [as the terminal says]"
        ),
    ] = None,
) -> None:
    """Show all tasks in a full-screen view: progress, curves, log, devices; start and stop them.

    Quitting stops no run. Keys are in the view, under `?`.
    """
    if importlib.util.find_spec("textual") is None:
        show_trouble(
            "finetunectl ui needs textual",
            reason="NO_TEXTUAL",
            command="pip install 'finetuned[ui]'",
            as_json=False,
        )
        raise typer.Exit(Exit.FAILED)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        show_trouble(
            "this needs a terminal; for pipes there is the list",
            reason="NO_TERMINAL",
            command=command_line("task", "list", "--json"),
            as_json=False,
        )
        raise typer.Exit(Exit.USAGE)
    from finetuned.cli.ui.app import FinetunedApp, wants_light

    app = FinetunedApp(settings(ctx), light=wants_light() if light is None else light)
    status = app.run()
    left = app.runs_left
    if left:
        say(f"{left} run{' goes' if left == 1 else 's go'} on; see them again: finetunectl ui")
    raise typer.Exit(status or Exit.OK)
