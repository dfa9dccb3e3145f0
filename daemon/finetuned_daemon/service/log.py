"""The daemon's own log file, for systems whose service manager keeps no output."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

_LOOK_SECONDS = 0.2


def show(path: Path, lines: int, *, follow: bool) -> int:
    """Prints the newest lines, all with 0, and with `follow` those that come; the exit status."""
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        print(f"finetuned: there is no log: {error}", file=sys.stderr)
        return 1
    with file:
        for line in deque(file, maxlen=lines or None):
            print(_text(line))
    if follow:
        _follow(path)
    return 0


def _follow(path: Path) -> None:
    """Goes on until Ctrl-C, through rotations."""
    file = path.open(encoding="utf-8", errors="replace")
    file.seek(0, 2)
    rest = ""
    while True:
        rest += file.read()
        *whole, rest = rest.split("\n")
        for line in whole:
            print(_text(line), flush=True)
        try:
            is_other = path.stat().st_ino != _inode(file)
        except FileNotFoundError:  # between two names
            is_other = False
        if is_other:
            file.close()
            file = path.open(encoding="utf-8", errors="replace")
        elif not whole:
            time.sleep(_LOOK_SECONDS)


def _inode(file: Any) -> int:
    return os.fstat(file.fileno()).st_ino


def _text(line: str) -> str:
    try:
        entry: Any = json.loads(line)
        return f"{entry['time']} {entry['level']:7} {entry['message']}".rstrip() + (
            f"\n{entry['exception']}" if entry.get("exception") else ""
        )
    except (ValueError, KeyError, TypeError):  # torn by a full disk
        return line.rstrip("\n")
