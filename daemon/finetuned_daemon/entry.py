"""The command `finetuned`: says what to install where the daemon's packages are missing."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the daemon's command line; returns the exit status."""
    try:
        from finetuned_daemon.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("finetuned"):
            raise
        print(f"finetuned needs {error.name}: pip install 'finetuned[daemon]'", file=sys.stderr)
        return 1
    return run()
