"""The command `finetuned`: says what to install where the daemon's packages are missing."""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Runs the daemon's command line; returns the exit status."""
    # What is imported stays: to look through it again and again is a tenth of the time.
    gc.disable()
    try:
        from finetuned_daemon.main import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("finetuned"):
            raise
        print(f"finetuned needs {error.name}: pip install 'finetuned[daemon]'", file=sys.stderr)
        return 1
    return run()
