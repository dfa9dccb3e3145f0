"""Help of every command: the same as the commands', and without loading them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from finetuned.cli import complete, quick, tree
from inside import Inside

# Metavars of what nobody but the user knows.
FREE = {"ADDRESS", "NAME", "N", "TOKENS", "PLACE", "ID", "COMMAND"}
PATHS = {"FILE", "DIR", "TASK|FILE", "SECTION.FIELD=VALUE"}


@pytest.fixture
def ctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inside:
    monkeypatch.setenv("COLUMNS", "100")
    return Inside(monkeypatch, capsys)


def commands(node: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for word, below in node.get("commands", {}).items():
        yield from commands(below, (*path, word))


def test_the_tree_is_that_of_the_commands() -> None:
    """If this fails: python -m finetuned.cli.tree"""
    assert tree.FILE.read_text(encoding="utf-8") == tree.text()


def test_help_of_every_command_loads_none_of_them() -> None:
    script = (
        "import json, sys, io, contextlib\n"
        "from finetuned.cli import quick\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        assert quick.answer([*words, '--help']) == 0, words\n"
        "    assert out.getvalue().startswith(' '.join(['Usage: finetunectl', *words])), words\n"
        "assert quick.answer(['--version']) == 0\n"
        "slow = {'typer', 'click', 'rich', 'grpc', 'google', 'yaml', 'inspect'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    words = json.dumps(list(commands(quick.load())))
    answer = subprocess.run([sys.executable, "-c", script, words], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["task", "start", "-h"],
        ["help", "task", "start"],
        ["task", "start", "x", "--resume", "best", "--help"],
        ["--address", "unix:/nowhere", "task", "start", "--help"],
    ],
)
def test_help_is_asked_in_many_ways(ctl: Inside, words: list[str]) -> None:
    answer = ctl(*words)
    assert answer.status == 0
    assert answer.out.startswith("Usage: finetunectl task start ")
    assert answer.err == ""


@pytest.mark.parametrize("words", [["task", "create", "--name", "--help"], ["task", "show", "--"]])
def test_what_only_looks_like_a_question_for_help_goes_to_the_command(
    ctl: Inside, words: list[str]
) -> None:
    assert quick.answer(words) is None


@pytest.mark.parametrize("words", [[], ["task"], ["--address", "unix:/nowhere", "task"]])
def test_a_group_alone_shows_its_help_on_stderr_as_status_2(ctl: Inside, words: list[str]) -> None:
    answer = ctl(*words)
    assert (answer.status, answer.out) == (2, "")
    assert answer.err.startswith("Usage: finetunectl")


def test_a_narrow_terminal_has_help_of_its_width(
    ctl: Inside, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = ctl("train", "--help").out
    monkeypatch.setenv("COLUMNS", "60")
    narrow = ctl("train", "--help").out
    assert max(map(len, wide.splitlines())) > 60
    assert max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == wide.split() or "train" in narrow


def test_every_command_takes_short_and_long_help_and_says_what_it_does() -> None:
    def check(node: dict[str, Any], path: str) -> None:
        assert node["summary"].endswith("."), path
        names = [name for one in node["options"] for name in one["names"]]
        assert "-h" in names, path
        assert len(names) == len(set(names)), path
        for one in node["options"]:
            assert one["help"], (path, one)
        for word, below in node.get("commands", {}).items():
            check(below, f"{path} {word}")

    check(quick.load(), "finetunectl")


def test_every_kind_of_value_can_be_completed_or_is_the_users_own() -> None:
    """A new metavar gets a row in `complete.py`."""

    def kinds(node: dict[str, Any]) -> Iterator[str]:
        yield from (one["value"] for one in node["options"] if one["value"])
        yield from (one["kind"] for one in node["arguments"])
        for below in node.get("commands", {}).values():
            yield from kinds(below)

    known = {*complete._WORDS, *complete._ASKED, *PATHS, *FREE}
    assert set(kinds(quick.load())) <= known


def test_other_names_of_commands_stand_for_them(ctl: Inside) -> None:
    assert ctl("task", "ls", "--help").out == ctl("task", "list", "--help").out
    assert ctl("template", "rm", "--help").out == ctl("template", "delete", "--help").out


def test_python_m_calls_itself_by_its_name() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "finetuned.cli", "task", "--nonsense"],
        capture_output=True,
        text=True,
    )
    assert answer.stderr.endswith("next: finetunectl task --help\n")
