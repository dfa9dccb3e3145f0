"""What could stand at the place of the cursor: the answer to the shells' completion scripts.

Commands and options are those of `tree.json`. Names of tasks and the like are asked of a daemon
that runs: none is started, none is waited for, and what goes wrong leaves fewer candidates and no
word.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from finetuned.cli.quick import Node, child, load, option

FILES, FOLDERS, OPEN, PLAIN = "files", "folders", "open", "plain"
"""What the first line of an answer says: the shell itself completes paths; or nothing, or a blank,
is to follow what was completed."""
_SEPARATOR = "\t"
_SPECIAL_IN_QUOTES = '\\"$`'
"""Before which a backslash means something to bash between double quotes."""


class Candidate(NamedTuple):
    """A word that could stand there."""

    value: str
    description: str = ""


@dataclass
class Place:
    """Where the cursor stands."""

    node: Node
    """The command."""
    path: list[str] = field(default_factory=list[str])
    """Its name, such as `task`, `stop`."""
    positionals: list[str] = field(default_factory=list[str])
    """Its arguments so far."""
    used: set[str] = field(default_factory=set[str])
    """Names of its options so far."""
    address: str | None = None
    awaited: Node | None = None
    """The option whose value comes next."""
    is_plain: bool = False
    """After `--`, where nothing is an option."""


def write_candidates(arguments: Sequence[str]) -> None:
    """Write what the script of a shell asks for.

    Args:
        arguments: `bash`, the line up to the cursor and the kind of completion; or the name of
            another shell and the words up to the cursor, the last of them unfinished.
    """
    lines: list[str] = []
    try:
        if arguments[:1] == ["bash"]:
            lines = _for_bash(*arguments[1:4])
        elif arguments:
            kind, found = candidates(list(arguments[1:]))
            lines = [kind, *(_line(one) for one in found)]
    except Exception:  # noqa: BLE001 (a shell's prompt is no place for errors)
        lines = []
    sys.stdout.write("".join(f"{line}\n" for line in lines or [PLAIN]))
    sys.stdout.flush()
    # Nothing is left to write, and gRPC's threads need not be waited for.
    os._exit(0)


def candidates(words: list[str]) -> tuple[str, list[Candidate]]:
    """What could stand for the last of these words.

    Args:
        words: The words after `finetunectl`; the last is unfinished, and may be empty.

    Returns:
        What the first line says, and the candidates that begin like the word.
    """
    *before, word = words or [""]
    place = _place(before)
    head = ""
    wanted = place.awaited
    if wanted is None and word.startswith("--") and "=" in word and not place.is_plain:
        name, _, word = word.partition("=")
        wanted, head = option(place.node, name), f"{name}="
        if wanted is None:
            return PLAIN, []
    if wanted is not None:
        kind, found = _values(wanted["value"], word, place)
    elif word.startswith("-") and not place.is_plain:
        kind, found = PLAIN, _options(place)
    elif "commands" in place.node:
        commands: dict[str, Node] = place.node["commands"]
        kind, found = PLAIN, [Candidate(name, node["summary"]) for name, node in commands.items()]
    else:
        argument = _argument(place)
        kind, found = _values(argument, word, place) if argument else (PLAIN, [])
    fitting = [
        Candidate(head + value, " ".join(text.split()))
        for value, text in found
        if value.startswith(word) and value.isprintable()
    ]
    return kind, list({one.value: one for one in fitting}.values())


def _place(words: Sequence[str]) -> Place:
    place = Place(load())
    for word in words:
        if place.awaited is not None:
            if "--address" in place.awaited["names"]:
                place.address = word
            place.awaited = None
        elif word == "--" and not place.is_plain:
            place.is_plain = True
        elif word.startswith("-") and word != "-" and not place.is_plain:
            name, equals, value = word.partition("=")
            known = option(place.node, name)
            if known is not None:
                place.used.update(known["names"])
                if known["value"] and not equals:
                    place.awaited = known
                elif name == "--address":
                    place.address = value
        elif "commands" in place.node:
            below = child(place.node, word)
            if below is None and word != "help":
                return Place({"options": [], "arguments": []})
            if below is not None and (word != "help" or place.path):
                place = Place(below, [*place.path, word], address=place.address)
        else:
            place.positionals.append(word)
    return place


def _options(place: Place) -> list[Candidate]:
    options: list[Node] = place.node["options"]
    return [
        Candidate(name, one["help"])
        for one in options
        if one["is_many"] or not place.used.intersection(one["names"])
        for name in one["names"]
    ]


def _argument(place: Place) -> str:
    """Kind of the argument that comes next; empty where none does."""
    arguments: list[Node] = place.node["arguments"]
    at = len(place.positionals)
    if at < len(arguments):
        return str(arguments[at]["kind"])
    return str(arguments[-1]["kind"]) if arguments and arguments[-1]["is_many"] else ""


def _values(kind: str, word: str, place: Place) -> tuple[str, list[Candidate]]:
    """What can stand for a metavar, such as `TASK`."""
    if kind == "FILE":
        return FILES, []
    if kind == "DIR":
        return FOLDERS, []
    if kind == "TASK|FILE":
        found = _by_kind("TASK", word, place)
        return (PLAIN, found) if any(one.value.startswith(word) for one in found) else (FILES, [])
    if kind == "SECTION.FIELD=VALUE":
        return _assignments(word, place)
    return PLAIN, _by_kind(kind, word, place)


def _by_kind(kind: str, word: str, place: Place) -> list[Candidate]:
    if kind in _WORDS:
        return [Candidate(value) for value in _WORDS[kind]]
    ask = _ASKED.get(kind)
    return ask(word, place) if ask is not None else []


def _assignments(word: str, place: Place) -> tuple[str, list[Candidate]]:
    """Parameters, and after `=` their values."""
    from finetuned.cli import complete_from_daemon as daemon

    path, equals, _ = word.partition("=")
    parameters = daemon.parameters(place.address)
    if not equals:
        return OPEN, [Candidate(f"{name}=", text) for name, (text, _) in parameters.items()]
    _, values = parameters.get(path, ("", ()))
    if values == daemon.A_PATH:
        return FILES, []
    return PLAIN, [Candidate(f"{path}={value}", text) for value, text in values]


def _tasks(word: str, place: Place) -> list[Candidate]:
    from finetuned.cli import complete_from_daemon as daemon

    verb = place.path[-1] if place.path else ""
    return [Candidate(*one) for one in daemon.tasks(place.address, verb, word)]


def _templates(word: str, place: Place) -> list[Candidate]:
    from finetuned.cli import complete_from_daemon as daemon

    return [Candidate(*one) for one in daemon.templates(place.address, word)]


def _devices(_word: str, place: Place) -> list[Candidate]:
    from finetuned.cli import complete_from_daemon as daemon

    return [Candidate(*one) for one in daemon.devices(place.address)]


def _steps(_word: str, place: Place) -> list[Candidate]:
    from finetuned.cli import complete_from_daemon as daemon

    task = place.positionals[0] if place.positionals else ""
    return [Candidate(*one) for one in daemon.steps(place.address, task)]


def _sources(word: str, place: Place) -> list[Candidate]:
    return [
        Candidate("newest", "the newest whole checkpoint"),
        Candidate("best", "the one with the lowest evaluation loss"),
        *_steps(word, place),
    ]


def _paths(_word: str, place: Place) -> list[Candidate]:
    from finetuned.cli import complete_from_daemon as daemon

    return [Candidate(name, text) for name, (text, _) in daemon.parameters(place.address).items()]


def _sections_and_paths(word: str, place: Place) -> list[Candidate]:
    paths = _paths(word, place)
    sections = dict.fromkeys(one.value.partition(".")[0] for one in paths)
    return [*map(Candidate, sections), *paths]


def _states(_word: str, _at: Place) -> list[Candidate]:
    from finetuned.v1.task_pb2 import TaskState

    words = [name.removeprefix("TASK_STATE_").lower() for name, _ in TaskState.items()]
    return [Candidate(word) for word in words if word != "unspecified"]


# By the metavar of an option or an argument.
_WORDS = {
    "TYPE": ("sft", "pretrain"),
    "LEVEL": ("debug", "info", "warning", "error"),
    "FORMAT": ("yaml", "script"),
    "LANGUAGE": ("en", "zh"),
    "WHEN": ("auto", "always", "never"),
    "SHELL": ("bash", "zsh", "fish"),
}
_ASKED: dict[str, Callable[[str, Place], list[Candidate]]] = {
    "TASK": _tasks,
    "TEMPLATE": _templates,
    "DEVICE": _devices,
    "STATE": _states,
    "STEP": _steps,
    "newest|best|STEP|PATH": _sources,
    "SECTION.FIELD": _paths,
    "SECTION|FIELD": _sections_and_paths,
}


def _line(candidate: Candidate) -> str:
    value, text = candidate
    return f"{value}{_SEPARATOR}{text}" if text else value


def _for_bash(line: str, breaks: str, kind: str) -> list[str]:
    """For bash, which knows neither quoted words nor descriptions.

    Args:
        line: Up to the cursor.
        breaks: The characters at which it begins a new word.
        kind: Its `COMP_TYPE`: 37 and 42 put the candidates themselves into the line.
    """
    words, quote, start = _split(line, breaks)
    first, found = candidates(words[1:])
    if start is None:
        return [first]
    shown: list[str] = []
    for value, text in found:
        # What is typed before it stays as it is.
        quoted = _in_quote(value[start:], quote) if quote else _escaped(value[start:])
        if text and len(found) > 1 and kind not in ("37", "42"):
            quoted += f"  ({text[:60]})"
        shown.append(quoted)
    return [first, *shown]


def _split(line: str, breaks: str) -> tuple[list[str], str, int | None]:
    """The words of a line as bash reads them, and what bash would replace of the last.

    Args:
        line: Up to the cursor.
        breaks: The characters at which bash begins a new word.

    Returns:
        The words; the quote that is open in the last; and how many characters of the last stay,
        as what bash replaces begins after the open quote, or after the last of its breaks. None:
        nothing can be put there, after a quote that is closed, or in one such as `$'`.
    """
    words: list[str] = []
    word, quote, before, is_word, stays = "", "", "", False, 0
    is_beyond = is_closed = False
    characters = iter(line)
    for char in characters:
        if quote:
            if char == quote:
                quote, is_closed = "", True
            elif char == "\\" and quote == '"':
                after = next(characters, "")
                word += after if after in _SPECIAL_IN_QUOTES else char + after
            else:
                word += char
        elif char.isspace():
            if is_word:
                words.append(word)
            word, is_word, stays = "", False, 0
            is_beyond = is_closed = False
        else:
            is_word = True
            if char in "'\"":
                quote, stays = char, len(word)
                is_beyond = is_beyond or before == "$"
            elif char == "\\":
                word += next(characters, "")
            else:
                word += char
                stays = len(word) if char in breaks and char in ":=@" else stays
        before = char
    return [*words, word], quote, None if is_beyond or (is_closed and not quote) else stays


def _in_quote(value: str, quote: str) -> str:
    """The value as bash reads it within a quote that is open."""
    if quote == "'":
        return value.replace("'", r"'\''")
    escaped = "".join(f"\\{c}" if c in _SPECIAL_IN_QUOTES else c for c in value)
    # A backslash before it would stay within the quote, so it stands outside.
    return escaped.replace("!", r'"\!"')


def _escaped(value: str) -> str:
    """The value as bash reads it, with backslashes, so that what was typed stays its beginning."""
    if shlex.quote(value) == value or not value:
        return value
    safe = "_@%+=:,./-"
    return "".join(c if c.isalnum() or c in safe or ord(c) > 127 else f"\\{c}" for c in value)
