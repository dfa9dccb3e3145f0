"""How long `finetunectl` takes to answer what needs no daemon, beside a bare start of Python.

    python tests/bench/cli.py [ROUNDS]

Each is the fastest of its rounds, in turns with the others, as other work on the machine only adds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

CTL = str(Path(sys.executable).parent / "finetunectl")
LIMIT_MS = 60.0
"""For `--help` of every command, on a quiet machine."""

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -S -c pass": [sys.executable, "-S", "-c", "pass"],
    "finetunectl --help": [CTL, "--help"],
    "finetunectl task --help": [CTL, "task", "--help"],
    "finetunectl train --help": [CTL, "train", "--help"],
    "finetunectl help task start": [CTL, "help", "task", "start"],
    "finetunectl --version": [CTL, "--version"],
    "completion of a command": [CTL, "_complete", "bash", "finetunectl task sh", "=:", "9"],
    "completion of a task, no daemon": [
        CTL,
        "_complete",
        "bash",
        "finetunectl task show a",
        "",
        "9",
    ],
    "finetunectl task list, no daemon": [CTL, "task", "list"],
}


def measure(rounds: int) -> dict[str, float]:
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


def main() -> None:
    """Measure, and print a table."""
    fastest = measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    bare = fastest["python -c pass"]
    print(f"{'':<34}{'ms':>8}{'of python -c pass':>20}")
    for name, milliseconds in fastest.items():
        print(f"{name:<34}{milliseconds:8.1f}{milliseconds / bare:20.1f}")
    slow = [name for name in fastest if "help" in name and fastest[name] > LIMIT_MS]
    print(f"--help within {LIMIT_MS:g} ms: {'no: ' + ', '.join(slow) if slow else 'yes'}")


if __name__ == "__main__":
    main()
