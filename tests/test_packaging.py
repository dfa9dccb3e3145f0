"""What is published: the wheel holds all of it, and a plain install is thin."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY


def test_the_wheel_holds_everything_that_the_checkout_runs(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, REPOSITORY],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    packages = (
        REPOSITORY / "client/finetuned",
        REPOSITORY / "daemon/finetuned_daemon",
        REPOSITORY / "daemon/finetuned_runner",
    )
    tree = {
        str(file.relative_to(package.parent))
        for package in packages
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert names == tree


def test_a_plain_install_is_the_thin_client() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0] for requirement in project["dependencies"]}
    assert names == {"grpcio", "grpcio-status", "platformdirs", "protobuf"}


@pytest.mark.parametrize("module", ["finetuned.cli", "finetuned_daemon"])
def test_the_commands_run_as_modules_too(module: str) -> None:
    """Where the scripts are not on the PATH, or Python is to be chosen."""
    asked = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
    assert "usage:" in asked.stdout.lower()


def test_what_make_installs_is_pinned() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert pins["grpcio-tools"] == "1.76.0"
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [r for extra in project["optional-dependencies"].values() for r in extra]
    for requirement in [*wanted, *project["dependencies"]]:
        name = requirement.split(">")[0].split("=")[0].split("[")[0]
        assert name == "finetuned" or name.lower() in {pin.lower() for pin in pins}, name
