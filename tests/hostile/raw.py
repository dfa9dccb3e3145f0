"""Bytes on the daemon's socket that no client of gRPC sends, or not so."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = range(5)
PING, GOAWAY, WINDOW, CONTINUATION = range(6, 10)
_END_STREAM, _END_HEADERS = 0x1, 0x4

_SECONDS = 5.0
_MOST_READ = 1 << 20


def frame(kind: int, flags: int, stream: int, body: bytes, length: int | None = None) -> bytes:
    """A frame of HTTP/2; with a `length` that lies, if given."""
    size = len(body) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream) + body


def _literal(name: bytes, value: bytes) -> bytes:
    """A header of HPACK, in plain."""

    def text(data: bytes) -> bytes:
        if len(data) < 127:
            return bytes([len(data)]) + data
        rest, parts = len(data) - 127, bytearray([127])
        while rest >= 128:
            parts.append(rest % 128 + 128)
            rest //= 128
        return bytes([*parts, rest]) + data

    return b"\0" + text(name) + text(value)


def call(stream: int, path: bytes = b"/finetuned.v1.TaskService/GetTask", *more: bytes) -> bytes:
    """The headers of a call."""
    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
    ]  # fmt: skip
    block = b"".join(_literal(name, value) for name, value in fields) + b"".join(more)
    return frame(HEADERS, _END_HEADERS, stream, block)


# --- what is sent


def _noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 5000))


def _http1(rng: random.Random) -> bytes:
    path = rng.choice(["/", "/finetuned.v1.TaskService/ListTasks", "/" + "a" * 9000])
    method = rng.choice(["GET", "POST", "DELETE", "OPTIONS", "CONNECT"])
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n"
    return head.encode() + b"Content-Length: 5\r\n\r\nhello" + rng.randbytes(rng.randint(0, 20))


def _tls(rng: random.Random) -> bytes:
    hello = b"\x01" + rng.randbytes(rng.randint(40, 400))
    return b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello


def _garbage_frames(rng: random.Random) -> bytes:
    sent = bytearray(PREFACE + frame(SETTINGS, 0, 0, b""))
    for _ in range(rng.randint(1, 50)):
        body = rng.randbytes(rng.choice([0, 1, 4, 8, 100]))
        sent += frame(rng.randrange(256), rng.randrange(256), rng.randrange(1 << 31), body)
    return bytes(sent)


def _lying_lengths(rng: random.Random) -> bytes:
    length = rng.choice([0, 1, 0x3FFF, 0x4001, 0xFFFFFF])
    kind = rng.choice([DATA, HEADERS, SETTINGS, PING, WINDOW, RST_STREAM, GOAWAY])
    return (
        PREFACE + frame(SETTINGS, 0, 0, b"") + call(1)
        + frame(kind, 0, rng.choice([0, 1]), rng.randbytes(rng.randint(0, 40)), length)
    )  # fmt: skip


def _lying_message(rng: random.Random) -> bytes:
    # The prefix of a message says how long it is: up to 4 GiB.
    size = rng.choice([0xFFFFFFFF, 1 << 30, 5 << 20, 3])
    prefix = bytes([rng.choice([0, 1, 255])]) + struct.pack(">I", size)
    body = prefix + rng.randbytes(rng.randint(0, 100))
    return PREFACE + frame(SETTINGS, 0, 0, b"") + call(1) + frame(DATA, rng.choice([0, 1]), 1, body)


def _huge_headers(rng: random.Random) -> bytes:
    sent = bytearray(PREFACE + frame(SETTINGS, 0, 0, b""))
    big = _literal(b"x-big", b"a" * rng.randint(1000, 12_000))
    sent += frame(HEADERS, 0, 1, big)
    for _ in range(rng.randint(1, 60)):  # a block without an end
        sent += frame(CONTINUATION, 0, 1, big)
    return bytes(sent)


def _bomb(rng: random.Random) -> bytes:
    # An entry of the table of headers, and then a byte for each time that it is meant.
    stored = b"\x40" + _literal(b"x", b"b" * 3000)[1:]
    sent = PREFACE + frame(SETTINGS, 0, 0, b"")
    return sent + call(1, b"/x", stored, b"\xbe" * rng.randint(100, 12_000))


def _rapid_reset(rng: random.Random) -> bytes:
    sent = bytearray(PREFACE + frame(SETTINGS, 0, 0, b""))
    for number in range(rng.randint(50, 400)):
        stream = 2 * number + 1
        sent += call(stream) + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
    return bytes(sent)


def _many_streams(rng: random.Random) -> bytes:
    sent = bytearray(PREFACE + frame(SETTINGS, 0, 0, b""))
    for number in range(rng.randint(100, 1500)):
        sent += call(2 * number + 1, b"/finetuned.v1.TaskService/WatchTask")
    return bytes(sent)


def _floods(rng: random.Random) -> bytes:
    kind, body = rng.choice(
        [
            (PING, bytes(8)),
            (SETTINGS, struct.pack(">HI", rng.randrange(8), rng.randrange(1 << 32))),
            (WINDOW, struct.pack(">I", rng.choice([0, 1, 0x7FFFFFFF]))),
            (PRIORITY, bytes(5)),
        ]
    )
    stream = 1 if kind == PRIORITY else 0
    return (
        PREFACE + frame(SETTINGS, 0, 0, b"") + frame(kind, 0, stream, body) * rng.randint(10, 2000)
    )


def _torn(rng: random.Random) -> bytes:
    whole = PREFACE + frame(SETTINGS, 0, 0, b"") + call(1) + frame(DATA, 1, 1, bytes(5))
    return whole[: rng.randint(0, len(whole))]


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "random bytes": _noise,
    "HTTP/1.1": _http1,
    "TLS hello": _tls,
    "garbage frames": _garbage_frames,
    "frames with wrong lengths": _lying_lengths,
    "messages with wrong lengths": _lying_message,
    "huge headers": _huge_headers,
    "header bomb": _bomb,
    "rapid reset": _rapid_reset,
    "many streams": _many_streams,
    "floods": _floods,
    "torn connection": _torn,
}
"""What is sent, by name; each takes a generator for what it leaves open."""


def attack(path: str, data: bytes, *, stays: bool) -> None:
    """Sends bytes on a connection of its own; with `stays` it waits for what the daemon says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_SECONDS)
        connection.connect(path)
        try:
            connection.sendall(data)
            if not stays:
                return
            connection.settimeout(0.05)
            read = 0
            while read < _MOST_READ and (piece := connection.recv(1 << 16)):
                read += len(piece)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            return


def hold(path: str, count: int, data: bytes) -> list[socket.socket]:
    """Connections that send a beginning and then nothing; the caller closes them."""
    held = list[socket.socket]()
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_SECONDS)
        connection.connect(path)
        connection.sendall(data)
        held.append(connection)
    return held
