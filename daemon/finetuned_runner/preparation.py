"""From a data file to samples, beside everything else: begun before torch is imported.

Tokens come from the cache, or are made by processes that go on while the run trains. What has to be
known before the first step is whether every line can be used, and how many samples there are, for
the schedule depends on it. So all lines are gone through first, by the same processes; then come
those chats of which it isn't certain that an answer stands within the length they are cut to.
One chat of each kind comes before all, so that a template that doesn't work shows at once.

Nothing here imports torch or, in this process, transformers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetuned_daemon.dataset.reader import BadLine, Stretch, open_data, stretches
from finetuned_daemon.runs.contract import EndReason, RunPhase, Spec
from finetuned_runner.encode_process import (
    Answer,
    CannotEncode,
    CannotRead,
    EncodeChats,
    Encoded,
    EncodeProcess,
    Encoder,
    Ended,
    SurveyChats,
    Work,
    most_processes,
)
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report
from finetuned_runner.samples import Chats, Samples
from finetuned_runner.survey import BAD_LINES_SHOWN, Survey, survey, whole
from finetuned_runner.token_store import Index, TokenCache, TokenStore

_BATCH = 64
BATCH_CHARACTERS = 1 << 18
_MOST_KINDS = 1000
_REPORT_SECONDS = 2.0
_SMALL_FILE = 256 << 10
"""Bytes; for less it isn't worth the second that a process takes to start."""
_LARGE_FILE = 4 << 20
"""Bytes; from here on more than one process."""
STRETCH = 1 << 20
"""Bytes of a file that a process goes through at a time."""

_logger = logging.getLogger(__name__)
_Numbers = npt.NDArray[np.int64]

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
        self._data = -1
        """Descriptor of the data file."""
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
            self._data = open_data(self._file)
            before = os.fstat(self._data)
            with open(self._data, "rb", closefd=False) as data:
                self.sha256 = hashlib.file_digest(data, "sha256").hexdigest()
            key = cache.key(
                self.sha256,
                Path(self._tokenizer_path),
                kind=type(self).__name__,
                max_samples=self._limit,
            )
        except OSError as error:
            raise unreadable(self._file, error) from error
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
            for _ in range(self._process_count(before.st_size)):
                EncodeProcess(
                    self._tokenizer_path, self._data, self._take, self._give, self._is_waited_for
                )
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
            raise _written_to(self._file)

    def _open_cache(self) -> TokenCache:
        try:
            return TokenCache(self._cache_dir)
        except OSError as error:  # the run doesn't need one; it needs a place for its tokens
            _logger.warning("tokens are not kept: %s", error)
            return TokenCache(self._report.run_dir / "tokens")

    def _process_count(self, size: int) -> int:
        return most_processes() if size >= _LARGE_FILE else 1

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = error
            self._changed.notify_all()

    # --- in the threads of the processes, or where there are none in that of the caller

    def _take(self) -> tuple[Any, Work] | None:
        """The next work; waits for it. None: there is no more."""
        raise NotImplementedError

    def _give(self, what: Any, answer: Answer) -> None:
        try:
            if isinstance(answer, CannotEncode):
                raise self._cannot(answer)
            if isinstance(answer, Ended):
                raise _ended(answer)
            if isinstance(answer, CannotRead):
                raise _cannot_read(self._file, answer.why)
            with self._changed:
                self._add(what, answer)
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again where samples are asked for
            self._fail(error)

    def _is_waited_for(self) -> bool:
        """Whether the run can't go on without what is being made."""
        return not self._is_complete

    def _see(self, encoded: Encoded) -> None:
        """Looks at what tokens there are."""
        self._largest = max(self._largest, encoded.largest)
        if self._check:
            self._check(self._largest)

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
        """Reads what has to be known first; the file must be as it was `before`."""
        raise NotImplementedError

    def _add(self, what: Any, answer: Answer) -> None:
        raise NotImplementedError

    # --- for the recipe

    @property
    def failure(self) -> BaseException | None:
        """What ended the preparation."""
        return self._failure

    def close(self) -> None:
        """The run is over: what was made and not kept goes."""
        if self._store is not None:
            TokenCache.drop(self._store)
        with self._changed:
            if self._data >= 0:
                os.close(self._data)
            self._data = -1

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
        encoder = Encoder(lambda: tokenizer, self._data)
        while self._failure is None and (taken := self._take()) is not None:
            what, work = taken
            self._give(what, encoder.do(work))

    def _complete(self) -> None:
        """All tokens are there."""
        self._is_complete = True
        self._keep()


class ChatPreparation(Preparation):
    """Chats, each a sample."""

    def __init__(self, spec: Spec, report: Report, file: Path, limit: int) -> None:
        self._stretches: list[Stretch] = []
        self._num_asked = 0
        """Stretches that somebody goes through, or has."""
        self._surveys: dict[int, Survey] = {}
        self._survey: Survey | None = None
        """Of all chats."""
        self._firsts: _Numbers = np.zeros(0, np.int64)
        """For each chat, the first of its kind."""
        self._arrays = Index.empty(())
        self._order: _Numbers = np.zeros(0, np.int64)
        """Of the chats, with some that were handed out already."""
        self._is_handed_out = np.zeros(0, bool)
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
            uncertain = np.flatnonzero(~certain)
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

    def _prefer(self, numbers: Sequence[int] | _Numbers) -> None:
        """Asks for these chats, by their number in the file, before all others."""
        with self._changed:
            if not self._left:
                return
            first = np.asarray(numbers, np.int64)
            is_first = self._is_handed_out.copy()
            is_first[first] = True
            rest = self._order[~is_first[self._order]]
            self._order = np.concatenate([first[~self._is_handed_out[first]], rest])

    def _read(self, before: os.stat_result) -> None:
        size = before.st_size
        parts = [Stretch(0, size, size)]
        try:
            if not self._is_local and not self._limit:
                parts = stretches(self._data, size, STRETCH)
            if self._is_local:
                self._surveys[0] = survey(self._data, parts[0], self._limit)
        except OSError as error:
            raise unreadable(self._file, error) from error
        with self._changed:
            self._num_asked = len(self._surveys)
            self._stretches = parts
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(self._surveys) == len(parts) or self._failure)
            if self._failure is not None:
                return
        found = whole([self._surveys.pop(number) for number in range(len(parts))])
        check_lines(self._file, found.bad, found.num_bad, len(found))
        self._check_unchanged(before)
        firsts = found.firsts()
        with self._changed:
            self._survey, self._firsts = found, firsts
            self._arrays = Index.empty(found.lines)
            self._left = len(found)
            self._is_handed_out = np.zeros(len(found), bool)
            self._order = np.arange(len(found))
            self._prefer(np.unique(firsts)[:_MOST_KINDS])
            self._changed.notify_all()

    def _take_over(self, index: Index) -> None:
        self._arrays = index

    def _index(self) -> Index:
        return self._arrays

    def _take(self) -> tuple[Any, Work] | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._num_asked < len(self._stretches) or self._survey or self._failure
            )
            if self._failure is not None:
                return None
            if self._survey is None:
                number = self._num_asked
                self._num_asked += 1
                return number, SurveyChats(self._stretches[number], self._limit)
            chosen = self._next_chats()
            if not chosen:
                return None
            return chosen, EncodeChats([self._survey.place(number) for number in chosen])

    def _is_waited_for(self) -> bool:
        return self._samples is None

    def _next_chats(self) -> list[int]:
        """The chats that are next to be made tokens of."""
        assert self._survey is not None
        chosen = self._order[:_BATCH]
        ends = np.cumsum(self._survey.characters[chosen], dtype=np.int64)
        chosen = chosen[: int(np.searchsorted(ends, BATCH_CHARACTERS)) + 1]
        self._order = self._order[len(chosen) :]
        self._is_handed_out[chosen] = True
        numbers: list[int] = chosen.tolist()
        return numbers

    def _add(self, what: Any, answer: Answer) -> None:
        if isinstance(answer, Survey):
            self._surveys[what] = answer
            return
        assert isinstance(answer, Encoded)
        self._see(answer)
        assert self._store is not None
        start = self._store.append(answer.tokens)
        lengths = np.array(answer.lengths, np.int64)
        self._arrays.lengths[what] = lengths
        self._arrays.first_learned[what] = answer.first_learned
        # Last: it says that the others hold.
        self._arrays.starts[what] = start + np.cumsum(lengths) - lengths
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
        assert self._survey is not None
        self._wait_for_all(np.unique(self._firsts)[:_MOST_KINDS])
        scaffold = self._arrays.first_learned[self._firsts]
        most = scaffold + self._survey.before
        certain: np.ndarray[Any, np.dtype[np.bool_]] = (scaffold > 0) & (most < self._max_length)
        return certain

    def _wait_for_all(self, origins: _Numbers) -> None:
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


# --- parts


def check_lines(path: Path, bad: Sequence[BadLine], num_bad: int, num_good: int) -> None:
    """Raises RunFailed where lines can't be used, naming the first of them; or there are none."""
    if bad:
        more = f"; and {num_bad - BAD_LINES_SHOWN} more" if num_bad > BAD_LINES_SHOWN else ""
        lines = "; ".join(map(str, bad[:BAD_LINES_SHOWN]))
        raise RunFailed(
            EndReason.DATASET_INVALID,
            f"{path.name}: {lines}{more}.",
            samples=[line.line for line in bad[:BAD_LINES_SHOWN]],
            file=str(path),
            excerpt=bad[0].excerpt,
        )
    if not num_good:
        raise RunFailed(EndReason.DATASET_INVALID, f"{path} holds no sample.")


def unreadable(path: Path, error: OSError) -> RunFailed:
    """Why a run can't go on without a file."""
    return _cannot_read(path, error.strerror or str(error))


def _ended(answer: Ended) -> RunFailed:
    return RunFailed(
        EndReason.HOST_OUT_OF_MEMORY if answer.is_out_of_memory else EndReason.RUNNER_CRASHED,
        "The process that makes tokens of the data ended; was there too little memory?",
    )


def _cannot_read(path: Path, why: str) -> RunFailed:
    """Why a file is of no use; `why` is empty where it has changed."""
    if not why:
        return _written_to(path)
    return RunFailed(EndReason.DATASET_INVALID, f"{path} can't be read: {why}.")


def _written_to(path: Path) -> RunFailed:
    return RunFailed(
        EndReason.DATASET_INVALID,
        f"{path} was written to while it was read; start again when it is whole.",
    )
