"""What tests of `finetunectl` before a run share: files, an editor, data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiny import chats, write_jsonl

if TYPE_CHECKING:
    from conftest import Scene


def files(scene: Scene) -> list[str]:
    return ["--model", str(scene.model), "--data", str(scene.data), "--device", "cpu"]


def editor(environment: dict[str, str], folder: Path, *steps: str) -> Path:
    """Makes an editor that does one of the steps each time; where it leaves what it has seen."""
    seen = folder / "seen"
    script = folder / "editor.sh"
    counter = folder / "count"
    cases = "\n".join(f"{n}) {step} ;;" for n, step in enumerate(steps, 1))
    script.write_text(
        f"n=$(( $(cat {counter} 2>/dev/null || echo 0) + 1 )); echo $n > {counter}\n"
        f'cat "$1" >> {seen}; f="$1"\ncase $n in\n{cases}\nesac\n'
    )
    environment.pop("VISUAL", None)
    environment["EDITOR"] = f"/bin/bash {script}"
    return seen


def dataset(folder: Path, *more: str) -> Path:
    long = {"role": "assistant", "content": "word " * 300}
    data = chats(40)
    data[0]["messages"][1] = long
    path = write_jsonl(folder / "chats.jsonl", data)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in more)
    return path
