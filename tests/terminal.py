"""`finetunectl` on a terminal of its own, for tests."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
from pathlib import Path

CTL = str(Path(sys.executable).parent / "finetunectl")


class Terminal:
    """A command on a terminal of its own; `finetunectl` unless another program is named."""

    def __init__(
        self,
        environment: dict[str, str],
        folder: Path,
        arguments: list[str],
        program: str = CTL,
    ) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            os.chdir(folder)
            os.execve(program, [program, *arguments], {**environment, "TERM": "xterm-256color"})
        self.written = ""

    def read_until(self, text: str) -> None:
        """Reads on until the text has been written."""
        while text not in self.plain:
            assert self._read(), self.written

    def type(self, keys: bytes) -> None:
        """Types keys."""
        os.write(self._terminal, keys)

    def hang_up(self) -> None:
        """Closes the terminal's window."""
        os.close(self._terminal)

    def end(self, again: bytes = b"") -> int:
        """Reads to the end, typing these keys as long as nothing comes; the exit status."""
        while True:
            if again and not select.select([self._terminal], [], [], 1)[0]:
                self.type(again)
            elif not self._read():
                break
        os.close(self._terminal)
        return self.status()

    def status(self) -> int:
        """Waits for the exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def plain(self) -> str:
        """What was written, without colours, moves and bells."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\a", "", self.written)

    @property
    def has_cursor(self) -> bool:
        """Whether the cursor was hidden and is shown again."""
        _, hidden, after = self.written.rpartition("\x1b[?25l")
        return bool(hidden) and "\x1b[?25h" in after

    def _read(self) -> bool:
        try:
            read = os.read(self._terminal, 65536)
        except OSError:  # the child has gone
            return False
        self.written += read.decode(errors="replace")
        return bool(read)
