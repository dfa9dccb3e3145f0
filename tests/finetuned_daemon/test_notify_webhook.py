"""What a webhook makes of receivers that answer wrongly, late or never: with sockets, no daemon."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from finetuned_daemon.notify.channel import NotDelivered
from finetuned_daemon.notify.message import sample
from finetuned_daemon.notify.webhook import Webhook, parse_url

Answer = Callable[[socket.socket, threading.Event], None]

_SECONDS = 0.3


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A receiver that reads a request and then does this; its address.

    The event is set once the test is over.
    """
    is_over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    _read(connection)
                    answer(connection, is_over)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        is_over.set()
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)  # of a receiver that nobody has called
        thread.join()


def _read(connection: socket.socket) -> None:
    """A whole request, as a rest that nobody reads resets the connection; of TLS what comes."""
    got = connection.recv(1 << 16)
    if not got.startswith(b"POST"):
        return
    while b"\r\n\r\n" not in got:
        got += connection.recv(1 << 16)
    head, _, body = got.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"(?i)content-length: (\d+)", head)
    while len(body) < int(length):
        body += connection.recv(1 << 16)


def said(url: str, seconds: float = 30) -> str:
    """Why it does not arrive there."""
    webhook = Webhook(parse_url(url, may_be_http=True), (), seconds=seconds)
    with pytest.raises(NotDelivered) as caught:
        webhook.send(sample(0, "en"))
    return str(caught.value)


def writing(text: bytes) -> Answer:
    return lambda connection, _: connection.sendall(text)


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 abc\x1b]0;pwn\x07\r\n\r\n",
        b"SSH-2.0-pwn\r\n",
        b"HTTP/9.9 200 pwn\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"pwn: " + b"a" * 70_000,
        b"HTTP/1.1 200 OK\r\n" + b"pwn: a\r\n" * 200,
    ],
    ids=["status", "other", "version", "long", "many"],
)
def test_none_of_a_receivers_words_are_told(text: bytes) -> None:
    with answering(writing(text)) as url:
        assert said(url) == "no HTTP answer"


def test_a_receiver_that_hangs_up_is_told_as_that() -> None:
    with answering(writing(b"")) as url:
        assert "closed connection" in said(url)


def _drip(connection: socket.socket, is_over: threading.Event) -> None:
    """A head that never ends; each byte comes well within the time of a read."""
    connection.sendall(b"HTTP/1.1 200 OK\r\na: ")
    while not is_over.wait(_SECONDS / 10):
        connection.sendall(b"b")


def _nothing(_: socket.socket, is_over: threading.Event) -> None:
    is_over.wait()


@pytest.mark.parametrize("answer", [_drip, _nothing], ids=["drips", "nothing"])
def test_what_has_not_answered_in_its_time_has_not_got_it(answer: Answer) -> None:
    """Also where a status of 200 has come, but never the whole of the head."""
    with answering(answer) as url:
        assert said(url, _SECONDS) == f"no answer within {_SECONDS:g} s"


def test_an_attempt_that_took_its_time_to_connect_has_no_more_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A slow resolver: the end comes while there is no socket that it could close."""
    look_up = socket.getaddrinfo
    has_ended = threading.Event()

    class Timer(threading.Timer):
        def run(self) -> None:
            super().run()
            has_ended.set()

    def slowly(*arguments: object, **options: object) -> object:
        assert has_ended.wait(60)
        return look_up(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    with answering(_drip) as url:
        assert said(url, 0.01) == "no answer within 0.01 s"


def test_a_stop_ends_an_attempt_that_waits() -> None:
    called = threading.Event()

    def answer(_: socket.socket, is_over: threading.Event) -> None:
        called.set()
        is_over.wait()

    with answering(answer) as url:
        webhook = Webhook(parse_url(url, may_be_http=True), (), seconds=600)
        failures = list[NotDelivered]()

        def send() -> None:
            try:
                webhook.send(sample(0, "en"))
            except NotDelivered as error:
                failures.append(error)

        thread = threading.Thread(target=send)
        thread.start()
        assert called.wait(60)
        webhook.abort()
        thread.join(60)
        assert len(failures) == 1


def test_a_head_of_tls_that_drips_has_the_same_time() -> None:
    """The handshake is as much of the attempt as the answer."""
    with answering(_drip_bytes) as url:
        assert said(url.replace("http:", "https:"), _SECONDS) == f"no answer within {_SECONDS:g} s"


def _drip_bytes(connection: socket.socket, is_over: threading.Event) -> None:
    connection.sendall(b"\x16\x03\x03\x40\x00")  # of a record that never comes whole
    while not is_over.wait(_SECONDS / 10):
        connection.sendall(b"\0")


@pytest.mark.parametrize("limit", ["99999999999999999999", "-5", "0", "x", ""])
def test_a_limit_that_is_none_is_named(limit: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetuned_daemon.main", "notify", "log", f"--limit={limit}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "argument --limit: must be" in done.stderr
