"""Memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_resident_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Not that of getrusage: it begins with the parent's, until the program was loaded.
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
