"""How long `finetunectl` takes to answer what needs no daemon, beside a bare start of Python.

Each is the fastest of its rounds, in turns with the others, as other work on the machine only adds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from table import Options, Part, Row

CTL = str(Path(sys.executable).parent / "finetunectl")
HELP_MS = 60.0
"""For the help of every command, on a quiet machine."""

BARE = "python -c pass"
COMMANDS = {
    BARE: [sys.executable, "-c", "pass"],
    "finetunectl --help": [CTL, "--help"],
    "finetunectl task --help": [CTL, "task", "--help"],
    "finetunectl train --help": [CTL, "train", "--help"],
    "finetunectl help task start": [CTL, "help", "task", "start"],
    "finetunectl --version": [CTL, "--version"],
    "completion of a command": [CTL, "_complete", "bash", "finetunectl task sh", "=:", "9"],
    "completion of a task, no daemon": [
        *(CTL, "_complete", "bash", "finetunectl task show a", "", "9"),
    ],
    "finetunectl task list, no daemon": [CTL, "task", "list"],
}


def run(options: Options) -> Part:
    """Measures all commands in turns."""
    fastest = _measure(2 if options.quick else 4 * options.rounds)
    part = Part("cli", "what the command line takes for what needs no daemon, to 60 ms for help")
    bare = fastest.pop(BARE)
    part.rows.append(Row(BARE, bare, "ms"))
    for name, milliseconds in fastest.items():
        part.rows.append(Row(name, milliseconds, "ms", bare, BARE))
    slowest = max((name for name in fastest if "help" in name), key=lambda name: fastest[name])
    part.rows.append(Row(f"slowest help: {slowest}", fastest[slowest], "ms", HELP_MS, "60 ms", 1.0))
    return part


def _measure(rounds: int) -> dict[str, float]:
    """Milliseconds of the fastest round of each."""
    environment = {**os.environ, "FINETUNED_RUNTIME_DIR": "/nonexistent", "COLUMNS": "100"}
    environment.pop("FINETUNED_ADDRESS", None)
    fastest = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run(command, env=environment, capture_output=True)
            fastest[name] = min(fastest[name], (time.perf_counter() - began) * 1000)
    return fastest
