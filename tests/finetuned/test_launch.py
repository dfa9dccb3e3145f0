"""Starting the daemon where none serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_process import eventually
from finetuned import (
    Client,
    DaemonNotStarted,
    DaemonUnavailable,
    FinetunedError,
    start_daemon,
)
from finetuned._connect import find
from finetuned._launch import _make_private
from finetuned._paths import paths

CTL = str(Path(sys.executable).parent / "finetunectl")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders of our own, by the environment; what serves there in the end is ended."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    yield
    endpoint = find()
    if endpoint.is_listening():
        with Client() as client:
            client.shutdown()
        eventually(lambda: not endpoint.is_listening(), "the daemon has ended")


async def test_a_client_can_start_the_daemon(make: Callable[..., Any]) -> None:
    client = make(start_daemon=True)
    pid = (await client.system_info()).pid
    assert (await make(start_daemon=True).system_info()).pid == pid
    assert (await make().system_info()).pid == pid


async def test_a_daemon_that_has_gone_is_started_again_by_the_next_call(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not to learn whether it is there, nor by a client that is closed."""
    client = make(start_daemon=True)
    assert not await client.is_serving()
    assert not find().is_listening()
    pid = (await client.system_info()).pid
    await client.shutdown()
    eventually(lambda: not find().is_listening(), "the daemon has ended")
    with monkeypatch.context() as patched, pytest.raises(DaemonUnavailable):
        patched.setattr("finetuned._session.RETRY_SECONDS", 0.1)
        await client.list_devices()
    assert not await client.is_serving()
    assert not find().is_listening()
    assert (await client.system_info()).pid != pid
    await client.close()
    with pytest.raises(FinetunedError, match="closed"):
        await client.system_info()


def test_starting_says_whether_it_did() -> None:
    logs: list[Path] = []
    assert start_daemon(on_start=logs.append)
    assert not start_daemon(on_start=logs.append)
    assert logs == [paths().log]
    assert "serving on" in paths().log.read_text()
    assert paths().log.stat().st_mode & 0o077 == 0


def test_the_daemon_has_a_session_of_its_own_and_no_terminal() -> None:
    start_daemon()
    with Client() as client:
        pid = client.system_info().pid
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[3]) == pid, "leader of its session"
    assert Path(f"/proc/{pid}/fd/0").readlink() == Path("/dev/null")
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_folders_that_are_missing_are_made_for_this_user_alone(tmp_path: Path) -> None:
    home, runtime = tmp_path / "home", tmp_path / "runtime"
    for folder in (home, runtime):
        folder.mkdir(mode=0o700)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FINETUNED", "XDG"))}
    environment |= {"HOME": str(home), "XDG_RUNTIME_DIR": str(runtime)}

    def ctl(verb: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CTL, "daemon", verb],
            env=environment,
            umask=0o002,
            capture_output=True,
            text=True,
            timeout=60,
        )

    started = ctl("start")
    assert ctl("stop").returncode == started.returncode == 0, started.stderr
    state = home / ".local" / "state" / "finetuned"
    modes = [folder.stat().st_mode & 0o777 for folder in (state, *list(state.parents)[:2])]
    assert modes == [0o700] * 3


@pytest.mark.parametrize("umask", [0o002, 0o277])
def test_what_is_there_keeps_its_mode(tmp_path: Path, umask: int) -> None:
    (tmp_path / "there").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to("there")
    before = os.umask(umask)
    try:
        _make_private(tmp_path / "link" / "a" / "b")
        _make_private(tmp_path / "link" / "a" / "b")
    finally:
        os.umask(before)
    modes = [(tmp_path / "there" / name).stat().st_mode & 0o777 for name in ("", "a", "a/b")]
    assert modes == [0o755, 0o700, 0o700]


def test_many_at_once_end_up_with_one_daemon() -> None:
    commands = [
        subprocess.Popen(
            [CTL, "daemon", "start", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    answers = [command.communicate(timeout=60) for command in commands]
    assert [command.returncode for command in commands] == [0, 0, 0, 0], answers
    assert len({json.loads(out)["pid"] for out, _ in answers}) == 1


def test_a_daemon_can_be_started_right_after_the_last_one() -> None:
    pids = set()
    for _ in range(3):
        assert start_daemon()
        with Client() as client:
            pids.add(client.system_info().pid)
            client.shutdown()
        eventually(lambda: not find().is_listening(), "the socket is closed")
    assert len(pids) == 3


def test_a_daemon_that_ends_is_shown_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o755)
    with pytest.raises(DaemonNotStarted, match="status 1") as caught:
        start_daemon()
    assert "0755" in str(caught.value)


def test_a_daemon_is_not_started_for_an_address_of_somebody_s_own(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="nobody serves"):
        start_daemon(f"unix:{tmp_path}/other.sock")
    assert not paths().state_dir.exists()


def test_without_the_daemon_s_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DaemonNotStarted, match=r"pip install 'finetuned\[daemon,train\]'"):
        start_daemon()


def test_relative_folders_are_the_client_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINETUNED_STATE_DIR", "state")
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", "run")
    start_daemon()
    with Client() as client:
        assert client.system_info().state_dir == str(tmp_path / "state")
