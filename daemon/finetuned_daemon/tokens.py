"""The tokens that TCP demands: two files, read again whenever they change."""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import stat
from pathlib import Path

from finetuned._paths import Paths
from finetuned_daemon import logs
from finetuned_daemon.privacy import FolderUnsafe
from finetuned_daemon.runs.contract import sync_dir

_log = logging.getLogger(__name__)

SHORTEST = 32
"""Characters that a token has at least; ours have 43, 256 random bits."""
_LONGEST = 1024


def write_token(path: Path) -> None:
    """Puts a new token in place of what is there, at once and as a whole."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_urlsafe(32).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def read_token(path: Path) -> bytes:
    """The token in a file.

    Raises:
        FileNotFoundError: There is none.
        FolderUnsafe: It is no token, or others could have read or written it.
    """
    remedy = f"remove it, or make a new one: finetuned token rotate{_option(path)}"
    try:
        # Not to wait for the writer of a FIFO, and not to follow a link out of our folder.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is a link" if path.is_symlink() else f"can't be read ({error.strerror})"
        raise FolderUnsafe(f"the token file {path} {what}; {remedy}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FolderUnsafe(f"the token file {path} is no regular file; {remedy}")
        if status.st_uid != os.getuid():
            raise FolderUnsafe(f"the token file {path} belongs to another user; {remedy}")
        if status.st_mode & 0o077:
            # Who has read it meanwhile is not known, so a mode that is mended would not be enough.
            raise FolderUnsafe(
                f"the token file {path} has mode {stat.S_IMODE(status.st_mode):04o}, so others may "
                f"know the token; {remedy}"
            )
        token = os.read(descriptor, _LONGEST + 1).strip()
    finally:
        os.close(descriptor)
    if len(token) < SHORTEST:
        raise FolderUnsafe(
            f"the token file {path} is empty or its token is shorter than {SHORTEST} characters; "
            f"{remedy}"
        )
    if len(token) > _LONGEST or not all(0x21 <= byte <= 0x7E for byte in token):
        raise FolderUnsafe(
            f"the token file {path} does not hold one line of printable ASCII; {remedy}"
        )
    logs.keep_secret(token.decode())
    return token


def _option(path: Path) -> str:
    return " --read-only" if path.name.endswith("read-only") else ""


class _TokenFile:
    """One token file as it was last seen."""

    def __init__(self, path: Path, *, is_always_there: bool) -> None:
        self._path = path
        self._is_always_there = is_always_there
        self._seen: tuple[int, ...] | None = None
        self._trouble = ""
        self._token = b""
        # Compared with where there is no token, so that an answer takes as long.
        self._nobody = secrets.token_bytes(32)

    def open(self) -> None:
        """Reads it for the first time; makes it where it must always be.

        Raises:
            FolderUnsafe: It can't be trusted.
        """
        try:
            self._token = read_token(self._path)
        except FileNotFoundError:
            if not self._is_always_there:
                return
            write_token(self._path)
            self._token = read_token(self._path)
        self._seen = self._look()

    def is_changed(self) -> bool:
        """Whether the file is another one than was read, as far as its metadata tells."""
        return self._look() != self._seen

    def read(self) -> bool:
        """Reads it again; whether the token is another one now.

        A file that can't be trusted any more admits nobody.
        """
        before, self._seen = self._token, self._look()
        trouble = ""
        try:
            if self._seen is None and self._is_always_there:
                # Whoever removes it wants the old one to be of no use any more.
                write_token(self._path)
                self._seen = self._look()
            self._token = read_token(self._path)
        except FileNotFoundError:
            self._token = b""
        except (FolderUnsafe, OSError) as error:
            self._token = b""
            trouble = str(error)
            if trouble != self._trouble:
                _log.error("no call is admitted by this token: %s", error)
        self._trouble = trouble
        if self._token not in (b"", before):
            _log.info("%s has changed; the old token is refused from now on", self._path)
        return before != self._token

    def matches(self, presented: bytes) -> bool:
        """Compares in constant time."""
        is_same = hmac.compare_digest(presented, self._token or self._nobody)
        return is_same and bool(self._token)

    def _look(self) -> tuple[int, ...] | None:
        try:
            status = self._path.lstat()
        except OSError:
            return None
        return (
            *(status.st_dev, status.st_ino, status.st_size, status.st_mode, status.st_uid),
            *(status.st_mtime_ns, status.st_ctime_ns),
        )


class Tokens:
    """The token for everything, which always is, and the one to read, which is if it was made."""

    def __init__(self, paths: Paths) -> None:
        """Reads both.

        Raises:
            FolderUnsafe: A file can't be trusted; the message has the remedy.
            OSError: The token can't be made.
        """
        self._full = _TokenFile(paths.token, is_always_there=True)
        self._read_only = _TokenFile(paths.read_only_token, is_always_there=False)
        for file in (self._full, self._read_only):
            file.open()

    def refresh(self, *, anyway: bool = False) -> bool:
        """Reads what has changed; whether a token is another one now.

        Args:
            anyway: Read also what looks the same: a file that is written twice within one tick of
                the clock does.
        """
        changed = [file.read() for file in self._files if anyway or file.is_changed()]
        return any(changed)

    def may_do_everything(self, presented: bytes) -> bool:
        """Whether this is the token for everything."""
        return self._full.matches(presented)

    def may_read(self, presented: bytes) -> bool:
        """Whether this is one of both; as long for either."""
        full, read_only = (file.matches(presented) for file in self._files)
        return full or read_only

    @property
    def _files(self) -> tuple[_TokenFile, _TokenFile]:
        return self._full, self._read_only


def check_tokens(paths: Paths) -> None:
    """Checks the token files where they are, also for a daemon that serves no TCP.

    Raises:
        FolderUnsafe: One can't be trusted.
    """
    for path in (paths.token, paths.read_only_token):
        try:
            read_token(path)
        except FileNotFoundError:
            continue
