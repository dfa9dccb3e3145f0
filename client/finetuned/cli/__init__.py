"""`finetunectl`, the command line of the daemon. Needs the extra `cli`."""

from __future__ import annotations

import contextlib
import io
import os
import sys

__all__ = ["main"]

_NEEDED = ("typer", "rich", "yaml")


def main() -> None:
    """The entry point. Ends the process with one of the statuses of `settings.Exit`."""
    _open_streams()
    # Remarks of grpc's core, such as on a connection that ended, would tear the live view.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    status: str | int | None = 0
    try:
        from finetuned.cli import quick

        sys.argv[1:] = quick.expanded(sys.argv[1:])
        status = quick.answer(sys.argv[1:])
        if status is None:
            _check_needed()
            from finetuned.cli.app import app

            # Else it would be `python -m finetuned.cli` in texts, where it was started so.
            app(prog_name="finetunectl")
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    except OSError as error:  # help or version, to a full disk
        status = _unwritten(error)
    sys.exit(_flushed(status))


def _check_needed() -> None:
    import importlib.util

    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: finetunectl needs {', '.join(missing)}", file=sys.stderr)
        print("next: pip install 'finetuned[cli]'", file=sys.stderr)
        sys.exit(1)


def _open_streams() -> None:
    """Let nothing that is written fail by what the streams are.

    A closed one (`>&-`) would be None in Python, and its number given to the next file or socket.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
        elif number and isinstance(stream, io.TextIOWrapper):
            # A terminal that is not UTF-8, or a name that is not.
            stream.reconfigure(errors="backslashreplace")


def _flushed(status: str | int | None) -> str | int | None:
    """The status once all is written; Python itself would flush too late to tell."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            status = 141
        except OSError as error:  # a full disk, or a terminal that has gone
            status = status or _unwritten(error)
        else:
            continue
        # What is left in the buffer goes nowhere, rather than fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return status


def _unwritten(error: OSError) -> int:
    with contextlib.suppress(OSError):
        print(f"error: the output can't be written: {error}", file=sys.stderr, flush=True)
    return 1
