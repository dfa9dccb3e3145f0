"""Processes that make tokens while the run's own process does something else.

They start before torch is imported, and don't import it: they are at work while the model loads. A
process ends when its pipe does, so none outlives the run, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from finetuned_daemon.dataset.formats import Chat
from finetuned_daemon.texts import Text
from finetuned_runner.pieces import Piece

_NICENESS = 5
"""The training itself comes first."""

Work = Sequence[Chat | Piece]
"""Chats, or pieces of documents."""


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
class CannotEncode:
    """Why no tokens can be made."""

    message: Text
    is_data: bool
    """It is the data, with this tokenizer; else the tokenizer alone."""
    line: int = 0
    """Of the data file; 0: of none."""


Answer = Encoded | CannotEncode


class Encoder:
    """Makes tokens in this process."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._mask: Any = None

    def encode(self, work: Work) -> Answer:
        """Makes tokens of some chats, or pieces of documents."""
        from finetuned_runner import encoding

        chats = [item for item in work if isinstance(item, Chat)]
        try:
            if chats:
                self._mask = self._mask or encoding.chat_mask(self._tokenizer)
                return self._chats(encoding.encode_chats(chats, self._tokenizer, self._mask))
            pieces = [item for item in work if isinstance(item, Piece)]
            end = encoding.end_of_text(self._tokenizer)
            return self._pieces(encoding.encode_pieces(pieces, self._tokenizer), end)
        except encoding.UncertainMask as error:
            return CannotEncode(error.message, is_data=True, line=error.line)
        except encoding.TokenizerUnusable as error:
            return CannotEncode(error.message, is_data=bool(chats))

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

    @staticmethod
    def _pieces(batches: Any, end: int) -> Encoded:
        from finetuned_runner.token_store import pack

        parts = list[bytes]()
        largest = -1
        for batch in batches:
            for piece in batch:
                ids = [*piece.encoding.ids, end] if piece.ends else piece.encoding.ids
                parts.append(pack(ids, None))
                largest = max(largest, max(ids, default=-1))
        return Encoded(b"".join(parts), [], [], largest)


class EncodeProcess:
    """A process that makes tokens, and the thread that gives it work."""

    def __init__(
        self,
        tokenizer: str,
        take: Callable[[], tuple[Any, Work] | None],
        give: Callable[[Any, Answer], None],
    ) -> None:
        """Starts it.

        Args:
            tokenizer: Folder of the tokenizer.
            take: Gives the next work, with what tells it from other; None: there is no more.
            give: Takes what became of it. Both are called in the thread of this process.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_work, args=(theirs, tokenizer), name="encode", daemon=True
        )
        self._process.start()
        theirs.close()
        self._take, self._give = take, give
        threading.Thread(target=self._run, name="encode", daemon=True).start()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            what, work = taken
            try:
                self._pipe.send(work)
                answer: Answer = self._pipe.recv()
            except (EOFError, OSError):
                answer = CannotEncode(_ENDED, is_data=False)
            self._give(what, answer)
        self._pipe.close()
        self._process.join()


_ENDED = Text(
    "The process that makes tokens of the data ended; was there too little memory?",
    "为数据分词的进程已意外结束；是否内存不足？",
)


def _work(pipe: Connection, tokenizer_path: str) -> None:
    """Answers until the pipe ends."""
    from finetuned_runner.environment import prepare_without_torch

    prepare_without_torch()
    os.nice(_NICENESS)
    from finetuned_runner import encoding

    encoder: Encoder | None = None
    refusal: CannotEncode | None = None
    try:
        encoder = Encoder(encoding.open_tokenizer(tokenizer_path))
    except encoding.TokenizerUnusable as error:
        refusal = CannotEncode(error.message, is_data=False)
    while True:
        try:
            work: Work = pipe.recv()
            answer = encoder.encode(work) if encoder else refusal
            pipe.send(answer)
        except (EOFError, BrokenPipeError):
            return
