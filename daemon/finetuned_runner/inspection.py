"""`python -m finetuned_runner --inspect`: looks at training data as a run would, for the daemon.

A request, one line of JSON, comes on stdin; answers go to stdout, a line each, the last one a
report, a measurement or a failure. The process ends when its stdin is closed: then the daemon is
gone. `finetuned_daemon.dataset.report` has the lines.
"""

from __future__ import annotations

import os
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel

from finetuned_daemon.dataset.formats import Chat, Document, message_text
from finetuned_daemon.dataset.report import (
    REQUEST,
    BadDataLine,
    BadLinePolicy,
    Failure,
    FormatCount,
    InspectRequest,
    Measured,
    MeasureRequest,
    Report,
    RoleCount,
    TurnCount,
)
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import NOTHING, Text
from finetuned_runner.environment import prepare_without_torch
from finetuned_runner.reading import Reading, Send

_NICENESS = 5
_MOST_TURN_COUNTS = 50
_BAD_LINES_SHOWN = 5


class _DataUnusable(Exception):
    """A measurement is not possible; the failure says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message.en)
        self.failure = failure


def main() -> int:
    """Answers the request on stdin; returns the exit status."""
    os.nice(_NICENESS)
    # What libraries print must not get among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = REQUEST.validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_the_daemon, daemon=True).start()
    prepare_without_torch()
    send = _sender(answers)
    send(answer(request, send))
    return 0


def answer(request: InspectRequest | MeasureRequest, send: Send) -> Report | Measured | Failure:
    """The last answer to a request; those before it are sent."""
    if isinstance(request, InspectRequest):
        try:
            return inspect(request, send)
        except OSError as error:
            return _unreadable("path", request.path, error)
    try:
        return measure(request)
    except _DataUnusable as error:
        return error.failure


def _sender(answers: BinaryIO) -> Send:
    def send(message: BaseModel) -> None:
        answers.write(message.model_dump_json().encode() + b"\n")
        answers.flush()

    return send


def _end_with_the_daemon() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _unreadable(field: str, path: str, error: OSError) -> Failure:
    why = error.strerror or str(error)
    text = Text(f"{path} can't be read: {why}", f"无法读取 {path}：{why}")
    return Failure(field=field, reason="NOT_READABLE", message=text)


class _Census:
    """Duplicates, roles and turns of the samples that go by."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self.roles = Counter[str]()
        self._turns = Counter[int]()

    def chats(self, chats: Iterator[Chat]) -> Iterator[Chat]:
        """Passes chats on."""
        for chat in chats:
            self.roles.update(message["role"] for message in chat.messages)
            self._turns[len(chat.messages)] += 1
            self._note("\0".join(f"{turn['role']}\0{message_text(turn)}" for turn in chat.messages))
            yield chat

    def documents(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Passes documents on."""
        for document in documents:
            self._note(document.text)
            yield document

    def _note(self, text: str) -> None:
        # Eight bytes a sample: two of a million differ in text and not in hash once in 10**7 files.
        self._hashes.append(
            int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        )

    @property
    def duplicates(self) -> int:
        """Samples that equal an earlier one."""
        import numpy as np

        hashes = np.frombuffer(self._hashes, np.uint64)
        hashes.sort()
        return int((hashes[1:] == hashes[:-1]).sum())

    @property
    def turns(self) -> tuple[TurnCount, ...]:
        """Chats by their number of turns; all longer ones in the last entry."""
        counts = [TurnCount(turns=n, samples=self._turns[n]) for n in sorted(self._turns)]
        if len(counts) <= _MOST_TURN_COUNTS:
            return tuple(counts)
        *first, last = counts[:_MOST_TURN_COUNTS]
        rest = sum(count.samples for count in counts[_MOST_TURN_COUNTS - 1 :])
        return (*first, TurnCount(turns=last.turns, samples=rest, or_more=True))


# --- inspection


def inspect(request: InspectRequest, send: Send) -> Report:
    """Reads a file and reports.

    Raises:
        OSError: It can't be read.
    """
    # transformers takes half a second to import, and is not needed without a tokenizer.
    reading = Reading(Path(request.path), request.training_type, request.max_samples, send)
    reading.tell(0)
    census = _Census()
    tokenizer_problem: Text | None = None
    is_uncertain = False
    figures = None
    is_sft = request.training_type is TrainingType.SFT
    chats = census.chats(reading.chats())
    documents = census.documents(reading.documents())
    if request.tokenizer_path:
        from finetuned_runner import token_figures
        from finetuned_runner.encoding import TokenizerUnusable, UncertainMask, open_tokenizer

        try:
            figures = token_figures.Figures(
                open_tokenizer(request.tokenizer_path),
                request.max_seq_length,
                request.max_rendered_samples,
            )
            if is_sft:
                figures.count_chats(chats)
            else:
                figures.count_documents(documents, reading)
        except TokenizerUnusable as error:
            tokenizer_problem, figures = error.message, None
            is_uncertain = isinstance(error, UncertainMask)
    # What a tokenizer's problem has left.
    for _ in chats if is_sft else documents:
        pass
    reading.tell(reading.size, at_once=True)
    bad_lines = tuple(
        BadDataLine(
            line=bad.line,
            byte_offset=bad.byte_offset,
            reason=bad.reason,
            message=bad.message,
            excerpt=bad.excerpt,
        )
        for bad in reading.bad
    )
    formats = reading.formats.most_common()
    report = Report(
        format=formats[0][0] if formats else None,
        formats=tuple(FormatCount(format=kind, samples=count) for kind, count in formats),
        problem=_problem(request, reading)
        or tokenizer_problem
        or (figures.problem if figures else None)
        or NOTHING,
        samples=reading.samples,
        size_bytes=reading.size,
        bad_line_count=reading.bad_count,
        bad_lines=bad_lines,
        duplicates=census.duplicates,
        roles=tuple(RoleCount(role=role, turns=n) for role, n in census.roles.most_common()),
        turns=census.turns,
        tokenizer_problem=tokenizer_problem or NOTHING,
        is_uncertain=is_uncertain,
    )
    if figures is not None:
        report = report.model_copy(update=figures.fields())
    return report


def _problem(request: InspectRequest, reading: Reading) -> Text | None:
    if reading.bad_count and request.bad_line_policy is BadLinePolicy.FAIL:
        first, count = reading.bad[0], reading.bad_count
        return Text(
            f"{count} {'line' if count == 1 else 'lines'} can't be used; the first is {first}",
            f"有 {count} 行无法使用；第一处是第 {first.line} 行：{first.message.zh}",
        )
    if not reading.samples:
        return Text("The file holds no sample", "文件中没有样本")
    return None


# --- measurement


def measure(request: MeasureRequest) -> Measured:
    """Counts what a run would train on.

    Raises:
        _DataUnusable: A file can't be read, holds no samples or bad lines, or the tokenizer can't
            read them.
    """
    from finetuned_runner import token_figures
    from finetuned_runner.encoding import TokenizerUnusable, UncertainMask, open_tokenizer

    files = [("data.train_file", request.train_file, request.max_samples)]
    if request.eval_file is not None:
        files.append(("data.eval_file", request.eval_file, 0))
    measured = []
    exact = True
    try:
        tokenizer = open_tokenizer(request.tokenizer_path)
        for field, path, max_samples in files:
            measure_file = (
                token_figures.measure_chats
                if request.training_type is TrainingType.SFT
                else token_figures.measure_documents
            )
            try:
                reading = Reading(Path(path), request.training_type, max_samples)
                figures, all_read = measure_file(reading, tokenizer, request.max_seq_length)
            except OSError as error:
                raise _DataUnusable(_unreadable(field, path, error)) from error
            _check(field, Path(path), reading)
            measured.append(figures)
            exact = exact and all_read
    except TokenizerUnusable as error:
        failure = Failure(
            field="data.tokenizer_path",
            reason="TOKENIZER_UNUSABLE",
            message=error.message,
            is_uncertain=isinstance(error, UncertainMask),
        )
        raise _DataUnusable(failure) from error
    return Measured(
        exact=exact, train=measured[0], evaluation=measured[1] if len(measured) > 1 else None
    )


def _check(field: str, path: Path, reading: Reading) -> None:
    if reading.bad_count:
        shown = reading.bad[:_BAD_LINES_SHOWN]
        rest = reading.bad_count - len(shown)
        text = Text(
            f"{path.name}, " + "; ".join(map(str, shown)) + (f"; and {rest} more" if rest else ""),
            f"{path.name}，"
            + "；".join(f"第 {bad.line} 行：{bad.message.zh}" for bad in shown)
            + (f"；另有 {rest} 行" if rest else ""),
        )
        raise _DataUnusable(Failure(field=field, reason="BAD_DATA_LINE", message=text))
    if not reading.samples:
        text = Text(f"{path.name} holds no sample", f"{path.name} 中没有样本")
        raise _DataUnusable(Failure(field=field, reason="DATA_EMPTY", message=text))
