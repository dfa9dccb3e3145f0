"""Which characters of a rendered chat are the assistant's: all it has to say, to its end of turn.

A template with `{% generation %}` blocks says so itself. For every other one two independent
methods must agree:

origins             The template is rendered so that the origin of every character is known: which
                    message's text it is, or the template's own, and at which message the template
                    wrote it (`chat_mask_tracking`). What it writes at an assistant message is that
                    turn; nobody else's text may stand in it, and its contents nowhere else.
growing prefixes    The chat up to a turn, with the generation prompt, shows how the turn is asked
                    for: all before it must be written the same in the whole chat, earlier answers
                    aside, which some templates shorten. A plain word in place of the turn, within
                    the chat and at its end, shows where the template's header ends and what ends
                    the turn, however its contents imitate that.

A turn's span begins where the generation prompt ends, and ends with the end-of-turn token. Text
that the template adds between is part of it, such as the marks around a tool call; an empty
reasoning block is not, nor a header that the generation prompt lacks. A line feed behind the end is
not learned: generation stops before it. Where the methods fail or differ the chat is refused: a
wrong mask is a model that learns the user's part.

The second method is asked once for all chats in which the template's own text is the same
(`_LARGEST_CACHE` of them at a time); the first, and that the text is what transformers renders, for
every chat.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetuned_daemon.dataset.formats import Message, message_text
from finetuned_runner.bounds import TakesTooLong, bounded_time
from finetuned_runner.chat_mask_tracking import NOWHERE, Field, Trace, Tracker
from finetuned_runner.chat_mask_turns import (
    MaskError,
    Turn,
    content_text,
    find_turns,
    skeleton,
    stretches,
)

__all__ = ["ChatMask", "MaskError", "Rendered", "Span"]

Span = tuple[int, int]
"""First character, and the one after the last."""

_Dict = dict[str, Any]
_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_EMPTY_BLOCK = re.compile(r"\s*<([^<>/]+)>\s*</\1>\s*")
_WORDS = ("Zq0xW", "Zq1xW")
_LARGEST_CACHE = 4096

_SECONDS = 5.0
"""Processor time for one chat; an ordinary one takes some milliseconds."""
_MOST_CHARACTERS = 10_000_000
"""That a template may write for a chat,"""
_MOST_GROWTH = 50
"""and so many more for each of the chat's own."""
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and the spans of it to be learned, in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Frame:
    """What the prefixes say of a turn, in characters."""

    header: int | None
    """From its beginning to the end of its generation prompt; None: it can't be told."""
    tail: int
    """From the last that an assistant says there, but for the end of turn, to the turn's end."""
    rest: int
    """From behind the end-of-turn token to the turn's end."""


class ChatMask:
    """Renders chats with a tokenizer's template and finds what is to be learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Raises MaskError if the tokenizer has no chat template."""
        try:
            template: Any = tokenizer.get_chat_template()
        except ValueError:
            raise MaskError("the tokenizer has no chat template") from None
        if not isinstance(template, str):
            raise MaskError("the tokenizer's chat template is no text")
        self._template = template
        self._variables = dict(tokenizer.special_tokens_map)
        self.has_generation_blocks = _GENERATION_BLOCK.search(self._template) is not None
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokens.update(str(token) for token in tokenizer.all_special_tokens)
        self._tokens = re.compile(
            "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
        )
        self._special = {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self._special.update(str(token) for token in tokenizer.all_special_tokens)
        self._most = _MOST_CHARACTERS
        self._eos = str(tokenizer.eos_token) if tokenizer.eos_token else None
        self._bos = str(tokenizer.bos_token) if tokenizer.bos_token else None
        self._tracker: Tracker | None = None
        self._frames: dict[tuple[object, ...], dict[int, _Frame]] = {}

    def render(self, messages: Sequence[Message], tools: Sequence[_Dict] | None = None) -> Rendered:
        """Renders a chat.

        Args:
            messages: The chat.
            tools: Descriptions of the tools that the assistant may call, as JSON schemas.

        Raises:
            MaskError: The template refuses the chat or takes too long or too much for it, or the
                assistant's text is not certain.
        """
        with self._bounded(messages):
            return self._render(messages, tools)

    def _render(self, messages: Sequence[Message], tools: Sequence[_Dict] | None) -> Rendered:
        prepared = self._prepare(messages)
        listed = list(tools) if tools else None
        if self.has_generation_blocks:
            text, spans = self._call(prepared, listed, return_assistant_tokens_mask=True)
            return Rendered(text, [(start, end) for start, end in spans if start < end])
        trace = self._trace(prepared, listed)
        turns = find_turns(prepared, trace)
        key = skeleton(prepared, listed, trace)
        frames = self._frames.get(key)
        if frames is None:
            frames = {
                index: self._frame(prepared, listed, trace, turn) for index, turn in turns.items()
            }
            if len(self._frames) >= _LARGEST_CACHE:
                self._frames.clear()
            self._frames[key] = frames
        return Rendered(
            trace.text,
            [
                self._span(prepared[index], trace.text, turn, frames[index])
                for index, turn in turns.items()
            ],
        )

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[_Dict] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """A chat as the template writes it, whatever of it is learned.

        Raises:
            MaskError: The template refuses the chat.
        """
        listed = list(tools) if tools else None
        with self._bounded(messages):
            prepared = self._prepare(messages)
            return self._call(prepared, listed, add_generation_prompt=generation_prompt)[0]

    # --- rendering

    @contextlib.contextmanager
    def _bounded(self, messages: Sequence[Message]) -> Generator[None]:
        """Bounds what the template may take for a chat, and write."""
        self._most = _MOST_CHARACTERS + _MOST_GROWTH * sum(len(message_text(m)) for m in messages)
        try:
            with bounded_time(_SECONDS):
                yield
        except TakesTooLong:
            raise MaskError(
                f"the chat template takes more than {_SECONDS:g} s for one chat"
            ) from None

    def _prepare(self, messages: Sequence[Message]) -> list[_Dict]:
        """Messages as the template reads them."""
        prepared: list[_Dict] = []
        for message in messages:
            written: _Dict = {**message}
            if "reasoning_content" in message:  # the name that gpt-oss reads
                written["thinking"] = message["reasoning_content"]
            if self._wants_parts:
                written["content"] = _parts(message["content"])
            if "tool_calls" in message and self._wants_json:
                written["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
            prepared.append(written)
        return prepared

    def _writes(self, content: Callable[[str], object], *further: _Dict) -> bool:
        """Whether a question and an answer stand in what the template makes of them."""
        asked, answered = _WORDS
        chat = [
            {"role": "user", "content": content(asked)},
            *further,
            {"role": "assistant", "content": content(answered)},
        ]
        try:
            text = self._call(chat, None)[0]
        except MaskError:
            return False
        return asked in text and answered in text

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads contents only where they are lists of parts."""
        return not self._writes(str) and self._writes(_parts)

    @cached_property
    def _wants_json(self) -> bool:
        """Whether the template reads the arguments of tool calls only as JSON text (DeepSeek)."""
        function = {"name": _WORDS[0], "arguments": {_WORDS[0]: _WORDS[0]}}
        call: _Dict = {"id": "call00001", "type": "function", "function": function}
        answer = {"role": "tool", "name": _WORDS[0], "tool_call_id": "call00001", "content": "1"}

        def writes(call: _Dict) -> bool:
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            return self._writes(str, calling, answer)

        return not writes(call) and writes(_with_json(call))

    def _call(
        self, messages: list[_Dict], tools: list[_Dict] | None, **options: Any
    ) -> tuple[str, list[Span]]:
        render: Any = render_jinja_template
        try:
            texts, spans = render(
                conversations=[messages],
                tools=tools,
                chat_template=self._template,
                **options,
                **self._variables,
            )
        except MemoryError as error:
            raise MaskError("the chat template takes too much memory") from error
        except Exception as error:  # whatever a template comes to: a division by zero, say
            raise MaskError(f"the chat template refuses the chat: {_brief(error)}") from error
        if len(texts[0]) > self._most:
            raise MaskError(f"the chat template makes {len(texts[0]):,} characters of one chat")
        return texts[0], spans[0] if spans else []

    def _trace(
        self, messages: list[_Dict], tools: list[_Dict] | None, *, generation_prompt: bool = False
    ) -> Trace:
        """The rendering with its origins, which must be what transformers itself renders."""
        text, _ = self._call(messages, tools, add_generation_prompt=generation_prompt)
        if self._tracker is None:
            self._tracker = Tracker(self._template, self._variables)
        try:
            trace = self._tracker.render(messages, tools, generation_prompt=generation_prompt)
        except MemoryError as error:
            raise MaskError("the chat template takes too much memory") from error
        except Exception as error:
            raise MaskError(f"the chat template can't be followed: {_brief(error)}") from error
        if trace.text != text:
            raise MaskError("the chat template can't be followed: it writes another text")
        return trace

    # --- growing prefixes

    def _frame(
        self, messages: list[_Dict], tools: list[_Dict] | None, trace: Trace, turn: Turn
    ) -> _Frame:
        """How a turn is asked for and ends, held against the same turn with a plain word."""
        index, text = turn.index, trace.text
        written = text[turn.start : turn.stop]
        before = text[turn.start : turn.first] if turn.own else written
        has_calls = bool(messages[index].get("tool_calls"))
        header: str | None
        header, last_tail = self._around_word([*messages[:index], self._word()], tools, index)
        if not self._end_of_turn(last_tail, after_calls=False):
            raise MaskError(f"no end-of-turn token follows messages[{index}]")
        tail = last_tail
        if index + 1 < len(messages):
            try:
                header, tail = self._around_word(messages, tools, index)
            except MaskError:
                if not has_calls:
                    raise
                header, tail = None, ""  # what follows may need the calls
        if not turn.own and written != f"{header}{tail}":
            raise MaskError(f"the template writes messages[{index}] differently without text")
        if tail and written.endswith(tail) and turn.last <= turn.stop - len(tail):
            end = self._common_end(index, tail, last_tail, after_calls=False)
        elif has_calls:
            tail = text[turn.last : turn.stop]
            ends: list[int] = []
            ended = messages[: index + 1]
            for chat in (ended, [*ended, *map(self._result, messages[index]["tool_calls"])]):
                other = self._trace(chat, tools)
                same = find_turns(chat, other)[index]
                at_end = other.text[same.last : same.stop]
                ends.append(self._common_end(index, tail, at_end, after_calls=True))
            end = min(ends)
        else:
            raise MaskError(f"no end-of-turn token follows messages[{index}]")
        prompt = self._prompt(messages, tools, trace, turn)
        rest = len(tail) - end
        # Without a generation prompt only a plain turn shows where the template's header ends.
        if before.startswith(prompt) and (prompt.strip() or not before.strip()):
            return _Frame(len(prompt), len(tail), rest)
        if header is not None and before.startswith(header):
            return _Frame(len(header), len(tail), rest)
        # What every way of asking begins with, such as the mark that opens a block of reasoning, is
        # never the model's to say.
        asked = [way for way in (prompt, header or "") if way.strip()]
        if asked and all(way.startswith(before) for way in asked):
            return _Frame(len(before), len(tail), rest)
        return _Frame(None, len(tail), rest)

    def _around_word(
        self, messages: list[_Dict], tools: list[_Dict] | None, index: int
    ) -> tuple[str, str]:
        """What the template writes before and behind a plain word in place of a message."""
        replaced = [*messages[:index], self._word(), *messages[index + 1 :]]
        trace = self._trace(replaced, tools)
        turn = find_turns(replaced, trace)[index]
        return trace.text[turn.start : turn.first], trace.text[turn.last : turn.stop]

    def _word(self) -> _Dict:
        word = _WORDS[1]
        return {"role": "assistant", "content": _parts(word) if self._wants_parts else word}

    def _result(self, call: _Dict) -> _Dict:
        """A plain word as the result of a tool call."""
        name, word = call["function"]["name"], _WORDS[0]
        content = _parts(word) if self._wants_parts else word
        return {
            "role": "tool",
            "name": name,
            "tool_call_id": call.get("id", name),
            "content": content,
        }

    def _common_end(self, index: int, in_chat: str, at_end: str, *, after_calls: bool) -> int:
        """How far behind its last text a turn ends, by what follows it in and at a chat's end."""
        one, other = (
            self._end_of_turn(tail, after_calls=after_calls) for tail in (in_chat, at_end)
        )
        if not one or not other:
            raise MaskError(f"no end-of-turn token follows messages[{index}]")
        if one.startswith(other):
            return len(other)
        # Two marks that differ, as those of gpt-oss, are both an end of this turn; more is unclear.
        if other.startswith(one) or (self._tokens.fullmatch(one) and self._tokens.fullmatch(other)):
            return len(one)
        raise MaskError(f"messages[{index}] is written differently when the chat goes on")

    def _prompt(
        self, messages: list[_Dict], tools: list[_Dict] | None, trace: Trace, turn: Turn
    ) -> str:
        """The generation prompt of a turn, empty where the chat begins with it."""
        index = turn.index
        if not index:
            return ""
        asked = self._trace(messages[:index], tools, generation_prompt=True)
        written = stretches(messages, trace, turn.start)
        before = stretches(messages, asked, len(asked.text))
        prompt = ""
        if len(before) > 1 and before[-1][0] == NOWHERE:
            prompt = before.pop()[1]
        if before and written and before[-1][1].startswith(written[-1][1]):
            # Some templates write it at the last message rather than behind all (Zephyr).
            prompt = before[-1][1][len(written[-1][1]) :] + prompt
            before[-1] = (before[-1][0], written[-1][1])
        if written != before:
            raise MaskError(f"the prompt of messages[{index}] is not how the whole chat begins")
        return prompt

    # --- spans

    def _span(self, message: _Dict, text: str, turn: Turn, frame: _Frame) -> Span:
        if frame.header is None:
            raise MaskError(f"it can't be told where the prompt of messages[{turn.index}] ends")
        prompt_end = turn.start + frame.header
        tail_start = turn.stop - frame.tail
        if prompt_end > (turn.first if turn.own else tail_start):
            raise MaskError(f"messages[{turn.index}] begins before its generation prompt ends")
        if turn.own:
            start = self._start(message, text, turn, prompt_end)
        elif _EMPTY_BLOCK.fullmatch(text, prompt_end, tail_start):
            start = tail_start
        else:
            start = prompt_end
        return start, turn.stop - frame.rest

    @staticmethod
    def _start(message: _Dict, text: str, turn: Turn, prompt_end: int) -> int:
        first = turn.own[0]
        if first.field is not Field.CONTENT:
            return prompt_end
        written = text[prompt_end : turn.first]
        dropped = content_text(message)[: first.place].strip()
        # A content may begin with reasoning whose marks the template writes anew, or leave it out.
        if dropped and not dropped.endswith((">", "]")):
            raise MaskError(f"the template changes the beginning of messages[{turn.index}]")
        if dropped and _squeeze(dropped).endswith(_squeeze(written)):
            return prompt_end
        return turn.first if _EMPTY_BLOCK.fullmatch(written) else prompt_end

    def _end_of_turn(self, tail: str, *, after_calls: bool) -> str:
        """What of a turn's tail ends the turn, empty where nothing does.

        Behind a content the tokens that follow it at once. Behind tool calls other text comes
        first: the last token, if it is a special one, as the marks around calls often are not.
        Never anything behind the end-of-text token, nor one that begins a text.
        """
        end = 0
        is_special = False
        for mark in self._tokens.finditer(tail):
            between = tail[end : mark.start()]
            if not after_calls and (between if end else between.strip()):
                break
            if mark.group() == self._bos != self._eos:
                break
            end = mark.end()
            is_special = mark.group() in self._special
            if mark.group() == self._eos:
                break
        return "" if after_calls and (tail[end:].strip() or not is_special) else tail[:end]


def _parts(text: str) -> list[_Dict]:
    return [{"type": "text", "text": text}]


def _with_json(call: Mapping[str, Any]) -> _Dict:
    """A tool call with its arguments as text, the form in which OpenAI sends them."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _brief(error: Exception) -> str:
    """What an error says, which a template may have written: on one line, and not without end."""
    why = str(error)[:_LONGEST_REASON] or type(error).__name__
    return "".join(c if c.isprintable() else " " for c in why)
