"""Which notifications are sent and how: settings, and the options that give them."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetuned_daemon.notify.kinds import BY_NAME, KINDS
from finetuned_daemon.notify.webhook import BadWebhook, Target, parse_secrets, parse_url
from finetuned_daemon.privacy import FolderUnsafe, check_private
from finetuned_daemon.texts import Language

_DEFAULT_KINDS = tuple(kind.name for kind in KINDS if kind.is_default)
_LONGEST_FILE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class NotifySettings:
    """Which notifications a daemon sends, and how; without a way it makes none."""

    command: tuple[str, ...] = ()
    """Program and arguments that are run for each; empty: none."""
    desktop: bool = False
    """Whether they are shown on the desktop of the daemon's user."""
    webhooks: tuple[Target, ...] = ()
    """Where they are posted to."""
    secrets: tuple[bytes, ...] = field(default=(), repr=False)
    """What posts are signed with, the newest first; empty: they are not."""
    kinds: frozenset[str] = frozenset(_DEFAULT_KINDS)
    """Names of the kinds that are sent."""
    language: Language = "en"
    """Of titles and sentences."""
    timeout_seconds: float = 10.0
    """Time that one attempt has on one way."""
    retry_seconds: float = 5.0
    """Time after a first attempt that failed; three times as long after each other, up to an hour.

    Each is longer or shorter by up to a fifth.
    """
    give_up_hours: float = 24.0
    """Age at which a notification that can't be delivered is given up."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a command."""
    default = NotifySettings()
    group = parser.add_argument_group("notifications")
    group.add_argument(
        "--notify-command",
        metavar="COMMAND",
        help="program that is run for each, with arguments, split as a shell would but run by "
        "none; the notification is JSON on its stdin, its main fields are FINETUNED_* in its "
        "environment; status 0: delivered",
    )
    group.add_argument(
        "--notify-desktop", action="store_true", help="show them on the desktop of this user"
    )
    group.add_argument(
        "--notify-webhook",
        action="append",
        default=[],
        metavar="URL",
        help="post them as JSON to this https:// address; @FILE: the address stands in a file of "
        "mode 0600. May be given several times",
    )
    group.add_argument(
        "--notify-webhook-secret-file",
        type=Path,
        metavar="FILE",
        help="file of mode 0600 with the secret that posts are signed with, as Standard Webhooks "
        "says; several lines: each signs. `finetuned notify new-secret FILE` makes one",
    )
    group.add_argument(
        "--notify-allow-http",
        action="store_true",
        help="take http:// addresses of other machines too",
    )
    group.add_argument(
        "--notify-on",
        type=_kinds,
        default=",".join(_DEFAULT_KINDS),
        metavar="KIND,...",
        help=f"what is told, of {', '.join(BY_NAME)}",
    )
    group.add_argument(
        "--notify-language",
        choices=("en", "zh"),
        default=default.language,
        help="of titles and sentences",
    )
    for name, text in (
        ("timeout-seconds", "time that one attempt has"),
        (
            "retry-seconds",
            "time before the second attempt; three times as long before each other, an hour at "
            "most",
        ),
        ("give-up-hours", "age at which one that can't be delivered is given up"),
    ):
        group.add_argument(
            f"--notify-{name}",
            type=_positive,
            default=getattr(default, name.replace("-", "_")),
            metavar=name.rpartition("-")[2].upper(),
            help=text,
        )


def settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, *, owner: int | None = None
) -> NotifySettings:
    """The settings that were given; ends the program where they can't be used.

    Args:
        parser: Says what is wrong.
        arguments: With the options of `add_options`.
        owner: The user whose files with secrets must be, or root's; None: this one.
    """
    command: tuple[str, ...] = ()
    if arguments.notify_command is not None:
        try:
            command = tuple(shlex.split(arguments.notify_command))
        except ValueError as error:
            parser.error(f"--notify-command can't be split ({error})")
        if not command:
            parser.error("--notify-command is empty")
        if shutil.which(command[0]) is None:
            parser.error(f"--notify-command: there is no program {command[0]}")
        # It is run in another folder than this.
        command = (os.path.abspath(shutil.which(command[0]) or ""), *command[1:])  # noqa: PTH100 - links stay
    secrets: tuple[bytes, ...] = ()
    file = arguments.notify_webhook_secret_file
    if file is not None:
        if not arguments.notify_webhook:
            parser.error("--notify-webhook-secret-file is for --notify-webhook")
        try:
            secrets = parse_secrets(_read_private(file, owner))
        except (BadWebhook, FolderUnsafe, OSError, UnicodeDecodeError) as error:
            parser.error(f"--notify-webhook-secret-file {file}: {error}")
    return NotifySettings(
        command=command,
        desktop=arguments.notify_desktop,
        webhooks=_targets(
            parser, arguments.notify_webhook, owner, may_be_http=arguments.notify_allow_http
        ),
        secrets=secrets,
        kinds=arguments.notify_on,
        language=arguments.notify_language,
        timeout_seconds=arguments.notify_timeout_seconds,
        retry_seconds=arguments.notify_retry_seconds,
        give_up_hours=arguments.notify_give_up_hours,
    )


def _targets(
    parser: argparse.ArgumentParser,
    given: Sequence[str],
    owner: int | None,
    *,
    may_be_http: bool,
) -> tuple[Target, ...]:
    targets = dict[str, Target]()
    for number, text in enumerate(given, start=1):
        # Which one it is, and not what it is: it may be a secret.
        which = f"--notify-webhook {number}" if len(given) > 1 else "--notify-webhook"
        try:
            if text == "@":
                raise BadWebhook("the file with the address must follow @")
            is_file = text.startswith("@")
            url = _read_private(Path(text[1:]), owner).strip() if is_file else text
            target = parse_url(url, may_be_http=may_be_http)
        except (BadWebhook, FolderUnsafe, OSError, UnicodeDecodeError) as error:
            parser.error(f"{which}: {error}")
        targets[target.digest] = target
    return tuple(targets.values())


def _read_private(path: Path, owner: int | None) -> str:
    """The text of a file that is this user's alone, or another's where an owner is given.

    Raises:
        FolderUnsafe: Others can get at it.
        BadWebhook: It is no file.
        OSError: It can't be read.
    """
    # Not to wait for the writer of a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadWebhook("it is no regular file")
    with open(descriptor, "rb") as file:
        check_private(path, may_be_roots=True, owner=owner)
        return file.read(_LONGEST_FILE).decode()


def _kinds(text: str) -> frozenset[str]:
    names = frozenset(filter(None, (name.strip().replace("-", "_") for name in text.split(","))))
    unknown = names - BY_NAME.keys()
    if unknown or not names:
        raise argparse.ArgumentTypeError(
            f"must be of {', '.join(BY_NAME)}, not {', '.join(sorted(unknown)) or 'nothing'}"
        )
    return names


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return number
