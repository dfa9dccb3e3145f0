"""What is published: the wheel holds all of it, and a plain install is thin."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from conftest import REPOSITORY

PROTOS = sorted((REPOSITORY / "proto").glob("finetuned/v1/*.proto"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", out, REPOSITORY],
        check=True,
        capture_output=True,
    )
    return out


def names_in_wheel(built: Path) -> set[str]:
    (wheel,) = built.glob("*.whl")
    return {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}


def test_the_wheel_holds_everything_that_the_checkout_runs(built: Path) -> None:
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
    protos = {f"finetuned/{file.relative_to(REPOSITORY)}" for file in PROTOS}
    assert names_in_wheel(built) == tree | protos


def test_the_sdist_holds_the_protos_and_the_documents(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    documents = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    assert {str(file.relative_to(REPOSITORY)) for file in (*PROTOS, *documents)} <= names


def test_what_is_installed_says_where_its_protos_are(built: Path, tmp_path: Path) -> None:
    """In the wheel they lie beside the package, in a checkout in `proto/`; buf reads both."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    asked = "import finetuned; print(finetuned.proto_dir())"
    for search, folder in (
        (tmp_path, tmp_path / "finetuned/proto"),
        (REPOSITORY / "client", REPOSITORY / "proto"),
    ):
        said = subprocess.run(
            [sys.executable, "-c", asked],
            env={"PYTHONPATH": str(search)},
            cwd="/",  # `python -c` looks in its own folder first
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.strip() == str(folder)
        buf = Path(sys.executable).parent / "buf"
        subprocess.run([buf, "build", folder, "-o", "/dev/null"], check=True, capture_output=True)


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
