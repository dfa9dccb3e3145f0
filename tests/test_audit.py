"""The audit finds what it is there to find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY


def audit(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / ".ci/audit.py"), "--offline", *options],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_package_with_an_advisory_is_named_with_what_mends_it(tmp_path: Path) -> None:
    pins = (REPOSITORY / "constraints.txt").read_text().splitlines()
    old = [line for line in pins if not line.startswith("filelock==")]
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("\n".join([*old, "filelock==3.20.0"]))
    result = audit("--constraints", str(constraints))
    assert result.returncode == 1
    assert "filelock 3.20.0 has CVE-2025-68146" in result.stderr
    assert "mended in 3.20.1" in result.stderr


def test_a_key_in_a_tracked_file_is_found(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    (clone / ".ci").mkdir(parents=True)
    for name in (
        ".ci/audit.py",
        ".ci/advisories.toml",
        ".ci/allowed_secrets.txt",
        "constraints.txt",
        "pyproject.toml",
    ):
        (clone / name).write_bytes((REPOSITORY / name).read_bytes())
    key = "AKIA" + "Q3EXAMPLE7LQ4Z2P"  # in two parts, or the audit would find it here
    (clone / "settings.py").write_text(f'access = "{key}"\n')
    for command in (["init", "-q"], ["add", "settings.py"]):
        subprocess.run(["git", "-C", str(clone), *command], check=True)
    result = subprocess.run(
        [sys.executable, str(clone / ".ci/audit.py"), "--offline"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "settings.py:1: AWS Access Key" in result.stderr
