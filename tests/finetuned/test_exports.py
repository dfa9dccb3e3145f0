"""What `import finetuned` gives, and what it must not bring along."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import finetuned
from finetuned import _errors

# Package, and why the client must not import it.
WALLS = {
    "torch": "a client is thin, and torch takes seconds",
    "transformers": "as torch",
    "pydantic": "the rules are the daemon's",
    "finetuned_daemon": "the client is installed without the daemon",
    "finetuned_runner": "the client is installed without the runner",
    "psutil": "belongs to the daemon",
}


def modules_after(code: str, *arguments: str) -> set[str]:
    """Names of the modules loaded once a fresh Python has run the code."""
    code = f"{code}\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_every_public_name_is_there() -> None:
    for name in finetuned.__all__:
        assert getattr(finetuned, name) is not None
    assert set(finetuned.__all__) <= set(dir(finetuned))


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(_errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert errors <= set(finetuned.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = finetuned.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_does_not_import_grpc() -> None:
    loaded = modules_after("import finetuned; finetuned.__version__; finetuned.NotFound")
    assert "grpc" not in loaded
    assert "google.protobuf" not in loaded


@pytest.mark.parametrize("package", WALLS)
def test_the_clients_import_nothing_beyond_the_wall(package: str) -> None:
    loaded = modules_after("import finetuned; [getattr(finetuned, n) for n in finetuned.__all__]")
    assert "grpc" in loaded
    assert package not in loaded, WALLS[package]


@pytest.mark.parametrize("package", ["typer", "rich", "yaml", "pandas", "IPython"])
def test_the_clients_need_no_extra(package: str) -> None:
    loaded = modules_after("import finetuned; [getattr(finetuned, n) for n in finetuned.__all__]")
    assert package not in loaded


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([verb, "--help"] for verb in ("train", "check", "estimate", "params", "doctor")),
        *([noun, "--help"] for noun in ("task", "template", "dataset", "daemon", "device")),
        *(
            ["task", verb, "--help"]
            for verb in ("create", "list", "show", "edit", "start", "stop", "delete")
        ),
        *(["task", verb, "--help"] for verb in ("watch", "logs")),
        *(
            ["template", verb, "--help"]
            for verb in ("list", "show", "save", "delete", "export", "import")
        ),
        ["dataset", "inspect", "--help"],
        *(["daemon", verb, "--help"] for verb in ("start", "stop", "status")),
        ["device", "list", "--help"],
    ],
    ids=" ".join,
)
def test_help_does_not_import_grpc(arguments: list[str]) -> None:
    code = (
        "import finetuned.cli\n"
        "try:\n    finetuned.cli.main()\n"
        "except SystemExit as end:\n    assert not end.code"
    )
    loaded = modules_after(code, *arguments)
    assert "finetuned.cli.quick" in loaded
    assert not loaded & {"grpc", "google.protobuf", "rich.console", "yaml", "typer", "click"}


def test_without_the_extra_the_command_line_says_what_to_install() -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n in ('rich', 'typer') else find(n, *a)\n"
        "from finetuned.cli import main; main()"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, "task", "list"], capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert "pip install 'finetuned[cli]'" in answer.stderr
    assert "typer, rich" in answer.stderr
