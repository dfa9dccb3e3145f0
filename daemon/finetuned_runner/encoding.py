"""From chats and documents to tokens, batch by batch: one code for runs and for inspections.

Works without torch, which takes a second to import, and 200 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuned_daemon.dataset.formats import Chat, Document, message_text
from finetuned_daemon.texts import Text
from finetuned_runner.bounds import MEMORY_BYTES, TakesTooLong, bounded_memory, bounded_time
from finetuned_runner.chat_mask import ChatMask, MaskError, Rendered, Span
from finetuned_runner.pieces import Piece, pieces_of

_BATCH = 256
_BATCH_CHARACTERS = 1 << 20
"""An encoding takes more than 100 bytes a token until its tokens are copied out."""

_BYTES_A_CHARACTER = 1000
"""What making tokens of a text may take beyond what any may; it takes about a tenth of it."""
_ENCODE_SECONDS = 120.0
"""Processor time for a batch of texts; an ordinary one takes less than one."""

_Item = TypeVar("_Item")


class TokenizerUnusable(Exception):
    """The folder holds no tokenizer for this purpose; `message` says why."""

    def __init__(self, message: Text) -> None:
        super().__init__(message.en)
        self.message = message


class UncertainMask(TokenizerUnusable):
    """It is not certain which tokens of a chat are the assistant's."""

    def __init__(self, line: int, error: MaskError) -> None:
        self.line = line
        super().__init__(
            Text(
                f"line {line}: it is not certain which tokens are the assistant's ({error}); "
                "set data.tokenizer_path to a tokenizer whose chat template marks them with "
                "{% generation %} blocks",
                f"第 {line} 行：无法确定哪些词元属于 assistant（{error}）；"
                "请将 data.tokenizer_path 设为对话模板以 {% generation %} 块标出它们的分词器",
            )
        )


# --- tokenizers


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; no code of the folder runs.

    Raises:
        TokenizerUnusable: It can't be loaded, or is no fast one.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = lines[0][:300]
        raise TokenizerUnusable(
            Text(
                f"The tokenizer in {path} can't be loaded: {why}",
                f"无法加载 {path} 中的分词器：{why}",
            )
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerUnusable(
            Text(
                f"The tokenizer in {path} has no tokenizer.json; convert it to a fast tokenizer",
                f"{path} 中的分词器没有 tokenizer.json；请转换为快速分词器",
            )
        )
    return tokenizer


def chat_mask(tokenizer: PreTrainedTokenizerBase) -> ChatMask:
    """What writes out chats with a tokenizer's template.

    Raises:
        TokenizerUnusable: It has none.
    """
    try:
        return ChatMask(tokenizer)
    except MaskError as error:
        raise TokenizerUnusable(
            Text(
                f"The chats can't be written out: {error}; set data.tokenizer_path to a tokenizer "
                "with one",
                "无法写出对话：分词器没有对话模板；请将 data.tokenizer_path 设为带有模板的分词器",
            )
        ) from error


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that parts documents.

    Raises:
        TokenizerUnusable: There is none.
    """
    token = tokenizer.eos_token_id
    if isinstance(token, int):
        return token
    raise TokenizerUnusable(
        Text(
            "The tokenizer has no end-of-text token to part documents with; set "
            "data.tokenizer_path to one that has",
            "分词器没有用于分隔文档的文本结束词元；请将 data.tokenizer_path 设为带有该词元的分词器",
        )
    )


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Any]:
    """`tokenizers.Encoding` of each text; templates write the special tokens themselves."""
    backend: Any = tokenizer.backend_tokenizer
    try:
        # Neither bound can interrupt it: beyond them the process ends, and not the machine.
        with (
            bounded_time(_ENCODE_SECONDS),
            bounded_memory(MEMORY_BYTES + _BYTES_A_CHARACTER * sum(map(len, texts))),
        ):
            encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=False)
    except (TakesTooLong, MemoryError) as error:
        raise TokenizerUnusable(
            Text(
                "The tokenizer takes too much time or memory; its tokenizer.json is not in order",
                "分词器耗费过多时间或内存；其 tokenizer.json 有问题",
            )
        ) from error
    return encodings


def _batches(items: Iterable[_Item], characters: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += characters(item)
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- chats


@dataclass(frozen=True)
class EncodedChat:
    """A chat in tokens, before it is cut."""

    chat: Chat
    text: str
    """As the template writes it."""
    encoding: Any
    """`tokenizers.Encoding` of the text."""
    learned: bytearray
    """A byte, 0 or 1, for each token."""

    def teaches(self, max_length: int) -> bool:
        """Whether something is learned within `max_length` tokens; else it is left out.

        The first token is never predicted, so it can't be learned.
        """
        return any(self.learned[1:max_length])


def encode_chats(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, mask: ChatMask
) -> Iterator[list[EncodedChat]]:
    """Chats in tokens, of which the assistant's are learned, in batches.

    Raises:
        UncertainMask: At the first chat of which it is not certain which tokens are learned.
    """
    for batch in _batches(chats, _characters):
        rendered: list[Rendered] = []
        with bounded_memory(MEMORY_BYTES + _BYTES_A_CHARACTER * sum(map(_characters, batch))):
            for chat in batch:
                try:
                    rendered.append(mask.render(chat.messages, chat.tools))
                except MaskError as error:
                    raise UncertainMask(chat.line, error) from error
        encodings = _encode(tokenizer, [chat.text for chat in rendered])
        encoded: list[EncodedChat] = []
        for chat, written, encoding in zip(batch, rendered, encodings, strict=True):
            learned = bytearray(len(encoding.ids))
            try:
                for span in written.spans:
                    first, last = tokens_of(span, encoding, written.text)
                    learned[first:last] = b"\1" * (last - first)
            except MaskError as error:
                raise UncertainMask(chat.line, error) from error
            encoded.append(EncodedChat(chat, written.text, encoding, learned))
        yield encoded


def _characters(chat: Chat) -> int:
    return sum(len(message_text(message)) for message in chat.messages)


def tokens_of(span: Span, encoding: Any, text: str) -> tuple[int, int]:
    """The tokens that lie in a span of characters: first, and the one after the last.

    Raises:
        MaskError: A token holds text of the span and text before it.
    """
    start, end = span
    first = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1  # blanks that belong to no token
    if first is None:
        return 0, 0
    token_start, token_end = encoding.token_to_chars(first)
    if token_start < span[0]:
        if text[token_start:token_end].strip():
            raise MaskError("a token holds the end of the prompt and the beginning of the answer")
        first += (
            1  # line feeds of the template and of the content in one token: nothing to learn in it
        )
    last = None
    while end > start and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    if last is None:
        return 0, 0
    while last + 1 < len(encoding.ids) and encoding.token_to_chars(
        last + 1
    ) == encoding.token_to_chars(last):
        last += 1  # one character in several tokens
    if encoding.token_to_chars(last)[1] > span[1]:
        if text[span[1] : encoding.token_to_chars(last)[1]].strip():
            raise MaskError("a token holds the end of the answer and text that follows it")
        last -= 1
    return first, max(first, last + 1)


# --- documents


@dataclass(frozen=True)
class EncodedPiece:
    """A piece of a document in tokens; the end-of-text token is not among them."""

    piece: Piece
    encoding: Any
    """`tokenizers.Encoding` of its text."""

    @property
    def document(self) -> Document:
        """What it is a piece of."""
        return self.piece.document

    @property
    def text(self) -> str:
        """Its text."""
        return self.piece.text

    @property
    def ends(self) -> bool:
        """The document ends with this piece, and the end-of-text token follows."""
        return self.piece.ends


def encode_documents(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[EncodedPiece]]:
    """Documents in tokens, in batches of pieces."""
    return encode_pieces((p for document in documents for p in pieces_of(document)), tokenizer)


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[EncodedPiece]]:
    """Pieces of documents in tokens, in batches."""
    for batch in _batches(pieces, lambda piece: len(piece.text)):
        encodings = _encode(tokenizer, [piece.text for piece in batch])
        yield [
            EncodedPiece(piece, encoding) for piece, encoding in zip(batch, encodings, strict=True)
        ]


def count_blocks(tokens: int, max_length: int) -> int:
    """Blocks that documents of so many tokens make; a single token over predicts nothing."""
    whole, rest = divmod(tokens, max_length)
    return whole + (rest > 1)
