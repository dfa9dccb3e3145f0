"""Chats with reasoning, tool calls and results are read, and what is wrong in them is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.dataset.formats import Chat, message_text
from finetuned_daemon.dataset.reader import BadLine, read_chats

USER = {"role": "user", "content": "Weather?"}
ANSWER = {"role": "assistant", "content": "Rain."}
FUNCTION = {"name": "weather", "arguments": {"city": "Bergen"}}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "7 degrees"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def read(tmp_path: Path, record: dict[str, Any]) -> Chat | BadLine:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"\n{json.dumps(record)}\n")
    (item,) = read_chats(path)
    assert item.line == 2
    return item


@pytest.mark.parametrize("as_text", [True, False])
def test_tool_calls_results_and_tools_are_read_as_openai_writes_them(
    tmp_path: Path, as_text: bool
) -> None:
    """Arguments and the list of tools may be JSON text, as some columns can hold nothing else."""
    calling = json.loads(json.dumps(CALLING))
    tools: Any = TOOLS
    if as_text:
        calling["tool_calls"][0]["function"]["arguments"] = '{"city": "Bergen"}'
        tools = json.dumps(TOOLS)
    item = read(tmp_path, {"messages": [USER, calling, RESULT, ANSWER], "tools": tools})
    assert isinstance(item, Chat)
    assert item.tools == TOOLS
    assert item.messages == [USER, {**CALLING, "content": ""}, RESULT, ANSWER]
    assert "Bergen" in message_text(item.messages[1])
    assert message_text(item.messages[3]) == "Rain."


def test_a_chat_may_end_with_a_call_and_have_nothing_else_to_learn(tmp_path: Path) -> None:
    without_content = {"role": "assistant", "tool_calls": [CALL]}
    item = read(tmp_path, {"prompt": [USER], "completion": [without_content], "tools": TOOLS})
    assert isinstance(item, Chat)
    assert item.messages[1] == {**CALLING, "content": ""}
    assert item.tools == TOOLS


def test_what_is_null_or_not_the_turns_own_is_read_as_ever(tmp_path: Path) -> None:
    """Tables have null where a row has nothing; users call no tools."""
    nothing = {"tool_calls": None, "reasoning_content": None, "name": None, "tool_call_id": None}
    chat = [{**USER, **nothing, "name": "Ada"}, {**ANSWER, **nothing, "tool_calls": []}]
    item = read(tmp_path, {"messages": chat, "tools": None})
    assert isinstance(item, Chat)
    assert (item.messages, item.tools) == ([USER, ANSWER], None)


def test_reasoning_stands_in_a_field_of_its_own(tmp_path: Path) -> None:
    answer = {**ANSWER, "reasoning_content": "West coast."}
    item = read(tmp_path, {"messages": [USER, answer]})
    assert isinstance(item, Chat)
    assert item.messages[1] == answer
    assert message_text(item.messages[1]) == "West coast.Rain."


def test_sharegpt_spells_calls_and_results_as_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(FUNCTION)},
        {"from": "observation", "value": "7 degrees"},
        {"from": "gpt", "value": "Rain."},
    ]
    item = read(tmp_path, {"conversations": turns, "tools": json.dumps(TOOLS)})
    assert isinstance(item, Chat)
    assert item.messages == [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": FUNCTION}],
        },
        {"role": "tool", "content": "7 degrees"},
        ANSWER,
    ]
    assert item.tools == TOOLS


def calling(function: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": None, "tool_calls": function}]


@pytest.mark.parametrize(
    ("record", "reason", "english", "chinese"),
    [
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "CONTENT_NOT_STRING",
            "messages[1].content must be a string",
            "字符串",
        ),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": 3}]},
            "CONTENT_NOT_STRING",
            "messages[1].reasoning_content must be a string",
            "字符串",
        ),
        (
            {"messages": calling({"name": "f"})},
            "TOOL_CALLS_NOT_LIST",
            "messages[1].tool_calls must be a list of tool calls",
            "工具调用列表",
        ),
        (
            {"messages": calling([CALL, FUNCTION])},
            "TOOL_CALL_NOT_FUNCTION",
            'messages[1].tool_calls[1] must be an object with "function"',
            "对象",
        ),
        (
            {"messages": calling([{"function": {"name": " ", "arguments": {}}}])},
            "TOOL_NAME_MISSING",
            'messages[1].tool_calls[0].function.name must be the name of a tool, not " "',
            "工具名称",
        ),
        (
            {"messages": calling([{"function": {"name": "f", "arguments": "{city: 3}"}}])},
            "TOOL_ARGUMENTS_NOT_OBJECT",
            'function.arguments must be an object, or the JSON text of one, not "{city: 3}"',
            "JSON 文本",
        ),
        (
            {"messages": calling([{"function": {"name": "f"}}])},
            "TOOL_ARGUMENTS_NOT_OBJECT",
            "not null",
            "JSON 文本",
        ),
        (
            {"messages": calling([{"function": {"name": "f", "arguments": {"a": "\ud800"}}}])},
            "HALF_SURROGATE",
            "messages[1].tool_calls[0].function.arguments holds half a surrogate pair",
            "代理字符",
        ),
        (
            {"messages": [USER, RESULT, ANSWER]},
            "TOOL_RESULT_WITHOUT_CALL",
            "messages[1]: a tool turn must follow an assistant turn that calls the tool",
            "tool 回合",
        ),
        (
            {"messages": [USER, CALLING, {**RESULT, "content": {"degrees": 7}}]},
            "CONTENT_NOT_STRING",
            "messages[2].content must be a string",
            "字符串",
        ),
        (
            {"messages": [USER, ANSWER], "tools": "weather, time"},
            "TOOLS_NOT_LIST",
            '"tools" must be a list of objects that describe tools',
            "对象列表",
        ),
        (
            {"messages": [USER, ANSWER], "tools": ["weather"]},
            "TOOLS_NOT_LIST",
            '"tools" must be a list',
            "对象列表",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": "weather(Bergen)"},
                ]
            },
            "TOOL_CALL_NOT_FUNCTION",
            "conversations[1].value must be the JSON text of",
            "JSON 文本",
        ),
    ],
)
def test_a_malformed_call_is_a_bad_line_with_the_place_and_what_would_be_right(
    tmp_path: Path, record: dict[str, Any], reason: str, english: str, chinese: str
) -> None:
    """In both languages."""
    item = read(tmp_path, record)
    assert isinstance(item, BadLine)
    assert item.reason == reason
    assert english in item.message.en
    assert chinese in item.message.zh
