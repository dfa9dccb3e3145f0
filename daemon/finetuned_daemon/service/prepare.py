"""From the command line to a plan: what can be wrong is found before anything is done."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from finetuned._paths import STATE_DIR_VARIABLE, Paths
from finetuned_daemon.service import launchd, systemd, windows
from finetuned_daemon.service.model import NAME, Manager, Plan, Refused
from finetuned_daemon.store.files import SERVING

_CARRIED = ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_CACHE")
"""Variables of a shell that decide what a run finds; a service would not have them."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FOLDERS = ("HF_HOME", "HF_HUB_CACHE")
"""Those of them that are paths."""
_SECRET = re.compile(
    r"(?i)token(?!iz)|secret|pass(w|phrase)|key|credential|(^|_)(pwd|pass|auth)(_|$)"
)
_CREDENTIALS = re.compile(r"://[^/?#@\s]+@")
"""In a URL."""
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*\$?")
_LONGEST_SOCKET_PATH = 100

_STATE_DIRS = {
    "systemd": systemd.STATE_DIR,
    "launchd": launchd.STATE_DIR,
    "windows": windows.STATE_DIR,
}


def here() -> str:
    """The service manager of this machine; empty: none that we know."""
    if sys.platform == "darwin":
        return "launchd"
    if sys.platform == "win32":
        return "windows"
    has_systemctl = any(
        os.access(Path(folder) / "systemctl", os.X_OK)
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
    )
    return "systemd" if has_systemctl else ""


def manager(arguments: argparse.Namespace) -> tuple[str, Manager]:
    """The service manager that is meant.

    Raises:
        Refused: It is not this machine's, and more than printing is asked for.
    """
    name = arguments.platform or here()
    if not name:
        raise Refused(
            "there is no service manager here that this command knows (systemd, launchd, Windows' "
            "Task Scheduler); finetunectl daemon start runs the daemon in the background"
        )
    is_dry = getattr(arguments, "dry_run", False)
    if name != here() and not is_dry:
        raise Refused(f"this machine has no {name}; --dry-run prints what one would be given")
    if name == "windows" and not is_dry:
        raise Refused(windows.NOT_YET)
    kinds: dict[str, type[systemd.Systemd | launchd.Launchd | windows.Windows]] = {
        "systemd": systemd.Systemd,
        "launchd": launchd.Launchd,
        "windows": windows.Windows,
    }
    return name, kinds[name](is_system=arguments.system)


def plan(arguments: argparse.Namespace, name: str) -> Plan:
    """The service that is asked for.

    Options of `serve` go through the daemon's own parser; wrong ones end the program.

    Raises:
        Refused: It is not possible; every reason is in the message.
    """
    # The daemon's main module imports this command's.
    from finetuned_daemon.main import parse_serve

    options = list(arguments.options)
    for option in ("state_dir", "runtime_dir"):
        if getattr(arguments, option) is not None:
            options += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    is_system = bool(arguments.system)
    user = (arguments.user or NAME) if is_system else _me()
    owner = _number(user) if is_system else None
    config, changed = parse_serve(options, owner=owner)
    problems = _contradictions(arguments, name, changed)
    if arguments.user and name != "windows" and not _USER.fullmatch(arguments.user):
        problems.append(f"--user {arguments.user!r} can't be the name of a user")
    owns_folders = False
    folders = config.paths
    if is_system:
        is_given = "state_dir" in changed or os.environ.get(STATE_DIR_VARIABLE)
        owns_folders = not is_given and "runtime_dir" not in changed
        state_dir = config.paths.state_dir if is_given else _STATE_DIRS[name]
        # Below the state folder, so that tokens outlive a boot.
        is_elsewhere = "runtime_dir" in changed
        runtime_dir = config.paths.runtime_dir if is_elsewhere else state_dir / "run"
        folders = Paths(state_dir, runtime_dir)
        if len(os.fsencode(folders.socket)) > _LONGEST_SOCKET_PATH:
            problems.append(f"{folders.socket} is too long for a socket; choose --runtime-dir")
    environment = _environment(arguments.env, problems, name, is_system=is_system)
    whole = _canonical(changed, config.notify.command)
    problems += _secrets(changed, whole, is_system=is_system)
    if is_system and name == here():
        problems += _unreadable(changed, user)
    written = (*folders_text(folders), *whole, *environment.values(), user, sys.executable)
    if any(not word.isprintable() for word in written):
        problems.append(
            "a path, user, option or value has a character that can't be written in a unit"
        )
    if problems:
        raise Refused(
            "\n  ".join(["this can't be installed:", *problems] if problems[1:] else problems)
        )
    return Plan(
        is_system=is_system,
        user=user,
        python=Path(sys.executable),
        paths=folders,
        options=whole,
        environment=environment,
        socket_activation=arguments.socket_activation,
        linger=arguments.linger and systemd.lingers(user) is not True,
        owns_folders=owns_folders and name == "systemd",
        needs_network=any(not address.is_loopback for address in config.listen),
    )


def folders_text(folders: Paths) -> tuple[str, str]:
    """State folder and runtime folder."""
    return str(folders.state_dir), str(folders.runtime_dir)


def has_user(name: str) -> bool:
    """Whether the machine has this user."""
    return _number(name) is not None


def warnings(plan: Plan) -> list[str]:
    """What will go wrong some day, though not now."""
    python = plan.python
    result = list[str]()
    if python.is_relative_to(tempfile.gettempdir()):
        result.append(f"{python} is in a folder for temporary files: the service ends with it")
    venv = Path(sys.prefix)
    marks = (".git", "pyproject.toml", "setup.py")
    if sys.prefix != sys.base_prefix and any((venv.parent / mark).exists() for mark in marks):
        result.append(
            f"{venv} belongs to the project {venv.parent}: if that is moved or its environment is "
            "made anew, the service has no program. An environment of its own is safer"
        )
    if plan.is_system and plan.user != _me():
        closed = _closed_to_others(python)
        if closed:
            result.append(
                f"{plan.user} can't run {python}, as {closed} is closed to others; install "
                "finetuned where everybody may read, such as /opt/finetuned"
            )
    if plan.user == "root" and plan.is_system:
        result.append("the daemon needs nothing of root's, and its runs would be root's")
    return result


def holder(folders: Paths) -> int | None:
    """The process that holds these folders as a daemon; 0: one that is not known; None: nobody."""
    import fcntl

    for lock, endpoint in (
        (folders.lock, folders.endpoint),
        (folders.state_dir / "lock", folders.state_dir / SERVING),
    ):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # there is none, or it is another user's, whose daemon is not in our way
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = serving(endpoint).get("pid")
            return pid if isinstance(pid, int) and psutil.pid_exists(pid) else 0
        finally:
            os.close(descriptor)
    return None


def serving(endpoint: Path) -> dict[str, Any]:
    """What a daemon has left of itself; empty: nothing that can be read."""
    try:
        content: object = json.loads(endpoint.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _contradictions(
    arguments: argparse.Namespace, name: str, changed: Mapping[str, object]
) -> list[str]:
    problems = list[str]()
    if arguments.user and not arguments.system:
        problems.append("--user is for --system: a user's own service runs as that user")
    if arguments.linger and arguments.system:
        problems.append("--linger is for a user's own service: --system starts at boot anyway")
    if name != "systemd":
        problems += [
            f"{option} is for systemd"
            for option in ("--socket-activation", "--linger")
            if getattr(arguments, option.strip("-").replace("-", "_"))
        ]
    if name != "systemd" and arguments.system and not arguments.user:
        problems.append("--system needs --user NAME here, whom it runs as")
    if name == "windows" and arguments.env:
        problems.append("--env: a task of Windows has no variables; set them for the user")
    if "new_database" in changed:
        problems.append("--new-database is for one start, and this would be every one")
    return problems


def _environment(
    given: list[str], problems: list[str], manager: str, *, is_system: bool
) -> dict[str, str]:
    remedy = {
        "systemd": "use EnvironmentFile= with a file of mode 0600 "
        f"(systemctl edit {systemd.SERVICE})"
    }.get(manager, "put it into a file that only the service's user reads")
    environment = dict[str, str]()
    if not is_system:
        environment = {name: os.environ[name] for name in _CARRIED if os.environ.get(name)}
    for each in given:
        name, has_value, value = each.partition("=")
        if not _VARIABLE.fullmatch(name):
            # Without its value, which may be a secret.
            problems.append(f"--env: {name!r} is no name of a variable")
        elif name.startswith("FINETUNED_"):
            problems.append(f"--env {name}: say it by an option, after --")
        elif is_system and _SECRET.search(name):
            problems.append(
                f"--env {name}: everybody on the machine may read a system service's variables; "
                f"{remedy}"
            )
        elif not has_value and name not in os.environ:
            problems.append(f"--env {name}: there is no such variable here")
        else:
            value = value if has_value else os.environ[name]
            if is_system and _CREDENTIALS.search(value):
                problems.append(
                    f"--env {name}: it has a password in a URL, and everybody on the machine may "
                    f"read a system service's variables; {remedy}"
                )
            environment[name] = value
    for name in _FOLDERS:
        # `~` is Hugging Face's own to resolve, in the home of whom it runs as.
        if environment.get(name, "~")[:1] != "~":
            environment[name] = str(Path(environment[name]).absolute())
    return environment


def _secrets(
    changed: Mapping[str, object], words: Sequence[str], *, is_system: bool
) -> Iterator[str]:
    """Options that would show a secret: a command line and a unit of the machine are open."""
    for each in _webhooks(changed):
        if not each.startswith("@") and (is_system or _CREDENTIALS.search(each)):
            who = "a system service's unit" if is_system else "a service's command line"
            yield (
                f"--notify-webhook: everybody on the machine may read {who}, and the address is a "
                "secret; put it into a file of mode 0600, and give --notify-webhook @FILE"
            )
            break
    for option, word in itertools.pairwise(words):
        if option != "--notify-webhook" and _CREDENTIALS.search(word):
            yield (
                f"{option}: it has a password in a URL, and everybody on the machine may read a "
                "service's command line; put it into a file, such as a script"
            )


def _unreadable(changed: Mapping[str, object], user: str) -> Iterator[str]:
    """Files that the service is to read, and its user can't."""
    files = [("--notify-webhook", Path(each[1:])) for each in _webhooks(changed) if each[0] == "@"]
    for name in ("notify_webhook_secret_file", "tls_cert", "tls_key", "tls_client_ca"):
        value = changed.get(name)
        if isinstance(value, Path):
            files.append((f"--{name.replace('_', '-')}", value))
    for option, file in files:
        closed = _closed_to(file.absolute(), user)
        if closed is None:
            continue
        said = f"{option}: {user}, whom the service runs as, can't read {file.absolute()}"
        if closed != file.absolute():
            yield f"{said}, as {closed} is closed to others; put it elsewhere, such as /etc/{NAME}"
        elif has_user(user):
            yield f"{said}; run: chown {user} {shlex.quote(str(closed))}"
        else:
            yield (
                f"{said}; install the service without it, which makes {user}, run: "
                f"chown {user} {shlex.quote(str(closed))}, and install it again"
            )


def _webhooks(changed: Mapping[str, object]) -> list[str]:
    value = changed.get("notify_webhook")
    return [str(each) for each in value] if isinstance(value, list) else []


def _canonical(changed: Mapping[str, object], command: Sequence[str]) -> tuple[str, ...]:
    """Options of `serve` written out, with whole paths: a service starts in another folder.

    Args:
        changed: Options by name.
        command: That of notifications, whose program has been found: a service has another PATH.
    """
    words = list[str]()
    for name, value in changed.items():
        option = f"--{name.replace('_', '-')}"
        if name in ("state_dir", "runtime_dir", "command"):
            continue  # said by variables, which clients know too
        if isinstance(value, list):
            for each in map(str, value):
                is_file = name == "notify_webhook" and each.startswith("@")
                words += [option, f"@{Path(each[1:]).absolute()}" if is_file else each]
        elif isinstance(value, Path):
            words += [option, str(value.absolute())]
        elif value is True:
            words.append(option)
        elif name == "notify_command":
            words += [option, shlex.join(command)]
        elif name == "runner_python":
            words += [option, str(Path(shutil.which(str(value)) or str(value)).absolute())]
        else:
            words += [option, str(value)]
    return tuple(words)


def _closed_to_others(program: Path) -> Path | None:
    """The folder or file that keeps others from running it; links are followed too."""
    for path in (program, program.resolve()):
        for part in (path, *path.parents):
            if not part.stat().st_mode & 0o001:
                return part
    return None


def _closed_to(file: Path, user: str) -> Path | None:
    """The file, or the folder above it, that keeps a user from reading it."""
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        number, groups = -1, list[int]()
    else:
        number, groups = entry.pw_uid, os.getgrouplist(user, entry.pw_gid)
    if number == 0:
        return None
    for path, read in ((file, stat.S_IROTH), *((each, stat.S_IXOTH) for each in file.parents)):
        try:
            status = path.stat()
        except OSError:  # the daemon says so when it starts, as it would by hand
            return None
        shift = 6 if status.st_uid == number else 3 if status.st_gid in groups else 0
        if not status.st_mode & (read << shift):
            return path
    return None


def _number(user: str) -> int | None:
    """Of a user of this machine; None: there is none of this name."""
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        return None


def _me() -> str:
    return psutil.Process().username().rpartition("\\")[2]
