"""TCP under gRPC: addresses are bound, with TLS whose certificate changes as its files do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc import aio

from finetuned_daemon.listen import BadAddress, Listen
from finetuned_daemon.tls import Certificates, TLSContent, TLSFiles


def bind(server: aio.Server, listens: Sequence[Listen], tls: TLSFiles | None) -> list[str]:
    """Binds each address, with TLS where there are files for it; returns what was bound.

    Raises:
        BadAddress: One can't be had.
        TLSUnusable: The files can't be used.
        FolderUnsafe: Others can read the key.
    """
    bound = list[str]()
    for listen in listens:
        address = f"{listen.host}:{listen.port}"
        try:
            if tls is not None:
                # Each address its own: gRPC takes "unchanged" for an answer to this one alone.
                port = server.add_secure_port(address, _credentials(Certificates(tls)))
            else:
                port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise BadAddress(f"can't serve on {address}: {error}") from error
        bound.append(f"{listen.host}:{port}")
    return bound


def _credentials(certificates: Certificates) -> grpc.ServerCredentials:
    def fetch() -> Any:  # its type does not say that None is an answer
        content = certificates.changed()
        return None if content is None else _configuration(content)

    content = certificates.content
    return grpc.dynamic_ssl_server_credentials(
        _configuration(content),
        fetch,
        require_client_authentication=content.client_ca is not None,
    )


def _configuration(content: TLSContent) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(content.key, content.certificate)], root_certificates=content.client_ca
    )
