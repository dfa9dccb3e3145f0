"""Who may call what: the one table, and the check that every call passes.

On the unix socket everything is allowed: the folder's mode is the wall. Anybody on the machine, and
any web page, reaches TCP, so there each call shows a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from finetuned_daemon.errors import Forbidden, Unauthenticated
from finetuned_daemon.tokens import Tokens

T = TypeVar("T")

_CHECK_SECONDS = 1.0


class Need(StrEnum):
    """What a call needs on TCP."""

    READ = "READ"
    """The read-only token is enough: it changes nothing, and opens no file that the caller names.
    """
    WRITE = "WRITE"
    """The token for everything."""


@dataclass(frozen=True)
class Rule:
    """What one rpc needs, and why."""

    need: Need
    why: str


def _read(why: str) -> Rule:
    return Rule(Need.READ, why)


def _write(why: str) -> Rule:
    return Rule(Need.WRITE, why)


_NAMES_FILES = "opens files that the caller names"

# Every rpc that is served; a test holds it to the services. What is not here is refused.
SERVICES: dict[str, dict[str, Rule]] = {
    "finetuned.v1.TaskService": {
        "CreateTask": _write("makes a task"),
        "GetTask": _read("a task and its parameters"),
        "ListTasks": _read("tasks and their parameters"),
        "UpdateTask": _write("changes a task"),
        "DeleteTask": _write("removes a task, and its outputs where asked to"),
        "StartTask": _write("starts a process"),
        "StopTask": _write("ends a run"),
        "PauseTask": _write("takes the device from a run"),
        "ResumeTask": _write("puts a run back into the queue"),
        "MoveTask": _write("changes the queue"),
        "WatchTask": _read("events and log lines of a task"),
        "WatchTasks": _read("tasks, without their parameters"),
        "GetMetrics": _read("curves of a run"),
        "ListRuns": _read("runs of a task"),
        "ListCheckpoints": _read("checkpoints that runs have recorded"),
        "DeleteCheckpoint": _write("removes a checkpoint"),
        "ListEvents": _read("events and log lines of a task"),
        "ExportTaskConfig": _read("a task's parameters as a file"),
    },
    "finetuned.v1.TemplateService": {
        "CreateTemplate": _write("makes a template"),
        "GetTemplate": _read("a template"),
        "ListTemplates": _read("templates"),
        "UpdateTemplate": _write("changes a template"),
        "DeleteTemplate": _write("removes a template"),
    },
    "finetuned.v1.ParameterService": {
        "GetParameterSchema": _read("the form of all parameters"),
        "ValidateParameters": _write(_NAMES_FILES),
        "EstimateTask": _write(_NAMES_FILES),
    },
    "finetuned.v1.DatasetService": {
        "InspectDataset": _write(f"{_NAMES_FILES}, and shows samples of them"),
    },
    "finetuned.v1.SystemService": {
        "GetSystemInfo": _read("the daemon's version, folders and limits"),
        "ListDevices": _read("devices and what runs on them"),
        "WatchDevices": _read("the same as a stream"),
        "CheckEnvironment": _read("whether the machine can train"),
        "GetQuota": _read("checkpoints that may still be saved"),
        "Shutdown": _write("ends the daemon"),
    },
    "grpc.health.v1.Health": {
        "Check": _read("whether the daemon serves"),
        "Watch": _read("the same as a stream"),
    },
    "grpc.reflection.v1alpha.ServerReflection": {
        "ServerReflectionInfo": _read("the API's description"),
    },
}

RULES: dict[str, Rule] = {
    f"/{service}/{rpc}": rule for service, rpcs in SERVICES.items() for rpc, rule in rpcs.items()
}
"""The same by gRPC's own names for methods."""


def render() -> str:
    """The table as Markdown, for the docs; a test holds it equal to what is written there."""
    lines = ["| rpc | needs | why |", "|---|---|---|"]
    for service, rpcs in SERVICES.items():
        short = service.rpartition(".")[2]
        lines += [
            f"| `{short}.{rpc}` | {rule.need.value} | {rule.why} |" for rpc, rule in rpcs.items()
        ]
    return "\n".join(lines) + "\n"


class Admission:
    """A call that was let in. Where its token is withdrawn, its stream ends."""

    def __init__(self, access: Access | None, token: bytes, need: Need) -> None:
        self._access = access
        self._token = token
        self._need = need
        self._is_revoked = False
        # The task to interrupt; none while it hands a message to gRPC, which an interruption would
        # leave without a status.
        self._task: asyncio.Task[Any] | None = None

    async def send(
        self, responses: AsyncGenerator[T], write: Callable[[T], Awaitable[None]]
    ) -> None:
        """Sends responses for as long as the token is good.

        Raises:
            Unauthenticated: It was withdrawn meanwhile.
        """
        with self._watched():
            task = self._task
            async with aclosing(responses):
                async for response in responses:
                    self._task = None
                    await write(response)
                    self._task = task
                    if self._is_revoked:
                        raise _withdrawn()

    async def run(self, call: Awaitable[None]) -> None:
        """The same for a handler that sends its responses itself.

        Raises:
            Unauthenticated: The token was withdrawn meanwhile.
        """
        with self._watched():
            await call

    @contextmanager
    def _watched(self) -> Generator[None]:
        if self._access is None:  # the unix socket
            yield
            return
        task = self._task = asyncio.current_task()
        self._access.opened.add(self)
        try:
            yield
        except asyncio.CancelledError:
            if self._is_revoked and task is not None and task.uncancel() == 0:
                self._check()
            raise
        finally:
            self._task = None
            self._access.opened.discard(self)

    def _check(self) -> None:
        if self._is_revoked:
            raise _withdrawn()

    def review(self, tokens: Tokens) -> None:
        """Ends the stream if its token is no longer good for it."""
        if self._is_revoked or _is_enough(tokens, self._token, self._need):
            return
        self._is_revoked = True
        if self._task is not None:
            self._task.cancel()


_OF_UNIX_SOCKET = Admission(None, b"", Need.READ)
"""Of every call there: nothing in it is that call's own, as there is nothing to withdraw."""


class Access:
    """Checks calls by the table and the tokens."""

    def __init__(self, tokens: Tokens | None = None) -> None:
        """Takes the tokens; without them, no TCP is served."""
        self._tokens = tokens
        self.opened: set[Admission] = set()

    def check(self, method: str, metadata: Sequence[tuple[str, Any]], *, is_tcp: bool) -> Admission:
        """Lets a call in.

        Args:
            method: gRPC's name for it, `/package.Service/Rpc`.
            metadata: What the caller sent.
            is_tcp: Whether it came by TCP, and not by the unix socket.

        Raises:
            Unauthenticated: It shows no token, or one that is not known.
            Forbidden: Its token is not enough, it comes from a web page, or nobody has said what
                the method needs.
        """
        rule = _rule(method)
        if not is_tcp:
            return _OF_UNIX_SOCKET
        tokens = self._known_tokens()
        if tokens.refresh():
            self._review(tokens)
        return self._let_in(tokens, method, rule.need, metadata)

    def check_headers(self, method: str, metadata: Sequence[tuple[str, Any]]) -> None:
        """The same by the headers alone, of a call by TCP whose message has not come yet.

        `check` comes once it is there. So here the token files are looked at only where a token is
        not the one that was known.

        Raises:
            Unauthenticated: As `check`.
            Forbidden: As `check`.
        """
        rule = _rule(method)
        tokens = self._known_tokens()
        try:
            self._let_in(tokens, method, rule.need, metadata)
        except (Unauthenticated, Forbidden):
            if not tokens.refresh():
                raise
            self._review(tokens)
            self._let_in(tokens, method, rule.need, metadata)

    def _known_tokens(self) -> Tokens:
        if self._tokens is None:
            raise Unauthenticated("TOKEN_WRONG", "this daemon has no token, so nobody may call it")
        return self._tokens

    def _let_in(
        self, tokens: Tokens, method: str, need: Need, metadata: Sequence[tuple[str, Any]]
    ) -> Admission:
        shown, is_of_a_page = list[str](), False
        for key, value in metadata:
            if key == "authorization":
                shown.append(str(value))
            # Browsers send these and let no page change them; nothing else that speaks gRPC does.
            elif key == "origin" or key.startswith("sec-fetch-"):
                is_of_a_page = True
        scheme, _, token = shown[0].partition(" ") if len(shown) == 1 else ("", "", "")
        presented = token.strip().encode() if scheme.lower() == "bearer" else b""
        if not tokens.may_read(presented):
            raise _refused(bool(shown))
        if is_of_a_page:
            raise Forbidden("BROWSER", "no web page may call the daemon")
        if need is not Need.READ and not tokens.may_do_everything(presented):
            raise Forbidden(
                "READ_ONLY_TOKEN",
                f"the read-only token does not let you call {method.rpartition('/')[2]}; it needs "
                "the token of the file `token`",
            )
        return Admission(self, presented, need)

    @asynccontextmanager
    async def watched(self) -> AsyncGenerator[None]:
        """Within it, streams end soon after their token was withdrawn; calls look themselves."""
        if self._tokens is None:
            yield
            return
        watching = asyncio.create_task(self._watch(self._tokens))
        try:
            yield
        finally:
            watching.cancel()

    async def _watch(self, tokens: Tokens) -> None:
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            tokens.refresh(anyway=True)
            self._review(tokens)

    def _review(self, tokens: Tokens) -> None:
        for admission in tuple(self.opened):
            admission.review(tokens)


def _rule(method: str) -> Rule:
    """What a method needs.

    Raises:
        Forbidden: Nobody has said.
    """
    rule = RULES.get(method)
    if rule is None:
        raise Forbidden("METHOD_NOT_LISTED", "the daemon lets nobody call this method")
    return rule


def _is_enough(tokens: Tokens, token: bytes, need: Need) -> bool:
    return tokens.may_read(token) if need is Need.READ else tokens.may_do_everything(token)


def _refused(has_shown: bool) -> Unauthenticated:
    if has_shown:
        return Unauthenticated(
            "TOKEN_WRONG",
            "this is not the daemon's token: it may have been changed; `finetuned token show` on "
            "the daemon's machine prints the present one",
        )
    return Unauthenticated(
        "TOKEN_MISSING",
        "TCP needs the token: metadata `authorization: Bearer TOKEN`, from the file `token` in the "
        "daemon's runtime folder",
    )


def _withdrawn() -> Unauthenticated:
    return Unauthenticated(
        "TOKEN_CHANGED", "the token that this stream came with is no longer the daemon's"
    )
