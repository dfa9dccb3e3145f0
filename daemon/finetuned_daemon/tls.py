"""The certificate that the daemon shows on TCP: checked before it serves, read again as it changes.

Handshakes of gRPC tell a user little, so a pair is tried first in a handshake with itself.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

from finetuned_daemon.privacy import FolderUnsafe, check_private

_log = logging.getLogger(__name__)

_LONGEST_BYTES = 1 << 20


class TLSUnusable(Exception):
    """Certificate, key or CA can't be used; the message says which and why."""


@dataclass(frozen=True)
class TLSFiles:
    """PEM files."""

    certificate: Path
    """The daemon's, followed by those of CAs between it and one that clients know."""
    key: Path
    """Its private key, without a passphrase."""
    client_ca: Path | None = None
    """CA whose certificate a client must show; None: clients show none."""

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file."""
        return tuple(p for p in (self.certificate, self.key, self.client_ca) if p is not None)


@dataclass(frozen=True)
class TLSContent:
    """What the files hold."""

    certificate: bytes
    key: bytes = field(repr=False)
    client_ca: bytes | None


class Certificates:
    """The files, read again as they change."""

    def __init__(self, files: TLSFiles) -> None:
        """Reads and checks the files.

        Raises:
            TLSUnusable: They can't be used.
            FolderUnsafe: Others can read the key.
        """
        self._files = files
        self._seen = _look(files)
        self._lock = threading.Lock()
        self.content = _load(files)

    def changed(self) -> TLSContent | None:
        """What the files hold now; None: the same as when they were last read.

        Called at each handshake, by threads of gRPC's own.
        """
        with self._lock:
            now = _look(self._files)
            if now == self._seen:
                return None
            self._seen = now
            try:
                self.content = _load(self._files)
            except (TLSUnusable, FolderUnsafe) as error:
                # Also where one of two files was replaced so far: the other's change tries again.
                _log.error("the certificate from before stays in use: %s", error)
                return None
            _log.info("%s was read again", self._files.certificate)
            return self.content


def _look(files: TLSFiles) -> tuple[tuple[int, ...] | None, ...]:
    def signature(path: Path) -> tuple[int, ...] | None:
        try:
            status = path.stat()
        except OSError:
            return None
        return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    return tuple(signature(path) for path in files.all)


def _load(files: TLSFiles) -> TLSContent:
    try:
        check_private(files.key, may_be_roots=True)
        contents = [_read(path) for path in files.all]
    except OSError as error:
        raise TLSUnusable(f"{error.filename} can't be read: {error.strerror}") from error
    certificate, key, *client_ca = contents
    _try_pair(files, _first_certificate(files.certificate, certificate))
    if files.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise TLSUnusable(f"{files.client_ca} holds no certificates in PEM") from error
    return TLSContent(certificate, key, client_ca[0] if client_ca else None)


def _read(path: Path) -> bytes:
    """A file's content; what would never end, or never begin, is no certificate."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LONGEST_BYTES:
            raise TLSUnusable(f"{path} is no file in PEM")
        return file.read(_LONGEST_BYTES)


def _first_certificate(path: Path, pem: bytes) -> str:
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    start, stop = pem.find(begin), pem.find(end)
    if start < 0 or stop < start:
        raise TLSUnusable(f"{path} holds no certificate in PEM")
    return pem[start : stop + len(end)].decode("ascii", "replace")


def _try_pair(files: TLSFiles, leaf: str) -> None:
    """Shakes hands with itself, in memory: the client trusts nothing but the certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password of ours OpenSSL would ask for one at the terminal.
        server.load_cert_chain(files.certificate, files.key, password=_no_password)
    except ssl.SSLError as error:
        raise TLSUnusable(_describe_pair(files, error)) from error
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        client.load_verify_locations(cadata=leaf)
        _shake_hands(client, server)
    except ssl.SSLCertVerificationError as error:
        raise TLSUnusable(
            f"{files.certificate} can't be shown to clients: {error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise TLSUnusable(f"{files.certificate} can't be used: {error.reason or error}") from error


def _no_password() -> str:
    raise TLSUnusable("the private key needs a passphrase, which nobody is there to give")


def _describe_pair(files: TLSFiles, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{files.key} is not the private key of {files.certificate}"
    return (
        f"{files.certificate} and {files.key} can't be used: not PEM, damaged, or of a kind that "
        f"TLS does not take ({error.reason or error})"
    )


def _shake_hands(client_context: ssl.SSLContext, server_context: ssl.SSLContext) -> None:
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    # Each turn brings at least one message; a handshake has a handful.
    for _ in range(16):
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
        if not waiting:
            return
    raise ssl.SSLError("the handshake does not end")
