"""`finetuned token`: the tokens that TCP demands, shown and changed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned_daemon.privacy import FolderUnsafe, make_private
from finetuned_daemon.tokens import read_token, write_token

COMMAND = "token"

EXIT_UNUSABLE = 1


def register(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(COMMAND, help="show or change the tokens that TCP demands")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("show", "print a token"),
        (
            "rotate",
            "put a new token in place of the old one; a daemon that runs takes it at once, refuses "
            "the old one and ends the streams that came with it",
        ),
        ("path", "print where a token lies"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument(
            "--read-only",
            action="store_true",
            help="the token that may read alone; there is none until it is rotated, and none again "
            "once its file is removed",
        )
        action.add_argument(
            "--state-dir", type=Path, help=f"of the daemon; also from {STATE_DIR_VARIABLE}"
        )
        action.add_argument(
            "--runtime-dir", type=Path, help=f"of the daemon; also from {RUNTIME_DIR_VARIABLE}"
        )


def run(arguments: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    here = paths(arguments.state_dir, arguments.runtime_dir)
    path = here.read_only_token if arguments.read_only else here.token
    option = " --read-only" if arguments.read_only else ""
    try:
        if arguments.action == "path":
            print(path)
        elif arguments.action == "show":
            print(read_token(path).decode("ascii"))
        else:
            make_private(here.runtime_dir)
            write_token(path)
            print(path)
    except FileNotFoundError:
        print(
            f"finetuned: there is no token {path}; make one: finetuned token rotate{option}",
            file=sys.stderr,
        )
        return EXIT_UNUSABLE
    except (FolderUnsafe, OSError) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    return 0
