"""`finetuned notify`: a test of the ways that are given, what was delivered, and a new secret."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sqlite3
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned_daemon.config import Config
from finetuned_daemon.notify.channel import NotDelivered
from finetuned_daemon.notify.message import sample
from finetuned_daemon.notify.notifier import channels
from finetuned_daemon.notify.settings import add_options, settings
from finetuned_daemon.notify.webhook import new_secret
from finetuned_daemon.store.integrity import open_read_only, version_of
from finetuned_daemon.store.notification_rows import Delivery, newest
from finetuned_daemon.tasks import now_us
from finetuned_daemon.texts import printable

COMMAND = "notify"

EXIT_FAILED = 1

_FIRST_SCHEMA = 8
_SECRET_BYTES = 32
_MOST_DIGITS = 18
"""What the database takes."""


def register(commands: Any) -> None:
    """Adds the command."""
    command = commands.add_parser(
        COMMAND, help="try notifications, see what became of them, or make a secret for webhooks"
    )
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True)
    text = "send a sample on each way that is given, once; options as those of serve"
    test = actions.add_parser(
        "test", help=text, description=f"{text[0].upper()}{text[1:]}. Status 1: one did not arrive."
    )
    test.set_defaults(parser=test)
    add_options(test)
    _add_folders(test)
    text = "print what was sent, newest first, with what came of it"
    log = actions.add_parser("log", help=text, description=f"{text[0].upper()}{text[1:]}.")
    log.add_argument("--undelivered", action="store_true", help="only what has not arrived")
    log.add_argument("--limit", type=_limit, default=50, metavar="N", help="lines at most (50)")
    log.add_argument("--json", action="store_true", help="one JSON object a line, with all of it")
    _add_folders(log)
    text = "write a new secret into a file that is not there yet, for --notify-webhook-secret-file"
    new = actions.add_parser("new-secret", help=text, description=f"{text[0].upper()}{text[1:]}.")
    new.add_argument("file", type=Path, metavar="FILE")


def run(arguments: argparse.Namespace, umask: int) -> int:
    """Runs it; returns the exit status."""
    if arguments.action == "test":
        return _test(arguments.parser, arguments, umask)
    try:
        if arguments.action == "log":
            return _show_log(arguments)
        return _new_secret(arguments.file)
    except (OSError, sqlite3.Error) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_FAILED


def _test(parser: argparse.ArgumentParser, arguments: argparse.Namespace, umask: int) -> int:
    given = settings(parser, arguments)
    ways = channels(given, paths(arguments.state_dir, arguments.runtime_dir), umask)
    if not ways:
        parser.error("give a way: --notify-command, --notify-desktop or --notify-webhook")
    status = 0
    for way in ways:
        began = time.monotonic()
        try:
            how = way.send(sample(now_us(), given.language))
        except NotDelivered as error:
            print(f"failed     {way.label}: {error}")
            status = EXIT_FAILED
        else:
            print(f"delivered  {way.label} ({how}, {time.monotonic() - began:.1f} s)")
    return status


def _show_log(arguments: argparse.Namespace) -> int:
    config = Config(paths=paths(arguments.state_dir, arguments.runtime_dir))
    if not config.database.exists():
        print(f"finetuned: there is no database {config.database}", file=sys.stderr)
        return EXIT_FAILED
    with contextlib.closing(open_read_only(config.database)) as connection:
        has_any = version_of(connection) >= _FIRST_SCHEMA
        limit, undelivered = arguments.limit, arguments.undelivered
        found = newest(connection, limit, undelivered=undelivered) if has_any else []
    for delivery in found:
        print(_as_json(delivery) if arguments.json else _as_line(delivery))
    if not found and not arguments.json:
        print("nothing was sent" if not arguments.undelivered else "everything has arrived")
    return 0


def _as_line(delivery: Delivery) -> str:
    content = json.loads(delivery.body)
    moment = datetime.fromtimestamp(delivery.time / 1e6).astimezone()
    attempts = f" after {delivery.attempts} attempts" if delivery.attempts > 1 else ""
    error = f": {' '.join(delivery.error.split())}" if delivery.error else ""
    state = delivery.state.lower().replace("_", " ")
    line = (
        f"{moment:%Y-%m-%d %H:%M:%S}  {content['type']}  {content['data']['task']} "
        f"run {content['data']['run']}  {delivery.channel}  {state}{attempts}{error}"
    )
    return printable(line)


def _as_json(delivery: Delivery) -> str:
    content = {
        "notification": json.loads(delivery.body),
        "channel": delivery.channel,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "next_attempt": _moment(delivery.next_time),
        "done_time": _moment(delivery.done_time),
        "error": delivery.error or None,
    }
    return json.dumps(content)


def _moment(time_us: int) -> str | None:
    return datetime.fromtimestamp(time_us / 1e6, UTC).isoformat() if time_us else None


def _new_secret(file: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(file, flags, 0o600), "w", encoding="ascii") as opened:
        opened.write(new_secret(secrets.token_bytes(_SECRET_BYTES)) + "\n")
    print(file)
    return 0


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < len(text) <= _MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    if not int(text):
        raise argparse.ArgumentTypeError("must be 1 at least")
    return int(text)


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir", type=Path, help=f"of the daemon; also from {STATE_DIR_VARIABLE}"
    )
    parser.add_argument(
        "--runtime-dir", type=Path, help=f"of the daemon; also from {RUNTIME_DIR_VARIABLE}"
    )
