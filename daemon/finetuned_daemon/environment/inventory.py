"""Which packages a Python has, without importing one.

A function, and a script for another Python, however old: `python -c SOURCE PACKAGE ...` prints it
as JSON. So it imports the standard library alone.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def take_inventory(names: list[str]) -> dict[str, Any]:
    """The fields of an `Inventory`: version, search path, and which of `names` are installed."""
    path = [entry for entry in sys.path if entry]  # not the folder that it was started in
    version = ".".join(str(part) for part in sys.version_info[:3])
    packages: dict[str, str] = {}
    answer = {"python": version, "path": path, "packages": packages}
    try:
        from importlib.metadata import distributions
    except ImportError:  # Python 3.7: too old in any case
        return answer
    for name in names:
        for found in distributions(name=name, path=path):
            packages[name] = str(found.version or "")  # a leftover folder holds none
            break
    return answer


if __name__ == "__main__":
    json.dump(take_inventory(sys.argv[1:]), sys.stdout)
