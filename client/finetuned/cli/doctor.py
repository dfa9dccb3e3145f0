"""`finetunectl doctor`: whether this machine is ready to train, and what mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import Exit, JsonOption, say, settings

if TYPE_CHECKING:
    from finetuned.v1.system_service_pb2 import CheckEnvironmentResponse


def doctor(
    ctx: typer.Context,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Look again, whatever is remembered; takes seconds.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check whether this machine is ready to train. Exit status 1 if training can't run."""
    from finetuned.cli.output import print_json
    from finetuned.v1.system_service_pb2 import CheckStatus

    with settings(ctx).client(start=True) as client:
        answer = client.check_environment(refresh=refresh)
    if as_json:
        print_json(answer)
    else:
        _show(answer)
    if answer.status == CheckStatus.CHECK_STATUS_ERROR:
        raise typer.Exit(Exit.FAILED)


def _show(answer: CheckEnvironmentResponse) -> None:
    from rich.text import Text

    from finetuned.cli.bars import is_encodable
    from finetuned.cli.output import console, print_table, time_text
    from finetuned.v1.system_service_pb2 import CheckStatus

    marks = {
        CheckStatus.CHECK_STATUS_OK: ("✓", "ok", "green"),
        CheckStatus.CHECK_STATUS_WARNING: ("!", "!", "yellow"),
        CheckStatus.CHECK_STATUS_ERROR: ("✗", "X", "red"),
    }
    is_plain = not is_encodable("✓✗")
    out = console()
    names = max((len(item.name) for item in answer.items), default=0)
    found = max((len(item.found) for item in answer.items), default=0)
    indent = " " * (4 if is_plain else 3)
    for item in answer.items:
        symbol, plain, style = marks.get(item.status, ("?", "?", ""))
        line = Text(f"{plain:<2}  " if is_plain else f"{symbol}  ", style=style)
        line.append(f"{item.name:<{names}}  ", "bold").append(f"{item.found:<{found}}", "default")
        if item.wanted and item.status != CheckStatus.CHECK_STATUS_OK:
            line.append(f"  wanted: {item.wanted}", "default")
        line.rstrip()
        out.print(line, soft_wrap=True)
        if item.message:
            out.print(Text(indent + item.message, style), soft_wrap=True)
        if item.remedy:
            out.print(Text(indent + "  " + item.remedy), soft_wrap=True)
    if answer.devices:
        print()
        print_table(
            ("device", "bf16", "fp16", "tf32", "4-bit", "8-bit optimizers"),
            (
                (
                    device.device,
                    *(
                        Text("yes", "green") if can else Text("no", "dim")
                        for can in (
                            device.bf16,
                            device.fp16,
                            device.tf32,
                            device.four_bit,
                            device.eight_bit_optimizer,
                        )
                    ),
                )
                for device in answer.devices
            ),
        )
    checked = time_text(answer.check_time)
    if checked:
        say(f"{answer.runner_python} was asked at {checked}; again: finetunectl doctor --refresh")
