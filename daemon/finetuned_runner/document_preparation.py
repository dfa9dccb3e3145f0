"""From a file of documents to blocks of tokens.

All tokens are needed before the first step: the order of the blocks, and the schedule, depend on
how many there are. Several processes make them, each of a stretch of the file at a time.

Nothing here imports torch or, in this process, transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from finetuned_daemon.dataset.formats import Document
from finetuned_daemon.dataset.reader import (
    BadLine,
    Stretch,
    is_plain_text,
    read_documents,
    stretches,
)
from finetuned_daemon.runs.contract import EndReason, Spec
from finetuned_runner.encode_process import (
    MOST_PROCESSES,
    Answer,
    Encoded,
    EncodeDocuments,
    EncodedStretch,
    EncodePieces,
    Work,
)
from finetuned_runner.failures import RunFailed
from finetuned_runner.pieces import Piece, pieces_of
from finetuned_runner.preparation import (
    BATCH_CHARACTERS,
    STRETCH,
    Check,
    Preparation,
    check_lines,
    unreadable,
)
from finetuned_runner.report import Report
from finetuned_runner.samples import Blocks
from finetuned_runner.survey import BAD_LINES_SHOWN
from finetuned_runner.token_store import Index

_MOST_PIECES = 256


class DocumentPreparation(Preparation):
    """Documents, one after the other, each with the end-of-text token."""

    def __init__(self, spec: Spec, report: Report, file: Path, limit: int) -> None:
        self._work: Iterator[Work] = iter(())
        self._taken = self._added = 0
        self._is_all_taken = False
        self._early: dict[int, Answer] = {}
        """What came before its turn."""
        self._before: os.stat_result | None = None
        """Of the file, where it is gone through in stretches."""
        self._num_documents = self._num_lines = self._num_bad = 0
        self._bad: list[BadLine] = []
        super().__init__(spec, report, file, limit)

    def samples(self, tokenizer: Any, max_length: int, check: Check) -> Blocks:
        """Blocks of `max_length` tokens; all are there.

        Raises:
            RunFailed: DATASET_INVALID, where the file can't be used or holds no text;
                MODEL_UNLOADABLE without an end-of-text token.
        """
        self._begin_to_check(check)
        self._make_here(tokenizer)
        self._wait_for(lambda: self._is_complete, self._how_far)
        assert self._store is not None
        blocks = Blocks(self._store, max_length)
        if not len(blocks):
            raise RunFailed(EndReason.DATASET_INVALID, "The training data holds no text.")
        return blocks

    def _how_far(self) -> str:
        return f"{self._store.num_tokens:,} tokens" if self._store else self._file.name

    def _read(self, before: os.stat_result) -> None:
        parts = list[Stretch]()
        try:
            if not (self._is_local or self._limit or is_plain_text(self._file)):
                parts = stretches(self._data, before.st_size, STRETCH)
        except OSError as error:
            raise unreadable(self._file, error) from error
        if len(parts) > 1:
            self._before = before
            # Once a line can't be used, it is only asked which others can't.
            work: Iterator[Work] = (EncodeDocuments(part, bool(self._num_bad)) for part in parts)
        else:
            documents = _collect(self._file, read_documents(self._file), self._limit)
            self._check_unchanged(before)
            pieces = (piece for document in documents for piece in pieces_of(document))
            work = map(EncodePieces, _batches(pieces))
        with self._changed:
            self._work = work

    def _process_count(self, size: int) -> int:
        count = super()._process_count(size)
        # The run waits for them.
        return count if count == 1 else max(count, min(MOST_PROCESSES, os.cpu_count() or 1))

    def _take_over(self, index: Index) -> None:
        pass

    def _index(self) -> Index:
        return Index.empty(())

    def _take(self) -> tuple[int, Work] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_read or self._failure)
            work = None if self._failure else next(self._work, None)
            if work is None:
                self._is_all_taken = True
                self._end()
                return None
            self._taken += 1
            return self._taken - 1, work

    def _add(self, what: int, answer: Answer) -> None:
        assert self._store is not None
        self._early[what] = answer
        while (due := self._early.pop(self._added, None)) is not None:
            if isinstance(due, EncodedStretch):
                self._count(due)
                due = due.encoded
            assert isinstance(due, Encoded)
            if not self._num_bad:
                self._see(due)
                self._store.append(due.tokens)
            self._added += 1
        self._end()

    def _count(self, part: EncodedStretch) -> None:
        room = BAD_LINES_SHOWN - len(self._bad)
        self._bad += [replace(bad, line=bad.line + self._num_lines) for bad in part.bad[:room]]
        self._num_bad += part.num_bad
        self._num_documents += part.num_documents
        self._num_lines += part.num_lines

    def _end(self) -> None:
        done = self._is_all_taken and self._added == self._taken
        if done and not self._is_complete and self._failure is None:
            if self._before is not None:
                check_lines(self._file, self._bad, self._num_bad, self._num_documents)
                self._check_unchanged(self._before)
            self._complete()
            self._changed.notify_all()


# --- parts


def _collect(path: Path, items: Iterator[Document | BadLine], limit: int) -> list[Document]:
    """The documents of a file, if all can be used.

    Raises:
        RunFailed: DATASET_INVALID, naming the first lines that can't be used.
    """
    good: list[Document] = []
    bad: list[BadLine] = []
    try:
        for item in islice(items, limit or None):
            if isinstance(item, BadLine):
                bad.append(item)
            else:
                good.append(item)
    except OSError as error:
        raise unreadable(path, error) from error
    check_lines(path, bad, len(bad), len(good))
    return good


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_CHARACTERS or len(batch) >= _MOST_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
