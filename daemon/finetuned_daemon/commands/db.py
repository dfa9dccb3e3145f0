"""`finetuned db`: check, back up, restore, rebuild and compact the database."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned_daemon.config import Config
from finetuned_daemon.folder_check import inspect
from finetuned_daemon.instance import AlreadyServing, Instance
from finetuned_daemon.privacy import FolderUnsafe
from finetuned_daemon.runs.contract import sync_dir
from finetuned_daemon.store import backup, integrity
from finetuned_daemon.store.database import Database, DatabaseUnusable
from finetuned_daemon.store.files import (
    COMPANIONS,
    SET_ASIDE,
    FolderRemote,
    refuse_network,
    set_aside,
)
from finetuned_daemon.store.opening import check_present, is_missing

if TYPE_CHECKING:
    from finetuned_daemon.rebuild import Report

COMMAND = "db"

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_SERVING = 3

_RESERVE = 16 << 20
"""Bytes that are left free."""

_NOT_REBUILT = (
    "not in run folders, and so not rebuilt: tasks that never ran, edits since a task's last "
    "start, custom templates, runs that waited in the queue, answers to repeated requests, and "
    "checkpoints of deleted tasks in the training quota"
)

Commands = Any
"""argparse gives its subparsers no public name."""


class _Refused(Exception):
    """A command does not do what it was asked for; the message says why."""


def register(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        COMMAND, help="check, back up, restore, rebuild or compact the database"
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--state-dir", type=Path, help=f"folder of the database; also from {STATE_DIR_VARIABLE}"
    )
    common.add_argument(
        "--runtime-dir", type=Path, help=f"folder of the socket; also from {RUNTIME_DIR_VARIABLE}"
    )
    common.add_argument("--json", action="store_true", help="write JSON")
    asking = argparse.ArgumentParser(add_help=False)
    asking.add_argument("--yes", action="store_true", help="ask nothing")
    actions.add_parser(
        "check",
        parents=[common],
        help="read all of it, and hold it against run folders and backups; a daemon may serve",
    )
    command = actions.add_parser(
        "backup", parents=[common], help="back it up now; a daemon may serve"
    )
    command.add_argument(
        "folder", nargs="?", type=Path, help="where to; default: backups in the state folder"
    )
    command.add_argument(
        "--keep", type=int, metavar="N", help="remove the oldest beyond so many of this command's"
    )
    command = actions.add_parser(
        "restore",
        parents=[common, asking],
        help="put a backup in its place, and take over what run folders have since",
    )
    command.add_argument(
        "backup", nargs="?", type=Path, help="the file; default: the newest that is whole"
    )
    command = actions.add_parser(
        "rebuild", parents=[common, asking], help="make it anew from the run folders"
    )
    command.add_argument(
        "--add",
        action="store_true",
        help="keep what is in it, and add the tasks and runs that it does not know",
    )
    actions.add_parser(
        "compact",
        parents=[common],
        help="write it anew without the room that nothing uses any more, which goes to the disk",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs it; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    action: Callable[[Config, argparse.Namespace], int] = {
        "check": _check,
        "backup": _backup,
        "restore": _restore,
        "rebuild": _rebuild,
        "compact": _compact,
    }[arguments.action]
    config = Config(paths=paths(arguments.state_dir, arguments.runtime_dir))
    try:
        refuse_network(config.paths.state_dir)
        return action(config, arguments)
    except AlreadyServing as error:
        return _fail(f"{error}; stop it first: finetunectl daemon stop", EXIT_SERVING)
    except (
        *(backup.BackupFailed, DatabaseUnusable, FolderRemote, FolderUnsafe),
        *(_Refused, OSError, sqlite3.Error),
    ) as error:
        return _fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was changed", 130)


# --- check, backup


def _check(config: Config, arguments: argparse.Namespace) -> int:
    if is_missing(config.database):
        raise _Refused(f"there is no database {config.database}")
    problems = list(check_present(config.database, thorough=True).problems)
    notes = list[str]()
    if not problems:
        problems, notes = inspect(config)
    kept = [
        (made, not integrity.check_file(made.path).problems)
        for made in backup.backups(config.backups_dir)
    ]
    problems += [f"the backup {made.path} is damaged" for made, is_whole in kept if not is_whole]
    if arguments.json:
        _print_json(
            {
                "database": str(config.database),
                "is_whole": not problems,
                "problems": problems,
                "notes": notes,
                "backups": [{**_described(made), "is_whole": is_whole} for made, is_whole in kept],
            }
        )
    else:
        for problem in problems:
            print(f"problem  {problem}")
        for note in notes:
            print(f"note     {note}")
        for made, is_whole in kept:
            print(f"backup   {_when(made)}  {made.cause}  {'whole' if is_whole else 'DAMAGED'}")
        found = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        print(f"{config.database}: {found if problems else 'whole'}")
    return EXIT_FAILED if problems else 0


def _backup(config: Config, arguments: argparse.Namespace) -> int:
    if is_missing(config.database):
        raise _Refused(f"there is no database {config.database}")
    if arguments.keep is not None and arguments.keep < 1:
        return _fail("--keep must be 1 at least", EXIT_USAGE)
    folder = arguments.folder.absolute() if arguments.folder else config.backups_dir
    made = backup.make(config.database, folder, backup.Cause.MANUAL, keep=arguments.keep)
    if arguments.json:
        _print_json(_described(made))
    else:
        print(f"{made.path}  {made.path.stat().st_size:,} bytes, verified")
    return 0


# --- restore, rebuild


def _restore(config: Config, arguments: argparse.Namespace) -> int:
    with _alone(config):
        source = _chosen(config, arguments.backup)
        _confirm(
            arguments,
            f"The database becomes that of {source}. What was done since and is not in run folders "
            "is lost, and the present one is kept aside.",
        )
        with contextlib.closing(integrity.open_read_only(source, immutable=True)) as connection:
            return _replace(config, arguments, connection, add_tasks=False)


def _rebuild(config: Config, arguments: argparse.Namespace) -> int:
    with _alone(config):
        if not arguments.add:
            _confirm(
                arguments,
                "The database is made anew from run folders alone, and the present one is kept "
                f"aside. What is {_NOT_REBUILT}.",
            )
            return _replace(config, arguments, None, add_tasks=True)
        if is_missing(config.database):
            raise _Refused(f"there is no database {config.database}; without --add one is made")
        problems = check_present(config.database).problems
        if problems:
            raise _Refused(f"{config.database} is damaged: {'; '.join(problems[:3])}")
        _confirm(
            arguments,
            "Tasks and runs that are in run folders alone are added; the database of before is "
            "kept aside.",
        )
        with contextlib.closing(integrity.open_read_only(config.database)) as connection:
            return _replace(config, arguments, connection, add_tasks=True)


def _compact(config: Config, arguments: argparse.Namespace) -> int:
    with _alone(config):
        if is_missing(config.database):
            raise _Refused(f"there is no database {config.database}")
        problems = check_present(config.database).problems
        if problems:
            raise _Refused(f"{config.database} is damaged: {'; '.join(problems[:3])}")
        database = Database(config.database, backups=config.backups_dir)
        try:
            before, used = config.database.stat().st_size, database.used_bytes()
            # Once beside, and once in the write-ahead log.
            room, free = 2 * used + _RESERVE, shutil.disk_usage(config.paths.state_dir).free
            if free < room:
                raise _Refused(
                    f"too little room on the disk: {room:,} bytes are needed, {free:,} are free; "
                    "nothing was changed"
                )
            database.rewrite()
        finally:
            database.close()
        after = config.database.stat().st_size
    if arguments.json:
        path = str(config.database)
        _print_json({"database": path, "bytes_before": before, "bytes_after": after})
    else:
        print(f"{config.database}: {after:,} bytes, {before - after:,} less than before")
    return 0


def _replace(
    config: Config,
    arguments: argparse.Namespace,
    source: sqlite3.Connection | None,
    *,
    add_tasks: bool,
) -> int:
    """Makes a database beside, whole, and then puts it in the place of the present one."""
    # Brings in most of the daemon, and every command of `finetuned` imports this module.
    from finetuned_daemon.rebuild import Rebuilder

    temporary = config.database.with_name(f".{config.database.name}.new")
    _remove(temporary)
    try:
        if source is not None:
            backup.copy(source, temporary)
        database = Database(temporary)
        report = Rebuilder(config, database).run(config.runs_dir, add_tasks=add_tasks)
        database.new_epoch()
        database.close()
        aside = set_aside(config.database, backup.stamp(datetime.now(UTC)))
        temporary.rename(config.database)
        sync_dir(config.database.parent)
    finally:
        _remove(temporary)
    _tell(config, arguments, report, aside)
    return 0


def _remove(temporary: Path) -> None:
    for end in (*COMPANIONS, "-journal"):
        temporary.with_name(temporary.name + end).unlink(missing_ok=True)


def _chosen(config: Config, given: Path | None) -> Path:
    if given is None:
        newest = backup.newest_whole(config.backups_dir)
        if newest is None:
            raise _Refused(
                f"there is no whole backup in {config.backups_dir}; finetuned db rebuild makes the "
                "database from run folders alone"
            )
        return newest.path
    if not given.is_file():
        raise _Refused(f"there is no file {given}")
    problems = integrity.check_file(given).problems
    if problems:
        raise _Refused(f"{given} is no whole backup: {'; '.join(problems[:3])}")
    return given.absolute()


@contextlib.contextmanager
def _alone(config: Config) -> Any:
    """Holds the folders as a daemon does, so that none can start meanwhile."""
    instance = Instance(config.paths)
    try:
        yield
    finally:
        instance.close()


def _confirm(arguments: argparse.Namespace, what: str) -> None:
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise _Refused(f"{what} Say --yes for it; nothing was changed")
    print(what, file=sys.stderr)
    print("Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise _Refused("nothing was changed")


# --- words


def _tell(config: Config, arguments: argparse.Namespace, report: Report, aside: list[Path]) -> None:
    if arguments.json:
        _print_json(
            {
                "database": str(config.database),
                "set_aside": [str(path) for path in aside],
                **asdict(report),
            }
        )
        return
    for title, names in (
        ("task added", report.added_tasks),
        ("run added", report.added_runs),
        ("run brought up to date", report.updated_runs),
        ("runner lives, and is adopted by the next daemon", report.live_runs),
        ("waits in the queue, and is started by the next daemon", report.queued),
        ("not in the database (finetuned db rebuild --add adds it)", report.unknown),
        ("holds no run that can be read", report.unreadable),
    ):
        for name in names:
            print(f"{name}: {title}")
    print(f"{config.database} is in place. Watchers begin anew.")
    if arguments.action == "rebuild" and not arguments.add:
        print(f"What is {_NOT_REBUILT}.")
    if aside:
        folder = config.paths.state_dir / SET_ASIDE
        print(f"The database of before lies in {folder}. To undo this, with no daemon running:")
        for end in COMPANIONS[1:]:
            print(f"  rm -f {shlex.quote(f'{config.database}{end}')}")
        for path in aside:
            end = path.name[len(aside[0].name) :]
            print(f"  mv {shlex.quote(str(path))} {shlex.quote(f'{config.database}{end}')}")


def _described(made: backup.Backup) -> dict[str, Any]:
    return {
        "path": str(made.path),
        "time": made.time.isoformat(),
        "schema_version": made.schema,
        "cause": made.cause,
        "size_bytes": made.path.stat().st_size,
    }


def _when(made: backup.Backup) -> str:
    return f"{made.time:%Y-%m-%d %H:%M:%S} UTC  schema {made.schema}"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _fail(message: str, status: int) -> int:
    print(f"finetuned: {message}", file=sys.stderr)
    return status
