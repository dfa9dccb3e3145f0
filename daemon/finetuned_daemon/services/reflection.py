"""Server reflection: which services there are and what they take, for tools that have no protos.

Few clients ask for it, and what answers takes more memory than the daemon's own services: it is
imported with the first call.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from grpc import aio

NAME = "grpc.reflection.v1alpha.ServerReflection"
_METHOD = "ServerReflectionInfo"


def add_reflection(names: Sequence[str], server: aio.Server) -> None:
    """Adds it to a server that has not started.

    Args:
        names: Full names of the services that it shows.
        server: Where they are served.
    """
    handler = grpc.stream_stream_rpc_method_handler(
        _reflect(names), request_deserializer=_decode, response_serializer=_encode
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(NAME, {_METHOD: handler}),)
    )


def _reflect(
    names: Sequence[str],
) -> Callable[[AsyncIterator[Any], aio.ServicerContext[Any, Any]], AsyncIterator[Any]]:
    async def reflect(
        requests: AsyncIterator[Any], context: aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        from grpc_reflection.v1alpha import reflection

        servicer: Any = reflection.aio.ReflectionServicer(names)
        async for response in servicer.ServerReflectionInfo(requests, context):
            yield response

    return reflect


def _decode(data: bytes) -> Any:
    from grpc_reflection.v1alpha import reflection_pb2

    return reflection_pb2.ServerReflectionRequest.FromString(data)


def _encode(response: Any) -> bytes:
    data: bytes = response.SerializeToString()
    return data
