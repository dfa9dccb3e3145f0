"""Help, version and completion, answered without loading the commands.

The framework of the command line takes 50 ms to load and the commands 80 more. What these three
need stands in `tree.json`, which `python -m finetuned.cli.tree` writes and a test holds equal to
the commands. Whatever is not answered here goes the long way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

Node = dict[str, Any]
"""A command: `help`, `summary`, `options`, `arguments`, and `commands` where it is a group."""

ALIASES = {"ls": "list", "rm": "delete"}
"""Other names of commands, where a group has the command and none of that name."""
WIDTH = 80
"""Of a terminal, from which on help is always laid out the same."""
COMPLETE = "_complete"
"""The command that the shells' scripts ask for completions."""


def answer(arguments: Sequence[str]) -> int | None:
    """Write what is asked for, and return the exit status; None: the commands have to see to it."""
    if arguments[:1] == [COMPLETE]:
        from finetuned.cli.complete import write_candidates

        write_candidates(arguments[1:])
        return 0
    if not _is_wide():
        return None
    text = _wanted(load(), arguments)
    if text is None:
        return None
    # Without any word it is no answer to a question, and so no answer on stdout.
    if "--help" in arguments or "-h" in arguments or "--version" in arguments:
        print(text)
        return 0
    print(text, file=sys.stderr)
    return 2


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with `help COMMAND` as `COMMAND --help`."""
    words = list(arguments)
    if words[:1] == ["help"] and not any(word.startswith("-") for word in words):
        return [*words[1:], "--help"]
    return words


def load() -> Node:
    """The tree of commands."""
    import json

    # pathlib alone takes as long as the rest of this.
    with open(f"{__file__.removesuffix('quick.py')}tree.json", "rb") as file:
        root: Node = json.load(file)
    return root


def child(node: Node, word: str) -> Node | None:
    """The command of that name, or alias, in a group."""
    commands: dict[str, Node] = node.get("commands", {})
    return commands.get(word) or commands.get(ALIASES.get(word, ""))


def option(node: Node, name: str) -> Node | None:
    """The option of that name, such as `--json`."""
    options: list[Node] = node["options"]
    return next((one for one in options if name in one["names"]), None)


def _wanted(node: Node, arguments: Sequence[str]) -> str | None:
    """The text that these arguments ask for, read as the commands would read them."""
    is_empty = True
    words = iter(arguments)
    for word in words:
        if word == "--":
            return None
        if not word.startswith("-") or word == "-":
            if "commands" not in node:
                continue
            found = child(node, word)
            if found is None:
                return None
            node, is_empty = found, True
            continue
        is_empty = False
        name, equals, _ = word.partition("=")
        known = option(node, name)
        if known is None:
            return None
        if name in ("--help", "-h"):
            return str(node["help"])
        if name == "--version":
            from finetuned._version import __version__

            return f"finetunectl {__version__}"
        if known["value"] and not equals and next(words, None) is None:
            return None
    return str(node["help"]) if "commands" in node and is_empty else None


def _is_wide() -> bool:
    try:
        columns = int(os.environ.get("COLUMNS", "0"))
    except ValueError:
        columns = 0
    if columns <= 0:
        try:
            columns = os.get_terminal_size(sys.__stdout__.fileno() if sys.__stdout__ else 1).columns
        except (OSError, ValueError):
            return True  # no terminal
    return columns <= 0 or columns >= WIDTH
