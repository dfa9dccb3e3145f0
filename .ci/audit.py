"""An audit of what is installed with us: known advisories, and secrets in the files of the project.

    python .ci/audit.py [--constraints FILE] [--offline]

1. Every pin of `constraints.txt` and every floor of `pyproject.toml` against `advisories.toml`.
2. `pip check`: packages that do not fit together.
3. Every file that git tracks against detect-secrets' patterns for keys, tokens and passwords.
4. pip-audit's public database, where it is installed and can be reached; else a line says that
   it was left out.

Exit status 1 where anything is found.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parent.parent
ALLOWED = ".ci/allowed_secrets.txt"


def main() -> int:
    """Runs every part; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--constraints", type=Path, default=REPOSITORY / "constraints.txt")
    parser.add_argument("--offline", action="store_true", help="don't ask the public database")
    arguments = parser.parse_args()
    found = advisories(arguments.constraints) + misfits() + secrets()
    if not arguments.offline:
        found += public_database(arguments.constraints)
    for line in found:
        print(f"audit: {line}", file=sys.stderr)
    if not found:
        print("audit: nothing found")
    return 1 if found else 0


def advisories(constraints: Path) -> list[str]:
    """Pins, and floors of what we ask for, below the first release that is mended."""
    known: list[dict[str, Any]] = tomllib.loads((REPOSITORY / ".ci/advisories.toml").read_text())[
        "advisory"
    ]
    pins = {
        canonicalize_name(name): Version(version)
        for name, version in re.findall(
            r"^([\w.-]+)==([\w.+!-]+)", constraints.read_text(), re.MULTILINE
        )
    }
    floors = _floors()
    found = list[str]()
    for advisory in known:
        package, fixed = canonicalize_name(advisory["package"]), Version(advisory["fixed"])
        for where, version, excuse in (
            (constraints.name, pins.get(package), ""),
            ("pyproject.toml", floors.get(package), advisory.get("floor", "")),
        ):
            if version is not None and version < fixed and not excuse:
                found.append(
                    f"{where}: {package} {version} has {advisory['id']} ({advisory['what']}); "
                    f"mended in {fixed}"
                )
    return found


def _floors() -> dict[str, Version]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    floors = dict[str, Version]()
    for text in (text for requirements in lists for text in requirements):
        requirement = Requirement(text)
        for specifier in requirement.specifier:
            if specifier.operator in (">=", "=="):
                name, version = canonicalize_name(requirement.name), Version(specifier.version)
                floors[name] = min(version, floors.get(name, version))
    return floors


def misfits() -> list[str]:
    """What pip finds that does not fit together in this environment."""
    result = subprocess.run(
        [sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    return result.stdout.splitlines() if result.returncode else []


def secrets() -> list[str]:
    """Keys, tokens and passwords in tracked files, but for what `allowed_secrets.txt` names."""
    files = subprocess.run(
        [shutil.which("git") or "git", "ls-files", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    # Descriptors as bytes, and hashes by the hundred: both are made by programs.
    scanned = [name for name in files if name and not re.search(r"_pb2|/data/databases/", name)]
    scan = subprocess.run(
        [sys.executable, "-m", "detect_secrets", "scan", *scanned],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    allowed = {
        line.split()[0]
        for line in (REPOSITORY / ALLOWED).read_text().splitlines()
        if line and line[0] != "#"
    }
    results: dict[str, list[dict[str, Any]]] = json.loads(scan.stdout)["results"]
    return [
        f"{name}:{secret['line_number']}: {secret['type']}; if it is none, write "
        f"{secret['hashed_secret']} into {ALLOWED}"
        for name, secrets_of in results.items()
        for secret in secrets_of
        if secret["hashed_secret"] not in allowed
    ]


def public_database(constraints: Path) -> list[str]:
    """What pip-audit knows; nothing where it is not installed or can't ask."""
    program = shutil.which("pip-audit")
    if program is None:
        print("audit: the public database is left out: pip-audit is not installed")
        return []
    result = subprocess.run(
        [program, "-r", str(constraints), "--no-deps", "--disable-pip", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (json.JSONDecodeError, KeyError):
        print("audit: the public database is left out: it can't be reached")
        return []
    asked = [package for package in packages if "skip_reason" not in package]
    print(f"audit: the public database knows {len(asked)} of {len(packages)} packages")
    return [
        f"{package['name']} {package['version']} has {problem['id']}; "
        f"mended in {', '.join(problem['fix_versions'])}"
        for package in asked
        for problem in package["vulns"]
    ]


if __name__ == "__main__":
    sys.exit(main())
