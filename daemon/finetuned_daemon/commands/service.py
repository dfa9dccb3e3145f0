"""`finetuned service`: the daemon as a service of the system."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

COMMAND = "service"

_ACTIONS = (
    ("install", "write the service's files, and start it"),
    ("uninstall", "stop it, and remove what install has written; runs and their data stay"),
    ("status", "show whether it is installed, enabled and running"),
    ("start", "start it"),
    ("stop", "stop it; runs go on"),
    ("restart", "start it anew, after an upgrade say; runs go on"),
    ("logs", "show its log"),
)


def register(commands: Any) -> None:
    """Adds the command."""
    text = "have the daemon run as a service: systemd, launchd, Windows' Task Scheduler"
    parser = commands.add_parser(COMMAND, help=text, description=text)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made = {name: actions.add_parser(name, help=text, description=text) for name, text in _ACTIONS}
    for command in made.values():
        command.add_argument(
            "--system",
            action="store_true",
            help="the whole machine's, started at boot; without it this user's own",
        )
        command.add_argument(
            "--platform",
            choices=("systemd", "launchd", "windows"),
            help="service manager; by default this machine's. Those of other machines only with "
            "--dry-run",
        )
        command.add_argument(
            "--dry-run", action="store_true", help="only print what would be written and run"
        )
    _register_install(made["install"])
    made["status"].add_argument("--json", action="store_true", help="write JSON")
    logs = made["logs"]
    logs.add_argument("-f", "--follow", action="store_true", help="go on with new lines")
    logs.add_argument(
        "-n", "--lines", type=int, default=200, metavar="N", help="so many of the newest (200)"
    )
    logs.add_argument(
        "--file",
        action="store_true",
        help="from the daemon's own log file, although the system has a journal",
    )


def _register_install(install: argparse.ArgumentParser) -> None:
    install.usage = "finetuned service install [OPTIONS] [-- OPTIONS OF SERVE...]"
    install.add_argument(
        "--user",
        metavar="NAME",
        help="with --system: whom it runs as; made on Linux if missing (finetuned)",
    )
    install.add_argument(
        "--socket-activation",
        action="store_true",
        help="systemd: listen from the beginning, and start the daemon with the first call",
    )
    install.add_argument(
        "--linger",
        action="store_true",
        help="systemd: let this user's services, and so runs, live on after logout, and start at "
        "boot",
    )
    install.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable for the daemon and its runs; may be given several times",
    )
    install.add_argument(
        "--now", action=argparse.BooleanOptionalAction, default=True, help="start it at once (yes)"
    )
    install.add_argument(
        "--no-start", dest="now", action="store_false", help="the same as --no-now"
    )
    install.add_argument(
        "--force",
        action="store_true",
        help="replace files that were not written by this command, or changed since",
    )
    install.add_argument("--state-dir", type=Path, help="as for serve")
    install.add_argument("--runtime-dir", type=Path, help="as for serve")
    install.add_argument("options", nargs="*", metavar="OPTION", help="options of serve, after --")


def run(arguments: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    # Only this command needs it, and each one of `finetuned` imports this module.
    from finetuned_daemon.service.command import run as run_action

    return run_action(arguments)
