"""systemd: units of a user or of the whole machine."""

from __future__ import annotations

import grp
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE
from finetuned_daemon.service.model import NAME, Change, File, Plan, State

SERVICE = f"{NAME}.service"
SOCKET = f"{NAME}.socket"
STATE_DIR = Path("/var/lib") / NAME
"""Of a service of the machine: its state folder; the runtime folder is `run` in it."""

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
# They may use the GPU on distributions where its devices are not everybody's.
_DEVICE_GROUPS = ("video", "render")

_SERVICE_TEXT = """\
[Unit]
Description=finetuned, the fine-tuning daemon
{unit}
# It does not come up for a reason that another try does not mend: give up, and say so.
StartLimitIntervalSec=120
StartLimitBurst=5

[Service]
# The daemon says when it serves, and when it stops.
Type=notify
NotifyAccess=main
ExecStart={command}
{environment}
{identity}
# Runs outlive the daemon: a stop, a restart or an upgrade signals the daemon alone, and the next
# one adopts them. They stay in this unit's control group, which systemd mentions at the next start
# ("left-over process"): that is as it should be. There is nothing to delegate, as the daemon makes
# no groups of its own.
KillMode=process
# A run that the kernel kills for want of memory ends alone; systemd-oomd, which would end all of
# this unit, looks elsewhere first.
OOMPolicy=continue
ManagedOOMPreference=avoid
Restart=on-failure
RestartSec=1
# 2: its options are wrong; 3: another daemon has its folders.
RestartPreventExitStatus=2 3
# A newer version may have a large database to migrate, after a backup of it.
TimeoutStartSec=30min
TimeoutStopSec=30
LimitNOFILE=65536
# Data loaders and libraries start hundreds of processes and threads.
TasksMax=infinity
{hardening}

[Install]
WantedBy={target}
"""

_HARDENING = """\
# What training can bear. Not here, and why: NoNewPrivileges and all that implies it (system call
# filters, capability bounds) keep the driver from loading itself (nvidia-modprobe is setuid);
# PrivateDevices, DevicePolicy and ProtectClock hide the GPU; PrivateTmp and ProtectHome hide data,
# models and outputs of whoever asks for a run.
ProtectSystem=full
ProtectControlGroups=yes"""

_SOCKET_TEXT = """\
[Unit]
Description=finetuned, the socket that starts the fine-tuning daemon
{unit}

[Socket]
# Where clients dial. The daemon serves beside it, and brings connections over; a restart finds them
# waiting here.
ListenStream={socket}
SocketMode=0600
# The folder is the wall: only its owner gets in.
DirectoryMode=0700
{identity}
# A daemon without this unit may have the place afterwards.
RemoveOnStop=yes

[Install]
WantedBy=sockets.target
"""


class Systemd:
    """systemd."""

    title = "systemd"

    def __init__(self, *, is_system: bool) -> None:
        self._is_system = is_system
        self._scope = ("systemctl",) if is_system else ("systemctl", "--user")
        folder = Path("/etc/systemd/system")
        if not is_system:
            configuration = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
            folder = Path(configuration) / "systemd" / "user"
        self.paths = (folder / SERVICE, folder / SOCKET)

    def files(self, plan: Plan) -> list[File]:
        """The service, and the socket where it is asked for."""
        files = [File(self.paths[0], _service(plan))]
        if plan.socket_activation:
            files.append(File(self.paths[1], _socket(plan)))
        return files

    def before(self, plan: Plan, *, has_user: bool) -> list[tuple[str, ...]]:
        """Makes user and folders of a service of the machine, and lets a user's one live on."""
        commands = list[tuple[str, ...]]()
        if plan.is_system and not has_user:
            home = ("--home-dir", str(plan.paths.state_dir), "--no-create-home")
            shell = ("--shell", "/usr/sbin/nologin")
            commands.append(("useradd", "--system", "--user-group", *home, *shell, plan.user))
        if plan.is_system and plan.socket_activation:
            # The socket is there before the service, and its folder would be root's.
            owner = ("-o", plan.user)
            folders = (str(plan.paths.state_dir), str(plan.paths.runtime_dir))
            commands.append(("install", "-d", "-m", "0700", *owner, *folders))
        if plan.linger:
            commands.append(("loginctl", "enable-linger", plan.user))
        return commands

    def probe(self) -> tuple[str, ...]:
        """Asks for its version."""
        return (*self._scope, "show", "--property=Version")

    def install(self, plan: Plan, *, now: bool, change: Change) -> list[tuple[str, ...]]:
        """Reads the units, enables what starts by itself, and starts it."""
        commands = [(*self._scope, "daemon-reload")]
        first = SOCKET if plan.socket_activation else SERVICE
        if plan.socket_activation and change is Change.CHANGED:
            # It may have been the service alone, whose daemon has the socket's place.
            commands.append((*self._scope, "disable", "--now", SERVICE))
        commands.append((*self._scope, "enable", first))
        if now:
            # It may run with what was written before; a restart leaves runs alone.
            action = "restart" if change is Change.CHANGED else "start"
            commands.append((*self._scope, action, first))
        return commands

    def verify(self) -> tuple[str, ...]:
        """Reads the units."""
        scope = () if self._is_system else ("--user",)
        written = (str(path) for path in self.paths if path.exists())
        return ("systemd-analyze", *scope, "verify", *written)

    def uninstall(self, *, has_socket: bool) -> list[tuple[str, ...]]:
        """Stops and disables."""
        units = (SOCKET, SERVICE) if has_socket else (SERVICE,)
        return [(*self._scope, "disable", "--now", *units)]

    def removed(self) -> list[tuple[str, ...]]:
        """Forgets the units, and that they failed."""
        return [(*self._scope, "daemon-reload")]

    def control(self, action: str, *, has_socket: bool) -> list[tuple[str, ...]]:
        """The socket goes with the service, or the next call would start it again."""
        if not has_socket:
            return [(*self._scope, action, SERVICE)]
        if action == "restart":
            return [(*self._scope, "start", SOCKET), (*self._scope, "restart", SERVICE)]
        return [(*self._scope, action, SOCKET, SERVICE)]

    def state(self, facts: Mapping[str, Any], *, has_socket: bool) -> State:
        """What systemctl and loginctl say."""
        shown = self._show(
            SERVICE,
            *("ActiveState", "UnitFileState", "MainPID", "ActiveEnterTimestamp", "Result"),
            *("ExecMainStatus", "NRestarts"),
        )
        socket = self._show(SOCKET, "ActiveState", "UnitFileState") if has_socket else {}
        ended = shown.get("Result", "")
        status, restarts = shown.get("ExecMainStatus", ""), int(shown.get("NRestarts") or 0)
        pid = int(shown.get("MainPID") or 0)
        is_running = shown.get("ActiveState") in ("active", "reloading", "deactivating")
        last_end = ""
        if ended not in ("", "success"):
            last_end = f"{ended} {status}" if ended == "signal" else f"{ended}, status {status}"
        elif is_running and restarts:
            last_end = f"it has failed, and was started again, {restarts} times"
        elif shown.get("ActiveState") == "activating" and restarts:
            last_end = f"it has failed {restarts} times, and is tried again"
        return State(
            is_enabled="enabled" in (shown.get("UnitFileState"), socket.get("UnitFileState")),
            is_running=is_running,
            waits=not is_running and socket.get("ActiveState") == "active",
            pid=pid,
            since=shown.get("ActiveEnterTimestamp", "") if is_running else "",
            last_end=last_end,
            lingers=None if self._is_system else lingers(str(facts.get("user", ""))),
        )

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        """The journal."""
        scope = () if self._is_system else ("--user",)
        count = ("--lines", str(lines) if lines else "all")
        return ("journalctl", *scope, "--unit", SERVICE, *count, *(("--follow",) * follow))

    def notes(self, plan: Plan) -> list[str]:
        """What a logout does."""
        if plan.is_system:
            return []
        notes = list[str]()
        if plan.paths.runtime_dir.is_relative_to(tempfile.gettempdir()):
            notes.append(
                f"this is no login session, so the socket is in {plan.paths.runtime_dir}; clients "
                f"in a session look elsewhere. Log in and install it again, or set "
                f"{RUNTIME_DIR_VARIABLE} on both sides"
            )
        if plan.linger or lingers(plan.user) in (True, None):
            return notes
        return [
            *notes,
            f"the service and its runs end when {plan.user} logs out, and do not start at boot: "
            f"loginctl enable-linger {plan.user} changes that, and so does --linger",
        ]

    def _show(self, unit: str, *properties: str) -> dict[str, str]:
        command = (*self._scope, "show", unit, f"--property={','.join(properties)}")
        shown = _ask(command) or ""
        return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def lingers(user: str) -> bool | None:
    """Whether a user's services outlive logout; None: nobody can know."""
    answer = _ask(("loginctl", "show-user", user, "--property=Linger"))
    if answer is not None and "Linger=" in answer:
        return answer.strip().endswith("yes")
    marks = Path("/var/lib/systemd/linger")
    # Of a user who is not logged in loginctl knows nothing.
    return (marks / user).exists() if marks.is_dir() else None


def quoted(text: str, *, is_command: bool = False) -> str:
    """A word as units write it: no specifier, variable or escape is meant by it."""
    text = text.replace("%", "%%")
    if is_command:
        text = text.replace("$", "$$")
    if _PLAIN.fullmatch(text.replace("%%", "").replace("$$", "") or "-") and text:
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _service(plan: Plan) -> str:
    folders = {
        STATE_DIR_VARIABLE: str(plan.paths.state_dir),
        RUNTIME_DIR_VARIABLE: str(plan.paths.runtime_dir),
    }
    environment = {**folders, **plan.environment}
    unit = [f"RequiresMountsFor={quoted(str(plan.paths.state_dir))}"]
    if plan.socket_activation:
        unit += [f"Requires={SOCKET}", f"After={SOCKET}"]
    if plan.is_system:
        network = "network-online.target" if plan.needs_network else "network.target"
        unit += [f"Wants={network}"] * plan.needs_network
        unit.append(f"After={network} nvidia-persistenced.service")
    identity = list[str]()
    if plan.is_system:
        identity.append(f"User={plan.user}")
        groups = [name for name in _DEVICE_GROUPS if _has_group(name)]
        identity += [f"SupplementaryGroups={' '.join(groups)}"] if groups else []
        if plan.owns_folders:
            identity.append(f"StateDirectory={NAME} {NAME}/run")
            identity.append("StateDirectoryMode=0700")
        identity.append("UMask=0022")
    program, *words = plan.argv
    command = [quoted(program)]
    if "$" in program:
        # No variable is meant in the path of a program, and $$ is not undone there, but in what the
        # program is told of it; `@` gives the two apart.
        command = [quoted(f"@{program}"), quoted(program, is_command=True)]
    return _filled(
        _SERVICE_TEXT,
        unit=unit,
        command=[" ".join([*command, *(quoted(word, is_command=True) for word in words)])],
        environment=[
            f"Environment={quoted(f'{name}={value}')}" for name, value in environment.items()
        ],
        identity=identity,
        hardening=[_HARDENING] if plan.is_system else [],
        target=["multi-user.target" if plan.is_system else "default.target"],
    )


def _socket(plan: Plan) -> str:
    return _filled(
        _SOCKET_TEXT,
        unit=[f"RequiresMountsFor={quoted(str(plan.paths.runtime_dir))}"],
        # Not a word: everything up to the end of the line is the path.
        socket=[str(plan.paths.socket).replace("%", "%%")],
        identity=[f"SocketUser={plan.user}"] if plan.is_system else [],
    )


def _filled(template: str, **lines: Sequence[str]) -> str:
    """The template; a line that has nothing in it goes."""
    for name, given in lines.items():
        hole = f"{{{name}}}"
        template = template.replace(hole if given else f"{hole}\n", "\n".join(given))
    return template


def _has_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True


def _ask(command: tuple[str, ...]) -> str | None:
    """What a command prints; None: it failed, or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
