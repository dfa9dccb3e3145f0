"""The edge to gRPC.

Errors to status codes in one table, the token on TCP, and requests that are no protos.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc import aio

from finetuned_daemon.errors import (
    AlreadyExists,
    CursorOutOfRange,
    DaemonError,
    DiskFull,
    Forbidden,
    InvalidRequest,
    LimitReached,
    NotFound,
    StaleEtag,
    Stopping,
    Unauthenticated,
    Violation,
    WrongState,
)
from finetuned_daemon.limits import Limits
from finetuned_daemon.services.access import Access, Admission
from finetuned_daemon.services.calls import Call, Calls, Method
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
    LimitReached: code_pb2.RESOURCE_EXHAUSTED,
    Stopping: code_pb2.UNAVAILABLE,
    Unauthenticated: code_pb2.UNAUTHENTICATED,
    Forbidden: code_pb2.PERMISSION_DENIED,
}


# An answer's trailers are limited, by default to 8 KiB: what is too long for them would arrive as
# an error of the transport's, without any field.
_MOST_MESSAGE = 600
_MOST_DETAIL = 4500
_MOST_VIOLATIONS = 100


def to_status(error: DaemonError, speaking: Language = "en") -> status_pb2.Status:
    """The status with its typed details, short enough for the trailers of an answer.

    Sentences on fields come in the caller's language, all else in English with a stable reason.
    """
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
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
    """All fields with their reasons; sentences are cut where they are too long together.

    Where that is not enough, there are more than parameters, such as paths of a mask: the first
    come, and how many more there are. What this costs does not grow with what was sent.
    """
    most = 400
    found = [
        (_short(v.field, 80), _short(v.message.within(speaking), most), v.reason)
        for v in violations[:_MOST_VIOLATIONS]
    ]
    while True:
        result = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=field, description=_short(sentence, most), reason=reason
                )
                for field, sentence, reason in found
            ]
        )
        if len(found) < len(violations):
            more = len(violations) - len(found)
            text = Text(f"{more:,} more values are wrong", f"另有 {more:,} 个值有误")
            result.field_violations.add(description=text.within(speaking), reason="MORE_VIOLATIONS")
        if result.ByteSize() <= _MOST_DETAIL:
            return result
        if most > 20:
            most = most * 2 // 3
        else:
            found = found[: len(found) // 2]


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


class TooLarge:
    """Stands for a request that is too large to be looked at."""


class Edge(aio.ServerInterceptor):
    """Wraps every rpc: access, limits, decoding, log, errors."""

    def __init__(self, access: Access, limits: Limits, shared: Calls | None = None) -> None:
        self._access = access
        self._limits = limits
        self._calls = shared or Calls(
            limits, lambda error, context: to_status(error, language(context))
        )
        self._is_tcp = shared is not None
        # By gRPC's names, of those methods that there are.
        self._wrapped = dict[str, Any]()

    @property
    def calls(self) -> Calls:
        """The calls that are under way and were, of all servers."""
        return self._calls

    def for_tcp(self) -> Edge:
        """The same for the server of TCP: who shows no good token is refused by the headers.

        gRPC hands a call to its handler once the message is there; until then calls of anybody
        on the machine would cost memory, and be in no count.
        """
        return Edge(self._access, self._limits, self._calls)

    async def wait_until_idle(self, seconds: float) -> None:
        """Takes no new calls, and returns once none is under way, or time is up."""
        self._calls.is_closing = True
        await self._calls.wait_until_idle(seconds)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The wrapped handler of the method that is called."""
        path = str(handler_call_details.method)
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler: Any = await continuation(handler_call_details)
            if handler is None:  # no such method: gRPC answers UNIMPLEMENTED itself
                return handler
            wrapped = self._wrapped[path] = self._wrap(path, handler)
        if self._is_tcp:
            try:
                self._access.check_headers(path, handler_call_details.invocation_metadata or ())
            except DaemonError as error:
                return self._refusal(error, path)
        return wrapped

    def _wrap(self, path: str, handler: Any) -> Any:
        changes: dict[str, Any] = {}
        changes["request_deserializer"] = _forgiving(
            handler.request_deserializer, self._limits["message_bytes"]
        )
        changes["response_serializer"] = _ready_or_not(handler.response_serializer)
        method = Method.of(path, is_stream=not handler.unary_unary)
        if handler.unary_unary:
            changes["unary_unary"] = self._unary(handler.unary_unary, method)
        elif handler.unary_stream:
            changes["unary_stream"] = self._stream(handler.unary_stream, method)
        elif handler.stream_stream:  # reflection
            reflect: Any = handler.stream_stream

            def checked(requests: Any, context: Any) -> Any:
                return reflect(self._well_formed(requests), context)

            changes["stream_stream"] = self._stream(checked, method)
        return handler._replace(**changes)

    def _refusal(self, error: DaemonError, path: str) -> Any:
        method = Method.of(path, is_stream=True)

        async def refuse(_: Any, context: aio.ServicerContext[Any, Any]) -> None:
            async with self._calls.call(method, context, is_tcp=self._is_tcp):
                raise error

        # This kind alone is called before any message has come.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _unary(self, behaviour: Callable[..., Awaitable[Any]], method: Method) -> Any:
        async def handle(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            call = self._calls.call(method, context, is_tcp=self._is_tcp)
            try:
                call.begin(request)
                self._admit(request, call, method)
                call.take_place()
                answer = await behaviour(request, context)
                call.note_answer(answer)
            except BaseException as error:
                await call.fail(error)
                raise
            call.succeed()
            return answer

        return handle

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: Method) -> Any:
        # No generator: where a client goes away while it is sent something, this is told at once.
        async def handle(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
            call = self._calls.call(method, context, is_tcp=self._is_tcp)
            try:
                call.begin(request)
                admission = self._admit(request, call, method)
                await call.take_place_of_stream()
                responses: Any = behaviour(request, context)
                if asyncio.iscoroutine(responses):  # sends them itself, as Health.Watch
                    await admission.run(responses)
                else:
                    await admission.send(responses, context.write)
            except BaseException as error:
                await call.fail(error)
                raise
            call.succeed()

        return handle

    def _admit(self, request: Any, call: Call, method: Method) -> Admission:
        self._calls.check_open(method.path)
        admission = self._access.check(method.path, call.metadata, is_tcp=self._is_tcp)
        self._check_form(request)
        return admission

    def _check_form(self, request: Any) -> None:
        """Refuses what is no message, or too large a one."""
        if isinstance(request, TooLarge):
            raise self._limits.reached("message_bytes")
        if isinstance(request, Malformed):
            text = Text("the request is no such message", "请求不是这种消息")
            raise InvalidRequest([Violation("", text, "MALFORMED")])

    async def _well_formed(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """Passes requests on, up to one whose bytes are no such message.

        Raises:
            DaemonError: There was one.
        """
        async for request in requests:
            self._check_form(request)
            yield request


def _ready_or_not(
    serializer: Callable[[Any], bytes] | None,
) -> Callable[[Any], bytes] | None:
    """A serializer that leaves alone what is bytes already."""
    if serializer is None:
        return None
    return lambda message: message if isinstance(message, bytes) else serializer(message)


def _forgiving(
    deserializer: Callable[[bytes], Any] | None, most_bytes: int
) -> Callable[[bytes], Any] | None:
    if deserializer is None:
        return None

    def deserialize(data: bytes) -> Any:
        if len(data) > most_bytes:
            return TooLarge()
        try:
            return deserializer(data)
        except DecodeError:  # gRPC would answer INTERNAL
            return Malformed()

    return deserialize
