"""`finetunectl` with odd input, odd streams and no daemon: sentences, never tracebacks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetuned import FailedPrecondition, Task
from finetuned._errors import PreconditionViolation
from finetuned.cli import main
from finetuned.cli.errors import show_error
from finetuned.cli.settings import json_text, task_command

CTL = str(Path(sys.executable).parent / "finetunectl")
ODD = "a\udcff"
"""What Python makes of the bytes `a\\xff` on a command line."""

Ctl = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders in which no daemon serves."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    monkeypatch.delenv("FINETUNED_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ctl:
    """Runs a command in this process: status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetunectl", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capsys.readouterr())

    return run


def process(
    command: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", "-c", command],
        env={**os.environ, **(environment or {}), "CTL": CTL},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--name", ODD], r"display_name +holds bytes that are no UTF-8"),
        (["train", "--device", ODD], r"device +holds bytes that are no UTF-8"),
        (["train", "--like", ODD], r"--like +holds bytes that are no UTF-8"),
        (["train", "--data", ODD], r"data.train_file +holds bytes that are no UTF-8"),
        (["train", "--set", f"lora.lora_target_modules={ODD}"], r"lora_target_modules +holds"),
        (["train", "--set", f"{ODD}=4"], r"is no section"),
        (["train", "--type", ODD], r"training_type +must be sft or pretrain"),
        (["train", "--set", "=4"], r"--set +wants section.field=value, not '=4'"),
        (["train", "-f", "missing.yaml"], r"missing.yaml +is not there: no such file"),
        (["train", "-f", "."], r"\. +can't be read: Is a directory"),
        (["task", "show", ODD], r"name +holds bytes that are no UTF-8"),
        (["task", "delete", "", "--yes"], r"name +must name a task, and is empty"),
        (["task", "list", "--state", ODD], r"states +must be one of"),
        (["--address", f"{ODD}:5", "task", "list"], r"is no address"),
    ],
)
def test_bad_input_is_a_sentence_and_status_2(ctl: Ctl, arguments: list[str], said: str) -> None:
    status, out, err = ctl(*arguments)
    assert (status, out) == (2, ""), err
    assert re.search(said, err), err


@pytest.mark.parametrize("token", ["é", "two\nlines"])
def test_a_token_that_is_none_is_status_2(
    ctl: Ctl, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("FINETUNED_TOKEN", token)
    status, _, err = ctl("--address", "127.0.0.1:5", "task", "list")
    assert status == 2
    assert "FINETUNED_TOKEN is no token" in err


def test_errors_in_json_stay_json_whatever_the_bytes(ctl: Ctl) -> None:
    status, _, err = ctl("task", "show", ODD, "--json")
    assert status == 2
    assert json.loads(err)["error"]["violations"][0]["field"] == "name"


@pytest.mark.parametrize(("encoding", "text"), [("ascii", '"\\u00e9"'), ("utf-8", '"é"')])
def test_json_is_json_in_any_encoding(encoding: str, text: str) -> None:
    assert json_text("é", encoding) == text
    assert json.loads(json_text(ODD, encoding)) == ODD


def test_a_current_folder_that_is_gone_is_named(ctl: Ctl, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)  # monkeypatch goes back
    shutil.rmtree(gone)
    status, _, err = ctl("train", "--model", "m", "--data", "d")
    assert status == 1
    assert err.startswith("error: the current folder is gone")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii", "C"],
)
def test_a_terminal_without_utf8_is_written_to(environment: dict[str, str]) -> None:
    answer = process(r'"$CTL" task show $(printf "\xc3\xa9"); "$CTL" train -f ü', environment)
    assert "Traceback" not in answer.stderr
    assert answer.returncode == 2


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ('"$CTL" --help >&-', 0),
        ('"$CTL" daemon status >&-', 3),
        ('"$CTL" daemon status >&- 2>&- <&-', 3),
        ('"$CTL" --help >/dev/full', 1),
    ],
)
def test_streams_that_take_nothing_are_no_tracebacks(command: str, status: int) -> None:
    answer = process(command)
    assert answer.returncode == status
    assert "Traceback" not in answer.stderr
    assert "Exception" not in answer.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version", "daemon status 2>&1"])
def test_a_reader_that_has_enough_ends_it_as_in_a_shell(arguments: str) -> None:
    # The reader has gone before anything is written.
    command = f'{{ read -r; "$CTL" {arguments}; echo $? >&3; }} < <(sleep 0.1; echo) | true'
    answer = process(f"exec 3>&1; {command}")
    assert answer.stdout == "141\n"
    assert answer.stderr == ""


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("plain", ["--watch"], "plain --watch"),
        ("-x", ["--watch"], "--watch -- -x"),
        ("a b", [], "'a b'"),
        ("it's", [], shlex.quote("it's")),
    ],
)
def test_a_hint_can_be_copied(name: str, options: list[str], words: str) -> None:
    assert task_command("start", Task(display_name=name), *options) == (
        f"finetunectl task start {words}"
    )


def test_hints_of_errors_are_commands_too(capsys: pytest.CaptureFixture[str]) -> None:
    violation = PreconditionViolation("tasks/a", "TASK_ACTIVE", "It runs.")
    error = FailedPrecondition("it runs", reason="TASK_ACTIVE", violations=[violation])
    show_error(error, as_json=False)
    assert "finetunectl task stop tasks/a --wait" in capsys.readouterr().err
