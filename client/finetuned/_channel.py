"""Channels to an endpoint, for both clients; apart from `_connect.py`, as grpc loads slowly."""

from __future__ import annotations

import grpc
import grpc.aio

from finetuned._connect import Endpoint


def open_channel(endpoint: Endpoint) -> grpc.Channel:
    """A new channel of blocking gRPC."""
    credentials = _credentials(endpoint)
    if credentials is None:
        return grpc.insecure_channel(endpoint.target, endpoint.options)
    return grpc.secure_channel(endpoint.target, credentials, endpoint.options)


def open_aio_channel(endpoint: Endpoint) -> grpc.aio.Channel:
    """A new channel for asyncio."""
    credentials = _credentials(endpoint)
    if credentials is None:
        return grpc.aio.insecure_channel(endpoint.target, endpoint.options)
    return grpc.aio.secure_channel(endpoint.target, credentials, endpoint.options)


def _credentials(endpoint: Endpoint) -> grpc.ChannelCredentials | None:
    tls = endpoint.tls
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(tls.ca, tls.key, tls.certificate)
