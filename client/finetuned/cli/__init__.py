"""`finetunectl`, the command line of the daemon. Needs the extra `cli`."""

from __future__ import annotations

import importlib.util
import os
import sys

__all__ = ["main"]

_NEEDED = ("typer", "rich", "yaml")


def main() -> None:
    """The entry point. Ends the process with one of the statuses of `settings.Exit`."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"finetunectl needs {', '.join(missing)}: pip install 'finetuned[cli]'", file=sys.stderr
        )
        sys.exit(1)
    # Remarks of grpc's core, such as on a connection that ended, would tear the live view.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from finetuned.cli.app import app

    app()
