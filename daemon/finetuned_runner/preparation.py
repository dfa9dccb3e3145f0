"""From a data file to samples, beside everything else: begun before torch is imported.

Tokens come from the cache, or are made by processes that go on while the run trains. What has to be
known before the first step is how many samples there are, for the schedule depends on it: so those
chats come first of which it isn't certain that an answer stands within the length they are cut to.
One chat of each kind comes before all, so that a template that doesn't work shows at once.

Nothing here imports torch or, in this process, transformers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from finetuned_daemon.dataset.formats import Chat, Document, message_text
from finetuned_daemon.dataset.reader import BadLine, read_chats, read_documents
from finetuned_daemon.runs.contract import EndReason, RunPhase, Spec
from finetuned_runner.encode_process import Answer, CannotEncode, Encoded, EncodeProcess, Encoder
from finetuned_runner.failures import RunFailed
from finetuned_runner.pieces import Piece, pieces_of
from finetuned_runner.report import Report
from finetuned_runner.samples import Blocks, Chats, Samples
from finetuned_runner.token_store import Index, TokenCache, TokenStore

_BAD_LINES_SHOWN = 5
_BATCH = 64
_BATCH_CHARACTERS = 1 << 18
_MOST_KINDS = 1000
_REPORT_SECONDS = 2.0
_SMALL_FILE = 256 << 10
"""Bytes; for less it isn't worth the second that a process takes to start."""
_LARGE_FILE = 4 << 20
"""Bytes; from here on more than one process."""
_MOST_PROCESSES = 8

_logger = logging.getLogger(__name__)
_Item = TypeVar("_Item", Chat, Document)

Check = Callable[[int], None]
"""Raises RunFailed where a token id is more than the model knows."""


class Preparation:
    """The samples of one data file in the making."""

    def __init__(self, spec: Spec, report: Report, file: Path, limit: int) -> None:
        """Begins, in a thread. What goes wrong comes up where the samples are asked for."""
        data = spec.parameters.data
        self._report = report
        self._file = file
        self._limit = limit
        self._tokenizer_path = data.tokenizer_path or data.model_path or ""
        self._cache_dir = Path(spec.cache_dir) if spec.cache_dir else report.run_dir / "tokens"
        self.sha256 = ""
        """Of the data file as it was read, once samples are there."""
        self._changed = threading.Condition()
        # All that follows is guarded by it.
        self._failure: BaseException | None = None
        self._is_read = False
        self._is_complete = False
        self._store: TokenStore | None = None
        self._largest = -1
        self._check: Check | None = None
        self._is_local = True
        self._keep: Callable[[], None] = lambda: None
        threading.Thread(target=self._begin, name="preparation", daemon=True).start()

    # --- in the thread

    def _begin(self) -> None:
        try:
            self._look_and_read()
        except BaseException as error:  # noqa: BLE001 - raised again where samples are asked for
            self._fail(error)

    def _look_and_read(self) -> None:
        cache = self._open_cache()
        try:
            before = self._file.stat()
            with self._file.open("rb") as data:
                self.sha256 = hashlib.file_digest(data, "sha256").hexdigest()
            key = cache.key(
                self.sha256,
                Path(self._tokenizer_path),
                kind=type(self).__name__,
                max_samples=self._limit,
            )
        except OSError as error:
            raise _unreadable(self._file, error) from error
        found = cache.find(key)
        if found:
            with self._changed:
                self._store, index, self._largest = found
                self._take_over(index)
                self._is_read = self._is_complete = True
                self._changed.notify_all()
            return
        store = cache.begin()
        self._is_local = before.st_size < _SMALL_FILE
        if not self._is_local:
            self._start_processes(before.st_size)
        with self._changed:
            self._store = store
            self._keep = lambda: cache.keep(key, store, self._index(), self._largest)
        self._read(before)
        with self._changed:
            self._is_read = True
            self._changed.notify_all()

    def _check_unchanged(self, before: os.stat_result) -> None:
        """Raises RunFailed where the file isn't the one whose hash was taken."""
        after = self._file.stat()
        if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
            raise RunFailed(
                EndReason.DATASET_INVALID,
                f"{self._file} was written to while it was read; start again when it is whole.",
            )

    def _open_cache(self) -> TokenCache:
        try:
            return TokenCache(self._cache_dir)
        except OSError as error:  # the run doesn't need one; it needs a place for its tokens
            _logger.warning("tokens are not kept: %s", error)
            return TokenCache(self._report.run_dir / "tokens")

    def _start_processes(self, size: int) -> None:
        count = 1
        if size >= _LARGE_FILE:
            count = max(2, min(_MOST_PROCESSES, (os.cpu_count() or 2) // 2))
        for _ in range(count):
            EncodeProcess(self._tokenizer_path, self._take, self._give)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()

    # --- in the threads of the processes, or where there are none in that of the caller

    def _take(self) -> tuple[Any, Any] | None:
        """The next work; waits for it. None: there is no more."""
        raise NotImplementedError

    def _give(self, what: Any, answer: Answer) -> None:
        try:
            if isinstance(answer, CannotEncode):
                raise self._cannot(answer)
            with self._changed:
                self._largest = max(self._largest, answer.largest)
                if self._check:
                    self._check(self._largest)
                self._add(what, answer)
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again where samples are asked for
            self._fail(error)

    def _cannot(self, answer: CannotEncode) -> RunFailed:
        reason = EndReason.DATASET_INVALID if answer.is_data else EndReason.MODEL_UNLOADABLE
        lines = [answer.line] if answer.line else []
        return RunFailed(
            reason,
            f"{answer.message.en}.",
            samples=lines,
            file=str(self._file),
            field="data.tokenizer_path" if answer.is_data else "",
        )

    # --- what kinds of data differ in

    def _take_over(self, index: Index) -> None:
        raise NotImplementedError

    def _index(self) -> Index:
        raise NotImplementedError

    def _read(self, before: os.stat_result) -> None:
        """Reads the file; hands nothing out unless it is still as it was `before`."""
        raise NotImplementedError

    def _add(self, what: Any, answer: Encoded) -> None:
        raise NotImplementedError

    # --- for the recipe

    def close(self) -> None:
        """The run is over: what was made and not kept goes."""
        if self._store is not None:
            TokenCache.drop(self._store)

    def samples(self, tokenizer: Any, max_length: int, check: Check) -> Samples:
        """The samples, of at most `max_length` tokens.

        Raises:
            RunFailed: The file can't be used.
        """
        raise NotImplementedError

    def _wait_for(self, holds: Callable[[], bool], told: Callable[[], str]) -> None:
        """Waits, and tells how far it is. Raises what ended the preparation."""
        with self._changed:
            while not holds() and self._failure is None:
                said = time.monotonic()
                self._changed.wait(_REPORT_SECONDS)
                if not holds() and time.monotonic() - said >= _REPORT_SECONDS:
                    self._report.phase(RunPhase.PREPARING_DATA, told())
            if self._failure is not None:
                raise self._failure

    def _begin_to_check(self, check: Check) -> None:
        self._wait_for(lambda: self._is_read, lambda: self._file.name)
        with self._changed:
            self._check = check
            check(self._largest)

    def _make_here(self, tokenizer: Any) -> None:
        """Makes what there is to make in this thread, where no process does."""
        if not self._is_local or self._is_complete:
            return
        encoder = Encoder(tokenizer)
        while self._failure is None and (taken := self._take()) is not None:
            what, work = taken
            self._give(what, encoder.encode(work))

    def _complete(self) -> None:
        """All tokens are there."""
        self._is_complete = True
        self._keep()


class ChatPreparation(Preparation):
    """Chats, each a sample."""

    def __init__(self, spec: Spec, report: Report, file: Path, limit: int) -> None:
        self._chats: list[Chat | None] = []
        self._arrays = Index.empty(())
        self._queue: deque[int] = deque()
        self._left = 0
        self._samples: Chats | None = None
        self._max_length = 0
        super().__init__(spec, report, file, limit)

    def samples(self, tokenizer: Any, max_length: int, check: Check) -> Chats:
        """The samples, cut to `max_length` tokens; they may still be in the making.

        Raises:
            RunFailed: DATASET_INVALID, where the file can't be used, it is not certain which tokens
                are the assistant's, or none is left to learn.
        """
        self._begin_to_check(check)
        self._max_length = max_length
        self._make_here(tokenizer)
        certain = np.zeros(len(self._arrays.starts), bool)
        if not self._is_complete:
            certain = self._surely_teach()
            uncertain = [int(at) for at in np.flatnonzero(~certain)]
            self._prefer(uncertain)
            self._wait_for_all(uncertain)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            kept = self._teaches() if self._is_complete else certain | self._teaches()
            if not kept.any():
                raise self._nothing_to_learn()
            assert self._store is not None
            self._samples = Chats(
                self._store,
                self._arrays,
                np.flatnonzero(kept),
                max_length,
                self._changed,
                lambda: self._failure,
                self._prefer,
            )
            if self._is_complete:
                self._tell()
            return self._samples

    def _prefer(self, numbers: Sequence[int]) -> None:
        """Asks for these chats, by their number in the file, before all others."""
        with self._changed:
            waiting, wanted = set(self._queue), set(numbers)
            first = [number for number in numbers if number in waiting]
            self._queue = deque(first + [rest for rest in self._queue if rest not in wanted])

    def _read(self, before: os.stat_result) -> None:
        chats = _collect(self._file, read_chats(self._file), self._limit)
        self._check_unchanged(before)
        first_of_kind: dict[Any, int] = {}
        for number, chat in enumerate(chats):
            if len(first_of_kind) < _MOST_KINDS:
                first_of_kind.setdefault(_kind(chat), number)
        first = list(first_of_kind.values())
        chosen = set(first)
        with self._changed:
            self._chats = list(chats)
            self._arrays = Index.empty(chat.line for chat in chats)
            self._left = len(chats)
            self._queue = deque(first + [at for at in range(len(chats)) if at not in chosen])
            self._changed.notify_all()

    def _take_over(self, index: Index) -> None:
        self._arrays = index

    def _index(self) -> Index:
        return self._arrays

    def _take(self) -> tuple[list[int], list[Chat]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._chats or self._failure)
            taken: list[int] = []
            size = 0
            while self._queue and len(taken) < _BATCH and size < _BATCH_CHARACTERS:
                taken.append(self._queue.popleft())
                size += _characters(cast("Chat", self._chats[taken[-1]]))
            if not taken or self._failure is not None:
                return None
            return taken, [cast("Chat", self._chats[at]) for at in taken]

    def _add(self, what: list[int], answer: Encoded) -> None:
        assert self._store is not None
        start = self._store.append(answer.tokens)
        for at, length, first in zip(what, answer.lengths, answer.first_learned, strict=True):
            self._arrays.lengths[at] = length
            self._arrays.first_learned[at] = first
            self._arrays.starts[at] = start  # last: it says that the others hold
            start += length
            if self._samples is not None:  # until then it may be asked what surely teaches
                self._chats[at] = None
        self._left -= len(what)
        if self._left:
            return
        self._complete()
        if self._samples is not None:
            if not self._teaches().any():
                raise self._nothing_to_learn()
            self._tell()

    def _teaches(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of the samples made so far teach something within the length."""
        first = self._arrays.first_learned
        return (first > 0) & (first < self._max_length)

    def _surely_teach(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which chats have the beginning of an answer within the length, as far as can be told.

        A token has a byte of the text at least. What the template puts before the answer is no more
        than all the tokens before the answer in the first chat of the same kind.
        """
        chats = cast("list[Chat]", self._chats)
        kinds: dict[Any, int] = {}
        for number, chat in enumerate(chats):
            kinds.setdefault(_kind(chat), number)
        self._wait_for_all(list(kinds.values())[:_MOST_KINDS])
        first = self._arrays.first_learned
        before = {kind: int(first[number]) for kind, number in kinds.items()}
        certain = np.zeros(len(chats), bool)
        for number, chat in enumerate(chats):
            scaffold = before[_kind(chat)]
            most = scaffold + _bytes_before_answer(chat)
            certain[number] = scaffold > 0 and most < self._max_length
        return certain

    def _wait_for_all(self, origins: list[int]) -> None:
        starts = self._arrays.starts
        self._wait_for(
            lambda: bool((starts[origins] >= 0).all()),
            lambda: f"{int((starts >= 0).sum())} of {len(starts)} samples",
        )

    def _nothing_to_learn(self) -> RunFailed:
        first = self._arrays.first_learned
        fix: dict[str, int] = {}
        if (first > 0).any():
            # The shortest length in which a sample has an answer to learn.
            fix["training.max_seq_length"] = -(-(int(first[first > 0].min()) + 1) // 8) * 8
        return RunFailed(
            EndReason.DATASET_INVALID,
            "No sample has an assistant's token within training.max_seq_length "
            f"({self._max_length}): nothing to learn.",
            samples=[int(self._arrays.lines[0])],
            file=str(self._file),
            fix=fix,
        )

    def _tell(self) -> None:
        """Notices of what was cut, left out, or teaches nothing."""
        count, limit = len(self._arrays.starts), self._max_length
        cut = int((self._arrays.lengths > limit).sum())
        assert self._samples is not None
        empty = count - len(self._samples)
        if cut:
            self._report.notice(
                "training.max_seq_length",
                "SAMPLES_CUT",
                f"{cut} of {count} samples are longer than {limit} tokens and were cut.",
            )
        if empty:
            self._report.notice(
                "training.max_seq_length",
                "SAMPLES_DROPPED",
                f"{empty} of {count} samples have no assistant's token within {limit} tokens and "
                "were left out.",
            )


class DocumentPreparation(Preparation):
    """Documents, one after the other, each with the end-of-text token."""

    def __init__(self, spec: Spec, report: Report, file: Path, limit: int) -> None:
        self._work: Iterator[list[Piece]] = iter(())
        self._taken = self._added = 0
        self._is_all_taken = False
        self._early: dict[int, Encoded] = {}
        """What came before its turn."""
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
        documents = _collect(self._file, read_documents(self._file), self._limit)
        self._check_unchanged(before)
        with self._changed:
            self._work = _batches(piece for document in documents for piece in pieces_of(document))

    def _take_over(self, index: Index) -> None:
        pass

    def _index(self) -> Index:
        return Index.empty(())

    def _take(self) -> tuple[int, list[Piece]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_read or self._failure)
            work = None if self._failure else next(self._work, None)
            if work is None:
                self._is_all_taken = True
                self._end()
                return None
            self._taken += 1
            return self._taken - 1, work

    def _add(self, what: int, answer: Encoded) -> None:
        assert self._store is not None
        self._early[what] = answer
        while (due := self._early.pop(self._added, None)) is not None:
            self._store.append(due.tokens)
            self._added += 1
        self._end()

    def _end(self) -> None:
        done = self._is_all_taken and self._added == self._taken
        if done and not self._is_complete and self._failure is None:
            self._complete()
            self._changed.notify_all()


# --- parts


def _collect(path: Path, items: Iterator[_Item | BadLine], limit: int) -> list[_Item]:
    """The good records of a file, if all are.

    Raises:
        RunFailed: DATASET_INVALID, naming the first lines that can't be used.
    """
    good: list[_Item] = []
    bad: list[BadLine] = []
    try:
        for item in islice(items, limit or None):
            if isinstance(item, BadLine):
                bad.append(item)
            else:
                good.append(item)
    except OSError as error:
        raise _unreadable(path, error) from error
    if bad:
        more = f"; and {len(bad) - _BAD_LINES_SHOWN} more" if len(bad) > _BAD_LINES_SHOWN else ""
        lines = "; ".join(map(str, bad[:_BAD_LINES_SHOWN]))
        raise RunFailed(
            EndReason.DATASET_INVALID,
            f"{path.name}: {lines}{more}.",
            samples=[line.line for line in bad[:_BAD_LINES_SHOWN]],
            file=str(path),
            excerpt=bad[0].excerpt,
        )
    if not good:
        raise RunFailed(EndReason.DATASET_INVALID, f"{path} holds no sample.")
    return good


def _unreadable(path: Path, error: OSError) -> RunFailed:
    return RunFailed(EndReason.DATASET_INVALID, f"{path} can't be read: {error.strerror}.")


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS or len(batch) >= 4 * _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(chat: Chat) -> int:
    return sum(len(message_text(message)) for message in chat.messages)


def _kind(chat: Chat) -> tuple[Any, ...]:
    """What a template may treat differently: roles, tools, reasoning, contents that are empty."""
    return (
        chat.tools is not None,
        *(
            (
                message["role"],
                not message["content"].strip(),
                "<" in message["content"] or "[" in message["content"],
                *sorted(message.keys() - {"role", "content"}),
            )
            for message in chat.messages
        ),
    )


def _bytes_before_answer(chat: Chat) -> int:
    size = 0
    for message in chat.messages:
        if message["role"] == "assistant":
            break
        size += len(message_text(message).encode())
    return size
