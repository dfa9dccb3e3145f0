"""Formats of training data: how each is recognised, and how it becomes a chat or a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from finetuned_daemon.dataset.turns import (
    OPENAI,
    SHAREGPT,
    BadRecord,
    Message,
    Record,
    check_unicode,
    late_system,
    message_text,
    no_string,
    read_tools,
    read_turns,
)
from finetuned_daemon.texts import Text

__all__ = [
    "BadRecord",
    "Chat",
    "DataFormat",
    "Document",
    "Message",
    "Record",
    "message_text",
    "to_chat",
    "to_document",
]


class DataFormat(StrEnum):
    """Format of a sample; names as in `finetuned.v1.DataFormat`."""

    MESSAGES = "MESSAGES"
    SHAREGPT = "SHAREGPT"
    ALPACA = "ALPACA"
    PROMPT_COMPLETION = "PROMPT_COMPLETION"
    TEXT = "TEXT"
    PLAIN_TEXT = "PLAIN_TEXT"


@dataclass(frozen=True)
class Chat:
    """A conversation, and where it stands."""

    line: int
    messages: list[Message]
    format: DataFormat = DataFormat.MESSAGES
    byte_offset: int = 0
    tools: list[Record] | None = None
    """The tools that the assistant may call, as JSON schemas; None: none are listed."""


@dataclass(frozen=True)
class Document:
    """A text, and where it begins."""

    line: int
    text: str
    format: DataFormat = DataFormat.TEXT
    byte_offset: int = 0


@dataclass(frozen=True)
class _ChatFormat:
    """How a format of chats is recognised and read."""

    format: DataFormat
    keys: tuple[str, ...]
    """A record that has all of these is of this format."""
    name: str
    turns: Callable[[Record], list[Message]]
    lists_tools: bool = True
    """Whether "tools" beside the chat are those that the assistant may call."""


def to_chat(record: Record) -> tuple[DataFormat, list[Message], list[Record] | None]:
    """The chat in a record, with the format it was taken for and the tools listed beside it.

    Raises:
        BadRecord: It holds none.
    """
    found = _chat_format(record)
    if found is None:
        raise _no_chat(record)
    messages = found.turns(record)
    if not any(map(_teaches, messages)):
        raise BadRecord(
            "NO_ANSWER",
            Text(
                "no assistant turn with content: nothing to learn",
                "没有含内容的 assistant 回合：没有可学习的内容",
            ),
        )
    tools = read_tools(record.get("tools")) if found.lists_tools else None
    return found.format, messages, tools


def _teaches(message: Message) -> bool:
    return message["role"] == "assistant" and bool(
        message["content"].strip() or message.get("tool_calls")
    )


def to_document(record: Record) -> str:
    """The text of a record.

    Raises:
        BadRecord: It holds none.
    """
    text = record.get("text")
    if isinstance(text, str):
        if not text.strip():
            raise BadRecord("TEXT_EMPTY", Text('"text" is empty', '"text" 为空'))
        check_unicode('"text"', text)
        return text
    found = None if "text" in record else _chat_format(record)
    if found is not None:
        raise BadRecord(
            "CHAT_FOR_PRETRAINING",
            Text(
                f'"text" must be a string; this is a chat ({found.name}), which supervised '
                "fine-tuning reads",
                f'"text" 必须是字符串；这是一条对话（{found.name}），只用于监督微调',
            ),
        )
    raise BadRecord("TEXT_NOT_STRING", Text('"text" must be a string', '"text" 必须是字符串'))


def _chat_format(record: Record) -> _ChatFormat | None:
    # A table written out as JSON lines has null in the columns that a row doesn't use.
    return next(
        (f for f in _CHAT_FORMATS if all(record.get(key) is not None for key in f.keys)), None
    )


def _no_chat(record: Record) -> BadRecord:
    if "text" in record:
        return BadRecord(
            "TEXT_FOR_SFT",
            Text(
                'a text ({"text": ...}), which pretraining reads; supervised fine-tuning needs a '
                'chat, such as {"messages": [...]}',
                '这是文本（{"text": ...}），只用于预训练；监督微调需要对话，'
                '例如 {"messages": [...]}',
            ),
        )
    wanted = ", ".join("+".join(f.keys) for f in _CHAT_FORMATS[1:])
    return BadRecord(
        "UNKNOWN_FORMAT",
        Text(
            f'"messages" must be a list of turns; nor are there the keys of another format: '
            f"{wanted}",
            f'"messages" 必须是回合列表；也没有其他格式的键：{wanted}',
        ),
    )


# --- one function a format


def _from_messages(record: Record) -> list[Message]:
    return list(read_turns("messages", record["messages"], OPENAI))


def _from_sharegpt(record: Record) -> list[Message]:
    turns = list(read_turns("conversations", record["conversations"], SHAREGPT))
    system = _optional_text(record, "system")
    if system and turns[0]["role"] != "system":
        return [Message(role="system", content=system), *turns]
    return turns


def _from_alpaca(record: Record) -> list[Message]:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    further = _optional_text(record, "input")
    system = _optional_text(record, "system")
    messages = [Message(role="system", content=system)] if system else []
    for question, answer in _history(record.get("history")):
        messages.append(Message(role="user", content=question))
        messages.append(Message(role="assistant", content=answer))
    question = f"{instruction}\n{further}" if further and instruction else instruction or further
    messages.append(Message(role="user", content=question))
    messages.append(Message(role="assistant", content=output))
    return messages


def _from_prompt_completion(record: Record) -> list[Message]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = list(read_turns("prompt", cast("object", prompt), OPENAI))
        after = list(read_turns("completion", cast("object", completion), OPENAI))
        if after[0]["role"] == "system":
            raise late_system("completion[0]")
        return [*before, *after]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [
            Message(role="user", content=_text(record, "prompt")),
            Message(role="assistant", content=_text(record, "completion")),
        ]
    raise BadRecord(
        "PROMPT_NOT_TEXT",
        Text(
            '"prompt" and "completion" must both be strings or both lists of turns',
            '"prompt" 和 "completion" 必须都是字符串，或都是回合列表',
        ),
    )


# The first whose keys are there wins: some Alpaca files carry the rendered prompt as "text" too.
_CHAT_FORMATS = (
    _ChatFormat(DataFormat.MESSAGES, ("messages",), "messages", _from_messages),
    _ChatFormat(DataFormat.SHAREGPT, ("conversations",), "ShareGPT", _from_sharegpt),
    _ChatFormat(
        DataFormat.ALPACA, ("instruction", "output"), "Alpaca", _from_alpaca, lists_tools=False
    ),
    _ChatFormat(
        DataFormat.PROMPT_COMPLETION,
        ("prompt", "completion"),
        "prompt/completion",
        _from_prompt_completion,
    ),
)


# --- texts


def _history(value: object) -> Iterator[tuple[str, str]]:
    pairs: object = [] if value is None else value
    if not isinstance(pairs, list):
        raise _bad_history('"history"')
    for index, pair in enumerate(cast("list[object]", pairs)):
        where = f"history[{index}]"
        if not isinstance(pair, list):
            raise _bad_history(where)
        texts = cast("list[object]", pair)
        if len(texts) != 2:
            raise _bad_history(where)
        question, answer = texts
        if not isinstance(question, str) or not isinstance(answer, str):
            raise _bad_history(where)
        check_unicode(where, question + answer)
        yield question, answer


def _bad_history(where: str) -> BadRecord:
    return BadRecord(
        "HISTORY_NOT_PAIRS",
        Text(
            f"{where}: the history must be a list of pairs of strings, question and answer",
            f"{where}：history 必须是由问答字符串对组成的列表",
        ),
    )


def _text(record: Record, key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise no_string(f'"{key}"')
    check_unicode(f'"{key}"', value)
    return value


def _optional_text(record: Record, key: str) -> str:
    return "" if record.get(key) is None else _text(record, key)
