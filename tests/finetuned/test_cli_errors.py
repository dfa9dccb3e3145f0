"""Errors of `finetunectl`: each ends with the command to type next, as text and as JSON."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from daemon_process import Daemon
from finetuned import _errors
from finetuned._errors import (
    DaemonNotStarted,
    FailedPrecondition,
    FinetunedError,
    PreconditionViolation,
)
from finetuned.cli import quick
from finetuned.cli.next_step import BY_CODE, BY_REASON, next_command
from finetuned.cli.settings import Settings
from inside import Inside, create, environment_of, shared_daemon

if TYPE_CHECKING:
    from conftest import Scene

KEYS = ["code", "reason", "message", "violations", "request_id", "next"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_daemon(tmp_path_factory.mktemp("errors")) as daemon:
        yield daemon


@pytest.fixture
def alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Inside:
    """Commands where no daemon serves."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return Inside(monkeypatch, capsys)


@pytest.fixture
def ctl(
    served: Daemon,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Inside:
    """Commands at the daemon of this module."""
    for name, value in environment_of(served).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    return Inside(monkeypatch, capsys)


def make(ctl: Inside, scene: Scene, name: str) -> list[str]:
    files = ["--model", str(scene.model), "--data", str(scene.data), "--device", "cpu"]
    assert ctl("task", "create", *files, "--name", name).status == 0
    return files


def is_command(text: str) -> bool:
    """Whether it can be typed: a command of this program with options that it has."""
    words = shlex.split(text)
    if words[:1] != ["finetunectl"]:
        return True
    node, rest = quick.load(), words[1:]
    if rest[:1] == ["--address"]:
        rest = rest[2:]
    while rest and "commands" in node and not rest[0].startswith("-"):
        below = quick.child(node, rest.pop(0))
        if below is None:
            return False
        node = below
    end = rest.index("--") if "--" in rest else len(rest)
    options = [word for word in rest[:end] if word.startswith("--")]
    return "--help" in options or all(
        quick.option(node, word.partition("=")[0]) for word in options
    )


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_reason_leads_to_a_command_that_there_is(reason: str) -> None:
    subject = "templates/x" if reason.startswith("TEMPLATE") else "tasks/x"
    violation = PreconditionViolation(subject, reason, "No.")
    error = FailedPrecondition("no", reason=reason, violations=[violation])
    for options in (Settings(), Settings(task="a b"), Settings(template="a b")):
        command = next_command(error, options)
        assert command
        assert is_command(command), command
        assert "NAME" not in command.split(), command


@pytest.mark.parametrize("code", sorted(_errors.BY_CODE))
def test_every_code_leads_to_a_command_that_there_is(code: str) -> None:
    assert code in BY_CODE or code == "INVALID_ARGUMENT"
    command = next_command(_errors.BY_CODE[code]("no"), Settings(task="a b"))
    assert command
    assert is_command(command), command


def test_the_table_has_every_reason_of_a_state(served: Daemon) -> None:
    """A reason that the daemon gains gets a row."""
    folder = Path(__file__).parents[2] / "daemon" / "finetuned_daemon"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    reasons = set(re.findall(r'WrongState\(\s*[^,"]+,\s*"([A-Z_]+)"', text))
    assert "TASK_ACTIVE" in reasons
    assert reasons <= set(BY_REASON)


def test_without_a_daemon_it_is_to_be_started(alone: Inside) -> None:
    answer = alone("task", "list")
    assert answer.status == 3
    assert answer.next == "finetunectl daemon start"
    assert next_command(DaemonNotStarted("it ended"), Settings()) == "finetunectl daemon logs"


@pytest.mark.parametrize("is_typed", [True, False], ids=["--address", "variable"])
def test_an_address_with_nobody_behind_it_is_named(
    alone: Inside, monkeypatch: pytest.MonkeyPatch, is_typed: bool
) -> None:
    if is_typed:
        answer = alone("--address", "127.0.0.1:9", "task", "list")
        assert answer.next == "finetunectl daemon status"
    else:
        monkeypatch.setenv("FINETUNED_ADDRESS", "127.0.0.1:9")
        answer = alone("task", "list")
        assert answer.next == "env -u FINETUNED_ADDRESS finetunectl daemon status"
    assert ("--address" if is_typed else "FINETUNED_ADDRESS") in answer.err.splitlines()[-2]


def test_another_machine_without_tls_wants_its_ca(alone: Inside) -> None:
    answer = alone("--address", "192.0.2.1:50051", "task", "list")
    assert answer.status == 2
    assert answer.next == "export FINETUNED_TLS_CA=/path/to/ca.pem"


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (["taks", "list", "--json"], "finetunectl task list --json"),
        (["task", "lst"], "finetunectl task list"),
        (["task", "list", "--stat", "failed"], "finetunectl task list --state failed"),
        (["task", "list", "--stat=failed"], "finetunectl task list --state=failed"),
        (["task", "show"], "finetunectl task show --help"),
        (["train", "--model"], "finetunectl train --help"),
        (["task", "logs", "x", "--level", "loud"], "finetunectl task logs --help"),
        (["xyzzy"], "finetunectl --help"),
        (["--json", "task", "list"], "finetunectl task list --json"),
        (["--state", "failed", "task", "list"], "finetunectl task list --state failed"),
        (["task", "--json", "show", "--", "-x"], "finetunectl task show --json -- -x"),
        (["--color", "loud", "task", "list"], "finetunectl --help"),
        (["train", "-f", "missing.yaml"], "finetunectl train --help"),
        (["train", "--set", "training.batch_size=x"], "finetunectl params training.batch_size"),
        (["train", "--set", "training.batchsize=4"], "finetunectl params training"),
    ],
)
def test_what_was_mistyped_is_suggested_whole(
    alone: Inside, words: list[str], following: str
) -> None:
    answer = alone(*words)
    assert (answer.status, answer.out) == (2, "")
    is_json = "--json" in words
    assert (answer.error["next"] if is_json else answer.next) == following
    if is_json:
        assert list(answer.error) == KEYS
        assert answer.error["reason"] == "USAGE"
    else:
        assert answer.err.startswith("error: ")


def test_the_address_that_was_typed_is_in_the_command_to_type(ctl: Inside, served: Daemon) -> None:
    answer = ctl("--address", served.address, "template", "show", "nothing like it")
    assert answer.next == f"finetunectl --address {served.address} template list"


def test_a_name_that_is_nearly_right_is_suggested(ctl: Inside, scene: Scene) -> None:
    make(ctl, scene, "short answers")
    assert ctl("task", "show", "Short answer").next == "finetunectl task show 'short answers'"
    assert ctl("template", "show", "sftt").next == "finetunectl template show SFT"
    assert ctl("task", "show", "something else").next == "finetunectl task list"


def test_a_task_that_runs_is_to_be_stopped_first(ctl: Inside, scene: Scene) -> None:
    scene.play(gated=True)
    make(ctl, scene, "run a")
    ctl("task", "start", "run a")
    answer = ctl("task", "delete", "run a", "--yes")
    assert answer.status == 1
    assert answer.next == "finetunectl task stop 'run a' --wait"
    as_json = ctl("task", "delete", "run a", "--yes", "--json")
    assert list(as_json.error) == KEYS
    assert as_json.error["next"] == answer.next
    assert as_json.error["reason"] == "TASK_ACTIVE"
    assert [*as_json.error["violations"][0]] == ["subject", "type", "description"]
    assert ctl(*shlex.split(answer.next)[1:]).status == 0
    assert ctl("task", "stop", "run a").next == "finetunectl task show 'run a'"
    assert ctl("task", "resume", "run a").next == "finetunectl task show 'run a'"
    assert ctl("task", "move", "run a", "1").next == "finetunectl queue"


def test_names_that_are_taken_and_presets_that_stay(ctl: Inside, scene: Scene) -> None:
    files = make(ctl, scene, "first")
    assert ctl("task", "create", *files, "--name", "first").next == "finetunectl task list"
    ctl("template", "save", "own", "--set", "training.batch_size=4")
    again = ctl("template", "save", "own", "--set", "training.batch_size=8")
    assert again.status == 1
    assert again.next == ("finetunectl template save --update own --set training.batch_size=8")
    assert ctl(*shlex.split(again.next)[1:]).status == 0
    preset = ctl("template", "delete", "SFT", "--yes")
    assert preset.next == "finetunectl template export SFT own.yaml"
    assert ctl(*shlex.split(preset.next)[1:]).status == 0


def test_what_needs_a_yes_says_how_to_give_it(ctl: Inside, scene: Scene) -> None:
    make(ctl, scene, "dear")
    answer = ctl("task", "rm", "dear")
    assert answer.status == 2
    assert answer.next == "finetunectl task delete dear --yes"
    assert ctl(*shlex.split(answer.next)[1:]).status == 0


def test_there_is_nothing_to_watch(
    alone: Inside, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has never been started isn't waited for; what has run is shown before it."""
    with shared_daemon(tmp_path / "empty") as daemon:
        for name, value in environment_of(daemon).items():
            monkeypatch.setenv(name, value)
        assert alone("task", "watch").next == "finetunectl train --help"
        create(daemon, scene.play(), "first", "first")
        answer = alone("task", "watch", "--json")
        assert (answer.status, answer.error["reason"]) == (1, "NOT_STARTED")
        assert answer.error["next"] == "finetunectl task start first --watch"
        assert alone(*shlex.split(answer.error["next"])[1:]).status == 0
        create(daemon, scene.play(), "second", "second")
        answer = alone("task", "watch", "--json")
        assert (answer.status, answer.lines[0]["snapshot"]["task"]["name"]) == (0, "tasks/first")


def test_what_failed_is_never_suggested_again(ctl: Inside, scene: Scene) -> None:
    make(ctl, scene, "tasks/zzz")
    answer = ctl("task", "stop", "--", "tasks/zzz")
    assert answer.status == 1
    name = ctl("task", "list", "--json").json[0]["name"]
    assert answer.next == f"finetunectl task stop -- {name}"
    assert ctl("task", "stop", name).next == f"finetunectl task show {name}"


def test_a_start_may_be_told_to_detach_as_it_does(ctl: Inside, scene: Scene) -> None:
    scene.play(steps=1)
    make(ctl, scene, "detached")
    assert ctl("task", "start", "detached", "--detach", "--watch").status == 2
    answer = ctl("task", "start", "detached", "--detach", "--json")
    assert answer.json["state"] in ("TASK_STATE_QUEUED", "TASK_STATE_RUNNING")


def test_where_no_fix_is_known_it_is_an_error_with_a_next_step(ctl: Inside, scene: Scene) -> None:
    scene.play()
    make(ctl, scene, "well")
    answer = ctl("task", "fix", "well", "--json")
    assert (answer.status, answer.out, list(answer.error)) == (1, "", KEYS)
    assert answer.error["reason"] == "NO_FIX"
    assert "finds nothing that is wrong" in answer.error["message"]
    assert answer.error["next"] == ctl("task", "fix", "well").next == "finetunectl task show well"


def test_the_page_about_json_has_every_reason_of_the_command_line() -> None:
    cli = Path(quick.__file__).parent
    text = "".join(file.read_text() for file in cli.glob("*.py"))
    reasons = set(re.findall(r'reason(?:: str = |=)"([A-Z_]+)"', text))
    page = (Path(__file__).parents[2] / "docs" / "json.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `reason`"))
    assert reasons
    assert reasons <= set(re.findall(r"`([A-Z_]+)`", row))


def test_errors_have_the_codes_that_the_page_says(alone: Inside, tmp_path: Path) -> None:
    for arguments, reason in (
        (("task", "list", "--nonsense", "--json"), "USAGE"),
        (("template", "import", "missing.yaml", "--json"), "BAD_FILE"),
    ):
        error = alone(*arguments).error
        found = {error["reason"], *(one["reason"] for one in error["violations"])}
        assert reason in found, error
        assert error["code"] == "INVALID_ARGUMENT"


def test_an_error_that_no_table_knows_is_still_shown() -> None:
    assert next_command(FinetunedError("odd"), Settings()) == ""
