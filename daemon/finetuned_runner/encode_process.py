"""Processes that read data and make tokens while the run's own process does something else.

They start before torch is imported, and don't import it: they are at work while the model loads. A
process ends when its pipe does, so none outlives the run, however that ends.

A run that was forked of a process that has imported everything forks these too, before it has a
second thread: they are at work at once.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from finetuned_daemon.dataset.formats import Chat, Document
from finetuned_daemon.dataset.reader import BadLine, Place, Stretch, chat_at, scan_documents
from finetuned_daemon.texts import Text
from finetuned_runner.pieces import Piece, pieces_of
from finetuned_runner.survey import BAD_LINES_SHOWN, Survey, survey

MOST_PROCESSES = 8
_NICENESS = 5
"""Once the run trains, the training comes first."""


# --- what can be asked for


@dataclass(frozen=True)
class SurveyChats:
    """A survey of the chats of a stretch; `most` of them at most, 0: all."""

    stretch: Stretch
    most: int


@dataclass(frozen=True)
class EncodeChats:
    """The tokens of chats that a survey has found."""

    places: Sequence[Place]


@dataclass(frozen=True)
class EncodeDocuments:
    """The tokens of the documents of a stretch; or only whether they can be used."""

    stretch: Stretch
    only_check: bool


@dataclass(frozen=True)
class EncodePieces:
    """The tokens of pieces of documents."""

    pieces: Sequence[Piece]


Work = SurveyChats | EncodeChats | EncodeDocuments | EncodePieces


# --- what comes of it


@dataclass(frozen=True)
class Encoded:
    """Chats, or pieces of documents, in tokens, end to end."""

    tokens: bytes
    """As `token_store.pack` gives them."""
    lengths: list[int]
    """Of each chat."""
    first_learned: list[int]
    """As in `token_store.Index`, of each chat."""
    largest: int
    """The largest token id."""


@dataclass(frozen=True)
class EncodedStretch:
    """The documents of a stretch of a file, in tokens, and what of it can't be used."""

    encoded: Encoded
    num_documents: int
    num_lines: int
    bad: list[BadLine]
    num_bad: int


@dataclass(frozen=True)
class CannotEncode:
    """Why no tokens can be made."""

    message: Text
    is_data: bool
    """It is the data, with this tokenizer; else the tokenizer alone."""
    line: int = 0
    """Of the data file; 0: of none."""


@dataclass(frozen=True)
class CannotRead:
    """The data file can't be read; or not any more, as it was when its chats were counted."""

    why: str = ""
    """Of the operating system; empty: something else stands there by now."""


@dataclass(frozen=True)
class Ended:
    """The process ended before it answered."""

    is_out_of_memory: bool
    """It ran out of memory, or was killed while the kernel killed for want of it."""


Answer = Encoded | EncodedStretch | Survey | CannotEncode | CannotRead | Ended


class Encoder:
    """Reads data, and makes tokens, in this process."""

    def __init__(self, tokenizer: Callable[[], Any], data: int) -> None:
        """What works on a data file.

        Args:
            tokenizer: Gives the tokenizer, and is asked when the first tokens are to be made.
            data: Descriptor of the file.
        """
        self._open_tokenizer = tokenizer
        self._data = data
        self._opened: Any = None
        self._mask: Any = None

    def do(self, work: Work) -> Answer:
        """Does what is asked for."""
        try:
            if isinstance(work, SurveyChats):
                return survey(self._data, work.stretch, work.most)
            if isinstance(work, EncodeDocuments) and work.only_check:
                return self._stretch(work)
        except OSError as error:
            return CannotRead(error.strerror or str(error))
        return self._encode(work)

    @property
    def _tokenizer(self) -> Any:
        if self._opened is None:
            self._opened = self._open_tokenizer()
        return self._opened

    def _encode(self, work: Work) -> Answer:
        from finetuned_runner import encoding

        is_chats = isinstance(work, EncodeChats)
        try:
            if isinstance(work, EncodeChats):
                chats = [chat_at(self._data, place) for place in work.places]
                if None in chats:
                    return CannotRead()
                self._mask = self._mask or encoding.chat_mask(self._tokenizer)
                found = cast("list[Chat]", chats)
                return self._chats(encoding.encode_chats(found, self._tokenizer, self._mask))
            if isinstance(work, EncodePieces):
                return self._pieces(work.pieces)
            assert isinstance(work, EncodeDocuments)
            return self._stretch(work)
        except OSError as error:
            return CannotRead(error.strerror or str(error))
        except encoding.UncertainMask as error:
            return CannotEncode(error.message, is_data=True, line=error.line)
        except encoding.TokenizerUnusable as error:
            return CannotEncode(error.message, is_data=is_chats and self._opened is not None)

    @staticmethod
    def _chats(batches: Any) -> Encoded:
        from finetuned_runner.token_store import pack

        parts, lengths, first = list[bytes](), list[int](), list[int]()
        largest = -1
        for batch in batches:
            for chat in batch:
                ids = chat.encoding.ids
                parts.append(pack(ids, chat.learned))
                lengths.append(len(ids))
                # The first token of a sample is never predicted.
                first.append(chat.learned.find(1, 1))
                largest = max(largest, max(ids, default=-1))
        return Encoded(b"".join(parts), lengths, first, largest)

    def _pieces(self, pieces: Any) -> Encoded:
        from finetuned_runner import encoding
        from finetuned_runner.token_store import pack

        end = encoding.end_of_text(self._tokenizer)
        parts = list[bytes]()
        largest = -1
        for batch in encoding.encode_pieces(pieces, self._tokenizer):
            for piece in batch:
                ids = [*piece.encoding.ids, end] if piece.ends else piece.encoding.ids
                parts.append(pack(ids, None))
                largest = max(largest, max(ids, default=-1))
        return Encoded(b"".join(parts), [], [], largest)

    def _stretch(self, work: EncodeDocuments) -> EncodedStretch:
        found = _Documents(self._data, work.stretch)
        if work.only_check:
            for _ in found:
                pass
            encoded = Encoded(b"", [], [], -1)
        else:
            encoded = self._pieces(piece for document in found for piece in pieces_of(document))
        return EncodedStretch(encoded, found.count, found.num_lines, found.bad, found.num_bad)


@dataclass
class _Documents:
    """The documents of a stretch, up to its first bad line, while everything is counted."""

    data: int
    stretch: Stretch
    count: int = 0
    num_lines: int = 0
    num_bad: int = 0
    bad: list[BadLine] = field(default_factory=list)

    def __iter__(self) -> Any:
        for item in scan_documents(self.data, self.stretch):
            if isinstance(item, Document):
                self.count += 1
                if not self.num_bad:  # else no tokens are wanted any more
                    yield item
            elif isinstance(item, BadLine):
                self.num_bad += 1
                if len(self.bad) < BAD_LINES_SHOWN:
                    self.bad.append(item)
            else:
                self.num_lines = item


# --- processes


class EncodeProcess:
    """A process that works on a data file, and the thread that gives it work."""

    def __init__(
        self,
        tokenizer: str,
        data: int,
        take: Callable[[], tuple[Any, Work] | None],
        give: Callable[[Any, Answer], None],
        is_waited_for: Callable[[], bool],
    ) -> None:
        """Starts it.

        Args:
            tokenizer: Folder of the tokenizer.
            data: Descriptor of the data file.
            take: Gives the next work, with what tells it from other; None: there is no more.
            give: Takes what became of it. Both are called in the thread of this process.
            is_waited_for: Whether the run can't go on without what is made.
        """
        with _guard:
            self._process, self._pipe = _ready.pop() if _ready else _spawn()
        _send_data(self._pipe, tokenizer, data)
        self._oom_kills = _oom_kills()
        self._take, self._give, self._is_waited_for = take, give, is_waited_for
        threading.Thread(target=self._run, name="encode", daemon=True).start()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            what, work = taken
            try:
                self._pipe.send((work, self._is_waited_for()))
                answer: Answer = self._pipe.recv()
            except (EOFError, OSError):
                answer = self._end()
            self._give(what, answer)
        self._pipe.close()
        self._process.join()

    def _end(self) -> Ended:
        self._process.join()
        status = self._process.exitcode
        if status == -signal.SIGKILL:
            return Ended(_oom_kills() != self._oom_kills)
        return Ended(status == _OUT_OF_MEMORY)


_OUT_OF_MEMORY = 12
"""Exit status of a process that could get no more memory."""

_ready: list[tuple[BaseProcess, Connection]] = []
"""Processes that were forked ahead, and nobody has taken yet."""
_guard = threading.Lock()


def most_processes() -> int:
    """How many processes a large file is worth."""
    return max(2, min(MOST_PROCESSES, (os.cpu_count() or 2) // 2))


def fork_ahead() -> None:
    """Forks the processes of a run to come; for a process that has one thread, and torch in it.

    They inherit its mask: SIGTERM, which goes to all of a run, must be blocked.
    """
    context = multiprocessing.get_context("fork")
    for _ in range(most_processes()):
        ours, theirs = context.Pipe()
        others = [ours, *(pipe for _, pipe in _ready)]
        process = context.Process(target=_forked, args=(theirs, others), name="encode", daemon=True)
        process.start()
        theirs.close()
        _ready.append((process, ours))


def let_go() -> None:
    """Ends processes that were forked ahead, and that no file has needed."""
    with _guard:
        left, _ready[:] = _ready[:], []
    for process, pipe in left:
        pipe.close()
        process.join()


def _spawn() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_spawned, args=(theirs,), name="encode", daemon=True)
    # It opens the mask of the thread that starts it, which later threads and processes inherit.
    resource_tracker.ensure_running()
    _block_sigterm()
    process.start()
    theirs.close()
    return process, ours


def _spawned(pipe: Connection) -> None:
    from finetuned_runner.environment import prepare_without_torch

    prepare_without_torch()
    _work(pipe)


def _forked(pipe: Connection, others: Sequence[Connection]) -> None:
    for other in others:  # else it would hold open what tells the others of the run's end
        other.close()
    _work(pipe)


@atexit.register  # before multiprocessing's own, which sends a SIGTERM, and waits
def _end_all() -> None:
    for process in multiprocessing.active_children():
        if process.name == "encode":
            process.kill()


def _oom_kills() -> str:
    """How often the kernel killed for want of memory, as it says; it counts before it kills."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    return next((line for line in lines if line.startswith("oom_kill ")), "")


def _block_sigterm() -> None:
    """A SIGTERM is the run's own process's to heed, which may want to save: see `control`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _send_data(pipe: Connection, tokenizer: str, data: int) -> None:
    try:
        pipe.send(tokenizer)
        with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
            # The descriptor and not the path: another file may take its place.
            socket.send_fds(channel, [b"\0"], [data])
    except OSError:  # it has ended: said when it is given work
        return


def _receive_data(pipe: Connection) -> tuple[str, int]:
    tokenizer: str = pipe.recv()
    with socket.socket(fileno=os.dup(pipe.fileno())) as channel:
        _, (data,), _, _ = socket.recv_fds(channel, 1, 1)
    return tokenizer, data


def _work(pipe: Connection) -> None:
    """Answers until the pipe ends."""
    _block_sigterm()
    try:
        tokenizer, data = _receive_data(pipe)
    except (EOFError, OSError, ValueError):  # nobody needs it
        return
    is_nice = False

    def open_tokenizer() -> Any:
        from finetuned_runner import encoding

        return encoding.open_tokenizer(tokenizer)

    encoder = Encoder(open_tokenizer, data)
    while True:
        try:
            work, is_waited_for = pipe.recv()
            if not (is_waited_for or is_nice):
                os.nice(_NICENESS)
                is_nice = True
            pipe.send(encoder.do(work))
        except (EOFError, BrokenPipeError):
            return
        except MemoryError:
            sys.exit(_OUT_OF_MEMORY)
