"""`finetunectl device`: what tasks can run on."""

from __future__ import annotations

import typer

from finetuned.cli.group import Commands
from finetuned.cli.settings import JsonOption, WatchOption, settings

app = typer.Typer(cls=Commands, help="Devices that tasks can run on.")


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keeps `list` a verb: typer would drop it where it is the only one."""


@app.command("list")
def list_devices(
    ctx: typer.Context, watch: WatchOption = False, as_json: JsonOption = False
) -> None:
    """List devices, GPUs first."""
    from finetuned.cli.output import print_json, print_table
    from finetuned.cli.rows import DEVICE_COLUMNS, device_row

    with settings(ctx).client() as client:
        if watch:
            from finetuned.cli.board import DeviceBoard, watch_board

            raise typer.Exit(watch_board(client.watch_devices(), DeviceBoard(), as_json=as_json))
        devices = client.list_devices()
    if as_json:
        print_json(devices)
        return
    print_table(DEVICE_COLUMNS, map(device_row, devices))
