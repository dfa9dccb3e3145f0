"""What a fork does to gRPC: its threads are not in the child, where calls would hang.

Where a stream was open at the fork, any use of gRPC in the child can end the parent as well: both
write to what they share.
"""

from __future__ import annotations

import os

from finetuned._errors import FinetunedError

# A set, as adding to it and taking from it needs no lock, which a fork could leave held.
_open = set[object]()
_was_open_at_fork = False


def stream_begins(stream: object) -> None:
    """A stream is open from now on."""
    _open.add(stream)


def stream_ends(stream: object) -> None:
    """It is not any more."""
    _open.discard(stream)


def check(pid: int) -> None:
    """Raise where what was made in that process is used in another."""
    if os.getpid() != pid:
        raise FinetunedError(
            "this client was used before the fork: make one in each process",
            reason="CLIENT_FORKED",
        )


def check_streams() -> None:
    """Raise where the process was forked while a stream was open: no client serves here."""
    if _was_open_at_fork:
        raise FinetunedError(
            "this process was forked while a watch was open; use multiprocessing's spawn",
            reason="CLIENT_FORKED",
        )


def _after_in_child() -> None:
    global _was_open_at_fork
    _was_open_at_fork = _was_open_at_fork or bool(_open)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_in_child)
