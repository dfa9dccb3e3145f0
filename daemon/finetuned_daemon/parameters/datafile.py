"""Reads data files sample by sample: the one reader, for the check before a start and for the run.

Fine-tuning: JSONL, a chat a line, `{"messages": [{"role": "user", "content": "..."}, ...]}`.
Pretraining: a `.txt` is one document; JSONL has a document a line, `{"text": "..."}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

ROLES = ("system", "user", "assistant")


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A conversation, and the line it stands in."""

    line: int
    messages: list[Message]


@dataclass(frozen=True)
class Document:
    """A text, and the line it begins in."""

    line: int
    text: str


@dataclass(frozen=True)
class BadLine:
    """A line that can't be used, and why."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


def is_plain_text(path: Path) -> bool:
    """Whether a file is read as one plain text rather than as JSON lines."""
    return path.suffix.lower() == ".txt"


def read_chats(path: Path) -> Iterator[Chat | BadLine]:
    """Yields every chat of a JSONL file in order, and every line that is none.

    Raises:
        OSError: The file can't be read.
    """
    for item in _read_objects(path):
        if isinstance(item, BadLine):
            yield item
            continue
        line, value = item
        reason = _why_no_chat(value)
        yield (
            BadLine(line, reason)
            if reason
            else Chat(
                line, [Message(role=m["role"], content=m["content"]) for m in value["messages"]]
            )
        )


def read_documents(path: Path) -> Iterator[Document | BadLine]:
    """Yields every document of a `.txt` or JSONL file in order, and every line that is none.

    Raises:
        OSError: The file can't be read.
    """
    if is_plain_text(path):
        raw = path.read_bytes()
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield BadLine(raw[: error.start].count(b"\n") + 1, f"not UTF-8 ({error.reason})")
            return
        if text.strip():
            yield Document(1, text)
        return
    for item in _read_objects(path):
        if isinstance(item, BadLine):
            yield item
            continue
        line, value = item
        content: object = value.get("text")
        if not isinstance(content, str):
            yield BadLine(line, '"text" must be a string')
        elif not content.strip():
            yield BadLine(line, '"text" is empty')
        elif not _is_unicode(content):
            yield BadLine(line, '"text" holds half a surrogate pair')
        else:
            yield Document(line, content)


def _read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | BadLine]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                value: object = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield BadLine(number, f"not UTF-8 ({error.reason} at byte {error.start + 1})")
            except json.JSONDecodeError as error:
                yield BadLine(number, f"not JSON ({error.msg} at column {error.colno})")
            except (
                RecursionError,
                ValueError,
            ) as error:  # too deep; a number of thousands of digits
                yield BadLine(number, f"not JSON ({error})")
            else:
                if isinstance(value, dict):
                    yield number, value
                else:
                    yield BadLine(number, "not a JSON object")


def _why_no_chat(value: dict[str, Any]) -> str:
    """A sentence on what is wrong with a chat; empty if nothing is."""
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        return '"messages" must be a list of turns'
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"messages[{index}] must be an object with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            return (
                f"messages[{index}].role must be system, user or assistant, not {json.dumps(role)}"
            )
        if not isinstance(content, str):
            return f"messages[{index}].content must be a string"
        if not _is_unicode(content):
            return f"messages[{index}].content holds half a surrogate pair"
        if role == "system" and index:
            return f"messages[{index}]: a system turn may only come first"
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return "no assistant turn with content: nothing to learn"
    return ""


def _is_unicode(text: str) -> bool:
    # JSON can spell "\\ud800", which Python takes and no tokenizer does.
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
