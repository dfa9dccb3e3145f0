"""`finetuned`: the daemon's own command line."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned._version import __version__
from finetuned_daemon.config import Config
from finetuned_daemon.instance import AlreadyServing, FolderUnsafe, Instance
from finetuned_daemon.server import BadAddress, parse_loopback, serve
from finetuned_daemon.store.database import DatabaseUnusable

EXIT_UNUSABLE = 1
EXIT_ALREADY_SERVING = 3

_log = logging.getLogger("finetuned_daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the daemon in the foreground; returns the exit status."""
    # What the daemon writes is for its user alone; runs get the umask that it was started with.
    umask = os.umask(0o077)
    config = _parse(argv, umask)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal is no reason to end
    try:
        instance = Instance(config.paths)
    except AlreadyServing as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_ALREADY_SERVING
    except (FolderUnsafe, OSError) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    try:
        asyncio.run(serve(config, instance))
    except (BadAddress, DatabaseUnusable) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    finally:
        instance.close()
    return 0


def _parse(argv: Sequence[str] | None, umask: int) -> Config:
    default = Config(paths=paths())
    parser = argparse.ArgumentParser(
        prog="finetuned",
        description="The fine-tuning daemon. Clients: finetunectl, import finetuned.",
    )
    parser.add_argument("--version", action="version", version=f"finetuned {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "serve",
        help="serve in the foreground until SIGTERM",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--state-dir",
        type=Path,
        default=default.paths.state_dir,
        help=f"folder of database and run folders; also from {STATE_DIR_VARIABLE}",
    )
    command.add_argument(
        "--runtime-dir",
        type=Path,
        default=None,
        help=f"folder of the socket; also from {RUNTIME_DIR_VARIABLE}; by default in the user's "
        "runtime folder",
    )
    command.add_argument(
        "--listen",
        default=default.listen,
        metavar="127.0.0.1:PORT",
        help="serve on loopback TCP as well, with a token; port 0: any that is free",
    )
    command.add_argument(
        "--runner-python", default=default.runner_python, help="Python that runs train with"
    )
    command.add_argument(
        "--runner-module", default=default.runner_module, help="module that is the runner"
    )
    command.add_argument(
        "--training-quota",
        type=_count,
        metavar="N",
        help="checkpoints that all runs together may ever save, those of deleted tasks included; "
        "without it any number",
    )
    for name, text in (
        ("save-deadline-seconds", "time that a stop has for its checkpoint before SIGTERM"),
        ("discard-deadline-seconds", "the same for a stop that saves nothing"),
        ("kill-deadline-seconds", "time between SIGTERM and SIGKILL"),
        ("heartbeat-seconds", "a watch that is quiet for so long sends a heartbeat"),
    ):
        command.add_argument(
            f"--{name}", type=float, default=getattr(default, name.replace("-", "_")), help=text
        )
    arguments = parser.parse_args(argv)
    if arguments.listen:
        try:
            parse_loopback(arguments.listen)
        except BadAddress as error:
            parser.error(f"--listen {error}")
    given_state_dir = (
        arguments.state_dir if arguments.state_dir != default.paths.state_dir else None
    )
    return Config(
        paths=paths(given_state_dir, arguments.runtime_dir),
        listen=arguments.listen,
        runner_python=arguments.runner_python,
        runner_module=arguments.runner_module,
        save_deadline_seconds=arguments.save_deadline_seconds,
        discard_deadline_seconds=arguments.discard_deadline_seconds,
        kill_deadline_seconds=arguments.kill_deadline_seconds,
        heartbeat_seconds=arguments.heartbeat_seconds,
        training_quota=arguments.training_quota,
        runner_umask=umask,
    )


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
