"""A real systemd user manager, of a user and namespaces of its own, with units of ours alone.

Its user can change nothing but the folder that it is given: another number, a mount namespace with
a /tmp and a /run of its own, and a process namespace with which all of it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY
from daemon_process import eventually

USER = 2917
SYSTEMD = Path("/lib/systemd/systemd")
_CONTROL_GROUPS = Path("/sys/fs/cgroup")

# What the manager needs to begin, and no other unit: those of this machine have no business here.
_UNITS = {
    "default.target": "[Unit]\nDescription=d\n",
    "basic.target": "[Unit]\nDescription=b\n",
    "sockets.target": "[Unit]\nDescription=s\n",
    "shutdown.target": "[Unit]\nDescription=e\nDefaultDependencies=no\n",
    "app.slice": "[Slice]\n",
}

_SET_UP = """\
set -eu
mount -t tmpfs tmpfs /mnt
number=0
for path in "$ROOT" "$@"; do  # what its user must see
    number=$((number + 1))
    mkdir "/mnt/$number"
    mount --bind "$path" "/mnt/$number"
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/systemd /run/systemd/system
printf '%s' "$CLOSED" | while read -r folder; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
test -z "$(ls -A /tmp)"
number=0
for path in "$ROOT" "$@"; do
    number=$((number + 1))
    mkdir -p "$path"
    mount --move "/mnt/$number" "$path"
done
exec setpriv --reuid "$OWNER" --regid "$OWNER" --clear-groups --bounding-set=-all --inh-caps=-all \\
    sh -c '"$1" --user --log-target=console >"$HOME/manager.log" 2>&1 & read -r _' sh "$SYSTEMD"
"""
# The last of it is the first process of its namespace, with which all others end; it ends with the
# pipe from the tests, however they end.


def missing() -> str:
    """Why there can be none here; empty: there can."""
    if os.getuid() != 0:
        return "only root can make a user manager of its own"
    tools = ("unshare", "nsenter", "setpriv", "systemctl")
    absent = [tool for tool in tools if not shutil.which(tool)]
    if absent or not SYSTEMD.exists():
        return f"there is no {', '.join(absent) or SYSTEMD}"
    if not _bases():
        return "control groups can't be written"
    return ""


def _bases() -> list[Path]:
    """Where a control group can be made that systemd looks at: of either version, or both."""
    places = (_CONTROL_GROUPS / "systemd", _CONTROL_GROUPS / "unified", _CONTROL_GROUPS)
    return [p for p in places if (p / "cgroup.procs").exists() and os.access(p, os.W_OK)]


def _closed(paths: list[Path]) -> list[Path]:
    """Folders above these that are closed to other users, such as root's home."""
    above = {parent for path in paths for parent in path.parents}
    closed = [folder for folder in sorted(above) if not folder.stat().st_mode & 0o001]
    return [f for f in closed if not any(f.is_relative_to(other) for other in closed if other != f)]


class UserManager:
    """The manager, and commands given as its user."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.runtime = root / "r"
        self.units = self.home / ".config/systemd/user"
        self._groups = [base / f"finetuned-test-{os.getpid()}-{id(self):x}" for base in _bases()]
        self.environment = {
            "HOME": str(self.home),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "XDG_RUNTIME_DIR": str(self.runtime),
            "SYSTEMD_UNIT_PATH": str(self.units),
            "LANG": "C.UTF-8",
        }

    def start(self) -> UserManager:
        """Starts it, and waits until it can be asked."""
        self.units.mkdir(parents=True)
        self.runtime.mkdir(mode=0o700)
        for name, text in _UNITS.items():
            (self.units / name).write_text(text)
        for path in (self.root, *self.root.rglob("*")):
            os.chown(path, USER, USER)
        self.root.chmod(0o700)
        for group in self._groups:
            group.mkdir()
            for path in (group, group / "cgroup.procs"):
                os.chown(path, USER, USER)

        def enter() -> None:
            for group in self._groups:
                (group / "cgroup.procs").write_text("0")

        program = [Path(sys.base_prefix).resolve(), Path(sys.prefix), REPOSITORY]
        closed = _closed(program)
        hidden = [*closed, Path("/tmp")]  # in its place comes another
        needed = [path for path in program if any(path.is_relative_to(f) for f in hidden)]
        variables = {
            "ROOT": str(self.root),
            "OWNER": str(USER),
            "SYSTEMD": str(SYSTEMD),
            "CLOSED": "".join(f"{folder}\n" for folder in closed),
        }
        self._outer = subprocess.Popen(
            [
                *("unshare", "-m", "-p", "-f", "--mount-proc", "sh", "-c", _SET_UP, "sh"),
                *map(str, needed),
            ],
            env={**self.environment, **variables},
            preexec_fn=enter,
            stdin=subprocess.PIPE,
        )
        try:
            eventually(self._answers, "the user manager answers", 30)
        except AssertionError:
            self.close()
            raise
        return self

    def _answers(self) -> bool:
        assert self._outer.poll() is None, "the user manager has ended"
        if not (self.runtime / "systemd/private").exists():
            return False
        return self.run("systemctl", "--user", "show", "--property=Version").returncode == 0

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command beside the manager, as its user."""
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text()
        return subprocess.run(
            [
                *("nsenter", "-t", children.split()[0], "-m", "-p"),
                *("setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"),
                *("--bounding-set=-all", "--inh-caps=-all"),
                *command,
            ],
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            cwd="/",
            timeout=120,
            check=False,
        )

    def service(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`finetuned service`, as its user."""
        return self.run(sys.executable, "-m", "finetuned_daemon.main", "service", *words)

    def close(self) -> None:
        """Ends it, and all that it has started."""
        assert self._outer.stdin is not None
        self._outer.stdin.close()
        self._outer.wait(30)
        eventually(self._is_gone, "all that it has started is gone")

    def _is_gone(self) -> bool:
        for group in self._groups:
            for folder, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):  # its last process is still going
                    Path(folder).rmdir()
        return not any(group.exists() for group in self._groups)
