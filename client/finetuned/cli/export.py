"""`finetunectl task export-config`: a task's settings as a file of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetuned.cli.settings import JsonOption, TaskArgument, say, settings


def export_config(
    ctx: typer.Context,
    name: TaskArgument,
    run: Annotated[
        int, typer.Option("--run", metavar="N", min=0, help="Settings of this run. [the task's]")
    ] = 0,
    file_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="yaml, which `train` and `check` read; or script, a Python program.",
        ),
    ] = "yaml",
    file: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File to write. [-, which is stdout]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the settings of a task, or of one of its runs, as YAML or as a script.

    The script trains alike with torch, transformers and peft alone; its first lines say what it
    leaves out.
    """
    from finetuned._errors import FieldViolation
    from finetuned.cli.output import print_json
    from finetuned.cli.params import refused

    to_stdout = file is None or str(file) == "-"
    # A device or a pipe loses nothing.
    if file is not None and not to_stdout and file.is_file() and not force:
        why = f"{file} is there already; --force overwrites it"
        raise refused([FieldViolation("--output", why, "FILE_EXISTS")])
    with settings(ctx).client() as client:
        exported = client.export_config(name, run=run, format=file_format)
    for setting in exported.left_out:
        say(f"warning: the script trains without {setting}")
    if file is not None and not to_stdout:
        file.write_text(exported.content, encoding="utf-8")
        say(f"{file} written")
    elif as_json:
        print_json(exported)
    else:
        print(exported.content, end="")
