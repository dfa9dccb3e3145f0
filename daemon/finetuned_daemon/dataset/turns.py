"""Turns of a chat: what each may hold, and how the formats of data spell it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, cast

from finetuned_daemon.texts import Text

Role = Literal["system", "user", "assistant", "tool"]
Record = dict[str, object]


class Function(TypedDict):
    """What a tool call calls."""

    name: str
    arguments: Record


class ToolCall(TypedDict):
    """An assistant's call of a tool, as OpenAI spells it, but for the arguments: an object."""

    id: NotRequired[str]
    type: Literal["function"]
    function: Function


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    """Empty where an assistant only calls tools."""
    reasoning_content: NotRequired[str]
    """What an assistant thinks before its content, where it stands in a field of its own."""
    tool_calls: NotRequired[list[ToolCall]]
    """An assistant's calls, at least one."""
    name: NotRequired[str]
    """Of the tool, in the turn with its result."""
    tool_call_id: NotRequired[str]
    """Of the call that a result answers."""


def message_text(message: Message) -> str:
    """All that a turn tells, as one text: to count its characters, or to compare it with others."""
    text = message.get("reasoning_content", "") + message["content"]
    calls = message.get("tool_calls")
    return text + json.dumps(calls, ensure_ascii=False) if calls else text


class BadRecord(Exception):
    """A record that can't be used; `reason` is stable and in capitals."""

    def __init__(self, reason: str, message: Text) -> None:
        super().__init__(message.en)
        self.reason = reason
        self.message = message


# --- turns


@dataclass(frozen=True)
class Spelling:
    """How a format spells turns."""

    role: str
    content: str
    roles: dict[str, Role]
    choices: str


_FUNCTION_CALL = "function_call"
"""Whose turn ShareGPT writes as the JSON text of a tool call, or of a list of them."""

OPENAI = Spelling(
    "role",
    "content",
    {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    "system, user, assistant or tool",
)
SHAREGPT = Spelling(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "chatgpt": "assistant",
        _FUNCTION_CALL: "assistant",
        "observation": "tool",
        "tool": "tool",
    },
    "system, human or gpt",
)


def read_turns(name: str, value: object, spelling: Spelling) -> Iterator[Message]:
    """The turns in a list that stands under a name. Raises BadRecord where one is none."""
    if not isinstance(value, list) or not value:
        raise BadRecord(
            "TURNS_NOT_LIST",
            Text(f'"{name}" must be a list of turns', f'"{name}" 必须是回合列表'),
        )
    before = ""
    for index, turn in enumerate(cast("list[object]", value)):
        where = f"{name}[{index}]"
        if not isinstance(turn, dict):
            raise BadRecord(
                "TURN_NOT_OBJECT",
                Text(
                    f"{where} must be an object with {spelling.role} and {spelling.content}",
                    f"{where} 必须是含 {spelling.role} 和 {spelling.content} 的对象",
                ),
            )
        turn = cast("Record", turn)
        spelled, content = turn.get(spelling.role), turn.get(spelling.content)
        role = spelling.roles.get(spelled) if isinstance(spelled, str) else None
        if role is None:
            given = _short(spelled)
            raise BadRecord(
                "ROLE_UNKNOWN",
                Text(
                    f"{where}.{spelling.role} must be {spelling.choices}, not {given}",
                    f"{where}.{spelling.role} 必须是 {spelling.choices.replace(' or ', ', ')} "
                    f"之一，而不是 {given}",
                ),
            )
        if role == "system" and index:
            raise late_system(where)
        if role == "tool" and before not in ("assistant", "tool"):
            raise _early_tool(where)
        before = role
        if spelled == _FUNCTION_CALL:
            yield _function_call(f"{where}.{spelling.content}", content)
            continue
        extra = _extras(where, role, turn)
        if content is None and "tool_calls" in extra:
            content = ""
        if not isinstance(content, str):
            raise no_string(f"{where}.{spelling.content}")
        check_unicode(f"{where}.{spelling.content}", content)
        yield Message(role=role, content=content, **extra)


# --- reasoning and tools


class _Extras(TypedDict, total=False):
    """The fields that a message may have or not."""

    reasoning_content: str
    tool_calls: list[ToolCall]
    name: str
    tool_call_id: str


def _extras(where: str, role: Role, turn: Record) -> _Extras:
    """What a turn has beside its content; as ever, null is the same as nothing."""
    extras = _Extras()
    if role == "assistant":
        reasoning = turn.get("reasoning_content")
        if reasoning is not None:
            extras["reasoning_content"] = _string(f"{where}.reasoning_content", reasoning)
        calls = turn.get("tool_calls")
        if calls is not None and calls != []:
            extras["tool_calls"] = _tool_calls(f"{where}.tool_calls", calls)
    elif role == "tool":
        if turn.get("name") is not None:
            extras["name"] = _string(f"{where}.name", turn["name"])
        if turn.get("tool_call_id") is not None:
            extras["tool_call_id"] = _string(f"{where}.tool_call_id", turn["tool_call_id"])
    return extras


def _tool_calls(where: str, value: object) -> list[ToolCall]:
    if not isinstance(value, list):
        raise BadRecord(
            "TOOL_CALLS_NOT_LIST",
            Text(f"{where} must be a list of tool calls", f"{where} 必须是工具调用列表"),
        )
    calls: list[ToolCall] = []
    for index, item in enumerate(cast("list[object]", value)):
        place = f"{where}[{index}]"
        function = cast("Record", item).get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict):
            raise BadRecord(
                "TOOL_CALL_NOT_FUNCTION",
                Text(
                    f'{place} must be an object with "function": {{"name": ..., "arguments": ...}}',
                    f'{place} 必须是含 "function": {{"name": ..., "arguments": ...}} 的对象',
                ),
            )
        call = ToolCall(
            type="function", function=_function(f"{place}.function", cast("Record", function))
        )
        number = cast("Record", item).get("id")
        if number is not None:
            call["id"] = _string(f"{place}.id", number)
        calls.append(call)
    return calls


def _function(where: str, value: Record) -> Function:
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise BadRecord(
            "TOOL_NAME_MISSING",
            Text(
                f"{where}.name must be the name of a tool, not {_short(name)}",
                f"{where}.name 必须是工具名称，而不是 {_short(name)}",
            ),
        )
    check_unicode(f"{where}.name", name)
    parsed = _json(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(parsed, dict):
        raise BadRecord(
            "TOOL_ARGUMENTS_NOT_OBJECT",
            Text(
                f"{where}.arguments must be an object, or the JSON text of one, not "
                f"{_short(arguments)}",
                f"{where}.arguments 必须是对象或其 JSON 文本，而不是 {_short(arguments)}",
            ),
        )
    check_unicode(f"{where}.arguments", json.dumps(parsed, ensure_ascii=False))
    return Function(name=name, arguments=cast("Record", parsed))


def _function_call(where: str, value: object) -> Message:
    """The turn that ShareGPT spells as the JSON text of a call: name and arguments."""
    parsed = _json(value) if isinstance(value, str) else value
    items = cast("list[object]", parsed if isinstance(parsed, list) else [parsed])
    if not items or not all(isinstance(item, dict) for item in items):
        raise BadRecord(
            "TOOL_CALL_NOT_FUNCTION",
            Text(
                f'{where} must be the JSON text of {{"name": ..., "arguments": ...}}, or of a list '
                "of such",
                f'{where} 必须是 {{"name": ..., "arguments": ...}} 或其列表的 JSON 文本',
            ),
        )
    calls = [
        ToolCall(type="function", function=_function(where, cast("Record", item))) for item in items
    ]
    return Message(role="assistant", content="", tool_calls=calls)


def read_tools(value: object) -> list[Record] | None:
    """The tools listed beside a chat; None: there are none. Raises BadRecord."""
    if value is None or value in ("", []):
        return None
    tools = _json(value) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) for tool in cast("list[object]", tools)
    ):
        raise BadRecord(
            "TOOLS_NOT_LIST",
            Text(
                '"tools" must be a list of objects that describe tools, or the JSON text of one',
                '"tools" 必须是描述工具的对象列表，或其 JSON 文本',
            ),
        )
    check_unicode('"tools"', json.dumps(tools, ensure_ascii=False))
    return cast("list[Record]", tools) or None


def _json(text: str) -> object:
    """The value of a JSON text; None where it is none."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def _early_tool(where: str) -> BadRecord:
    return BadRecord(
        "TOOL_RESULT_WITHOUT_CALL",
        Text(
            f"{where}: a tool turn must follow an assistant turn that calls the tool",
            f"{where}：tool 回合必须位于调用该工具的 assistant 回合之后",
        ),
    )


def late_system(where: str) -> BadRecord:
    """What is wrong with a system turn behind others."""
    return BadRecord(
        "SYSTEM_NOT_FIRST",
        Text(
            f"{where}: a system turn may only come first",
            f"{where}：system 回合只能位于最前",
        ),
    )


# --- texts


def _string(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise no_string(where)
    check_unicode(where, value)
    return value


def no_string(where: str) -> BadRecord:
    """What is wrong with a value that is no string."""
    return BadRecord(
        "CONTENT_NOT_STRING", Text(f"{where} must be a string", f"{where} 必须是字符串")
    )


def check_unicode(where: str, text: str) -> None:
    """Raises BadRecord where a text can't be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell "\\ud800", which Python takes and no tokenizer does
        raise BadRecord(
            "HALF_SURROGATE",
            Text(f"{where} holds half a surrogate pair", f"{where} 含有不成对的代理字符"),
        ) from None


def _short(value: object) -> str:
    if isinstance(value, dict):
        return "{...}"
    if isinstance(value, list):
        return "[...]"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
