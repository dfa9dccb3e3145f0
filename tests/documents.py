"""The documents as programs: their blocks, and what is wrong with them unrun.

    ```sh         is run, from top to bottom with `bash -e`; variables last to the end of the file
    ```python     is run; the blocks of a file share one namespace; `await` may be used
    ```sh notest  is not run: a comment `<!-- notest: why -->` before it says why
    ```console    shows a session: lines behind `$ ` are commands; with `notest` they may be wrong

A block of commands that belong to another place (`make`, `pip`, `sudo` ...) is not run either, nor
is one with `finetuned serve`, which would not end. What is not run is still parsed, and each
`finetunectl`, `finetuned` and `make` in it must be a command that there is, with these options.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conftest import REPOSITORY

KINDS = frozenset(
    {"", "sh", "python", "console", "text", "yaml", "json", "toml", "ini", "diff", "proto", "xml"}
    | {"ts", "typescript", "js", "javascript", "go", "rust", "csharp", "java", "promql", "http"}
)
"""What may stand behind ```; anything else is a slip."""

ELSEWHERE = frozenset(
    {"make", "sudo", "pip", "npm", "npx", "git", "docker", "systemctl", "loginctl", "journalctl"}
    | {"launchctl", "schtasks", "brew", "apt-get", "source", "cargo", "go", "dotnet"}
)
"""Commands that belong to another place than a reader's shell beside a daemon."""

_FENCE = re.compile(r"^( *)(`{3,})([^`]*)$")
_BLOCK = re.compile(r"^( *)(`{3,})[^`]*$.*?^ *\2 *$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    file: Path
    line: int
    """Of its first line of content."""
    kind: str
    text: str
    is_marked: bool
    """Whether `notest` is behind its kind."""
    why: str
    """Why it is not run, as the comment before it says."""

    @property
    def place(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.kind in ("sh", "python") and not self.is_marked and not self.is_elsewhere

    @property
    def is_elsewhere(self) -> bool:
        """Whether all its commands belong to another place, or one serves until it is ended."""
        if self.kind != "sh":
            return False
        found = commands(self.text)
        return all(command[0] in ELSEWHERE for command in found) or any(
            command[:2] == ["finetuned", "serve"] for command in found
        )


def documents() -> list[Path]:
    """The documents whose blocks are run."""
    return [
        REPOSITORY / "README.md",
        *sorted((REPOSITORY / "docs").glob("*.md")),
        REPOSITORY / "proto/README.md",
    ]


def all_documents() -> list[Path]:
    """All documents, those of the parts too."""
    parts = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
    more = ("client/node/README.md", "client/examples/howto/README.md")
    return [*documents(), *(f for p in (*parts, *more) if (f := REPOSITORY / p).is_file())]


def blocks(file: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    found = list[Block]()
    lines = file.read_text().splitlines()
    number = 0
    before = ""
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        number += 1
        if fence is None:
            if lines[number - 1].strip():
                before = lines[number - 1].strip()
            continue
        indent, ticks, info = fence.groups()
        start = number
        while lines[number].strip() != ticks:
            number += 1
        text = "\n".join(line.removeprefix(indent) for line in lines[start:number]) + "\n"
        words = info.split()
        comment = re.fullmatch(r"<!-- notest: (.+) -->", before)
        found.append(
            Block(
                file=file,
                line=start + 1,
                kind=words[0] if words else "",
                text=text,
                is_marked="notest" in words,
                why=comment[1] if comment else "",
            )
        )
        number += 1
        before = ""
    return found


# --- unrun


def faults(block: Block) -> list[str]:
    """What is wrong with a block, as far as can be told without running it."""
    wrong = list[str]()
    if block.kind not in KINDS:
        wrong.append(f"{block.kind!r} is no kind of block; there are {sorted(KINDS)}")
    if block.is_marked and not block.why and not block.is_elsewhere:
        wrong.append("is not run, and no comment <!-- notest: why --> before it says why")
    try:
        match block.kind:
            case "sh":
                _check_shell(block.text)
                wrong += command_faults(block.text)
            case "console" | "" if not block.is_marked:
                for line in block.text.splitlines():
                    if line.startswith("$ "):
                        wrong += command_faults(line[2:])
            case "python":
                _compiled(block.text, block.place)
            case "json":
                _check_json(block.text)
            case "yaml":
                list(yaml.safe_load_all(block.text))
            case "toml":
                tomllib.loads(block.text)
            case _:
                pass
    except (ValueError, SyntaxError, yaml.YAMLError) as error:
        wrong.append(str(error))
    return wrong


def _check_shell(text: str) -> None:
    looked = subprocess.run(
        ["/bin/bash", "-n"], input=text, capture_output=True, text=True, check=False
    )
    if looked.returncode:
        raise ValueError(looked.stderr)


def _check_json(text: str) -> None:
    """One value, or a value a line."""
    try:
        json.loads(text)
    except ValueError:
        for line in filter(str.strip, text.splitlines()):
            json.loads(line)


def commands(text: str) -> list[list[str]]:
    """The simple commands of shell text, as words; assignments before them are left out."""
    found = list[list[str]]()
    text = re.sub(r"\\\n\s*", " ", text)
    # What is substituted is a command of its own.
    inner = re.findall(r"\$\(([^()]*)\)", text)
    for line in [*text.splitlines(), *inner]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a quotation over several lines
            continue
        command = list[str]()
        for token in [*tokens, ";"]:
            if set(token) <= set("|&;()"):
                while command and re.fullmatch(r"\w+=.*|if|then|do|while|else|!|time", command[0]):
                    command.pop(0)
                if command:
                    found.append(command)
                command = []
            else:
                command.append(token)
    return found


def command_faults(text: str) -> list[str]:
    """Commands and options of ours in shell text that there are not."""
    wrong = list[str]()
    for command in commands(text):
        name = Path(command[0]).name
        if name == "make":
            targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
            wrong += [
                f"make has no target {word!r}"
                for word in command[1:]
                if not word.startswith("-") and "=" not in word and word not in targets
            ]
        elif name in ("finetunectl", "finetuned"):
            fault = _fault_of(name, command[1:])
            if fault:
                wrong.append(f"{shlex.join(command)}: {fault}")
        elif name == "grpcurl":
            calls = [word for word in command if re.fullmatch(r"finetuned\.v1\.\w+/\w+", word)]
            wrong += [f"there is no {call}" for call in calls if call not in _methods()]
    return list(dict.fromkeys(wrong))


def inline_commands_faults(file: Path) -> list[str]:
    """The same of code within sentences."""
    text = re.sub(_BLOCK, "", file.read_text())
    spans = re.findall(r"`((?:finetunectl|finetuned|make) [^`]+)`", text)
    return [fault for span in spans for fault in command_faults(span.replace("\\|", "|"))]


@dataclass(frozen=True)
class _Command:
    options: dict[str, bool]
    """By name: whether a value follows."""
    children: dict[str, Any]
    """Subcommands, each to be looked at on demand."""


def _fault_of(program: str, words: list[str]) -> str:
    here = _programs()[program]
    options = dict(here.options)
    rest = iter(words)
    for word in rest:
        if word in (">", ">>", "<"):
            next(rest, None)
        elif word == "--set" or word.startswith("--set="):
            path = (word.partition("=")[2] or next(rest, "")).partition("=")[0]
            if path not in parameter_paths():
                return f"there is no parameter {path}"
        elif word == "--":
            break
        elif word.startswith("-") and len(word) > 1:
            name, has_value, _ = word.partition("=")
            if name not in options:
                return f"there is no option {name}"
            if options[name] and not has_value:
                next(rest, None)
        elif here.children:
            word = _aliases().get(word, word)
            if word not in here.children:
                return f"there is no command {word!r}; there are {sorted(here.children)}"
            here = here.children[word]
            options |= here.options
    return ""


@functools.cache
def parameter_paths() -> frozenset[str]:
    """Paths of all parameters."""
    from finetuned_daemon.parameters.models import SECTIONS

    return frozenset(f"{name}.{field}" for name, s in SECTIONS.items() for field in s.model_fields)


def _aliases() -> dict[str, str]:
    from finetuned.cli.quick import ALIASES

    return ALIASES


@functools.cache
def _methods() -> frozenset[str]:
    from finetuned.v1 import (
        dataset_service_pb2,
        parameter_service_pb2,
        system_service_pb2,
        task_service_pb2,
        template_service_pb2,
    )

    files = (dataset_service_pb2, parameter_service_pb2, system_service_pb2)
    return frozenset(
        f"{service.full_name}/{method.name}"
        for file in (*files, task_service_pb2, template_service_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    )


@functools.cache
def _programs() -> dict[str, _Command]:
    import typer.main

    from finetuned.cli.app import app
    from finetuned_daemon import main

    made = main._parser()
    parser = made[0] if isinstance(made, tuple) else made
    return {
        "finetunectl": _of_typer(typer.main.get_command(app)),
        "finetuned": _of_argparse(parser),
    }


def _of_typer(command: Any) -> _Command:
    options = {"--help": False, "-h": False}
    for parameter in command.params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            if name.startswith("-"):
                options[name] = not getattr(parameter, "is_flag", False)
    children = {name: _of_typer(one) for name, one in getattr(command, "commands", {}).items()}
    return _Command(options, children)


def _of_argparse(parser: Any) -> _Command:
    options = dict[str, bool]()
    children = dict[str, Any]()
    for action in parser._actions:
        for name in action.option_strings:
            options[name] = action.nargs != 0
        if not action.option_strings and isinstance(action.choices, dict):
            children = {name: _of_argparse(one) for name, one in action.choices.items()}
    return _Command(options, children)


def _compiled(text: str, place: str) -> Any:
    return compile(text, place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


# --- links


def anchors(file: Path) -> set[str]:
    """The anchors of a document, as GitHub makes them of headings; and those made by hand."""
    text = re.sub(_BLOCK, "", file.read_text())
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    seen = dict[str, int]()
    for heading in re.findall(r"^#{1,6} +(.*?)(?: +#+)?$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        number = seen.get(slug, 0)
        seen[slug] = number + 1
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(file: Path) -> list[str]:
    """Relative links that lead nowhere."""
    broken = list[str]()
    text = re.sub(_BLOCK, "", file.read_text())
    text = re.sub(r"(`+).+?\1", lambda code: code[0] if "](" in code[0] else "code", text)
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)|src=\"([^\"]+)\"", text):
        link = target[0] or target[1]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        aim = (file.parent / path).resolve() if path else file
        if not aim.exists():
            broken.append(link)
        elif anchor and aim.suffix == ".md" and anchor not in anchors(aim):
            broken.append(f"{link} (no such heading)")
    return broken
