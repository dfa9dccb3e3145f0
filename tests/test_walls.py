"""The walls between the packages, each with its reason."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY

CLIENT = REPOSITORY / "client/finetuned"
DAEMON = REPOSITORY / "daemon/finetuned_daemon"
RUNNER = REPOSITORY / "daemon/finetuned_runner"


def imports(file: Path, package: str) -> set[str]:
    """Every module that a file imports anywhere, by its full name."""
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            module = base if node.level else node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def modules(root: Path, below: str = "**/*.py") -> list[Path]:
    return [file for file in sorted(root.glob(below)) if "v1" not in file.parts]


def offenders(root: Path, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    def is_below(name: str, roots: tuple[str, ...]) -> bool:
        return any(name == r or name.startswith(f"{r}.") for r in roots)

    result = list[str]()
    for file in modules(root):
        relative = file.relative_to(root.parent)
        package = ".".join(relative.parent.parts)
        for name in imports(file, package):
            if is_below(name, forbidden) and not is_below(name, allowed):
                result.append(f"{relative} imports {name}")
    return sorted(result)


def test_the_client_weighs_nothing() -> None:
    """It goes into editors and desktop applications: no torch, no pydantic, never the daemon."""
    heavy = ("torch", "transformers", "peft", "datasets", "numpy", "pydantic", "psutil")
    assert offenders(CLIENT, (*heavy, "finetuned_daemon", "finetuned_runner")) == []


def test_the_daemon_holds_no_torch_and_knows_no_runner() -> None:
    """It serves within a second and rests at 50 MB; a crash in training code is not its own."""
    heavy = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "bitsandbytes")
    assert offenders(DAEMON, (*heavy, "finetuned_runner")) == []


def test_the_daemon_takes_from_the_client_the_protos_and_the_meeting_place_alone() -> None:
    """What is shared is the contract: messages, where the socket lies, and the version."""
    shared = ("finetuned.v1", "finetuned._paths", "finetuned._version")
    found = offenders(DAEMON, ("finetuned",), shared)
    assert [line for line in found if not line.endswith("imports finetuned")] == []


def test_the_runner_meets_the_daemon_in_the_run_folder_alone() -> None:
    """Either may die at any time: they share records, parameters, the reader of data and plans."""
    shared = (
        "finetuned_daemon.runs.contract",
        "finetuned_daemon.runs.manifest",
        "finetuned_daemon.parameters.models",
        "finetuned_daemon.parameters.needs",
        "finetuned_daemon.dataset.formats",
        "finetuned_daemon.dataset.reader",
        "finetuned_daemon.dataset.report",
        "finetuned_daemon.environment.probe",
        "finetuned_daemon.planning.schedule",
        "finetuned_daemon.planning.timing",
        "finetuned_daemon.texts",
    )
    assert offenders(RUNNER, ("finetuned_daemon", "finetuned", "grpc", "google"), shared) == []


def test_parameters_stand_on_nothing_but_their_texts() -> None:
    """The runner loads them at every start: no protos and no rule of the daemon come with them."""
    edge = ("protos.py", "schema.py")
    for file in modules(DAEMON / "parameters"):
        if file.name not in edge:
            for name in imports(file, ""):
                if name.startswith("finetuned"):
                    allowed = ("finetuned_daemon.parameters", "finetuned_daemon.texts")
                    assert name.startswith(allowed), f"{file.name} imports {name}"
                    assert not name.endswith(("parameters.protos", "parameters.schema")), file


def test_sql_stands_in_the_store_alone() -> None:
    """Durability is decided in one place."""
    sql = re.compile(r'"(SELECT|INSERT|UPDATE|DELETE|PRAGMA|BEGIN) |sqlite3\.connect')
    for file in modules(DAEMON):
        if "store" not in file.parts:
            assert not sql.search(file.read_text()), file


def test_the_rules_know_no_grpc() -> None:
    """State machine, parameters and runs are tested and changed without a server."""
    edge = {DAEMON / "server.py", *(DAEMON / "services").glob("*.py")}
    for file in modules(DAEMON):
        if file not in edge:
            assert not {name.split(".")[0] for name in imports(file, "")} & {
                "grpc",
                "grpc_status",
            }, file


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import finetuned_daemon.main", "torch transformers finetuned_runner numpy"),
        ("import finetuned", "grpc google pydantic torch finetuned_daemon"),
        ("import finetuned.cli", "grpc torch finetuned_daemon"),
    ],
)
def test_what_a_start_does_not_load(statement: str, absent: str) -> None:
    code = f"import sys; {statement}; print(*(m for m in {absent.split()} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []
