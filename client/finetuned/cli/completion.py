"""`finetunectl completion`: what makes a shell complete commands, options and names of tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from finetuned.cli.group import Commands
from finetuned.cli.settings import JsonOption, say

SHELLS = ("bash", "zsh", "fish")
_MARK = "# finetunectl completion"
_MADE = f"{_MARK} (made this file)"
"""Where there was no file: so an end of it takes away the file, too."""

app = typer.Typer(
    cls=Commands, help="Completion in the shell: commands, options, tasks, parameters, files."
)

ShellArgument = Annotated[
    str | None, typer.Argument(metavar="[SHELL]", help="bash, zsh or fish. [that of $SHELL]")
]


@app.command()
def bash() -> None:
    """Print the script for bash, as for: source <(finetunectl completion bash)."""
    print(_script("bash"), end="")


@app.command()
def zsh() -> None:
    """Print the script for zsh, as for: source <(finetunectl completion zsh)."""
    print(_script("zsh"), end="")


@app.command()
def fish() -> None:
    """Print the script for fish, as for: finetunectl completion fish | source."""
    print(_script("fish"), end="")


@app.command()
def install(shell: ShellArgument = None, as_json: JsonOption = False) -> None:
    """Put the script where the shell loads it, and say what was written.

    For bash and zsh this is a file and one line in .bashrc or .zshrc; for fish a file.
    """
    chosen = _chosen(shell)
    file, start = _places(chosen)
    written = [file]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_script(chosen), encoding="utf-8")
    if start is not None:
        before = _read(start)
        after = "".join(_without_ours(before))
        after += "\n" if after and not after.endswith("\n") else ""
        is_made = not start.exists() or _is_made(before)
        after += _loading(file, _MADE if is_made else _MARK)
        if after != before:
            start.parent.mkdir(parents=True, exist_ok=True)
            start.write_text(after, encoding="utf-8", errors="surrogateescape")
            written.append(start)
    _report("written", chosen, written, as_json)
    if not as_json:
        say(f"it holds in every new {chosen}; undo it: finetunectl completion uninstall {chosen}")


@app.command()
def uninstall(shell: ShellArgument = None, as_json: JsonOption = False) -> None:
    """Take away what `install` has written."""
    chosen = _chosen(shell)
    file, start = _places(chosen)
    changed: list[Path] = []
    if file.exists():
        file.unlink()
        changed.append(file)
    if start is not None:
        before = _read(start)
        after = "".join(_without_ours(before))
        if not after and _is_made(before):
            start.unlink()
            changed.append(start)
        elif after != before:
            start.write_text(after, encoding="utf-8", errors="surrogateescape")
            changed.append(start)
    if not changed and not as_json:
        say(f"nothing was installed for {chosen}")
    _report("removed", chosen, changed, as_json)


def _script(shell: str) -> str:
    return Path(__file__).with_name("shells").joinpath(f"finetunectl.{shell}").read_text("utf-8")


def _chosen(shell: str | None) -> str:
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        given = f"not {name!r}" if name else "and $SHELL names none"
        raise typer.BadParameter(f"one of {', '.join(SHELLS)}, {given}", param_hint="SHELL")
    return name


def _places(shell: str) -> tuple[Path, Path | None]:
    """Where the script goes, and the file of the shell that has to load it, if one has to."""
    home = Path.home()
    if shell == "fish":
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        return folder / "fish" / "completions" / "finetunectl.fish", None
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    file = data / "finetuned" / "completion" / f"finetunectl.{shell}"
    if shell == "zsh":
        return file, Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    return file, home / ".bashrc"


def _loading(file: Path, mark: str) -> str:
    import shlex

    path = shlex.quote(str(file))
    return f"[ -f {path} ] && . {path} {mark}\n"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return ""


def _without_ours(text: str) -> list[str]:
    ours = (f"{_MARK}\n", f"{_MADE}\n")
    return [line for line in text.splitlines(keepends=True) if not line.endswith(ours)]


def _is_made(text: str) -> bool:
    return f"{_MADE}\n" in text


def _report(word: str, shell: str, files: list[Path], as_json: bool) -> None:
    if as_json:
        from finetuned.cli.output import print_json_value

        print_json_value({"shell": shell, "files": [str(file) for file in files]})
        return
    for file in files:
        print(f"{file} {'written' if word == 'written' else 'cleaned up'}")
