"""Reads JSON that others wrote, in bounded memory: 64 MB of it may make objects of gigabytes."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 << 20
"""Bytes. The largest tokenizer.json that models bring has some 35 million."""

_MOST_CONTAINERS = 2_000_000
"""Objects and arrays. A tokenizer of 262,000 words has 514,000: each merge is an array."""
_MOST_ITEMS = 8_000_000
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class NotJson(ValueError):
    """What is there is no JSON that anybody needs; the message says why."""


def check_extent(data: bytes) -> None:
    """Raises NotJson where a text would take gigabytes as values."""
    if data.count(b"{") + data.count(b"[") > _MOST_CONTAINERS or data.count(b",") > _MOST_ITEMS:
        raise NotJson("it holds too many values")


def parse_json(data: bytes) -> Any:
    """The value.

    Raises:
        NotJson: It is no JSON, is nested too deep, or would take gigabytes.
    """
    check_extent(data)
    try:
        value = json.loads(data)
        if _SURROGATE.search(data):  # halves of characters, which nothing can write down
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise NotJson("it is nested too deep") from None
    except ValueError as error:  # also bytes that are no UTF-8, and a number of thousands of digits
        raise NotJson(str(error)) from None


def read_json_file(path: Path) -> Any:
    """The value in a file.

    Raises:
        NotJson: As above, or it is no ordinary file, or too large.
        OSError: It can't be read.
    """
    # A pipe would be waited for. What grows while it is read, or has a size that lies, ends too.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotJson("it is no ordinary file")
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise NotJson(f"it is larger than {LARGEST_JSON >> 20} MiB")
    return parse_json(data)
