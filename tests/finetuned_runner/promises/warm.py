"""Forks a runner process for each run folder that it is told of, with the imports already done.

    python warm.py      a JSON object a line on stdin: folder, and the cut that ends the run

A process started anew costs seconds of imports. One forked from here runs the very module that
`python -m finetuned_runner` runs, in a session of its own, and can be cut off at a certain point,
for which no test could wait from outside.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

from finetuned_daemon.runs.contract import CONTROL, EVENTS, Control, StopWish, write_record


def cut(folder: Path, how: str, at: int) -> None:
    """Ends this process, or asks it to stop, when `at` optimizer steps are done here.

    Args:
        folder: The run folder.
        how: `stop`, by a wish at the step's end; `stop_within`, by one while the next step is
            computed; `kill`, by SIGKILL before anything else is done; `kill_saving`, by SIGKILL
            when the next checkpoint is about to take its name.
        at: Steps of this process alone.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done = 0

    def step(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == at and how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif done == at and how == "stop":
            stop()
        elif done == at and how == "stop_within":
            register_module_forward_pre_hook(stop)

    def stop(*_: Any) -> None:
        if not (folder / CONTROL).exists():
            write_record(folder / CONTROL, Control(stop=StopWish.SAVE))
        while "STOPPING" not in (folder / EVENTS).read_text():
            time.sleep(0.01)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if (
            event == "os.rename"
            and done >= at
            and Path(arguments[1]).name.startswith("checkpoint-")
        ):
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(step)
    if how == "kill_saving":
        sys.addaudithook(audit)


def run(folder: Path, how: str, at: int) -> None:
    """Becomes the runner of a folder; comes never back."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    console = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(console, 1)
    os.dup2(console, 2)
    if how:
        cut(folder, how, at)
    sys.argv[1:] = [str(folder)]
    runpy.run_module("finetuned_runner", run_name="__main__", alter_sys=True)


def main() -> None:
    """Forks for each line; says the process id."""
    for package in ("datasets", "bitsandbytes"):  # as the runner does before it imports torch
        sys.modules[package] = None  # type: ignore[assignment]
    for package in ("sft", "pretrain"):
        importlib.import_module(f"finetuned_runner.{package}")
    gc.freeze()  # what is shared is not looked through, and so stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # they are nobody's zombies
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                run(Path(order["folder"]), order["how"], order["at"])
            finally:
                os._exit(1)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
