"""TLS: what a client trusts, and what it shows of itself."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from finetuned._errors import InvalidArgument

CA_VARIABLE = "FINETUNED_TLS_CA"
CERTIFICATE_VARIABLE = "FINETUNED_TLS_CERT"
KEY_VARIABLE = "FINETUNED_TLS_KEY"


@dataclass(frozen=True)
class TLS:
    """PEM files for a connection with TLS."""

    ca: str | PathLike[str] | None = None
    """The CA that the daemon's certificate must come from, or that certificate itself where it is
    self-signed. None: the CAs that gRPC brings."""
    certificate: str | PathLike[str] | None = None
    """The client's own certificate, where the daemon demands one (`--tls-client-ca`)."""
    key: str | PathLike[str] | None = None
    """Its private key."""


@dataclass(frozen=True)
class TLSContent:
    """What the files hold. Another content is another endpoint, and gets a new channel."""

    ca: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


def read_tls(tls: TLS | None) -> TLSContent | None:
    """The content of the files that were given, else of those that the environment names.

    None: neither names any, so there is to be no TLS.

    Raises:
        InvalidArgument: A file can't be read or is not PEM, or certificate and key are not both
            given.
    """
    if tls is None:
        ca, certificate, key = (
            os.environ.get(name) or None
            for name in (CA_VARIABLE, CERTIFICATE_VARIABLE, KEY_VARIABLE)
        )
        if not (ca or certificate or key):
            return None
        tls = TLS(ca, certificate, key)
    if (tls.certificate is None) is not (tls.key is None):
        raise InvalidArgument(
            "the client's certificate and its key go together "
            f"({CERTIFICATE_VARIABLE}, {KEY_VARIABLE})",
            reason="BAD_TLS",
        )
    return TLSContent(
        ca=_read(tls.ca, "CERTIFICATE"),
        certificate=_read(tls.certificate, "CERTIFICATE"),
        key=_read(tls.key, "PRIVATE KEY"),
    )


def _read(path: str | PathLike[str] | None, kind: str) -> bytes | None:
    if path is None:
        return None
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{path} can't be read: {error.strerror}", reason="BAD_TLS") from None
    # gRPC says no more than that a handshake has failed.
    if f"{kind}-----".encode() not in content:
        raise InvalidArgument(f"{path} holds no {kind.lower()} in PEM", reason="BAD_TLS")
    return content


# What gRPC's text of a failed handshake has in it: what that means, and what to do.
_TROUBLES = (
    (
        "is not in peer certificate",
        "its certificate is for another name than the one that was dialled; use a name or address "
        "that the certificate holds, or have one made that holds this one",
    ),
    (
        "certificate has expired",
        "its certificate has expired; a new one in place of the file is taken without a restart",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        f"its certificate does not come from the CA that you trust; give the right one by "
        f"{CA_VARIABLE} or `tls`",
    ),
    (
        "WRONG_VERSION_NUMBER",
        f"it does not speak TLS at that address; take away {CA_VARIABLE}, or let the daemon serve "
        "with --tls-cert",
    ),
)


def explain(content: TLSContent | None, message: str) -> str:
    """Why no connection came about, and the next step; empty: it is not for TLS.

    Args:
        content: What the client had for TLS; None: it used none.
        message: What gRPC said.
    """
    if content is None:
        return ""
    for sign, text in _TROUBLES:
        if sign in message:
            return text
    if "handshake failed" in message.lower():
        return "the TLS handshake failed"
    return ""


def advise(content: TLSContent | None) -> str:
    """What else may be wrong where somebody takes the connection and closes it."""
    if content is None:
        return f"if the daemon serves with --tls-cert, name its CA by {CA_VARIABLE}"
    if content.certificate is None:
        return (
            "if the daemon was started with --tls-client-ca, show a certificate: "
            f"{CERTIFICATE_VARIABLE}, {KEY_VARIABLE}"
        )
    return "the certificate of this client may come from another CA than the daemon demands"
