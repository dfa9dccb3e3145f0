"""Makes the pictures of the documentation anew: a daemon, tiny real models, real runs.

    .venv/bin/python docs/images/make.py

It takes some minutes. What a picture shows has happened; only the folder's name is another one.
"""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text
from svg import standalone

from finetuned import Client, Task
from finetuned.cli.settings import Settings
from finetuned.cli.ui.app import FinetunedApp

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
BIN = Path(sys.executable).parent

ROOT = Path(tempfile.gettempdir(), "ft-views")
SHOWN_ROOT = "/srv/training"
"""Stands in its place; mostly as long, so that nothing moves."""

sys.path.insert(0, str(REPOSITORY / "client/examples/howto"))


@contextmanager
def daemon() -> Iterator[Client]:
    """A daemon of its own, and a client that is closed with it."""
    os.environ["FINETUNED_STATE_DIR"] = str(ROOT / "state")
    os.environ["FINETUNED_RUNTIME_DIR"] = str(ROOT / "run")
    os.environ.pop("FINETUNED_ADDRESS", None)
    client = Client(start_daemon=True, timeout=60)
    try:
        yield client
    finally:
        for task in list(client.list_tasks(("queued", "running", "paused"))):
            client.stop_task(task.name, discard=True)
            client.wait(task.name)
        client.shutdown()
        client.close()


def parameters(name: str, **training: Any) -> dict[str, Any]:
    """What the tiny model is trained with."""
    return {
        "data": {
            "train_file": str(ROOT / "docs.jsonl"),
            "model_path": str(ROOT / "tiny"),
            "output_dir": str(ROOT / "out" / name),
            "eval_ratio": 0.05,
        },
        "training": {
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_seq_length": 128,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "max_steps": 200,
            "save_strategy": "steps",
            "save_steps": 50,
            "eval_strategy": "steps",
            "eval_steps": 20,
            **training,
        },
        "optimization": {"fp16": False, "gradient_checkpointing": False},
        "logging": {"logging_steps": 2},
    }


def create(client: Client, name: str, *, start: bool = True, **training: Any) -> Task:
    """A task that pretrains the tiny model."""
    return client.create_task(
        "pretrain",
        parameters(name.replace(" ", "-"), **training),
        display_name=name,
        device="cpu",
        start=start,
    )


def after(client: Client, task: Task, step: int) -> None:
    """Waits for a step of the run."""
    while client.get_task(task.name).progress.step < step:
        time.sleep(0.1)


def prepare() -> None:
    """The folder, the tiny model and its text."""
    from tiny_model import default_text, make_model

    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(mode=0o700)
    make_model(ROOT / "tiny", default_text(ROOT / "docs.jsonl"))
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]
    chat = json.dumps({"messages": turns})
    (ROOT / "chats.jsonl").write_text(f"{chat}\n" * 6 + "this is no JSON\n")


def write(name: str, svg: str) -> None:
    """A picture, with nothing of this machine in it."""
    text = standalone(svg.replace(str(ROOT), SHOWN_ROOT))
    for leak in (str(REPOSITORY), str(ROOT), str(Path.home()), os.uname().nodename, "http"):
        found = text.replace("http://www.w3.org", "").count(leak)
        if found:
            raise SystemExit(f"{name}: {leak!r} is in the picture")
    (HERE / f"{name}.svg").write_text(text)
    print(f"{name}.svg", flush=True)


class Terminal:
    """A command on a terminal of its own, and what stands on it in the end."""

    def __init__(self, words: list[str], width: int) -> None:
        self.words = words
        self.width = width
        self.pid, self._fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
            environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
            environment.pop("NO_COLOR", None)
            os.execve(BIN / words[0], words, environment)  # noqa: S606
        self._written = ""

    def read(self, until: Callable[[list[str]], bool] | None = None) -> list[str]:
        """The lines once they are so; without `until`, once the command has ended."""
        while until is None or not until(self._lines()):
            if not select.select([self._fd], [], [], 300)[0]:
                raise SystemExit(f"{self.words}: nothing came\n{self._written}")
            try:
                data = os.read(self._fd, 65536)
            except OSError:  # the command has ended
                data = b""
            if not data:
                break
            self._written += data.decode()
        return self._lines()

    def end(self) -> None:
        """Ctrl-C, and its end."""
        os.write(self._fd, b"\x03")
        self.read()
        os.waitpid(self.pid, 0)

    def _lines(self) -> list[str]:
        """Lines with their colours. Moves are those of a live view: whole lines, up and down."""
        lines, row = [""], 0
        for part in re.split(r"(\r\n|\n|\r|\x1b\[\d*[A-LK]|\x1b\[\?\d+[hl])", self._written):
            if part in ("\n", "\r\n"):
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part.endswith("A") and part.startswith("\x1b["):
                row = max(row - int(part[2:-1] or 1), 0)
            elif part == "\r" or part.endswith("K"):
                if part != "\r":
                    lines[row] = ""
            elif part and not part.startswith("\x1b[?"):
                lines[row] += part
        return lines


def picture(name: str, words: list[str], lines: list[str], width: int) -> None:
    """What stands on the terminal, below the command that was typed."""
    console = Console(
        record=True,
        width=width,
        file=io.StringIO(),
        force_terminal=True,
    )
    while lines and not Text.from_ansi(lines[-1]).plain.strip():
        lines.pop()
    console.print(Text.assemble(("$ ", "green"), shlex.join(words)), soft_wrap=True)
    for line in lines:
        whole = Text.from_ansi(line)
        for part in whole.divide(range(width, len(whole), width)):  # as a terminal breaks it
            console.print(part, soft_wrap=True)
    console.print()  # the frame cuts off what is below the last line, such as underscores
    write(name, console.export_svg(title=words[0], theme=DIMMED_MONOKAI))


def command(name: str, words: list[str], width: int = 100) -> None:
    """A command that ends by itself."""
    terminal = Terminal(words, width)
    lines = terminal.read()
    os.waitpid(terminal.pid, 0)
    picture(name, words, lines, width)


def live(name: str, words: list[str], shows: str, width: int = 100) -> None:
    """A live view, at the moment when it first shows this."""
    terminal = Terminal(words, width)
    wanted = re.compile(shows)

    def is_there(lines: list[str]) -> bool:
        return bool(wanted.search(Text.from_ansi("\n".join(lines)).plain))

    picture(name, words, terminal.read(is_there), width)
    terminal.end()


async def view(
    name: str, task: Task, step: int, size: tuple[int, int], keys: str = "", *, light: bool = False
) -> None:
    """`finetunectl ui`, once a task has come so far."""
    app = FinetunedApp(Settings(), light=light)
    async with app.run_test(size=size) as pilot:
        while task.name not in app.table.tasks:
            await pilot.pause(0.05)
        app.table.choose(task.name)
        while (
            app.watched is None
            or app.watched.task.name != task.name
            or app.watched.curves.last_step < step
            or not app.devices.devices
        ):
            await pilot.pause(0.05)
        await pilot.press(*keys)
        await pilot.pause(2.5)  # the devices, once more
        write(name, app.export_screenshot(title="finetunectl ui"))


def main() -> None:
    """All pictures."""
    prepare()
    with daemon() as client:
        client.system_info()
        refused = ["finetunectl", "train", "--model", "models/smol", "--data", "chats.jsonl"]
        command("train-refused", [*refused, "--set", "training.batch_size=0"], 110)
        done = create(client, "docs lr 1e-3", learning_rate=1e-3, max_steps=100)
        client.wait(done.name)
        killed = create(client, "docs baseline", max_steps=2000)
        after(client, killed, 20)
        os.kill(next(iter(client.list_runs(killed.name))).pid, signal.SIGKILL)
        client.wait(killed.name)
        stopped = create(client, "docs one more epoch", max_steps=2000)
        after(client, stopped, 30)
        client.stop_task(stopped.name)
        client.wait(stopped.name)
        running = create(client, "docs lr 3e-3", max_steps=600)
        create(client, "docs lr 1e-2", learning_rate=1e-2)
        create(client, "docs long context", max_seq_length=256)
        create(client, "docs draft", start=False)
        live("task-watch", ["finetunectl", "task", "watch", running.display_name], r" 8\d/600")
        command("task-list", ["finetunectl", "task", "list"])
        asyncio.run(view("ui", running, 150, (120, 40)))
        asyncio.run(view("ui-80x24", running, 150, (80, 24)))
        asyncio.run(view("ui-light", running, 150, (120, 40), "3", light=True))
    shutil.rmtree(ROOT)


if __name__ == "__main__":
    main()
