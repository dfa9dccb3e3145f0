"""`finetunectl daemon`: start, stop, ask."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import typer

from finetuned.cli import log
from finetuned.cli.group import Commands
from finetuned.cli.settings import Exit, JsonOption, say, settings

if TYPE_CHECKING:
    from finetuned._client import Client

app = typer.Typer(cls=Commands, help="The daemon itself.")

_STOP_SECONDS = 15.0
_POLL_SECONDS = 0.05


@app.command()
def start(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Start the daemon in the background, if none runs."""
    from finetuned._launch import start_daemon

    was_started = start_daemon(
        settings(ctx).address, on_start=lambda log: say(f"starting the daemon (log: {log})")
    )
    if not was_started:
        say("the daemon runs already")
    with settings(ctx).client() as client:
        _show(client, as_json)


@app.command()
def stop(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Stop the daemon. Runs go on, and the next daemon adopts them."""
    from finetuned._connect import announced, find

    endpoint = find(settings(ctx).address)
    with settings(ctx).client() as client:
        info = client.system_info()
        # Where a service manager listens for it, somebody always does, and a look would start the
        # next one.
        is_activated = endpoint.is_default and announced().get("is_activated") is True
        client.shutdown()
    deadline = time.monotonic() + _STOP_SECONDS
    while announced().get("pid") == info.pid if is_activated else endpoint.is_listening():
        if time.monotonic() > deadline:
            say(f"the daemon (process {info.pid}) has not ended within {_STOP_SECONDS:g} s")
            raise typer.Exit(Exit.FAILED)
        time.sleep(_POLL_SECONDS)
    if as_json:
        from finetuned.cli.output import print_json

        print_json(info)
        return
    print("the daemon has ended")
    if info.running_tasks:
        runs = "run goes on; its" if info.running_tasks == 1 else "runs go on; their"
        say(f"{info.running_tasks} {runs} next daemon: finetunectl daemon start")
    if is_activated:
        say("the next call starts it again; to have it stay away: finetuned service stop")


@app.command()
def status(ctx: typer.Context, as_json: JsonOption = False) -> None:
    """Show what the daemon is, and the quota if there is one; exit status 3 if none answers."""
    with settings(ctx).client() as client:
        _show(client, as_json)


app.command("logs")(log.logs)


def _show(client: Client, as_json: bool) -> None:
    from finetuned.cli.output import bytes_text, print_json_value, print_pairs, time_text, to_dict
    from finetuned.v1.system_service_pb2 import StandbyState

    info, quota = client.system_info(), client.quota()
    has_quota = quota.HasField("limit")
    if as_json:
        print_json_value({**to_dict(info), **({"quota": to_dict(quota)} if has_quota else {})})
        return
    spent = f"{quota.used:,} of {quota.limit:,} checkpoints used"
    if quota.reserved:
        spent += f", {quota.reserved:,} more planned by runs under way"
    standby = info.standby
    kept = StandbyState.Name(standby.state).removeprefix("STANDBY_STATE_").lower()
    if standby.pid:
        kept += f", process {standby.pid}, {bytes_text(standby.memory_bytes)}"
    if standby.started_runs:
        kept += f", {standby.started_runs:,} runs began from it"
    print_pairs(
        [
            ("version", info.version),
            ("address", ", ".join(info.addresses)),
            ("process", str(info.pid)),
            ("since", time_text(info.start_time)),
            ("state folder", info.state_dir),
            ("log", info.log_path),
            ("tasks", f"{info.running_tasks} running, {info.queued_tasks} queued"),
            ("quota", spent if has_quota else ""),
            ("standby", kept if info.HasField("standby") else ""),
            ("runner python", info.runner_python),
        ]
    )
