"""Asks a process of the training environment about data: the daemon itself has no tokenizer.

A process a question, `runner_python -P -m finetuned_runner --inspect`, in a process group of its
own, which ends with the question. It takes half a second to start, so that measurements, which
front-ends ask for again and again, are remembered. So is a template that left it uncertain what is
learned, for a check and a start, which ask no process; who asks for a measurement gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import Process
from collections import OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetuned_daemon.config import Config
from finetuned_daemon.dataset.report import (
    ANSWER,
    Failure,
    InspectRequest,
    Measured,
    MeasureRequest,
    Progress,
    Report,
)
from finetuned_daemon.errors import InvalidRequest, Stopping, Violation, WrongState
from finetuned_daemon.limits import Limits
from finetuned_daemon.validation.paths import own_folders

_REMEMBERED = 64
_LONGEST_LINE = 32 << 20
_LAST_WORDS = 8192
"""Bytes kept of what a process writes to stderr."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    # What a fast tokenizer is made of where there is no tokenizer.json.
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)

_Identity = tuple[str, int, int, int]
_Key = tuple[MeasureRequest, tuple[_Identity | None, ...]]


@dataclass
class _Shared:
    """A measurement that is under way, and how many wait for it."""

    answer: asyncio.Future[Measured]
    askers: int = 0


class Worker:
    """Questions about data, two at once at most."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.own_folders = own_folders(config.paths)
        self._limits = Limits(config.limits)
        self._asked = 0
        self._processes: set[Process] = set()
        self._measured: OrderedDict[_Key, Measured] = OrderedDict()
        self._shared: dict[_Key, _Shared] = {}
        self._refused: OrderedDict[_Key, Violation] = OrderedDict()
        self._is_closed = False

    @property
    def asked(self) -> int:
        """Questions that are being answered."""
        return self._asked

    async def measure(self, request: MeasureRequest) -> Measured:
        """The samples that a run would train on.

        Raises:
            InvalidRequest: A file holds no samples or bad lines, or the tokenizer can't read them.
            LimitReached: Two questions are being answered.
            WrongState: The training environment can't answer.
            Stopping: The daemon ends.
        """
        key = await asyncio.to_thread(_identify, request)
        known = self._measured.get(key)
        if known is not None:
            self._measured.move_to_end(key)
            return known
        shared = self._shared.get(key)
        if shared is None:
            shared = self._shared[key] = _Shared(asyncio.ensure_future(self._measure(key, request)))
            shared.answer.add_done_callback(lambda _: self._shared.pop(key, None))
        shared.askers += 1
        try:
            return await asyncio.shield(shared.answer)
        finally:
            shared.askers -= 1
            if not shared.askers and not shared.answer.done():
                # Nobody waits any more: the process ends with the question.
                shared.answer.cancel()
                await asyncio.wait([shared.answer])

    async def refused(self, request: MeasureRequest) -> list[Violation]:
        """What a measurement or an inspection of the same files found, where it was refused.

        Of templates alone that leave it uncertain what is learned. Nothing is read, and nobody
        asked: empty where it is not known.
        """
        if not self._refused:
            return []
        # An inspection is of the training file alone.
        for asked in (request, request.model_copy(update={"eval_file": None})):
            known = self._refused.get(await asyncio.to_thread(_identify, _any_length(asked)))
            if known is not None:
                return [known]
        return []

    async def _measure(self, key: _Key, request: MeasureRequest) -> Measured:
        async with contextlib.aclosing(self._ask(request)) as answers:
            async for answer in answers:
                if isinstance(answer, Measured):
                    if await asyncio.to_thread(_identify, request) == key:
                        self._remember(key, answer)
                    return answer
        raise AssertionError("a question ends with an answer or an error")

    async def inspect(self, request: InspectRequest) -> AsyncGenerator[Progress | Report]:
        """Reads a whole file: how far it is, and last the report. Close it to end the process.

        Raises:
            InvalidRequest: The file can't be read.
            LimitReached: Two questions are being answered.
            WrongState: The training environment can't answer.
            Stopping: The daemon ends.
        """
        async with contextlib.aclosing(self._ask(request)) as answers:
            async for answer in answers:
                if not isinstance(answer, Measured):
                    yield answer

    async def close(self) -> None:
        """Ends all processes; whoever waits for an answer is told that the daemon stops."""
        self._is_closed = True
        for process in list(self._processes):
            await _end(process)

    async def _note(
        self, before: _Key, request: MeasureRequest, answer: Report | Measured | Failure
    ) -> None:
        """Remembers that files were refused, or that they are not any more."""
        if await asyncio.to_thread(_identify, request) != before:
            return
        self._refused.pop(before, None)
        if isinstance(answer, Failure) and answer.is_uncertain:
            found = Violation(answer.field, answer.message, answer.reason)
        elif isinstance(answer, Report) and answer.is_uncertain:
            text = answer.tokenizer_problem
            found = Violation("data.tokenizer_path", text, "TOKENIZER_UNUSABLE")
        else:
            return
        self._refused[before] = found
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)

    def _remember(self, key: _Key, measured: Measured) -> None:
        self._measured[key] = measured
        if len(self._measured) > _REMEMBERED:
            self._measured.popitem(last=False)

    async def _ask(
        self, request: InspectRequest | MeasureRequest
    ) -> AsyncGenerator[Progress | Report | Measured]:
        """Answers as they come; the last one is a report or a measurement."""
        files = _any_length(request)
        before = await asyncio.to_thread(_identify, files)
        if self._is_closed:
            raise Stopping
        self._limits.check("data_questions", self._asked)
        self._asked += 1
        try:
            process = await self._start()
            self._processes.add(process)
            last_words = asyncio.ensure_future(_last_words(process))
            try:
                async for answer in _answers(process, request):
                    if not isinstance(answer, Progress):
                        await self._note(before, files, answer)
                    if isinstance(answer, Failure):
                        violation = Violation(answer.field, answer.message, answer.reason)
                        raise InvalidRequest([violation])
                    yield answer
                    if not isinstance(answer, Progress):
                        return
                await process.wait()
            finally:
                self._processes.discard(process)
                await _end(process)
                words = await last_words
            if self._is_closed:
                raise Stopping
            raise _crashed(process.returncode, words)
        finally:
            self._asked -= 1

    async def _start(self) -> Process:
        config = self._config
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")}
        try:
            return await asyncio.create_subprocess_exec(
                *(config.runner_python, "-P", "-m", "finetuned_runner", "--inspect"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=_LONGEST_LINE,
                env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                cwd=config.paths.state_dir,
                start_new_session=True,
            )
        except OSError as error:
            raise _not_ready(f"{config.runner_python}: {error.strerror}") from error


async def _answers(
    process: Process, request: InspectRequest | MeasureRequest
) -> AsyncGenerator[Progress | Report | Measured | Failure]:
    assert process.stdin is not None
    assert process.stdout is not None
    # One that ends at once leaves a broken pipe: why, it says on stderr.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        await process.stdin.drain()
    # stdin stays open: its end tells the process that the daemon is gone.
    async for line in process.stdout:
        try:
            yield ANSWER.validate_json(line)
        except ValidationError as error:
            raise _not_ready(
                f"{line[:200]!r} is no answer: is finetuned there of the same version?"
            ) from error


async def _last_words(process: Process) -> str:
    """The last line that a process writes to stderr before it ends."""
    assert process.stderr is not None
    words = b""
    while piece := await process.stderr.read(_LAST_WORDS):
        words = (words + piece)[-_LAST_WORDS:]
    lines = words.decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


async def _end(process: Process) -> None:
    """Kills a process with its group, where it has not ended, and waits for it."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _crashed(status: int | None, last_words: str) -> WrongState:
    if status is not None and status < 0:
        how = f"signal {signal.Signals(-status).name}"
    else:
        how = f"exit status {status}"
    return _not_ready(f"{last_words} ({how})" if last_words else how)


def _not_ready(why: str) -> WrongState:
    return WrongState(
        "environment",
        "ENVIRONMENT_NOT_READY",
        f"the training environment can't read the data: {why}",
    )


def _any_length(request: InspectRequest | MeasureRequest) -> MeasureRequest:
    """The files of a question, whatever length samples are cut to."""
    if isinstance(request, MeasureRequest):
        return request.model_copy(update={"max_seq_length": 0})
    return MeasureRequest(
        training_type=request.training_type,
        train_file=request.path,
        tokenizer_path=request.tokenizer_path,
        max_seq_length=0,
        max_samples=request.max_samples,
    )


def _identify(request: MeasureRequest) -> _Key:
    """A question, and the files as they are on which its answer depends."""
    folder = Path(request.tokenizer_path)
    paths = [request.train_file, *([request.eval_file] if request.eval_file else [])]
    paths += [str(folder / name) for name in _TOKENIZER_FILES]
    return request, tuple(_identity(path) for path in paths)


def _identity(path: str) -> _Identity | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - one call for a dozen files, many times a minute
    except OSError:
        return None  # the process says so, if it matters
    return path, status.st_size, status.st_mtime_ns, status.st_ino
