"""The reader of data files: formats, bad lines, arrays; and what scans remember."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.dataset import reader
from finetuned_daemon.dataset.formats import Chat, DataFormat, Document
from finetuned_daemon.dataset.reader import BadLine, read_chats, read_documents
from finetuned_daemon.dataset.scan import scan
from finetuned_daemon.runs.contract import TrainingType

SFT, PRETRAIN = TrainingType.SFT, TrainingType.PRETRAIN
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINE = json.dumps(CHAT)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def chats(path: Path) -> list[Chat | BadLine]:
    return list(read_chats(path))


def one_chat(tmp_path: Path, record: dict[str, Any]) -> Chat | BadLine:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record) + "\n")
    [item] = read_chats(path)
    return item


# --- formats


@pytest.mark.parametrize(
    ("record", "kind", "messages"),
    [
        (CHAT, DataFormat.MESSAGES, [("user", "a"), ("assistant", "b")]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "user", "value": "c"},
                    {"from": "chatgpt", "value": "d"},
                ]
            },
            DataFormat.SHAREGPT,
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "assistant", "value": "b"},
                ],
            },
            DataFormat.SHAREGPT,
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {"instruction": "Sum up.", "input": "1 2", "output": "3", "text": "all of it"},
            DataFormat.ALPACA,
            [("user", "Sum up.\n1 2"), ("assistant", "3")],
        ),
        (
            {
                "instruction": "i",
                "input": None,
                "output": "o",
                "system": "s",
                "history": [["a", "b"]],
                "messages": None,
            },
            DataFormat.ALPACA,
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "i"), ("assistant", "o")],
        ),
        (
            {"prompt": "a", "completion": "b"},
            DataFormat.PROMPT_COMPLETION,
            [("user", "a"), ("assistant", "b")],
        ),
        (
            {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]},
            DataFormat.PROMPT_COMPLETION,
            [("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_each_format_is_recognised_by_its_keys(
    tmp_path: Path, record: dict[str, Any], kind: DataFormat, messages: list[tuple[str, str]]
) -> None:
    assert one_chat(tmp_path, record) == Chat(1, turns(*messages), kind, 0)  # type: ignore[arg-type]


def test_documents_are_texts_whatever_stands_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n{"instruction": "i", "output": "o", "text": "b"}\n')
    assert list(read_documents(path)) == [
        Document(1, "a"),
        Document(3, "b", DataFormat.TEXT, byte_offset=15),
    ]
    plain = tmp_path / "book.txt"
    plain.write_bytes(b"\xef\xbb\xbf{\r\nnot JSON\n")
    assert list(read_documents(plain)) == [Document(1, "{\r\nnot JSON\n", DataFormat.PLAIN_TEXT)]


def test_a_file_that_mixes_formats_is_counted_by_format(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    alpaca = json.dumps({"instruction": "i", "output": "o"})
    path.write_text("\n".join([LINE, alpaca, alpaca, "{}"]))
    seen = scan(path, SFT)
    assert seen.formats == {DataFormat.ALPACA: 2, DataFormat.MESSAGES: 1}
    assert (seen.samples, seen.bad_count) == (3, 1)


# --- bad lines


@pytest.mark.parametrize(
    ("line", "reason", "english", "chinese"),
    [
        ('{"messages": 3}', "TURNS_NOT_LIST", '"messages" must be a list of turns', "回合列表"),
        ('{"conversations": []}', "TURNS_NOT_LIST", '"conversations" must be', "回合列表"),
        ('{"messages": ["a"]}', "TURN_NOT_OBJECT", "an object with role and content", "对象"),
        ('{"conversations": [3]}', "TURN_NOT_OBJECT", "with from and value", "对象"),
        (
            '{"messages": [{"role": "robot", "content": ""}]}',
            "ROLE_UNKNOWN",
            'messages[0].role must be system, user, assistant or tool, not "robot"',
            '而不是 "robot"',
        ),
        (
            '{"conversations": [{"from": {"a": 1}, "value": ""}]}',
            "ROLE_UNKNOWN",
            "conversations[0].from must be system, human or gpt, not {...}",
            "之一",
        ),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "CONTENT_NOT_STRING",
            "messages[0].content must be a string",
            "必须是字符串",
        ),
        ('{"instruction": 1, "output": "o"}', "CONTENT_NOT_STRING", '"instruction"', "字符串"),
        (
            '{"messages": [{"role": "assistant", "content": "\\ud800"}]}',
            "HALF_SURROGATE",
            "half a surrogate pair",
            "代理字符",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
            "SYSTEM_NOT_FIRST",
            "a system turn may only come first",
            "最前",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "NO_ANSWER",
            "no assistant turn with content",
            "没有可学习的内容",
        ),
        ('{"instruction": "i", "output": " "}', "NO_ANSWER", "nothing to learn", "没有"),
        (
            '{"instruction": "i", "output": "o", "history": [["a"]]}',
            "HISTORY_NOT_PAIRS",
            "history[0]",
            "问答",
        ),
        ('{"prompt": "a", "completion": []}', "PROMPT_NOT_TEXT", "both be strings", "都是字符串"),
        ('{"text": "a"}', "TEXT_FOR_SFT", "supervised fine-tuning needs a chat", "需要对话"),
        ('{"a": 1}', "UNKNOWN_FORMAT", '"messages" must be a list of turns', "其他格式"),
        ("[1]", "NOT_AN_OBJECT", "not a JSON object", "不是 JSON 对象"),
        ("{'a': 1}", "NOT_JSON", "at column 2", "第 2 列"),
        ("[" * 100_000, "NOT_JSON", "not JSON", "不是 JSON"),
        ('{"messages": ' + "9" * 5000 + "}", "NOT_JSON", "not JSON", "不是 JSON"),
        ("\udcff", "NOT_UTF8", "not UTF-8 (invalid start byte at byte 1)", "第 1 字节"),
    ],
)
def test_a_bad_line_has_its_place_reason_and_a_sentence_in_both_languages(
    tmp_path: Path, line: str, reason: str, english: str, chinese: str
) -> None:
    path = tmp_path / "data.jsonl"
    before = LINE.encode() + b"\r\n\r\n"
    path.write_bytes(before + line.encode("utf-8", "surrogateescape") + b"\r\n" + LINE.encode())
    good, bad, last = read_chats(path)
    assert isinstance(good, Chat)
    assert isinstance(last, Chat)
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.byte_offset, bad.reason) == (3, len(before), reason)
    assert english in bad.message.en
    assert chinese in bad.message.zh
    assert bad.excerpt == line[:200].replace("\udcff", "\ufffd")


@pytest.mark.parametrize(
    ("line", "reason", "english"),
    [
        ('{"text": 3}', "TEXT_NOT_STRING", '"text" must be a string'),
        ('{"a": 3}', "TEXT_NOT_STRING", '"text" must be a string'),
        ('{"text": " \\n"}', "TEXT_EMPTY", '"text" is empty'),
        ('{"text": "\\udfff"}', "HALF_SURROGATE", "surrogate"),
        (LINE, "CHAT_FOR_PRETRAINING", "this is a chat (messages)"),
        ('{"prompt": "a", "completion": "b"}', "CHAT_FOR_PRETRAINING", "(prompt/completion)"),
    ],
)
def test_a_record_that_is_no_document_says_what_it_is(
    tmp_path: Path, line: str, reason: str, english: str
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    [bad] = read_documents(path)
    assert isinstance(bad, BadLine)
    assert bad.reason == reason
    assert english in bad.message.en


def test_a_text_file_that_is_not_utf8_names_line_and_byte(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone\ntwo \xff three\nfour")
    [bad] = read_documents(path)
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.byte_offset, bad.reason) == (2, 7, "NOT_UTF8")
    assert "at byte 5" in bad.message.en
    assert bad.excerpt == "two \ufffd three"


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 1 << 20])
@pytest.mark.parametrize(
    ("data", "line", "byte_offset", "byte"),
    [
        (b"\xef\xbb\xbf\xff", 1, 0, 4),
        ("你好\n你".encode() + b"\xe4\xbd", 2, 7, 4),
        ("你好\r\n\n".encode() + b"\xe4\nx", 3, 9, 1),
        ("é".encode() * 5 + b"\xc3\n", 1, 0, 11),
    ],
)
def test_what_is_not_utf8_is_found_wherever_the_reading_pauses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    data: bytes,
    line: int,
    byte_offset: int,
    byte: int,
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    [bad] = read_documents(path)
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.byte_offset, bad.reason) == (line, byte_offset, "NOT_UTF8")
    assert f"at byte {byte})" in bad.message.en
    assert scan(path, PRETRAIN).bad == [bad]


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_a_text_file_is_one_document_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeff 你好\r\né 🙂\n".encode())
    assert list(read_documents(path)) == [
        Document(1, " 你好\r\né 🙂\n", DataFormat.PLAIN_TEXT),
    ]
    assert scan(path, PRETRAIN).formats == {DataFormat.PLAIN_TEXT: 1}
    path.write_bytes("\ufeff \r\n\u3000\n".encode())
    assert list(read_documents(path)) == []
    assert scan(path, PRETRAIN).samples == 0


def test_a_scan_does_not_hold_a_long_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("word " * (4 << 20))
    tracemalloc.start()
    try:
        assert scan(path, PRETRAIN).samples == 1
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20, "the text takes 20 MiB"


def test_a_line_that_is_too_long_is_bad_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "LARGEST_RECORD", 2 << 20)
    path = tmp_path / "data.jsonl"
    long = json.dumps({"messages": "x" * (5 << 20)})
    path.write_text(f"{long}\n{LINE}\n{long}")
    first, second, third = read_chats(path)
    assert isinstance(first, BadLine)
    assert isinstance(third, BadLine)
    assert (first.reason, first.line, first.byte_offset) == ("TOO_LONG", 1, 0)
    assert second == Chat(2, turns(("user", "a"), ("assistant", "b")), byte_offset=len(long) + 1)  # type: ignore[arg-type]
    assert (third.reason, third.line) == ("TOO_LONG", 3)
    path.write_text(f"[{long}, {LINE}]")
    first, second = read_chats(path)
    assert isinstance(first, BadLine)
    assert first.reason == "TOO_LONG"
    assert isinstance(second, Chat)


# --- arrays


AWKWARD = {"messages": turns(("user", 'a "quoted" ]} \\'), ("assistant", 'b\\\\"],[{ 你好 \n'))}


@pytest.mark.parametrize("chunk", [16, 17, 19, 23, 1 << 20])
def test_an_array_is_read_as_the_same_records_in_lines_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    records = [CHAT, AWKWARD, {"instruction": "i", "output": "o"}, AWKWARD]
    path = tmp_path / "data.json"
    for indent in (None, 1):
        path.write_bytes(
            b"\xef\xbb\xbf \n" + json.dumps(records, indent=indent, ensure_ascii=False).encode()
        )
        items = list(read_chats(path))
        assert all(isinstance(item, Chat) for item in items)
        raw = path.read_bytes()
        for item, record in zip(items, records, strict=True):
            assert isinstance(item, Chat)
            if "messages" in record:
                assert item.messages == record["messages"]
            assert raw[item.byte_offset : item.byte_offset + 1] == b"{"
            assert item.line == raw.count(b"\n", 0, item.byte_offset) + 1


def test_a_bad_element_of_an_array_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(f'[\n{LINE},\n{{"messages": [x]}},\n  7,\n{LINE} {LINE},\n{LINE}\n]\n')
    items = chats(path)
    assert [item.line for item in items if isinstance(item, Chat)] == [2, 6]
    assert [(item.line, item.reason) for item in items if isinstance(item, BadLine)] == [
        (3, "NOT_JSON"),
        (4, "NOT_AN_OBJECT"),
        (5, "NOT_JSON"),
    ]


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (f"[{LINE},\n{LINE}\n", 3, "the array is not closed"),
        (f"[{LINE}]\n{LINE}\n", 2, "behind the end of the array"),
    ],
)
def test_an_array_that_does_not_end_where_the_file_does_is_said(
    tmp_path: Path, text: str, line: int, why: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    *good, bad = chats(path)
    assert good
    assert all(isinstance(item, Chat) for item in good)
    assert isinstance(bad, BadLine)
    assert (bad.line, bad.reason) == (line, "NOT_JSON")
    assert why in bad.message.en


# --- scans


def settle(path: Path) -> None:
    """Makes a file look as if it had been written a while ago."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


def test_a_scan_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{LINE}\n")
    settle(path)
    first = scan(path, SFT)
    assert scan(path, SFT) is first
    assert scan(path, SFT, 1) is not first
    assert scan(path, PRETRAIN).bad_count == 1
    path.write_text(f"{LINE}\n{LINE}\n")
    assert scan(path, SFT).samples == 2


def test_threads_that_ask_for_the_same_scan_share_one(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{LINE}\n" * 2000)
    settle(path)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(scan(path, SFT))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    assert len({id(scan_) for scan_ in seen}) == 1


def test_a_file_that_cant_be_read_is_an_os_error_each_time(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            scan(tmp_path / "missing.jsonl", SFT)
        with pytest.raises(IsADirectoryError):
            scan(tmp_path, SFT)


def test_a_scan_names_a_hundred_bad_lines_and_counts_all(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{}\n" * 250)
    seen = scan(path, SFT)
    assert (len(seen.bad), seen.bad_count) == (100, 250)
    assert scan(path, SFT, 3).bad_count == 3


def test_a_file_that_grows_is_read_to_where_it_ended_when_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    line = json.dumps({"text": "word " * 100}) + "\n"
    path.write_text(line * 3)
    seen = 0
    for _ in read_documents(path):
        seen += 1
        with path.open("a") as file:
            file.write(line * 10_000)
    assert seen == 3
