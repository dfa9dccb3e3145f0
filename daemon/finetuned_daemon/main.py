"""`finetuned`: the daemon's own command line."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned._version import __version__
from finetuned_daemon import logs
from finetuned_daemon.config import Config
from finetuned_daemon.instance import AlreadyServing, Instance
from finetuned_daemon.limits import LIMITS, Limits, raise_open_files
from finetuned_daemon.listen import BadAddress, parse_listen, parse_metrics_listen
from finetuned_daemon.notify.settings import add_options as add_notify_options
from finetuned_daemon.notify.settings import settings as notify_settings
from finetuned_daemon.plugins import refuse_plugins
from finetuned_daemon.privacy import FolderUnsafe
from finetuned_daemon.service import handed
from finetuned_daemon.store.database import DatabaseUnusable
from finetuned_daemon.store.files import FolderRemote, refuse_network
from finetuned_daemon.tls import TLSFiles, TLSUnusable

EXIT_UNUSABLE = 1
EXIT_ALREADY_SERVING = 3

_SERVE = "serve"
_MOST_MINUTES = 365 * 24 * 60

_log = logging.getLogger("finetuned_daemon")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    # What the daemon writes is for its user alone; runs get the umask that it was started with.
    umask = os.umask(0o077)
    given = sys.argv[1:] if argv is None else argv
    parser, serve_parser = _parser(serves=list(given[:1]) == [_SERVE])
    arguments = parser.parse_args(given)
    if arguments.command == _SERVE:
        return _serve(_config(serve_parser, arguments, umask))
    return _run(arguments, umask)


def _run(arguments: argparse.Namespace, umask: int) -> int:
    """Runs another command than `serve`; returns the exit status."""
    from finetuned_daemon.commands import db, notify, service, token

    if arguments.command == db.COMMAND:
        return db.run(arguments)
    if arguments.command == token.COMMAND:
        return token.run(arguments)
    if arguments.command == notify.COMMAND:
        return notify.run(arguments, umask)
    return service.run(arguments)


def _serve(config: Config) -> int:
    """Runs the daemon in the foreground; returns the exit status."""
    if config.prometheus is not None and find_spec("prometheus_client") is None:
        print(
            "finetuned: --prometheus needs the package prometheus-client; install it with\n"
            f"    {sys.executable} -m pip install 'finetuned[prometheus]'",
            file=sys.stderr,
        )
        return EXIT_UNUSABLE
    refuse_plugins()
    gc.disable()  # until it serves, as in `entry.py`
    # Half of what takes time before `finetuned token` answers, and only this command needs it.
    from finetuned_daemon.server import serve

    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal is no reason to end
    try:
        refuse_network(config.paths.state_dir)
        given = handed.take(config.paths, os.environ)
        is_activated = given.listening is not None
        instance = Instance(config.paths, config.private, is_activated=is_activated)
    except AlreadyServing as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_ALREADY_SERVING
    except (FolderRemote, FolderUnsafe, handed.HandedUnusable, OSError) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    limits = Limits(config.limits)
    logs.set_up(config.paths.log_file, config.paths.log, limits, config.log_level)
    raise_open_files(limits["open_files"])
    try:
        asyncio.run(serve(config, instance, given))
    except (BadAddress, DatabaseUnusable, FolderUnsafe, TLSUnusable) as error:
        print(f"finetuned: {error}", file=sys.stderr)
        return EXIT_UNUSABLE
    finally:
        instance.close()
        logs.end()
    return 0


def _parser(*, serves: bool = False) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The parser of all commands, and the one of `serve`.

    Args:
        serves: Only that one is needed: what the others import is not, and a daemon that starts
            does not wait for it.
    """
    default = Config(paths=paths())
    parser = argparse.ArgumentParser(
        prog="finetuned",
        description="The fine-tuning daemon. Clients: finetunectl, import finetuned.",
    )
    parser.add_argument("--version", action="version", version=f"finetuned {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    command = commands.add_parser(
        _SERVE,
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
        action="append",
        default=[],
        metavar="ADDRESS:PORT",
        help="serve on TCP as well, with a token: 127.0.0.1:PORT or [::1]:PORT, or with --tls-cert "
        "any address of this machine (0.0.0.0 or [::]: all of them, IPv4 and IPv6); port 0: any "
        "that is free. May be given several times",
    )
    for name, text in (
        (
            "cert",
            "PEM file of the certificate that TCP is served with, those of CAs between behind "
            "it; read again as it changes",
        ),
        ("key", "PEM file of its private key, of mode 0600"),
        ("client-ca", "PEM file of a CA: clients must show a certificate of it, besides the token"),
    ):
        command.add_argument(f"--tls-{name}", type=Path, metavar="FILE", help=text)
    command.add_argument(
        "--runner-python", default=default.runner_python, help="Python that runs train with"
    )
    command.add_argument(
        "--runner-module", default=default.runner_module, help="module that is the runner"
    )
    command.add_argument(
        "--standby-idle-minutes",
        type=_minutes,
        default=default.standby_idle_minutes,
        metavar="MINUTES",
        help="time that a process which has imported everything is kept after a run, for the next "
        "to begin from; 0: none is",
    )
    command.add_argument(
        "--standby-spare",
        action="store_true",
        help="it becomes the next run itself, as on systems other than Linux, and forks none",
    )
    command.add_argument(
        "--training-quota",
        type=_count,
        metavar="N",
        help="checkpoints that all runs together may ever save, those of deleted tasks included; "
        "without it any number",
    )
    command.add_argument(
        "--backup-hours",
        type=float,
        default=default.backup_hours,
        metavar="HOURS",
        help="the database is backed up when its newest backup is so old; 0: never",
    )
    command.add_argument(
        "--backup-keep",
        type=_at_least_one,
        default=default.backup_keep,
        metavar="N",
        help="how many of those stay",
    )
    command.add_argument(
        "--new-database",
        action="store_true",
        help="begin with an empty database where it is missing, although there are run folders",
    )
    for name, text in (
        ("save-deadline-seconds", "time that a stop has for its checkpoint before SIGTERM"),
        ("discard-deadline-seconds", "the same for a stop that saves nothing"),
        ("kill-deadline-seconds", "time between SIGTERM and SIGKILL"),
        ("hang-notice-seconds", "time without a sign of life of a runner before it is said"),
        ("hang-deadline-seconds", "the same before the runner is ended; 0: never"),
        ("start-deadline-seconds", "time that a runner has to its first sign of life; 0: any"),
        ("restart-pause-seconds", "time before a runner that crashed at once is started again"),
        ("heartbeat-seconds", "a watch that is quiet for so long sends a heartbeat"),
        ("disk-wait-seconds", "time that a run waits in memory on a full disk before it is paused"),
        ("disk-look-seconds", "how often it is looked whether paused runs have room again"),
    ):
        command.add_argument(
            f"--{name}", type=float, default=getattr(default, name.replace("-", "_")), help=text
        )
    for limit in LIMITS:
        if limit.flag:
            command.add_argument(
                limit.flag,
                type=_count,
                default=limit.default,
                metavar="N",
                help=f"{limit.bounds}; 0: any number",
            )
    command.add_argument(
        "--log-level",
        choices=logs.LEVELS,
        default=default.log_level,
        help="the least that is shown on stderr; the log file has info and above, and with debug "
        "all",
    )
    command.add_argument(
        "--prometheus",
        metavar="ADDRESS:PORT",
        help="serve metrics for Prometheus on http://ADDRESS:PORT/metrics, without a token: "
        "loopback only, such as 127.0.0.1:9464",
    )
    add_notify_options(command)
    if serves:
        return parser, command
    from finetuned_daemon.commands import db, notify, service, token

    db.register(commands)
    token.register(commands)
    notify.register(commands)
    service.register(commands)
    return parser, command


def parse_serve(
    options: Sequence[str], *, owner: int | None = None
) -> tuple[Config, dict[str, object]]:
    """What options of `serve` mean, for whoever starts it later; wrong ones end the program.

    Args:
        options: After `serve`.
        owner: Whom it will run as; None: this user.

    Returns:
        The settings, and the options by name whose values are not the defaults.
    """
    parser, serve_parser = _parser()
    given = parser.parse_args(["serve", *options])
    default = vars(parser.parse_args(["serve"]))
    changed = {name: value for name, value in vars(given).items() if value != default[name]}
    return _config(serve_parser, given, 0o022, owner), changed


def _config(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    umask: int,
    owner: int | None = None,
) -> Config:
    default = Config(paths=paths())
    if (arguments.tls_cert is None) is not (arguments.tls_key is None):
        parser.error("--tls-cert and --tls-key go together")
    if arguments.tls_client_ca is not None and arguments.tls_cert is None:
        parser.error("--tls-client-ca needs --tls-cert and --tls-key")
    tls = None
    if arguments.tls_cert is not None:
        if not arguments.listen:
            parser.error("--tls-cert is for TCP: give --listen as well")
        tls = TLSFiles(arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca)
    try:
        listen = tuple(parse_listen(a, has_tls=tls is not None) for a in arguments.listen)
    except BadAddress as error:
        parser.error(f"--listen {error}")
    try:
        prometheus = parse_metrics_listen(arguments.prometheus) if arguments.prometheus else None
    except BadAddress as error:
        parser.error(f"--prometheus {error}")
    given_state_dir = (
        arguments.state_dir if arguments.state_dir != default.paths.state_dir else None
    )
    return Config(
        paths=paths(given_state_dir, arguments.runtime_dir),
        listen=listen,
        tls=tls,
        runner_python=arguments.runner_python,
        runner_module=arguments.runner_module,
        standby_idle_minutes=arguments.standby_idle_minutes,
        standby_spare=arguments.standby_spare,
        save_deadline_seconds=arguments.save_deadline_seconds,
        discard_deadline_seconds=arguments.discard_deadline_seconds,
        kill_deadline_seconds=arguments.kill_deadline_seconds,
        hang_notice_seconds=arguments.hang_notice_seconds,
        hang_deadline_seconds=arguments.hang_deadline_seconds,
        start_deadline_seconds=arguments.start_deadline_seconds,
        restart_pause_seconds=arguments.restart_pause_seconds,
        heartbeat_seconds=arguments.heartbeat_seconds,
        backup_hours=arguments.backup_hours,
        backup_keep=arguments.backup_keep,
        may_be_new=arguments.new_database,
        notify=notify_settings(parser, arguments, owner=owner),
        prometheus=prometheus,
        disk_wait_seconds=arguments.disk_wait_seconds,
        disk_look_seconds=arguments.disk_look_seconds,
        training_quota=arguments.training_quota,
        log_level=arguments.log_level,
        limits={
            limit.name: getattr(arguments, f"most_{limit.name}") for limit in LIMITS if limit.flag
        },
        runner_umask=umask,
    )


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes <= _MOST_MINUTES:
        raise argparse.ArgumentTypeError(
            f"must be minutes from 0 to {_MOST_MINUTES} (a year), not {text!r}"
        )
    return minutes


def _at_least_one(text: str) -> int:
    number = _count(text)
    if not number:
        raise argparse.ArgumentTypeError("must be 1 at least")
    return number


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
