"""`finetunectl device`: what tasks can run on."""

from __future__ import annotations

import typer

from finetuned.cli.settings import JsonOption, settings

app = typer.Typer(no_args_is_help=True, help="Devices that tasks can run on.")


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keeps `list` a verb: typer would drop it where it is the only one."""


@app.command("list")
def list_devices(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """List devices, GPUs first."""
    from finetuned.cli.output import bytes_text, print_json, print_table

    with settings(ctx).client() as client:
        devices = client.list_devices()
    if as_json:
        print_json(devices)
        return
    print_table(
        ("device", "product", "memory", "free", "use", "task", "queued"),
        (
            (
                device.id,
                device.product_name,
                bytes_text(device.memory_total_bytes),
                bytes_text(device.memory_free_bytes),
                f"{device.utilization:.0%}" if device.HasField("utilization") else "",
                device.running_task.removeprefix("tasks/") or "free",
                str(device.queued_tasks or ""),
            )
            for device in devices
        ),
    )
