"""Sends hostile requests to one daemon and judges what comes back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, seed, settings

from hostile import raw
from hostile.surfaces import Rpc, Strategies, rpcs
from hostile.victim import Victim

_DEADLINE_SECONDS = 30.0
_NEVER = (
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DATA_LOSS,
)
_DETAILS: dict[grpc.StatusCode, type[Any]] = {
    grpc.StatusCode.INVALID_ARGUMENT: error_details_pb2.BadRequest,
    grpc.StatusCode.NOT_FOUND: error_details_pb2.ResourceInfo,
    grpc.StatusCode.ALREADY_EXISTS: error_details_pb2.ResourceInfo,
    grpc.StatusCode.FAILED_PRECONDITION: error_details_pb2.PreconditionFailure,
}
"""The detail that an answer of ours has beside `ErrorInfo`."""


@dataclass
class Row:
    """What came of one surface."""

    surface: str
    examples: int = 0
    accepted: int = 0
    internal: int = 0
    """Answers that must never come: INTERNAL, UNKNOWN, UNIMPLEMENTED."""
    untyped: int = 0
    """Refusals without their typed details."""
    hung: int = 0
    written: int = 0
    """Refused calls behind which something else stood in database or folders."""
    codes: Counter[str] = field(default_factory=Counter[str])
    first: str = ""
    """The first example that failed, and how."""

    @property
    def failures(self) -> int:
        """All that must be none."""
        return self.internal + self.untyped + self.hung + self.written

    def fail(self, kind: str, how: str) -> None:
        """Counts a failure."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.first = self.first or f"{kind}: {how}"


class Fuzzer:
    """One daemon, and all that is sent to it."""

    def __init__(self, victim: Victim) -> None:
        self.victim = victim
        self.strategies = Strategies(victim)
        self._listing = victim.listing()
        self._content = victim.content()
        self._commits = victim.commits()

    def messages(self, rpc: Rpc, examples: int, number: int | None) -> Row:
        """Sends requests made from the descriptor."""
        row = Row(rpc.name)
        if rpc.name != "SystemService.Shutdown":  # has no field: each one is in order
            strategy = self.strategies.message(rpc)
            _run(
                strategy, lambda m: self._send(rpc, m.SerializeToString(), row, m), examples, number
            )
        return row

    def bodies(self, rpc: Rpc, examples: int, number: int | None) -> Row:
        """Sends bytes that need be no request."""
        row = Row(f"{rpc.name}, bytes")

        def send(data: bytes) -> None:
            if rpc.name == "SystemService.Shutdown" and _parses(rpc, data):
                return
            self._send(rpc, data, row, data)

        _run(self.strategies.body(rpc), send, examples, number)
        return row

    def socket_bytes(self, kind: str, examples: int, number: int | None) -> Row:
        """Sends bytes on connections of their own; others are answered all the while."""
        row = Row(f"socket, {kind}")
        path = str(self.victim.daemon.paths.socket)
        for example in range(examples):
            rng = random.Random(f"{number}/{kind}/{example}")
            raw.attack(path, raw.KINDS[kind](rng), stays=rng.random() < 0.5)
            row.examples += 1
        self._answers_others(row)
        return row

    def half_open(self, examples: int) -> Row:
        """Holds connections that have begun and go no further."""
        row = Row("socket, half open", examples=examples)
        path = str(self.victim.daemon.paths.socket)
        settings_only = raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0, b"")
        beginnings = (b"", raw.PREFACE[:10], settings_only, settings_only + raw.call(1))
        held = [s for data in beginnings for s in raw.hold(path, examples // 4, data)]
        try:
            self._answers_others(row)
        finally:
            for connection in held:
                connection.close()
        return row

    def _answers_others(self, row: Row) -> None:
        try:
            self.victim.answers()
        except (grpc.RpcError, AssertionError) as error:
            row.fail("hung", f"others are not answered: {error}")
        if changed := self._changed():
            row.fail("written", changed)
            self._look()

    def _send(self, rpc: Rpc, data: bytes, row: Row, shown: object) -> None:
        row.examples += 1
        code, detail, error = self._call(rpc, data)
        row.codes[code.name] += 1
        sent = f"{rpc.path} {data[:2000]!r}\n{str(shown)[:2000]}\n-> {code.name} {detail[:500]}"
        if code in _NEVER:
            row.fail("internal", sent)
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            row.fail("hung", sent)
        elif code is grpc.StatusCode.OK:
            row.accepted += 1
        elif rpc.is_ours and error is not None and not _is_typed(error):
            row.fail("untyped", sent)
        if code is grpc.StatusCode.OK:
            if self.victim.commits() != self._commits or not self.victim.is_up():
                self.victim.settle()
            self._look()
        elif changed := self._changed():
            row.fail("written", f"{sent}\n{changed}")
            self.victim.settle()
            self._look()

    def _call(self, rpc: Rpc, data: bytes) -> tuple[grpc.StatusCode, str, grpc.RpcError | None]:
        channel = self.victim.daemon.channel
        method = rpc.descriptor
        try:
            if method.client_streaming:
                both = channel.stream_stream(rpc.path)
                _first(both(iter([data]), timeout=_DEADLINE_SECONDS))
            elif method.server_streaming:
                stream = channel.unary_stream(rpc.path)
                _first(stream(data, timeout=_DEADLINE_SECONDS))
            else:
                channel.unary_unary(rpc.path)(data, timeout=_DEADLINE_SECONDS)
        except grpc.RpcError as error:
            return error.code(), error.details() or "", error
        return grpc.StatusCode.OK, "", None

    def _look(self) -> None:
        self._listing = self.victim.listing()
        self._content = self.victim.content()
        self._commits = self.victim.commits()

    def _changed(self) -> str:
        """What else stands in database or folders than before; empty: nothing."""
        commits = self.victim.commits()
        if commits != self._commits:
            self._commits = commits
            content = self.victim.content()
            if content != self._content:
                tables = [name for name in content if content[name] != self._content.get(name)]
                return f"tables: {', '.join(tables)}"
        listing = self.victim.listing()
        if listing != self._listing:
            return f"files: {sorted({*listing} ^ {*self._listing})}"
        return ""


def _first(call: Any) -> None:
    try:
        for _ in call:
            return
    finally:
        call.cancel()


def _parses(rpc: Rpc, data: bytes) -> bool:
    try:
        rpc.request.FromString(data)
    except Exception:  # noqa: BLE001 - whatever protobuf says of it
        return False
    return True


def _is_typed(error: Any) -> bool:
    """Whether a refusal carries a reason, and where fields are wrong each with a sentence."""
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:
        return True
    status = rpc_status.from_call(error)
    if status is None:
        return False
    details = {detail.TypeName(): detail for detail in status.details}
    info = error_details_pb2.ErrorInfo()
    packed = details.get("google.rpc.ErrorInfo")
    if packed is None or not packed.Unpack(info) or not info.reason:
        return False
    wanted = _DETAILS.get(error.code())
    if wanted is None:
        return True
    found = wanted()
    packed = details.get(found.DESCRIPTOR.full_name)
    if packed is None or not packed.Unpack(found):
        return False
    if isinstance(found, error_details_pb2.BadRequest):
        violations = found.field_violations
        return bool(violations) and all(v.description and v.reason for v in violations)
    return True


def _run(strategy: Any, send: Callable[[Any], None], examples: int, number: int | None) -> None:
    """Draws examples; without a number the same ones each time."""

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(example: Any) -> None:
        send(example)

    if number is not None:
        draw = seed(number)(draw)
    draw()


def sweep(fuzzer: Fuzzer, examples: int, number: int | None, only: str = "") -> Iterator[Row]:
    """Sends about so many examples in all, to every rpc; two rows each."""
    all_rpcs = [rpc for rpc in rpcs() if only in rpc.name]
    each = max(1, round(examples / (len(all_rpcs) + len(raw.KINDS) / 4)))
    for place, rpc in enumerate(all_rpcs):
        own = None if number is None else number * 1000 + place
        yield fuzzer.messages(rpc, max(1, each * 2 // 3), own)
        yield fuzzer.bodies(rpc, max(1, each // 3), own)
    for kind in raw.KINDS:
        if only in f"socket, {kind}":
            yield fuzzer.socket_bytes(kind, max(1, each // 4), number)
    if only in "socket, half open":
        yield fuzzer.half_open(min(200, 4 * each))


def table(rows: list[Row]) -> str:
    """What came of it, as text."""
    head = ("surface", "examples", "accepted", "INTERNAL/UNKNOWN", "untyped", "hung", "written")
    lines = [
        (r.surface, *map(str, (r.examples, r.accepted, r.internal, r.untyped, r.hung, r.written)))
        for r in rows
    ]
    total = ("all", *(str(sum(int(line[i]) for line in lines)) for i in range(1, len(head))))
    widths = [max(len(line[i]) for line in (head, total, *lines)) for i in range(len(head))]

    def show(line: tuple[str, ...]) -> str:
        first, *rest = line
        numbers = "  ".join(t.rjust(w) for t, w in zip(rest, widths[1:], strict=True))
        return f"{first.ljust(widths[0])}  {numbers}"

    return "\n".join(map(show, (head, *lines, total)))
