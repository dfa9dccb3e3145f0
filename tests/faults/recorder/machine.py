"""A machine that a test can mislead: what is on its disk, when it was booted, what time it is.

`machine.c` is compiled when it is first wanted, and preloaded into the daemon.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from daemon_process import Daemon
from faults.registry import World

_SOURCE = Path(__file__).with_name("machine.c")


def library(world: World) -> Path:
    """The compiled library; skips the round where there can be none."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not sys.platform.startswith("linux") or compiler is None:
        world.skip("needs Linux and a C compiler")
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"finetuned-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    made = folder / f"machine-{digest}.so"
    if not made.exists():
        beside = folder / f".{made.name}.{os.getpid()}"
        subprocess.run(
            [
                *(str(compiler), "-O2", "-Wall", "-Werror", "-shared", "-fPIC"),
                *("-o", str(beside), str(_SOURCE), "-ldl"),
            ],
            check=True,
        )
        os.replace(beside, made)
    return made


class Machine:
    """What a daemon, and all that it starts, believes of the machine."""

    def __init__(self, world: World, daemon: Daemon) -> None:
        self._folder = world.root / "machine"
        self._folder.mkdir()
        self._boot_id = self._folder / "boot_id"
        self._clock = self._folder / "clock"
        self._daemon = daemon
        daemon.environment |= {
            "LD_PRELOAD": str(library(world)),
            "FAULT_BOOT_ID": str(self._boot_id),
            "FAULT_CLOCK": str(self._clock),
        }
        self.jump_to(0)
        self.reboot()

    def reboot(self) -> None:
        """Another boot id, and an empty folder for sockets. Processes are the caller's to end."""
        self._boot_id.write_text(f"{uuid.uuid4()}\n")
        shutil.rmtree(self._daemon.paths.runtime_dir, ignore_errors=True)

    def jump_to(self, seconds: float) -> None:
        """Sets the wall clock that far from the true one, at once and for all processes."""
        if not self._clock.exists():
            self._clock.write_bytes(bytes(8))
        with open(self._clock, "r+b") as file:  # in place: it is mapped
            file.write(struct.pack("<q", int(seconds * 1e9)))

    def record(self, root: Path) -> Path:
        """Has all that is written below a folder recorded; returns the file of the record."""
        log = self._folder / f"record-{time.monotonic_ns()}"
        self._daemon.environment |= {"FAULT_RECORD": str(log), "FAULT_ROOT": str(root)}
        return log

    def record_no_more(self) -> None:
        """Of daemons that are started from now on."""
        del self._daemon.environment["FAULT_RECORD"], self._daemon.environment["FAULT_ROOT"]
