"""launchd: an agent of a user, or a daemon of the whole Mac."""

from __future__ import annotations

import os
import plistlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE
from finetuned_daemon.service.model import NAME, Change, File, Plan, State

LABEL = f"org.{NAME}.daemon"
STATE_DIR = Path("/Library/Application Support") / NAME
"""Of a service of the machine."""


class Launchd:
    """launchd."""

    title = "launchd"

    def __init__(self, *, is_system: bool) -> None:
        self._is_system = is_system
        owner = os.getuid() if hasattr(os, "getuid") else 0
        self._domain = "system" if is_system else f"gui/{owner}"
        folder = Path("/Library/LaunchDaemons")
        if not is_system:
            folder = Path.home() / "Library" / "LaunchAgents"
        self.paths = (folder / f"{LABEL}.plist",)

    def files(self, plan: Plan) -> list[File]:
        """One property list."""
        output = str(plan.paths.log)
        content: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": list(plan.argv),
            "EnvironmentVariables": {
                STATE_DIR_VARIABLE: str(plan.paths.state_dir),
                RUNTIME_DIR_VARIABLE: str(plan.paths.runtime_dir),
                **plan.environment,
            },
            "RunAtLoad": True,
            # After a crash; not after `finetunectl daemon stop`.
            "KeepAlive": {"SuccessfulExit": False},
            # Runs outlive the daemon: else launchd ends what is left of it.
            "AbandonProcessGroup": True,
            "ExitTimeOut": 30,
            "ThrottleInterval": 5,
            # The default slows down processor and disk for what nobody looks at.
            "ProcessType": "Interactive",
            "SoftResourceLimits": {"NumberOfFiles": 65536},
            "HardResourceLimits": {"NumberOfFiles": 65536},
            "StandardOutPath": output,
            "StandardErrorPath": output,
        }
        if plan.is_system:
            content["UserName"] = plan.user
            content["Umask"] = 0o022
        else:
            # In a session of the window server, and in one over ssh.
            content["LimitLoadToSessionType"] = ["Aqua", "Background"]
        return [File(self.paths[0], plistlib.dumps(content, sort_keys=False).decode())]

    def before(self, plan: Plan, *, has_user: bool) -> list[tuple[str, ...]]:
        """Makes the folders, as launchd opens the log before the daemon begins."""
        owner = ("-o", plan.user) if plan.is_system else ()
        folders = (str(plan.paths.state_dir), str(plan.paths.runtime_dir))
        return [("install", "-d", "-m", "0700", *owner, *folders)]

    def probe(self) -> tuple[str, ...]:
        """Asks for the domain."""
        return ("launchctl", "print", self._domain)

    def install(self, plan: Plan, *, now: bool, change: Change) -> list[tuple[str, ...]]:
        """Loads it, which starts it; without `now` that happens at the next login or boot."""
        target = f"{self._domain}/{LABEL}"
        if not now:
            return []
        if change is Change.SAME:
            return [("launchctl", "kickstart", target)]
        out = [] if change is Change.NEW else [("launchctl", "bootout", target)]
        return [*out, ("launchctl", "bootstrap", self._domain, str(self.paths[0]))]

    def verify(self) -> tuple[str, ...]:
        """Reads the property list."""
        return ("plutil", "-lint", "-s", str(self.paths[0]))

    def uninstall(self, *, has_socket: bool) -> list[tuple[str, ...]]:
        """Unloads it."""
        return [("launchctl", "bootout", f"{self._domain}/{LABEL}")]

    def removed(self) -> list[tuple[str, ...]]:
        """Nothing is left."""
        return []

    def control(self, action: str, *, has_socket: bool) -> list[tuple[str, ...]]:
        """A stop is a signal: a service that is unloaded would have to be loaded again."""
        target = f"{self._domain}/{LABEL}"
        return [
            {
                "start": ("launchctl", "kickstart", target),
                "stop": ("launchctl", "kill", "SIGTERM", target),
                "restart": ("launchctl", "kickstart", "-k", target),
            }[action]
        ]

    def state(self, facts: Mapping[str, Any], *, has_socket: bool) -> State:
        """What launchctl says."""
        command = ("launchctl", "print", f"{self._domain}/{LABEL}")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except OSError:
            return State()
        if done.returncode:
            return State()
        pid = re.search(r"^\s*pid = (\d+)", done.stdout, re.MULTILINE)
        ended = re.search(r"^\s*last exit code = (.+)$", done.stdout, re.MULTILINE)
        is_good = ended is None or ended[1].strip() in ("0", "(never exited)")
        return State(
            is_enabled=True,
            is_running=pid is not None,
            pid=int(pid[1]) if pid else 0,
            last_end=f"exit status {ended[1].strip()}" if ended and not is_good else "",
        )

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        """The daemon's own log file has all."""
        return ()

    def notes(self, plan: Plan) -> list[str]:
        """What a logout does."""
        if plan.is_system:
            return []
        return [
            "the service ends when you log out; whether its runs do has not been tried. Where "
            "runs must outlive a logout, install it with --system --user NAME"
        ]
