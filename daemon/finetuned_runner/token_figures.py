"""What a tokenizer makes of training data, in figures: lengths, what is cut, what is learned."""

from __future__ import annotations

import heapq
import math
from array import array
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetuned_daemon.dataset.formats import Chat, DataFormat, Document
from finetuned_daemon.dataset.report import (
    LONGEST,
    HistogramBin,
    MeasuredFile,
    RenderedPiece,
    RenderedSample,
    TokenLengths,
)
from finetuned_daemon.texts import Text
from finetuned_runner.encoding import (
    EncodedChat,
    EncodedPiece,
    chat_mask,
    count_blocks,
    encode_chats,
    encode_documents,
    end_of_text,
)
from finetuned_runner.reading import Reading

_BINS = 20
_RENDERED_BYTES = 3 << 20
"""All rendered samples together: an answer of more than 4 MiB is refused by gRPC's clients."""
_MEASURED_SAMPLES = 20_000
_MEASURED_CHARACTERS = 64 << 20

_Kept = TypeVar("_Kept")


class Figures:
    """Tokens of a file, before and after cutting, and some samples rendered."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, max_rendered: int
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._rendered = _Spread[RenderedSample](max_rendered)
        self._lengths = array("i")
        self._cut = self._empty = self._tokens = self._learned = self._train = 0
        self.problem: Text | None = None
        """Why a run can't train on these samples; None: it can."""

    def count_chats(self, chats: Iterator[Chat]) -> None:
        """Counts chats, each a sample.

        Raises:
            TokenizerUnusable: There is no chat template, or it is not certain what is learned.
        """
        for batch in encode_chats(chats, self._tokenizer, chat_mask(self._tokenizer)):
            for chat in batch:
                self._add_chat(chat)
        if self._lengths and not self._train:
            limit = self._max_length
            self.problem = Text(
                f"No sample has an assistant's token within {limit} tokens: nothing to learn",
                f"没有样本在 {limit} 个词元内含有 assistant 的词元：没有可学习的内容",
            )

    def count_documents(self, documents: Iterator[Document], reading: Reading) -> None:
        """Counts documents, which make blocks of equal length.

        Raises:
            TokenizerUnusable: There is no end-of-text token.
        """
        end_of_text(self._tokenizer)
        length = done = 0
        beginning: EncodedPiece | None = None
        for batch in encode_documents(documents, self._tokenizer):
            for piece in batch:
                if beginning is None:
                    beginning, length, done = piece, 0, 0
                length += len(piece.encoding)
                done += len(piece.text)
                share = done / len(piece.document.text)
                if piece.document.format is DataFormat.PLAIN_TEXT:  # the file is one document
                    reading.tell(int(reading.size * share))
                if piece.ends:
                    self._add_document(beginning, length + 1)
                    beginning = None
        total = sum(self._lengths)
        self._train = count_blocks(total, self._max_length)
        self._tokens = self._learned = total - (total % self._max_length == 1)

    def fields(self) -> dict[str, Any]:
        """The fields of `report.Report` that are known by now."""
        rendered: list[RenderedSample] = []
        size = 0
        for sample in self._rendered.chosen():
            size += sum(len(piece.text.encode()) for piece in sample.pieces)
            if size <= _RENDERED_BYTES:
                rendered.append(sample)
        return {
            "token_lengths": token_lengths(self._lengths) if self._lengths else None,
            "cut_samples": self._cut,
            "empty_samples": self._empty,
            "tokens": self._tokens,
            "learned_tokens": self._learned,
            "train_samples": self._train,
            "rendered_samples": tuple(rendered),
        }

    def _add_chat(self, chat: EncodedChat) -> None:
        tokens, limit = len(chat.learned), self._max_length
        learned = chat.learned.count(1, 0, limit)
        self._lengths.append(tokens)
        self._cut += tokens > limit
        if chat.teaches(limit):
            self._train += 1
            self._tokens += min(tokens, limit)
            self._learned += learned
        else:
            self._empty += 1
        if self._rendered.wants_next():
            self._rendered.add(
                RenderedSample(
                    line=chat.chat.line,
                    pieces=render(chat.text, chat.encoding, chat.learned, limit),
                    tokens=tokens,
                    learned_tokens=learned,
                    cut=tokens > limit,
                )
            )

    def _add_document(self, beginning: EncodedPiece, tokens: int) -> None:
        self._lengths.append(tokens)
        if not self._rendered.wants_next():
            return
        limit = self._max_length
        learned = b"\1" * len(beginning.encoding)
        pieces = render(beginning.text, beginning.encoding, learned, limit)
        if tokens <= limit:
            pieces = _joined([*pieces, RenderedPiece(text=self._end_text(), learned=True)])
        self._rendered.add(
            RenderedSample(
                line=beginning.document.line,
                pieces=pieces,
                tokens=tokens,
                learned_tokens=tokens,
                cut=tokens > limit,
            )
        )

    def _end_text(self) -> str:
        return str(self._tokenizer.eos_token)


class _Spread(Generic[_Kept]):
    """Some of a stream, evenly spread over it, whose length nobody knows beforehand.

    Keeps every sample at first, and every second one of these whenever there are twice as many as
    are wanted.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._stride = 1
        self._seen = 0
        self._kept: list[_Kept] = []

    def wants_next(self) -> bool:
        """Whether the next one is to be kept; counts it."""
        self._seen += 1
        return self._count > 0 and (self._seen - 1) % self._stride == 0

    def add(self, item: _Kept) -> None:
        """Keeps one."""
        self._kept.append(item)
        if len(self._kept) > 2 * self._count:
            self._kept = self._kept[::2]
            self._stride *= 2

    def chosen(self) -> list[_Kept]:
        """As many as are wanted, the first of all among them."""
        have, want = len(self._kept), min(self._count, len(self._kept))
        return [self._kept[index * have // want] for index in range(want)]


def render(
    text: str, encoding: Any, learned: bytes | bytearray, max_length: int
) -> tuple[RenderedPiece, ...]:
    """The first tokens of a text in pieces, learned and not: what the mask of tokens really says.

    Blanks that belong to no token go with the token that follows.
    """
    offsets: list[tuple[int, int]] = encoding.offsets
    pieces: list[RenderedPiece] = []
    start = 0
    begin, is_learned = 0, False
    for (_, end), flag in zip(offsets[:max_length], learned, strict=False):
        if bool(flag) != is_learned:
            if start > begin:
                pieces.append(RenderedPiece(text=text[begin:start], learned=is_learned))
            begin, is_learned = start, bool(flag)
        start = max(start, end)
    pieces.append(RenderedPiece(text=text[begin:start], learned=is_learned))
    if len(offsets) <= max_length and start < len(text):
        pieces.append(RenderedPiece(text=text[start:], learned=False))
    return _joined(pieces)


def _joined(pieces: list[RenderedPiece]) -> tuple[RenderedPiece, ...]:
    """Neighbours of one kind as one, and none that is empty."""
    joined: list[RenderedPiece] = []
    for piece in pieces:
        if joined and joined[-1].learned == piece.learned:
            joined[-1] = RenderedPiece(text=joined[-1].text + piece.text, learned=piece.learned)
        elif piece.text:
            joined.append(piece)
    return tuple(joined)


def token_lengths(lengths: array[int]) -> TokenLengths:
    """Percentiles by nearest rank, and a histogram with bins of equal width from 0."""
    ordered = np.sort(np.frombuffer(lengths, np.intc))
    count, longest = len(ordered), int(ordered[-1])
    width = math.ceil((longest + 1) / _BINS)
    bins = np.bincount(ordered // width)

    def percentile(percent: int) -> int:
        return int(ordered[math.ceil(percent * count / 100) - 1])

    return TokenLengths(
        minimum=int(ordered[0]),
        maximum=longest,
        mean=float(ordered.mean()),
        p50=percentile(50),
        p90=percentile(90),
        p95=percentile(95),
        p99=percentile(99),
        histogram=tuple(
            HistogramBin(start=number * width, end=(number + 1) * width, samples=int(samples))
            for number, samples in enumerate(bins)
        ),
    )


# --- measurements


def measure_chats(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[MeasuredFile, bool]:
    """The samples that chats make, and whether all were looked at.

    After 20,000 chats or 64 million characters the others are only counted.

    Raises:
        TokenizerUnusable: There is no chat template, or it is not certain what is learned.
        OSError: The file can't be read.
    """
    longest: list[tuple[int, int]] = []
    seen = kept = cut = tokens = learned = 0
    chats = reading.chats()
    for batch in encode_chats(chats, tokenizer, chat_mask(tokenizer)):
        seen += len(batch)
        for chat in batch:
            cut += len(chat.learned) > max_length
            if not chat.teaches(max_length):
                continue
            kept += 1
            sample = (min(len(chat.learned), max_length), chat.learned.count(1, 0, max_length))
            tokens += sample[0]
            learned += sample[1]
            if len(longest) < LONGEST:
                heapq.heappush(longest, sample)
            else:
                heapq.heappushpop(longest, sample)
        if seen >= _MEASURED_SAMPLES or reading.characters >= _MEASURED_CHARACTERS:
            break
    for _ in chats:
        pass
    factor = reading.samples / seen if seen else 1.0
    samples = round(kept * factor)
    return MeasuredFile(
        samples=samples,
        cut=round(cut * factor),
        dropped=round((seen - kept) * factor),
        tokens=round(tokens * factor),
        learned_tokens=round(learned * factor),
        longest=tuple(sorted(longest, reverse=True)),
    ), seen == reading.samples


def measure_documents(
    reading: Reading, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[MeasuredFile, bool]:
    """The blocks that documents make, and whether all were looked at.

    After 20,000 documents or 64 million characters the others are only counted, by characters.

    Raises:
        TokenizerUnusable: There is no end-of-text token.
        OSError: The file can't be read.
    """
    end_of_text(tokenizer)
    seen = tokens = characters = 0
    documents = reading.documents()
    for batch in encode_documents(documents, tokenizer):
        for piece in batch:
            tokens += len(piece.encoding) + piece.ends
            seen += piece.ends
            characters += len(piece.text)
        if seen >= _MEASURED_SAMPLES or characters >= _MEASURED_CHARACTERS:
            break
    for _ in documents:
        pass
    is_exact = characters == reading.characters
    if not is_exact:
        tokens = round(tokens * reading.characters / characters)
    blocks, rest = count_blocks(tokens, max_length), tokens % max_length
    trained = tokens - (rest == 1)
    whole = tokens // max_length
    longest = [(max_length, max_length)] * min(whole, LONGEST)
    if rest > 1 and len(longest) < LONGEST:
        longest.append((rest, rest))
    return MeasuredFile(
        samples=blocks, tokens=trained, learned_tokens=trained, longest=tuple(longest)
    ), is_exact
