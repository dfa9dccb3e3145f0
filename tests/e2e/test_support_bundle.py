"""The support bundle: what is listed is what is in it, and nothing of a user's own."""

from __future__ import annotations

import getpass
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.cli.support_redact import Redactor
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2

CANARY = "Zq7canaryZq7"

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


def user_name() -> list[str]:
    """The user's, where its number has one."""
    try:
        return [getpass.getuser()]
    except (KeyError, OSError):
        return []


@pytest.fixture
def ctl(daemon: Daemon, tmp_path: Path) -> Ctl:
    """`finetunectl`, with a HOME and a variable that hold canaries."""
    home = tmp_path / f"home-{CANARY}"
    home.mkdir()
    environment = {
        **os.environ,
        "FINETUNED_STATE_DIR": str(daemon.paths.state_dir),
        "FINETUNED_RUNTIME_DIR": str(daemon.paths.runtime_dir),
        "HF_TOKEN": f"hf_{CANARY}0123456789abcdef",
        "HOME": str(home),
    }
    environment.pop("FINETUNED_ADDRESS", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from finetuned.cli import main; main()", *arguments],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def failed(daemon: Daemon, scene: Scene) -> task_pb2.Task:
    """A task that has failed, with canaries in all that it was given and all that it said."""
    folder = scene.root / f"data-{CANARY}"
    folder.mkdir()
    chat = [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]
    data = folder / f"{CANARY} chats.jsonl"
    data.write_text(json.dumps({"messages": chat}) + "\n")
    detail = (
        "Traceback (most recent call last):\n"
        f'  File "/home/{CANARY}/train.py", line 7, in step\n'
        f"    raise ValueError({CANARY!r})\n"
        f"ValueError: {CANARY} of {data}"
    )
    parameters = parameters_pb2.Parameters()
    fails = {"step": 2, "reason": "DATASET_INVALID", "detail": detail, "excerpt": CANARY}
    parameters.CopyFrom(
        scene.play(steps=3, console=f"printed {CANARY}", log=f"logged {CANARY}", fail=fails)
    )
    parameters.data.train_file = str(data)
    parameters.data.output_dir = str(folder / "out")
    task = daemon.create(parameters, start=True, task_id=f"a-{CANARY.lower()}")
    name = task_pb2.Task(name=task.name, display_name=f"my {CANARY}")
    daemon.wait(task.name, "FAILED")
    request = task_service_pb2.UpdateTaskRequest(task=name)
    return daemon.tasks.UpdateTask(request).task


def unpacked(path: Path) -> dict[str, bytes]:
    """The files of a bundle by their names in it."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        assert all(m.isreg() and m.mode == 0o600 and not m.uname for m in members)
        files = {m.name.partition("/")[2]: archive.extractfile(m) for m in members}
        return {name: file.read() for name, file in files.items() if file is not None}


def test_what_is_listed_is_what_is_in_it(tmp_path: Path, ctl: Ctl, failed: task_pb2.Task) -> None:
    result = ctl("support-bundle", "--yes", "-o", "b.tar.gz", "--json")
    assert result.returncode == 0, result.stderr
    path = tmp_path / "b.tar.gz"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = unpacked(path)
    shown = re.findall(r"^  (\S+) +[\d.]+ \w+  \w", result.stderr, re.MULTILINE)
    assert shown == list(files)
    told = json.loads(result.stdout)
    assert told["file"] == str(path)
    assert {f["name"]: f["bytes"] for f in told["files"]} == {n: len(c) for n, c in files.items()}
    runs = [name for name in files if name.startswith("runs/")]
    assert len(runs) == 2
    assert {name for name in files if name not in runs} == {
        *("README.txt", "versions.json", "system.json", "limits.json", "devices.json"),
        *("doctor.json", "database.json", "tasks.json", "daemon-log.jsonl"),
    }
    assert not list(tmp_path.glob(".b.tar.gz*")), "nothing is left beside it"


def test_it_says_what_a_maintainer_needs(tmp_path: Path, ctl: Ctl, failed: task_pb2.Task) -> None:
    ctl("support-bundle", "--yes", "-o", "b.tar.gz")
    files = unpacked(tmp_path / "b.tar.gz")

    def read(name: str) -> Any:
        return json.loads(next(c for n, c in files.items() if n.endswith(name)))

    assert read("versions.json")["packages"]["grpcio"]
    assert "HF_TOKEN" in read("versions.json")["environment_variables"]
    assert read("database.json")["is_whole"] is True
    assert {item["name"] for item in read("doctor.json")["items"]} >= {"python", "disk"}
    (task,) = read("tasks.json")
    assert (task["state"], task["end_reason"]) == ("failed", "dataset invalid")
    run = read("run.json")
    assert run["parameters"]["training"]["learning_rate"] == pytest.approx(2e-4, rel=10)
    assert run["parameters"]["data"]["train_file"].startswith("path-")
    assert run["parameters"]["data"]["train_file"].endswith(".jsonl")
    events = [
        json.loads(line)
        for line in next(c for n, c in files.items() if n.endswith("events.jsonl")).splitlines()
    ]
    (result,) = [e["result"] for e in events if "result" in e]
    assert result["traceback"][-1] == "ValueError"
    assert re.fullmatch(r"path-\w+\.py:7 step", result["traceback"][0])
    assert any("metrics" in e for e in events)
    assert b'"CreateTask OK"' in files["daemon-log.jsonl"]


@pytest.mark.parametrize("is_alive", [True, False])
def test_nothing_of_a_users_own_is_in_it(
    tmp_path: Path, daemon: Daemon, ctl: Ctl, failed: task_pb2.Task, is_alive: bool
) -> None:
    """With a daemon, and from its files alone."""
    token = "T0kenT0kenT0kenT0kenT0kenT0kenT0kenT0kenT0k"
    (daemon.paths.runtime_dir / "token").write_text(token)
    with daemon.paths.log_file.open("a") as log:  # a line that should never have been
        log.write(json.dumps({"level": "error", "message": f"{token} in /srv/{CANARY}/x"}) + "\n")
    if not is_alive:
        daemon.stop()
    result = ctl("support-bundle", "--yes", "-o", "b.tar.gz")
    assert result.returncode == 0, result.stderr
    assert ("no daemon answers" in result.stderr) is not is_alive
    files = unpacked(tmp_path / "b.tar.gz")
    assert any(name.endswith("run.json") for name in files)
    hidden = [CANARY, token, str(tmp_path), failed.display_name, failed.name.partition("/")[2]]
    for name, content in files.items():
        for text in (*hidden, *user_name()):
            found = re.search(rf"(?i)(?<!\w){re.escape(text)}(?!\w)", content.decode())
            assert found is None, (name, text, content.decode()[found.start() - 200 : found.end()])
            assert text not in name
        assert CANARY.lower() not in content.decode().lower(), name
        assert CANARY.lower() not in name.lower()


def test_names_and_what_was_printed_are_in_it_where_they_are_asked_for(
    tmp_path: Path, ctl: Ctl, failed: task_pb2.Task
) -> None:
    ctl(
        *("support-bundle", "--yes", "-o", "b.tar.gz", "--with-names", "--with-console"),
        *("--task", failed.display_name),
    )
    files = unpacked(tmp_path / "b.tar.gz")
    console = next(c for n, c in files.items() if n.endswith("console.txt"))
    assert f"printed {CANARY}" in console.decode()
    assert failed.display_name in files["tasks.json"].decode()


def test_without_a_yes_nothing_is_written_and_nothing_is_replaced(
    tmp_path: Path, ctl: Ctl, daemon: Daemon
) -> None:
    refused = ctl("support-bundle", "-o", "b.tar.gz")
    assert refused.returncode == 2
    assert "versions.json" in refused.stderr, "the list is shown all the same"
    assert "--yes" in refused.stderr
    assert not (tmp_path / "b.tar.gz").exists()
    (tmp_path / "b.tar.gz").symlink_to("elsewhere")
    taken = ctl("support-bundle", "--yes", "-o", "b.tar.gz")
    assert taken.returncode == 1
    assert "there is a b.tar.gz already" in taken.stderr
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("can't read /home/jane/secret plans.txt", "/home/jane"),
        ("authorization: Bearer abc123def456", "abc123def456"),
        ("api_key=abcdef123456", "abcdef123456"),
        ("hf_abcdefghijklmnopqrst", "abcdefghij"),
        ("https://jane:pw@example.org/x", "example"),
        ("~/models/mine", "mine"),
        ("'/data/chats.jsonl'", "chats"),
    ],
)
def test_texts_lose_paths_and_secrets(text: str, hidden: str) -> None:
    assert hidden not in Redactor(with_names=False).text(text)


def test_a_user_without_name_and_home_has_a_bundle_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container a user may be a number alone."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(variable, raising=False)

    def nobody(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert "~" not in Redactor(with_names=True).text("a text of /home/jane")


def test_the_same_path_has_the_same_word_in_one_bundle_alone() -> None:
    one, other = Redactor(with_names=False), Redactor(with_names=False)
    assert one.path("/a/b.jsonl") == one.path("/a/b.jsonl") == one.text("/a/b.jsonl")
    assert one.path("/a/b.jsonl") != one.path("/a/c.jsonl")
    assert one.path("/a/b.jsonl") != other.path("/a/b.jsonl")
