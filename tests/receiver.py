"""A server that takes webhooks, for tests: it keeps what it got, and answers as it is told."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections import defaultdict
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from daemon_process import eventually


@dataclass(frozen=True)
class Post:
    """One request."""

    path: str
    headers: Message
    body: bytes

    @property
    def content(self) -> dict[str, Any]:
        """The notification."""
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def task(self) -> str:
        """The task that it is about."""
        return str(self.content["data"]["task"])

    def is_signed_by(self, secret: str) -> bool:
        """As Standard Webhooks has it, in the words of its specification."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        id_, timestamp = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        signed = f"{id_}.{timestamp}.{self.body.decode()}".encode()
        expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ")


class Receiver:
    """Serves on a port of loopback until it is closed."""

    def __init__(self) -> None:
        self.posts: dict[str, list[Post]] = defaultdict(list)
        """By the path, without its query, in the order in which they came."""
        self.answers: dict[str, list[int]] = defaultdict(list)
        """Statuses that come next, by path; then 204. 0: none, until `let_go`."""
        self.let_go = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                path = self.path.partition("?")[0]
                answers = receiver.answers[path]
                status = answers.pop(0) if answers else 204
                receiver.posts[path].append(Post(self.path, self.headers, body))
                if not status:
                    receiver.let_go.wait(60)
                    return
                self.send_response(status)
                if status == 302:
                    self.send_header("location", f"{receiver.url}/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def wait(self, path: str, task: str, number: int = 1) -> list[Post]:
        """All that came there about a task, once there are so many."""

        def look() -> list[Post] | None:
            found = [post for post in self.posts[path] if post.task == task]
            return found if len(found) >= number else None

        return eventually(look, f"{number} notifications at {path}")

    def close(self) -> None:
        self.let_go.set()
        self._server.shutdown()
        self._server.server_close()
