"""Another user and another machine: what they can't do, shown with a real second one of each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Scene
from daemon_process import TESTS, Daemon
from finetuned import Client, PermissionDenied
from finetuned._connect import find
from reach import finetuned, get_info, tcp_address

NOBODY = 65534

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")

# Becomes another user, and tries what stdin names; how each ended goes to stdout.
_INTRUDER = f"""
import json, os, socket, sys
wishes = json.load(sys.stdin)
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})

def connect(path):
    with socket.socket(socket.AF_UNIX) as there:
        there.connect(path)

def plant(folder):
    os.mkdir(folder, 0o755)
    for name in ("token", "daemon.json"):
        with open(folder + "/" + name, "w") as file:
            file.write(wishes["plants"][name])
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(folder + "/finetuned.sock")

acts = {{
    "connect": connect,
    "list": os.listdir,
    "read": lambda path: open(path, "rb").read(),
    "write": lambda path: open(path, "r+b"),
    "make": lambda path: open(path + "/planted", "wb"),
    "remove": os.unlink,
    "plant": plant,
    "link": lambda path: os.symlink(wishes["target"], path),
}}
results = {{}}
for act, path in wishes["acts"]:
    try:
        acts[act](path)
        results[act + " " + path] = "done"
    except OSError as error:
        results[act + " " + path] = type(error).__name__
json.dump(results, sys.stdout)
"""


def intrude(*acts: tuple[str, Path], **more: Any) -> dict[str, str]:
    """What another user's process gets for each of these acts."""
    done = subprocess.run(
        [sys.executable, "-c", _INTRUDER],
        input=json.dumps({"acts": [(act, str(path)) for act, path in acts], **more}),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    results: dict[str, str] = json.loads(done.stdout)
    assert len(results) == len(acts)
    return results


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everybody can enter, as /tmp is; tests' own are below one that nobody can."""
    folder = Path(tempfile.mkdtemp(prefix="finetuned-test-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@as_root
def test_another_user_gets_at_nothing(shared: Path, scene: Scene) -> None:
    """Not at the socket, tokens, database, run folders, backups or log: folders are the wall, and
    behind it every file that matters has one of its own.
    """
    home = shared / "home"
    home.mkdir(mode=0o755)
    daemon = Daemon(home, "--listen", "127.0.0.1:0").start()
    try:
        finetuned(daemon, "token", "rotate", "--read-only")
        task = daemon.create(scene.parameters(), start=True)
        daemon.wait(task.name, "COMPLETED")
        here = daemon.paths
        backups = here.state_dir / "backups"
        backups.mkdir(mode=0o700, exist_ok=True)
        files = [here.token, here.read_only_token, here.endpoint, here.lock]
        files += [p for p in here.state_dir.iterdir() if p.is_file()]
        assert here.state_dir / "finetuned.db" in files
        run_dir = next((here.state_dir / "runs").glob("*/1"))
        folders = [here.runtime_dir, here.state_dir, run_dir, run_dir.parents[1], backups]
        acts = [
            ("connect", here.socket),
            *((act, file) for file in files for act in ("read", "write", "remove")),
            *((act, folder) for folder in folders for act in ("list", "make")),
            *(("read", file) for file in run_dir.iterdir()),
        ]
        assert set(intrude(*acts).values()) == {"PermissionError"}
        assert get_info(daemon.address) == "OK", "and all of it was there"
        # With the wall down: whatever lies right behind it still refuses.
        for folder in (here.runtime_dir, here.state_dir):
            folder.chmod(0o711)
        behind = [a for a in acts if a[1] not in (here.runtime_dir, here.state_dir)]
        assert set(intrude(*behind).values()) == {"PermissionError"}
        # TCP is anybody's; the token is not.
        assert get_info(tcp_address(daemon)) == "UNAUTHENTICATED"
    finally:
        daemon.close()
    assert daemon.spawn().wait(20) == 1
    assert "chmod 700" in daemon.log.read_text()


@as_root
@pytest.mark.parametrize("how", ["plant", "link"])
def test_what_another_user_has_planted_gets_no_token_and_no_call(
    shared: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared folder for temporary files anybody can be there before the daemon."""
    place, target = shared / "run", shared / "other"
    theirs = {"token": "t" * 43, "daemon.json": json.dumps({"addresses": ["127.0.0.1:9"]})}
    if how == "link":
        target.mkdir(mode=0o700)
    done = intrude((how, place), plants=theirs, target=str(target))
    assert set(done.values()) == {"done"}
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(place))
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(shared / "state"))
    monkeypatch.setenv("FINETUNED_TOKEN", "secret" * 8)
    with pytest.raises(PermissionDenied, match="belongs to another user") as caught:
        find()
    assert caught.value.reason == "NOT_YOURS"
    with Client(start_daemon=True) as client, pytest.raises(PermissionDenied):
        client.system_info()
    daemon = Daemon(shared)
    assert daemon.paths.runtime_dir == place
    assert daemon.spawn().wait(20) == 1
    assert "another user" in daemon.log.read_text()


@as_root
@pytest.mark.parametrize("name", ["daemon.json", "finetuned.sock", "token"])
def test_one_planted_file_is_enough_to_refuse(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    assert find().is_unix
    (tmp_path / name).touch()
    os.chown(tmp_path / name, NOBODY, NOBODY)
    with pytest.raises(PermissionDenied, match=name):
        find()


def test_a_runtime_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There anybody can put a socket of his own in place of the daemon's."""
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionDenied, match="can be written by others"):
        find()


@pytest.mark.skipif(
    os.getuid() != 0 or any(shutil.which(c) is None for c in ("unshare", "nsenter", "ip")),
    reason="only root can lay a cable to a second network, with unshare, nsenter and ip",
)
def test_another_machine_reaches_tls_alone_and_needs_the_token(tmp_path: Path) -> None:
    """A second network namespace: loopback is out of its reach, with whatever token."""
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-m", "second_network", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    results = {name: status.partition(":")[0] for name, status in json.loads(done.stdout).items()}
    assert results == {
        "loopback": "UNAVAILABLE",
        "loopback by the cable": "UNAVAILABLE",
        "loopback, from here": "OK",
        "TLS and token": "OK",
        "TLS, no token": "UNAUTHENTICATED",
        "TLS, another daemon's token": "UNAUTHENTICATED",
        "token, no TLS": "UNAVAILABLE",
        "mutual TLS and token": "OK",
        "mutual TLS, no token": "UNAUTHENTICATED",
        "token, no client certificate": "UNAVAILABLE",
        "token, a stranger's certificate": "UNAVAILABLE",
    }
