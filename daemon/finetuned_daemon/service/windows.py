"""Windows' Task Scheduler: a task at logon, or at boot."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from finetuned_daemon.service.model import NAME, Change, File, Plan, State

_NAMESPACE = "http://schemas.microsoft.com/windows/2004/02/mit/task"
STATE_DIR = Path(os.environ.get("PROGRAMDATA", "C:\\ProgramData")) / NAME
"""Of a service of the machine."""
NOT_YET = (
    "the daemon does not run on Windows itself yet, as it needs a POSIX system; until it does: "
    "WSL 2, and there finetuned service install"
)


class Windows:
    """Windows' Task Scheduler."""

    title = "the Task Scheduler"

    def __init__(self, *, is_system: bool) -> None:
        self._is_system = is_system
        # The scheduler keeps a copy of its own; this one tells what we gave it.
        folder = os.environ.get("PROGRAMDATA" if is_system else "LOCALAPPDATA")
        base = Path(folder) if folder else Path.home() / "AppData" / "Local"
        self.paths = (base / NAME / f"{NAME}-task.xml",)

    def files(self, plan: Plan) -> list[File]:
        """One task."""
        return [File(self.paths[0], _task(plan))]

    def before(self, plan: Plan, *, has_user: bool) -> list[tuple[str, ...]]:
        """Nothing."""
        return []

    def probe(self) -> tuple[str, ...]:
        """Lists the tasks' root."""
        return ("schtasks", "/Query", "/FO", "LIST")

    def install(self, plan: Plan, *, now: bool, change: Change) -> list[tuple[str, ...]]:
        """Registers it, and runs it."""
        commands: list[tuple[str, ...]] = [
            ("schtasks", "/Create", "/TN", NAME, "/XML", str(self.paths[0]), "/F")
        ]
        if now:
            commands.append(("schtasks", "/Run", "/TN", NAME))
        return commands

    def verify(self) -> tuple[str, ...]:
        """It is read when it is registered."""
        return ()

    def uninstall(self, *, has_socket: bool) -> list[tuple[str, ...]]:
        """Ends and deletes it."""
        return [("schtasks", "/End", "/TN", NAME), ("schtasks", "/Delete", "/TN", NAME, "/F")]

    def removed(self) -> list[tuple[str, ...]]:
        """Nothing is left."""
        return []

    def control(self, action: str, *, has_socket: bool) -> list[tuple[str, ...]]:
        """There is no restart of its own."""
        steps = {"start": ("/Run",), "stop": ("/End",), "restart": ("/End", "/Run")}[action]
        return [("schtasks", step, "/TN", NAME) for step in steps]

    def state(self, facts: Mapping[str, Any], *, has_socket: bool) -> State:
        """What schtasks says."""
        command = ("schtasks", "/Query", "/TN", NAME, "/FO", "CSV", "/NH")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except OSError:
            return State()
        return State(is_enabled=done.returncode == 0, is_running='"Running"' in done.stdout)

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        """The daemon's own log file has all."""
        return ()

    def notes(self, plan: Plan) -> list[str]:
        """What is missing there."""
        return [NOT_YET]


def _task(plan: Plan) -> str:
    """The task. It has no place for variables, so that folders are options."""
    task = ET.Element("Task", {"version": "1.2", "xmlns": _NAMESPACE})
    information = ET.SubElement(task, "RegistrationInfo")
    ET.SubElement(information, "Description").text = "finetuned, the fine-tuning daemon"
    triggers = ET.SubElement(task, "Triggers")
    trigger = ET.SubElement(triggers, "BootTrigger" if plan.is_system else "LogonTrigger")
    ET.SubElement(trigger, "Enabled").text = "true"
    if not plan.is_system:
        ET.SubElement(trigger, "UserId").text = plan.user
    principal = ET.SubElement(ET.SubElement(task, "Principals"), "Principal", {"id": "Author"})
    ET.SubElement(principal, "UserId").text = plan.user
    # S4U: that user, with no password kept, also where nobody is logged on.
    ET.SubElement(principal, "LogonType").text = "S4U" if plan.is_system else "InteractiveToken"
    ET.SubElement(principal, "RunLevel").text = "LeastPrivilege"
    settings = ET.SubElement(task, "Settings")
    restart = ET.Element("RestartOnFailure")
    for name, value in (
        ("MultipleInstancesPolicy", "IgnoreNew"),
        ("DisallowStartIfOnBatteries", "false"),
        ("StopIfGoingOnBatteries", "false"),
        ("AllowHardTerminate", "true"),
        ("StartWhenAvailable", "true"),
        ("RunOnlyIfNetworkAvailable", "false"),
        ("Enabled", "true"),
        ("RunOnlyIfIdle", "false"),
        # None: by default a task is ended after three days.
        ("ExecutionTimeLimit", "PT0S"),
        # Normal; a task has less by default, and its runs would have it too.
        ("Priority", "5"),
    ):
        ET.SubElement(settings, name).text = value
    ET.SubElement(restart, "Interval").text = "PT1M"
    ET.SubElement(restart, "Count").text = "5"
    settings.append(restart)
    program, *words = plan.argv
    folders = ["--state-dir", str(plan.paths.state_dir)]
    folders += ["--runtime-dir", str(plan.paths.runtime_dir)]
    execution = ET.SubElement(ET.SubElement(task, "Actions", {"Context": "Author"}), "Exec")
    # Without a console window.
    where = PureWindowsPath(program)
    if where.name.lower() == "python.exe":
        program = str(where.with_name("pythonw.exe"))
    ET.SubElement(execution, "Command").text = program
    ET.SubElement(execution, "Arguments").text = subprocess.list2cmdline([*words, *folders])
    ET.indent(task)
    text = ET.tostring(task, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'
