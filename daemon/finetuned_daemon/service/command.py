"""What `finetuned service` does: writes, runs the service manager's commands, and tells."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, Paths, paths
from finetuned_daemon.runs.contract import write_atomic
from finetuned_daemon.service import log, model, prepare
from finetuned_daemon.service.model import Change, File, Manager, Plan, Refused
from finetuned_daemon.store.files import SERVING
from finetuned_daemon.texts import printable

EXIT_FAILED = 1
EXIT_NOT_RUNNING = 3
EXIT_NOT_INSTALLED = 4

_MOST_LINES = 1_000_000_000

Command = tuple[str, ...]


def run(arguments: argparse.Namespace) -> int:
    """Runs an action; returns the exit status."""
    action = {
        "install": _install,
        "uninstall": _uninstall,
        "status": _status,
        "logs": _logs,
    }.get(arguments.action, _control)
    try:
        name, manager = prepare.manager(arguments)
        return action(name, manager, arguments)
    except Refused as error:
        print(f"finetuned: {printable(str(error))}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


# --- install


def _install(name: str, manager: Manager, arguments: argparse.Namespace) -> int:
    plan = prepare.plan(arguments, name)
    has_user = not plan.is_system or prepare.has_user(plan.user)
    is_dry = arguments.dry_run
    old = _written(manager)
    facts = dict(plan.facts)
    # Turned on by an earlier installation: still ours to turn off.
    facts["linger"] = plan.linger or bool(model.facts(old.get(manager.paths[0], "")).get("linger"))
    files = [_marked(file, facts) for file in manager.files(plan)]
    kept = {file.path for file in files}
    stale = [path for path in old if path not in kept and model.was_ours(old[path])]
    if not is_dry:
        _check(name, manager, arguments, plan, old, has_user=has_user)
    changed = [file for file in files if old.get(file.path) != file.content]
    change = Change.CHANGED if changed or stale else Change.SAME
    if manager.paths[0] not in old:
        change = Change.NEW
    _warn(prepare.warnings(plan))
    _do(manager.before(plan, has_user=has_user), is_dry=is_dry)
    if stale:
        _do(manager.uninstall(has_socket=True), is_dry=is_dry)
    for path in stale:
        _remove(path, is_dry=is_dry)
    for file in files:
        _write(file, old.get(file.path), mode=0o644 if plan.is_system else 0o600, is_dry=is_dry)
    if not is_dry:
        _warn(_found_wrong(manager.verify()))
    _do(manager.install(plan, now=arguments.now, change=change), is_dry=is_dry)
    _warn(manager.notes(plan))
    if is_dry:
        return 0
    how = "is installed and runs" if arguments.now else "is installed, and not started"
    if plan.socket_activation and arguments.now:
        how = "is installed, and starts with the first call"
    print(f"the service {how}; to see how it is: {_again('status', plan)}")
    for line in _way_in(plan):
        print(line)
    return 0


def _check(
    name: str,
    manager: Manager,
    arguments: argparse.Namespace,
    plan: Plan,
    old: dict[Path, str],
    *,
    has_user: bool,
) -> None:
    """What of this machine stands against it.

    Raises:
        Refused: Something does; nothing was changed.
    """
    if plan.is_system and os.geteuid() != 0:
        raise Refused(f"--system needs root: sudo {_again('install', plan)} ...")
    if not has_user and name != "systemd":
        raise Refused(f"there is no user {plan.user}; make one, or name another by --user")
    for path, text in old.items():
        if arguments.force or model.is_ours(text):
            continue
        if model.was_ours(text):
            beside = ""
            if name == "systemd":
                scope = "" if plan.is_system else " --user"
                beside = (
                    f"; changes belong beside it (systemctl{scope} edit {path.name}), where they "
                    "stay"
                )
            raise Refused(
                f"{path} has been changed since it was installed{beside}. --force writes it anew "
                "and keeps the old one"
            )
        raise Refused(
            f"{path} is there, and was not written by this command; --force replaces it and keeps "
            "the old one"
        )
    pid = prepare.holder(plan.paths)
    facts = model.facts(old.get(manager.paths[0], ""))
    state = manager.state(facts, has_socket=manager.paths[-1] in old)
    if pid is not None and (not pid or pid != state.pid):
        raise Refused(
            f"a daemon outside the service has {plan.paths.state_dir}"
            f"{f' (pid {pid})' if pid else ''}; stop it first, its runs go on: "
            "finetunectl daemon stop"
        )
    _reach(manager)


def _reach(manager: Manager) -> None:
    try:
        done = subprocess.run(manager.probe(), capture_output=True, text=True, check=False)
    except OSError as error:
        raise Refused(f"{manager.title} can't be reached: {error}") from error
    if done.returncode:
        hint = ""
        if "--user" in manager.probe():
            hint = (
                "\n  A user's services need a login session (ssh or a desktop, not su or sudo), or "
                "lingering: sudo loginctl enable-linger USER"
            )
        raise Refused(
            f"{manager.title} can't be reached, so nothing was changed: "
            f"{done.stderr.strip() or done.stdout.strip()}{hint}"
        )


def _found_wrong(check: Command) -> list[str]:
    """What the service manager's own check finds; an older one may not know all that is written."""
    if not check or not shutil.which(check[0]):
        return []
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    return [f"{check[0]}: {line}" for line in done.stderr.splitlines()]


def _marked(file: File, facts: dict[str, Any]) -> File:
    # Nothing may stand before the declaration of XML; in a plist, nor before its type.
    if file.path.suffix == ".plist":
        return File(file.path, model.marked(file.content, facts, ("<!-- ", " -->"), line=2))
    if file.path.suffix == ".xml":
        return File(file.path, model.marked(file.content, facts, ("<!-- ", " -->"), line=1))
    return File(file.path, model.marked(file.content, facts, ("# ", ""), line=0))


def _write(file: File, old: str | None, *, mode: int, is_dry: bool) -> None:
    if is_dry:
        print(f"# --- {file.path}\n{file.content}")
        return
    if old == file.content:
        print(f"unchanged  {file.path}")
        return
    if old is not None and not model.is_ours(old):
        kept = _spare(file.path)
        file.path.replace(kept)
        print(f"kept       {kept}")
    file.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file.path, file.content.encode())
    file.path.chmod(mode)
    print(f"{'written' if old is None else 'replaced':9}  {file.path}")


def _spare(path: Path) -> Path:
    """A name beside it that is free; what was kept before stays."""
    kept, number = path.with_name(f"{path.name}.replaced"), 1
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.replaced-{number}")
    return kept


def _way_in(plan: Plan) -> list[str]:
    """How clients find it, where they don't by themselves."""
    if plan.is_system:
        there = f"sudo -u {plan.user} env {' '.join(_variables(plan.paths))}"
        return [
            f"its socket is for {plan.user} alone: {there} finetunectl ...",
            "others come by TCP with a token: install it with  -- --listen 127.0.0.1:7411 ; the "
            f"token: sudo cat {shlex.quote(str(plan.paths.token))}",
        ]
    if plan.paths == paths(None, None):
        return []
    return [f"clients find it with: export {' '.join(_variables(plan.paths))}"]


def _variables(folders: Paths) -> tuple[str, str]:
    state_dir, runtime_dir = (shlex.quote(text) for text in prepare.folders_text(folders))
    return f"{STATE_DIR_VARIABLE}={state_dir}", f"{RUNTIME_DIR_VARIABLE}={runtime_dir}"


def _again(action: str, plan: Plan | None = None, *, is_system: bool = False) -> str:
    """The command line of another action."""
    is_system = plan.is_system if plan is not None else is_system
    program = "finetuned"
    if action == "install" and is_system:  # sudo searches other folders
        program = shlex.join([sys.executable, "-m", "finetuned_daemon.main"])
    return f"{program} service {action}{' --system' if is_system else ''}"


# --- uninstall


def _uninstall(name: str, manager: Manager, arguments: argparse.Namespace) -> int:
    written = {path: text for path, text in _written(manager).items() if model.was_ours(text)}
    if not written:
        print("the service is not installed")
        return 0
    if arguments.system and os.geteuid() != 0 and not arguments.dry_run:
        raise Refused(f"--system needs root: sudo {_again('uninstall', is_system=True)}")
    facts = model.facts(written.get(manager.paths[0], ""))
    if not arguments.dry_run:
        _reach(manager)
    _do(
        manager.uninstall(has_socket=len(manager.paths) > 1 and manager.paths[-1] in written),
        is_dry=arguments.dry_run,
    )
    for path in written:
        _remove(path, is_dry=arguments.dry_run)
    _do(manager.removed(), is_dry=arguments.dry_run)
    if facts.get("linger"):
        _do([("loginctl", "disable-linger", str(facts["user"]))], is_dry=arguments.dry_run)
    print("the service is removed; runs that were under way go on")
    if "state_dir" in facts:
        print(f"tasks, runs and settings stay: {facts['state_dir']}")
    if arguments.system and "user" in facts:
        print(f"and so does the user {facts['user']}, to whom they belong")
    for path in manager.paths:
        beside = path.with_name(f"{path.name}.d")
        if beside.exists():
            print(f"your own changes stay: {beside}")
    return 0


def _remove(path: Path, *, is_dry: bool) -> None:
    if is_dry:
        print(f"rm {shlex.quote(str(path))}")
    elif model.is_ours(path.read_text(encoding="utf-8")):
        path.unlink()
        print(f"removed    {path}")
    else:
        kept = _spare(path)
        path.replace(kept)
        print(f"kept       {kept}  (it was changed since it was installed)")


# --- start, stop, restart


def _control(name: str, manager: Manager, arguments: argparse.Namespace) -> int:
    written = _written(manager)
    if manager.paths[0] not in written:
        return _not_installed(arguments)
    has_socket = len(manager.paths) > 1 and manager.paths[-1] in written
    _do(manager.control(arguments.action, has_socket=has_socket), is_dry=arguments.dry_run)
    if arguments.action == "stop" and not arguments.dry_run:
        print(
            f"the daemon has ended; runs go on. Its next start adopts them: "
            f"{_again('start', is_system=arguments.system)}"
        )
    return 0


def _not_installed(arguments: argparse.Namespace) -> int:
    print(
        f"the service is not installed: {_again('install', is_system=arguments.system)}",
        file=sys.stderr,
    )
    return EXIT_NOT_INSTALLED


# --- status, logs


def _status(name: str, manager: Manager, arguments: argparse.Namespace) -> int:
    written = _written(manager)
    is_installed = manager.paths[0] in written
    facts = model.facts(written.get(manager.paths[0], ""))
    folders = _folders(facts)
    has_socket = len(manager.paths) > 1 and manager.paths[-1] in written
    state = manager.state(facts, has_socket=has_socket) if is_installed else model.State()
    serving = prepare.serving(folders.state_dir / SERVING)
    pid = prepare.holder(folders)
    outside = pid if pid and pid != state.pid else 0
    is_answering = state.is_running and serving.get("pid") == state.pid
    if not is_installed:
        status = EXIT_NOT_INSTALLED
    else:
        status = 0 if state.is_running or state.waits else EXIT_NOT_RUNNING
    again = {"is_system": arguments.system}
    next_command = {
        EXIT_NOT_INSTALLED: _again("install", **again),
        EXIT_NOT_RUNNING: _again("logs" if state.last_end else "start", **again),
    }.get(status, "")
    if outside:
        next_command = "finetunectl daemon stop"
    elif status == 0 and state.lingers is False:
        next_command = f"loginctl enable-linger {facts.get('user', '')}"
    content: dict[str, Any] = {
        "manager": name,
        "is_installed": is_installed,
        "files": [str(path) for path in written],
        "is_enabled": state.is_enabled,
        "is_running": state.is_running,
        "waits_for_first_call": state.waits,
        "pid": state.pid or None,
        "since": state.since or None,
        "version": serving.get("version") if is_answering else None,
        "addresses": serving.get("addresses", []) if is_answering else [],
        "state_dir": str(folders.state_dir),
        "outlives_logout": state.lingers,
        "last_end": state.last_end or None,
        "daemon_outside": outside or None,
        "next_command": next_command or None,
    }
    if arguments.json:
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print_status(content)
    return status


def _print_status(content: dict[str, Any]) -> None:
    shown = {True: "yes", False: "no", None: ""}
    doing = "runs" if content["is_running"] else "does not run"
    if content["waits_for_first_call"]:
        doing = "waits for the first call"
    if not content["is_installed"]:
        doing = "is not installed"
    stays = shown[content["outlives_logout"]]
    pairs = (
        ("service", f"{doing} ({content['manager']})"),
        ("starts by itself", shown[content["is_enabled"]] if content["is_installed"] else ""),
        ("outlives logout", stays and f"{stays}, and so do its runs" if stays == "yes" else stays),
        ("process", content["pid"]),
        ("since", content["since"]),
        ("version", content["version"]),
        ("address", ", ".join(content["addresses"])),
        ("last end", content["last_end"]),
        ("state folder", content["state_dir"]),
        ("files", ", ".join(content["files"])),
        ("runs", "a stop, restart or upgrade leaves them alone" if content["is_running"] else ""),
        ("outside of it", content["daemon_outside"] and f"a daemon, {content['daemon_outside']}"),
        ("next", content["next_command"]),
    )
    for name, value in pairs:
        if value:
            print(f"{name:17} {value}")


def _logs(name: str, manager: Manager, arguments: argparse.Namespace) -> int:
    written = _written(manager)
    if manager.paths[0] not in written:
        return _not_installed(arguments)
    if not 0 <= arguments.lines <= _MOST_LINES:
        raise Refused(f"--lines must be from 0 (all of them) to {_MOST_LINES}")
    command = manager.logs(arguments.lines, follow=arguments.follow)
    if command and not arguments.file and shutil.which(command[0]):
        if arguments.follow:
            return subprocess.run(command, check=False).returncode
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # Where the journal keeps nothing for this user, the daemon's own file still has it.
        if done.returncode == 0 and done.stdout.strip() not in ("", "-- No entries --"):
            sys.stdout.write(done.stdout)
            return 0
    folders = _folders(model.facts(written[manager.paths[0]]))
    return log.show(folders.log_file, arguments.lines, follow=arguments.follow)


# --- what all of them need


def _folders(facts: dict[str, Any]) -> Paths:
    if "state_dir" not in facts or "runtime_dir" not in facts:
        return paths()
    return Paths(Path(facts["state_dir"]), Path(facts["runtime_dir"]))


def _written(manager: Manager) -> dict[Path, str]:
    """The files that are there, ours or not."""
    written = dict[Path, str]()
    for path in manager.paths:
        try:
            written[path] = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Refused(f"{path} can't be read: {error}") from error
    return written


def _do(commands: Sequence[Command], *, is_dry: bool) -> None:
    for command in commands:
        print(f"{'$ ' if is_dry else 'runs       '}{shlex.join(command)}", flush=True)
        if is_dry:
            continue
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise Refused(f"{command[0]} can't be run: {error}") from error
        if done.returncode:
            raise Refused(
                f"{shlex.join(command)} has failed with status {done.returncode}: "
                f"{done.stderr.strip() or done.stdout.strip()}\n"
                "  finetuned service status and logs say more; what was done before stays, and "
                "finetuned service uninstall undoes it"
            )


def _warn(sentences: Sequence[str]) -> None:
    for sentence in sentences:
        print(f"note: {sentence}", file=sys.stderr)
