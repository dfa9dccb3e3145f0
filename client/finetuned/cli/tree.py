"""Writes `tree.json`: what `quick.py` needs of the commands.

    python -m finetuned.cli.tree

after every change of a command, an option or a help text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer.main

from finetuned.cli.app import app
from finetuned.cli.group import summary
from finetuned.cli.quick import WIDTH, Node

FILE = Path(__file__).with_name("tree.json")


def text() -> str:
    """What the file has to hold."""
    # Help is laid out for the terminal at hand, and the file must not be.
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        tree = _node(typer.main.get_command(app), "finetunectl", None)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def _node(command: Any, name: str, parent: Any) -> Node:
    context = command.context_class(
        command, info_name=name, parent=parent, **command.context_settings
    )
    parameters = [p for p in command.get_params(context) if not getattr(p, "hidden", False)]
    node: Node = {
        "summary": summary(command),
        "help": command.get_help(context),
        "options": [_option(p) for p in parameters if p.param_type_name == "option"],
        "arguments": [
            {"kind": _kind(p), "is_many": p.nargs == -1}
            for p in parameters
            if p.param_type_name == "argument"
        ],
    }
    if hasattr(command, "commands"):
        node["commands"] = {
            word: _node(child, word, context)
            for word, child in command.commands.items()
            if not child.hidden
        }
    return node


def _option(option: Any) -> Node:
    is_flag = option.is_flag or option.count
    return {
        # Those of the help option come in any order.
        "names": sorted([*option.opts, *option.secondary_opts], key=len),
        "help": " ".join((option.help or "").split()),
        "value": "" if is_flag else option.metavar or "VALUE",
        "is_many": bool(option.multiple),
    }


def _kind(argument: Any) -> str:
    return str(argument.metavar or argument.name or "").strip("[].")


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
