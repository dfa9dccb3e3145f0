"""What `--json` writes is what docs/json.md says, command by command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor

from conftest import Scene
from daemon_process import Daemon
from finetuned.cli import quick
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)
from inside import Inside, create, environment_of, shared_daemon
from tiny import chats, make_model, write_jsonl

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
MESSAGES: dict[str, Descriptor] = {
    name: message
    for module in (
        dataset_service_pb2,
        parameter_service_pb2,
        system_service_pb2,
        task_pb2,
        task_service_pb2,
        template_service_pb2,
    )
    for name, message in module.DESCRIPTOR.message_types_by_name.items()
}
RUN_LINES = {"snapshot", "event", "connection_lost", "log_replaced"}


@pytest.fixture(scope="module")
def promised() -> dict[str, str]:
    """Rows of the page: command to what it writes."""
    text = PAGE.read_text(encoding="utf-8").partition("## Errors")[0]
    rows = re.findall(r"^\| `([a-z -]+)` \| (.+) \|$", text, re.M)
    return dict(rows)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@pytest.fixture(scope="module")
def stage(root: Path) -> Iterator[Scene]:
    """One scene for all: the daemon's tasks outlive a test."""
    scene = Scene(root / "scene")
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Daemon]:
    with shared_daemon(root / "daemon") as daemon:
        yield daemon


@pytest.fixture
def ctl(
    served: Daemon,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Inside:
    for name, value in environment_of(served).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(root))
    for name in ("FINETUNED_ADDRESS", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return Inside(monkeypatch, capsys)


def fields(name: str) -> tuple[set[str], set[str]]:
    """Names of fields that are always there, and of those that may be."""
    message = MESSAGES[name]
    optional = {field.name for field in message.fields if field.has_presence}
    return {field.name for field in message.fields} - optional, optional


def check(content: Any, shape: str) -> None:
    """Hold JSON against a shape of the page, such as `[Task]`, `{a, b?}` or `Task`."""
    if shape.startswith("["):
        assert isinstance(content, list)
        assert content, "nothing to look at"
        for item in content:
            check(item, shape[1:-1])
        return
    assert isinstance(content, dict)
    if shape.startswith("{"):
        names = [name.strip() for name in shape[1:-1].split(",") if name.strip()]
        always = {name for name in names if not name.endswith("?")}
        optional = {name[:-1] for name in names if name.endswith("?")}
    else:
        always, optional = fields(shape)
    assert always <= set(content) <= always | optional


def shapes(row: str) -> list[str]:
    """The shapes that a row names, in their order."""
    return re.findall(r"`((?:\[|\{|[A-Z])[^`]*)`", row)


def test_the_page_has_every_command_that_writes_json(promised: dict[str, str]) -> None:
    def writers(node: dict[str, Any], path: str = "") -> Iterator[str]:
        if "commands" not in node and quick.option(node, "--json"):
            yield path.strip()
        for word, below in node.get("commands", {}).items():
            yield from writers(below, f"{path} {word}")

    assert set(promised) == set(writers(quick.load()))


def test_every_message_of_the_page_is_in_the_contract(promised: dict[str, str]) -> None:
    for row in promised.values():
        for name in re.findall(r"`\[?([A-Z]\w+)\]?`", row):
            assert name in MESSAGES, name


def test_commands_about_tasks(ctl: Inside, stage: Scene, promised: dict[str, str]) -> None:
    def look(command: str, *words: str, shape: int = 0, status: int = 0) -> Any:
        answer = ctl(*command.split(), *words, "--json")
        assert answer.status == status, answer.err
        check(answer.json, shapes(promised[command])[shape])
        return answer.json

    files = ["--model", str(stage.model), "--data", str(stage.data), "--device", "cpu"]
    stage.play(steps=2, save_steps=1)
    look("task create", *files, "--name", "one")
    look("task list")
    look("task show", "one")
    look("task edit", "one", "--set", "optimization.fp16=false")
    look("task start", "one")
    lines = ctl("task", "watch", "one", "--json").lines
    assert {key for line in lines for key in line} <= RUN_LINES
    assert all(len(line) == 1 for line in lines)
    assert {*lines[0]} == {"snapshot"}
    check(lines[0]["snapshot"], "Snapshot")
    assert all({*line} == {"event"} for line in ctl("task", "logs", "one", "--json").lines)
    look("task checkpoints", "one")
    look("task export-config", "one")
    look("task delete-checkpoint", "one", "2", "--yes")

    stage.play(gated=True)
    look("train", *files, "--name", "two", "--detach")
    look("task create", *files, "--name", "three")
    look("task start", "three")
    look("task move", "three", "1")
    queue = look("queue")
    check(queue[0]["tasks"], "[Task]")
    look("task pause", "three")
    look("task resume", "three")
    look("task stop", "three")
    look("task stop", "two", "--wait")
    look("task delete", "two", "--yes")

    stage.play(fail={"step": 1, "reason": "DEVICE_OUT_OF_MEMORY", "above": 2})
    large = ("--set", "training.batch_size=8")
    assert ctl("train", *files, *large, "--name", "large", "--json").status == 1
    look("task fix", "large", "--yes")
    stage.play(exit=[1, 7])
    assert ctl("train", *files, "--name", "bad", "--json").status == 1
    answer = ctl("task", "fix", "bad", "--yes", "--json")
    assert (answer.status, answer.out, answer.error["reason"]) == (1, "", "NO_FIX")


def test_commands_about_parameters_and_data(
    ctl: Inside, stage: Scene, root: Path, promised: dict[str, str]
) -> None:
    files = ["--model", str(stage.model), "--data", str(stage.data), "--device", "cpu"]
    # An estimate and an inspection want a tokenizer that is one.
    real = make_model(root / "model")
    data = write_jsonl(root / "real.jsonl", chats(6))
    whole = ["--model", str(real), "--data", str(data), "--device", "cpu"]
    answer = ctl("check", *files, "--json")
    check(answer.json, "{valid, violations}")
    fixed = ctl("check", *files, "--fix", "--json")
    check(
        fixed.json,
        "{valid, violations, parameters, training_type?, display_name?, device?, template?}",
    )
    assert "`parameters`, `training_type?`" in promised["check"]
    for command, words, shape in (
        ("estimate", whole, 0),
        ("dataset inspect", [str(data), "--model", str(real)], 0),
        ("params", [], 0),
        ("params", ["lora"], 1),
        ("params", ["training.batch_size"], 2),
        ("template list", [], 0),
        ("template show", ["SFT"], 0),
        ("template save", ["own", "--set", "training.batch_size=4"], 0),
    ):
        answer = ctl(*command.split(), *words, "--json")
        assert answer.out, answer.err
        check(answer.json, shapes(promised[command])[shape])
    assert ctl("template", "export", "own", "own.yaml").status == 0
    imported = ctl("template", "import", "own.yaml", "--name", "again", "--json")
    check(imported.json, shapes(promised["template import"])[0])
    assert ctl("template", "delete", "own", "--yes", "--json").json == {}


def test_commands_about_the_machine(
    ctl: Inside, root: Path, served: Daemon, promised: dict[str, str]
) -> None:
    for command, words in (
        ("device list", []),
        ("daemon start", []),
        ("daemon status", []),
        ("support-bundle", ["--yes", "--output", str(root / "bundle.tar.gz")]),
        ("completion install", ["fish"]),
        ("completion uninstall", ["fish"]),
    ):
        answer = ctl(*command.split(), *words, "--json")
        assert answer.status == 0, answer.err
        check(answer.json, shapes(promised[command])[0])
    for line in ctl("daemon", "logs", "--json").lines:
        assert {"time", "level", "message"} <= set(line)


def test_a_watched_list_writes_the_lines_of_the_page(
    served: Daemon, stage: Scene, promised: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetuned._errors import DaemonUnavailable
    from finetuned._overview import TaskDeleted, TasksSynced
    from finetuned._watch import ConnectionLost
    from finetuned.cli import board

    task = create(served, stage.play(), "listed", "listed")
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(board, "print_json_line", lines.append)
    lost = ConnectionLost(DaemonUnavailable("away"))
    items = [task, TaskDeleted(task.name), TasksSynced(1), lost]
    board.watch_board(items, board.TaskBoard(), as_json=True)
    named = [shape.strip("{}") for shape in shapes(promised["task list"])[1:]]
    assert [*map(list, lines)] == [[name] for name in named]
    json.dumps(lines)
