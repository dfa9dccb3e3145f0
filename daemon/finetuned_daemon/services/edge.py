"""The edge to gRPC.

Errors to status codes in one table, the token on TCP, and requests that are no protos.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from finetuned_daemon.errors import (
    AlreadyExists,
    CursorOutOfRange,
    DaemonError,
    DiskFull,
    InvalidRequest,
    NotFound,
    StaleEtag,
    Stopping,
    TooMany,
    Violation,
    WrongState,
)
from finetuned_daemon.texts import Language, Text, choose_language

DOMAIN = "finetuned"

CODES: dict[type[DaemonError], int] = {
    InvalidRequest: code_pb2.INVALID_ARGUMENT,
    NotFound: code_pb2.NOT_FOUND,
    AlreadyExists: code_pb2.ALREADY_EXISTS,
    WrongState: code_pb2.FAILED_PRECONDITION,
    StaleEtag: code_pb2.ABORTED,
    CursorOutOfRange: code_pb2.OUT_OF_RANGE,
    DiskFull: code_pb2.RESOURCE_EXHAUSTED,
    TooMany: code_pb2.RESOURCE_EXHAUSTED,
    Stopping: code_pb2.UNAVAILABLE,
}


# An answer's trailers are limited, by default to 8 KiB: what is too long for them would arrive as
# an error of the transport's, without any field.
_MOST_MESSAGE = 600
_MOST_DETAIL = 4500


def to_status(error: DaemonError, speaking: Language = "en") -> status_pb2.Status:
    """The status with its typed details, short enough for the trailers of an answer.

    Sentences on fields come in the caller's language, all else in English with a stable reason.
    """
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)]
    if isinstance(error, InvalidRequest):
        details.append(_bad_request(error.violations, speaking))
    elif isinstance(error, NotFound | AlreadyExists):
        details.append(
            error_details_pb2.ResourceInfo(
                resource_type=f"{DOMAIN}.v1/{error.kind.capitalize()}",
                resource_name=_short(error.name, 200),
                description=_short(str(error), 400),
            )
        )
    elif isinstance(error, WrongState):
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type=error.reason, subject=error.subject, description=str(error)
                    )
                ]
            )
        )
    status = status_pb2.Status(code=CODES[type(error)], message=_short(str(error), _MOST_MESSAGE))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _bad_request(
    violations: Sequence[Violation], speaking: Language
) -> error_details_pb2.BadRequest:
    """All fields with their reasons; sentences are cut where they are too long together."""
    most = 400
    while True:
        result = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=_short(v.field, 80),
                    description=_short(v.message.within(speaking), most),
                    reason=v.reason,
                )
                for v in violations
            ]
        )
        if result.ByteSize() <= _MOST_DETAIL:
            return result
        if most > 20:
            most = most * 2 // 3
        else:
            violations = violations[
                :-1
            ]  # more than there are parameters: a request of unknown ones


def _short(text: str, most: int) -> str:
    """At most so many UTF-8 bytes, cut in the middle: paths differ at their ends."""
    data = text.encode()
    if len(data) <= most:
        return text
    half = (most - 5) // 2
    return f"{data[:half].decode(errors='ignore')} ... {data[-half:].decode(errors='ignore')}"


def language(context: aio.ServicerContext[Any, Any]) -> Language:
    """The language that a caller asks for by the metadata `accept-language`."""
    for key, value in context.invocation_metadata() or ():
        if key == "accept-language" and isinstance(value, str):
            return choose_language(value)
    return "en"


class Malformed:
    """Stands for a request whose bytes are no such message."""


class Edge(aio.ServerInterceptor):
    """Wraps every rpc: access, decoding, errors."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_until_idle(self, seconds: float) -> None:
        """Returns once no call is under way, or time is up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()

    @contextlib.contextmanager
    def _counted(self) -> Generator[None]:
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler of one call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED itself
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        authorization = str(metadata.get("authorization", "")).encode()
        changes: dict[str, Any] = {}
        if not handler.request_streaming:
            changes["request_deserializer"] = _forgiving(handler.request_deserializer)
        if handler.unary_unary:
            changes["unary_unary"] = self._unary(handler.unary_unary, authorization)
        elif handler.unary_stream:
            changes["unary_stream"] = self._stream(handler.unary_stream, authorization)
        elif handler.stream_stream:  # reflection
            changes["stream_stream"] = self._stream(handler.stream_stream, authorization)
        return handler._replace(**changes)

    def _unary(self, behaviour: Callable[..., Awaitable[Any]], authorization: bytes) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            with self._counted():
                await self._admit(request, context, authorization)
                try:
                    return await behaviour(request, context)
                except DaemonError as error:
                    status = to_status(error, language(context))
                    await context.abort_with_status(rpc_status.to_status(status))

        return call

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], authorization: bytes) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._counted():
                await self._admit(request, context, authorization)
                try:
                    async for response in behaviour(request, context):
                        yield response
                except DaemonError as error:
                    status = to_status(error, language(context))
                    await context.abort_with_status(rpc_status.to_status(status))

        return call

    async def _admit(
        self, request: Any, context: aio.ServicerContext[Any, Any], authorization: bytes
    ) -> None:
        # On the unix socket the folder's mode is the wall. Anybody on the machine, and any web
        # page, reaches TCP.
        if not context.peer().startswith("unix:") and not hmac.compare_digest(
            authorization, b"Bearer " + self._token
        ):
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "TCP needs the token: metadata `authorization: Bearer TOKEN`, from the file "
                "`token` in the daemon's runtime folder",
            )
        if isinstance(request, Malformed):
            text = Text("the request is no such message", "请求不是这种消息")
            error = InvalidRequest([Violation("", text, "MALFORMED")])
            status = to_status(error, language(context))
            await context.abort_with_status(rpc_status.to_status(status))


def _forgiving(deserializer: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:  # gRPC would answer INTERNAL
            return Malformed()

    return deserialize
