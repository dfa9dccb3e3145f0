"""How often the kernel's out-of-memory killer struck, to tell its SIGKILL from anybody else's."""

from __future__ import annotations

from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_VMSTAT = Path("/proc/vmstat")


def oom_kills(
    own: Path = _OWN_CGROUPS, cgroups: Path = _CGROUPS, vmstat: Path = _VMSTAT
) -> int | None:
    """Processes killed so far for want of memory, where runners are; None: nobody can know.

    Of the daemon's own cgroup, in which its runners live too, else of the whole machine. The kernel
    counts before it kills.
    """
    for path, key in (*_counters(own, cgroups), (vmstat, "oom_kill")):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == key and count.isdecimal():
                return int(count)
    return None


def _counters(own: Path, cgroups: Path) -> list[tuple[Path, str]]:
    """Files that count for this process's cgroup, with the name of the count: version 2, then 1."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return []
    version_2, version_1 = list[tuple[Path, str]](), list[tuple[Path, str]]()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        folder = name.strip("/")
        if not controllers:
            version_2.append((cgroups / folder / "memory.events", "oom_kill"))
        elif "memory" in controllers.split(","):
            version_1.append((cgroups / "memory" / folder / "memory.oom_control", "oom_kill"))
    return version_2 + version_1
