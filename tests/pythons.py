"""Pythons for tests that train in another environment than their own."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path


def python_without(folder: Path, *packages: str) -> str:
    """A Python with all that this one has but for some packages; returns its path."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (there,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if name not in packages:
            (there / entry.name).symlink_to(entry)
    return str(folder / "bin/python")
