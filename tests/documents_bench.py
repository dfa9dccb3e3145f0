"""A place where the blocks of a document are run: a small model, data, a HOME, a daemon."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from daemon_process import eventually
from documents import Block
from tiny import chats, make_model, write_jsonl
from tiny import documents as texts

PLACEHOLDERS = {"TASK": "sft_first", "STEP": "2", "ANOTHER": "sft_second", "RUN": "1"}
"""What a reader puts in for words in capitals. There are such tasks where a document has them."""

WITHOUT_TRAINING = frozenset(
    {"cli.md", "failures.md", "json.md", "notifications.md", "operations.md", "python.md"}
    | {"service.md", "troubleshooting.md", "ui.md"}
)
"""Documents that are not about training: their runs are the fake runner's, in milliseconds."""

_ABSOLUTE = re.compile(r"(?<![\w~.}])/(models|data|mnt)(?=/)")
_WORD = re.compile(r"(?<![\w.$/{-])(" + "|".join(PLACEHOLDERS) + r")(?![\w.=-])")


class Bench:
    """A folder with a small model and data, a HOME and state of its own; runs the blocks there."""

    def __init__(self, root: Path) -> None:
        self.programs = root / "programs"
        self.home = root / "home"
        self.work = root / "work"
        self.data = root / "data"
        for folder in (
            *(self.home / "models", self.work, self.data),
            *(root / "models", root / "mnt", self.programs),
        ):
            folder.mkdir(parents=True)
        model = make_model(root / "models/small", layers=1)
        (self.home / "models/small").symlink_to(model)
        for folder in (self.work, self.data):
            write_jsonl(folder / "chats.jsonl", chats(32))
            write_jsonl(folder / "more.jsonl", chats(16, turns=2))
            write_jsonl(folder / "texts.jsonl", texts(16))
            (folder / "text.txt").write_text("\n\n".join(t["text"] for t in texts(16)))
            lines = (folder / "chats.jsonl").read_text().splitlines()
            lines[6] = lines[6][:-2]
            (folder / "broken.jsonl").write_text("\n".join(lines) + "\n")
            (folder / "run.yaml").write_text(run_yaml())
        # Everything is installed, and a test installs nothing.
        for name in ("pip", "npm"):
            (self.programs / name).write_text("#!/bin/sh\n")
            (self.programs / name).chmod(0o755)
        stand_in = self.programs / "grpcurl"
        code = f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "grpcurl.py"} "$@"\n'
        stand_in.write_text(code)
        stand_in.chmod(0o755)
        self._root = root
        self._variables = root / "variables"
        self._python: subprocess.Popen[str] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self.environment = {
            "PATH": f"{self.programs}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "COLUMNS": "100",
            "TMPDIR": str(root),
            "FINETUNED_STATE_DIR": str(root / "state"),
            "FINETUNED_RUNTIME_DIR": str(root / "run"),
            "MODEL": str(model),
            "DATA": str(self.data / "chats.jsonl"),
            "OUT": str(root / "out"),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def prepare(self, file: Path, text: str) -> None:
        """Starts a daemon, and makes the tasks that a document takes for granted."""
        if file.name in WITHOUT_TRAINING:
            self._serve_fake_runs()
        else:
            self._call(["finetunectl", "daemon", "start"])
        text = re.sub(r"#.*", "", text)
        for word in ("TASK", "ANOTHER"):
            if re.search(rf"\b({word}{'|RUN|STEP' if word == 'TASK' else ''})\b", text):
                train = ("finetunectl", "train", "run.yaml", "--name", PLACEHOLDERS[word])
                self._call([*train, "--set", "training.max_steps=4"])
        if "--run 2" in text:
            self._call(["finetunectl", "task", "start", PLACEHOLDERS["TASK"], "--watch"])

    def _serve_fake_runs(self) -> None:
        scenario = {"steps": 4, "save_steps": 2, "eval_losses": {"2": 1.5, "4": 1.4}}
        (Path(self.environment["MODEL"]) / "scenario.json").write_text(json.dumps(scenario))
        with open(self._root / "daemon.log", "wb") as log:
            self._daemon = subprocess.Popen(
                ["finetuned", "serve", "--runner-module", "fake_runner"],
                env={**self.environment, "PYTHONPATH": str(Path(__file__).parent)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually(lambda: (self._root / "run/daemon.json").exists(), "the daemon serves", 60)

    def run(self, block: Block) -> str:
        """Runs a block; its output. Fails where it fails."""
        text = self.filled(block.text)
        return self._run_shell(block, text) if block.kind == "sh" else self._run_python(block, text)

    def filled(self, text: str) -> str:
        """With the folders and names that a reader would put in."""
        text = _ABSOLUTE.sub(lambda found: f"{self._root}/{found[1]}", text)
        return _WORD.sub(lambda found: PLACEHOLDERS[found[1]], text)

    def _run_shell(self, block: Block, text: str) -> str:
        script = self._root / "block.sh"
        script.write_text(
            f'set -a; . {shlex.quote(str(self._variables))} 2>/dev/null; cd "$PWD_OF_BLOCKS"\n'
            f"set -eo pipefail\n{text}\n"
            f"PWD_OF_BLOCKS=$PWD; export -p > {shlex.quote(str(self._variables))}\n"
        )
        return self._call(["/bin/bash", str(script)], f"{block.place}\n{text}")

    def _call(self, command: list[str], what: str = "") -> str:
        # Into a file: a daemon that is started in a block would hold a pipe open.
        with open(self._root / "output", "w+") as output:
            done = subprocess.run(
                command,
                cwd=self.work,
                env={"PWD_OF_BLOCKS": str(self.work), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=300,
            )
            output.seek(0)
            said = output.read()
        assert done.returncode == 0, f"{what or command}\nexit status {done.returncode}\n{said}"
        return said

    def _run_python(self, block: Block, text: str) -> str:
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", _INTERPRETER],
                cwd=self.work,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._python.stdin.write(json.dumps({"text": text, "place": block.place}) + "\n")
        self._python.stdin.flush()
        answer = json.loads(self._python.stdout.readline() or '{"error": "the interpreter ended"}')
        assert not answer.get("error"), f"{block.place}\n{text}\n{answer}"
        return str(answer["output"])

    def close(self) -> None:
        """Ends the interpreter, the daemon, and every process of them that is left."""
        if self._python is not None:
            assert self._python.stdin is not None
            self._python.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._python.wait(20)
            self._python.kill()
            self._python.wait()
            assert self._python.stdout is not None
            self._python.stdout.close()
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
        mine = f"FINETUNED_STATE_DIR={self.environment['FINETUNED_STATE_DIR']}"
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if f"FINETUNED_STATE_DIR={process.environ().get('FINETUNED_STATE_DIR')}" == mine:
                    process.kill()


def run_yaml() -> str:
    """The `run.yaml` at the top of the cookbook, as a reader would take it from there."""
    page = Path(__file__).parents[1] / "docs" / "cookbook.md"
    found = re.search(r"^```yaml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


@contextlib.contextmanager
def bench(root: Path) -> Iterator[Bench]:
    """A bench that is cleared at the end."""
    made = Bench(root)
    try:
        yield made
    finally:
        made.close()


_INTERPRETER = """
import ast, asyncio, contextlib, inspect, io, json, sys, traceback
namespace = {"__name__": "__main__"}
loop = asyncio.new_event_loop()
asyncio.set_event_loop(loop)
for line in sys.stdin:
    block = json.loads(line)
    output, error = io.StringIO(), ""
    try:
        code = compile(
            block["text"], block["place"], "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        with contextlib.redirect_stdout(output):
            value = eval(code, namespace)
            if inspect.iscoroutine(value):
                loop.run_until_complete(value)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps({"output": output.getvalue(), "error": error}), flush=True)
"""
