"""The daemon at rest: what it has imported, which threads it has, and whose code runs in it."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon, python_path
from finetuned.v1 import system_service_pb2, task_service_pb2
from finetuned_daemon import main, server
from finetuned_daemon.later import is_made, later

# Written by the process itself as it ends: nobody else can see its modules.
_AT_EXIT = """
import atexit, json, sys, threading

def _write():
    seen = {"modules": sorted(sys.modules), "threads": [t.name for t in threading.enumerate()]}
    with open(%r, "w") as file:
        json.dump(seen, file)

atexit.register(_write)
"""

_FOR_NOBODY_YET = {
    # the command line and other commands
    *("rich", "typer", "textual", "finetuned.cli", "finetuned_daemon.commands"),
    *("finetuned_daemon.rebuild", "finetuned_daemon.service.command"),
    # training
    *("torch", "numpy", "transformers", "tokenizers", "finetuned_runner"),
    # what a start of a run, a check or an inspection needs
    *("psutil", "pynvml", "packaging", "finetuned_daemon.planner", "finetuned_daemon.explain"),
    *("finetuned_daemon.dataset.worker", "finetuned_daemon.dataset.report"),
    *("finetuned_daemon.validation.check", "finetuned_daemon.environment.items"),
    *("finetuned_daemon.planning.plan", "finetuned_daemon.runs.room"),
    # other ways in and out
    *("grpc_reflection.v1alpha", "prometheus_client", "finetuned_daemon.export", "cryptography"),
    *("http.client", "importlib.metadata", "email", "zipfile"),
}


def _resting(root: Path, *, python: str = "") -> dict[str, Any]:
    """Modules and threads of a daemon that was asked for its tasks and itself, and nothing more."""
    seen = root / "seen.json"
    custom = root / "custom"
    custom.mkdir()
    (custom / "sitecustomize.py").write_text(_AT_EXIT % str(seen))
    daemon = Daemon(root)
    daemon.environment["PYTHONPATH"] = f"{custom}:{python}:{python_path()}"
    daemon.start()
    try:
        daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest())
        daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
        assert daemon.stop() == 0
    finally:
        daemon.close()
    found: dict[str, Any] = json.loads(seen.read_text())
    return found


def test_a_daemon_at_rest_has_imported_nothing_that_nobody_asked_for(tmp_path: Path) -> None:
    """What it takes to list tasks is all that is there; the rest comes with its first use."""
    imported = set(_resting(tmp_path)["modules"])
    assert {"finetuned_daemon.manager", "sqlite3", "grpc"} <= imported
    assert sorted(imported & _FOR_NOBODY_YET) == []


def test_a_daemon_at_rest_has_no_threads_that_wait_for_work(tmp_path: Path) -> None:
    """Threads of the executor come with the first file that is read for somebody."""
    assert not [name for name in _resting(tmp_path)["threads"] if name.startswith("asyncio")]


def test_no_package_gets_code_into_the_daemon_by_calling_itself_a_plug_in(tmp_path: Path) -> None:
    """Whatever is installed beside it, pydantic asks for no plug-ins."""
    package = tmp_path / "beside"
    info = package / "beside-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: beside\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pydantic]\nbeside = beside:plugin\n")
    (package / "beside.py").write_text("plugin = None\n")
    assert "beside" not in _resting(tmp_path, python=str(package))["modules"]


def test_what_stands_for_the_module_of_plug_ins_hands_on_what_else_it_has() -> None:
    """A pydantic that asks it for more gets that from its own module."""
    script = (
        "from finetuned_daemon.plugins import refuse_plugins\n"
        "refuse_plugins()\n"
        "from pydantic.plugin._loader import get_plugins, PYDANTIC_ENTRY_POINT_GROUP\n"
        "assert not get_plugins() and PYDANTIC_ENTRY_POINT_GROUP == 'pydantic'\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_serve_is_parsed_alike_without_the_other_commands() -> None:
    """`finetuned serve` has the same options whether the others are imported or not."""
    assert main._parser(serves=True)[1].format_help() == main._parser()[1].format_help()


def test_the_collector_works_again_once_the_start_is_over() -> None:
    """It is off while modules are imported, and then passes them over."""
    gc.disable()
    try:
        server._settle()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_part_is_made_when_something_of_it_is_asked_for_and_once() -> None:
    """Until then nothing is made, and it can be told."""
    made = list[str]()

    def make() -> str:
        made.append("made")
        return "part"

    part = later(make)
    assert not is_made(part)
    assert not made
    assert part.upper() == "PART"
    assert part.title() == "Part"
    assert is_made(part)
    assert made == ["made"]
    assert is_made("anything else")


def test_a_part_that_can_not_be_made_is_tried_again() -> None:
    """An error of making it is the asker's, and the next may have more luck."""
    failures = [OSError("disk")]

    def make() -> str:
        if failures:
            raise failures.pop()
        return "part"

    part = later(make)
    with pytest.raises(OSError, match="disk"):
        part.upper()
    assert part.upper() == "PART"
