"""Which characters of a rendered chat are the assistant's: its content and end-of-turn token.

A template with `{% generation %}` blocks says so itself. For every other one two independent
methods must agree:

growing prefixes    The chat up to a turn, with the generation prompt, must be how the whole
                    rendering begins: the turn starts there at the earliest. The chat through the
                    turn shows where it ends.
tracked contents    The same chat is rendered with a unique word in place of every content. What
                    stands between the words is the template's own text. Laid over the real
                    rendering it shows where each content stands; what follows a turn both in
                    mid-chat and at the end of a chat is its end of turn.

A turn's span begins at its content, or at the blanks that the template puts between generation
prompt and content (they are one token with the content's first word in many tokenizers), and ends
with the end-of-turn token. A line feed that follows is not learned: generation stops before it.
Neither is text that the template itself puts before the content, such as an empty reasoning block.
Where the methods fail or differ the chat is refused: a wrong mask is a model that learns the user's
part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from finetuned_daemon.dataset.formats import Message

Span = tuple[int, int]
"""First character, and the one after the last."""

_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_WORD = re.compile(r"Zq(\d+)xW")


class MaskError(Exception):
    """It is not certain which text of a chat is the assistant's; the message says why."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and the spans of it to be learned, in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class _Skeleton:
    """A rendering without its contents: text, content, text, content ... text."""

    texts: list[str]
    """One more than contents."""
    order: list[int]
    """Index of the message whose content stands at each place."""


@dataclass(frozen=True)
class _Turn:
    """Where an assistant turn stands in a rendering."""

    content_start: int
    content_end: int
    end: int
    """Behind the end-of-turn token."""
    tail: str
    """All that follows the content where the chat ends with this turn."""


class ChatMask:
    """Renders chats with a tokenizer's template and finds what is to be learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Raises MaskError if the tokenizer has no chat template."""
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise MaskError("the tokenizer has no chat template") from None
        self._template = template
        self._variables = dict(tokenizer.special_tokens_map)
        self.has_generation_blocks = _GENERATION_BLOCK.search(self._template) is not None
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        tokens.update(str(token) for token in tokenizer.all_special_tokens)
        self._end_token = re.compile(
            "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
        )
        self._skeletons: dict[tuple[str, ...], _Skeleton | str] = {}

    def render(self, messages: list[Message]) -> Rendered:
        """Renders a chat.

        Raises:
            MaskError: The template refuses the chat, or the assistant's text is not certain.
        """
        if self.has_generation_blocks:
            return self._by_generation_blocks(messages)
        whole = self._render(messages)
        tracked = self._track(messages, whole)
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            earliest = spans[-1][1] if spans else 0
            if isinstance(tracked, str):
                spans.append(self._by_prefixes_alone(messages, index, whole, earliest, tracked))
            else:
                spans.append(self._checked(messages, index, whole, earliest, tracked[index]))
        return Rendered(whole, spans)

    def _render(self, messages: list[Message], *, generation_prompt: bool = False) -> str:
        if not messages:  # many templates look at the first message
            return ""
        return self._call(messages, add_generation_prompt=generation_prompt)[0]

    def _call(self, messages: list[Message], **options: Any) -> tuple[str, list[Span]]:
        render: Any = render_jinja_template
        try:
            texts, spans = render(
                conversations=[messages],
                chat_template=self._template,
                **options,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise MaskError(f"the chat template refuses the chat: {error}") from error
        return texts[0], spans[0] if spans else []

    # --- the template says so

    def _by_generation_blocks(self, messages: list[Message]) -> Rendered:
        text, spans = self._call(messages, return_assistant_tokens_mask=True)
        return Rendered(text, [(start, end) for start, end in spans if start < end])

    # --- tracked contents

    def _skeleton(self, roles: tuple[str, ...]) -> _Skeleton | str:
        """The skeleton of chats with these roles, or why there is none."""
        if roles not in self._skeletons:
            self._skeletons[roles] = self._make_skeleton(roles)
        return self._skeletons[roles]

    def _make_skeleton(self, roles: tuple[str, ...]) -> _Skeleton | str:
        words = [Message(role=role, content=f"Zq{index}xW") for index, role in enumerate(roles)]
        try:
            rendered = self._render(words)
        except MaskError as error:
            return str(error)
        order = [int(match[1]) for match in _WORD.finditer(rendered)]
        assistants = [index for index, role in enumerate(roles) if role == "assistant"]
        if [index for index in order if index in assistants] != assistants or len(set(order)) < len(
            order
        ):
            return "the template drops, repeats or reorders contents"
        return _Skeleton(_WORD.split(rendered)[::2], order)

    def _track(self, messages: list[Message], whole: str) -> dict[int, _Turn] | str:
        """Where each assistant turn stands, by index of its message; or why it can't be said."""
        roles = tuple(message["role"] for message in messages)
        skeleton = self._skeleton(roles)
        if isinstance(skeleton, str):
            return skeleton
        contents = self._lay(skeleton, messages, whole)
        if contents is None:
            return "the template changes contents, or its own text with them"
        found: dict[int, _Turn] = {}
        for place, index in enumerate(skeleton.order):
            if roles[index] != "assistant":
                continue
            ended = self._skeleton(roles[: index + 1])
            if isinstance(ended, str):
                return ended
            if ended.order[-1] != index:
                return "the template reorders contents"
            tail = ended.texts[-1]
            end = self._end_of_turn(skeleton.texts[place + 1], tail)
            if end is None:
                return "no end-of-turn token follows the assistant's turns"
            start, stop = contents[index]
            found[index] = _Turn(start, stop, stop + end, tail)
        return found

    @staticmethod
    def _lay(skeleton: _Skeleton, messages: list[Message], whole: str) -> dict[int, Span] | None:
        """Lays a skeleton over a rendering: the span of each content, None if they don't fit."""
        if not whole.startswith(skeleton.texts[0]):
            return None
        spans: dict[int, Span] = {}
        position = len(skeleton.texts[0])
        for index, text in zip(skeleton.order, skeleton.texts[1:], strict=True):
            content = messages[index]["content"]
            # Templates trim contents, or leave them as they are.
            for variant in dict.fromkeys(
                (content, content.lstrip(), content.rstrip(), content.strip())
            ):
                end = position + len(variant)
                if whole.startswith(variant, position) and whole.startswith(text, end):
                    break
            else:
                return None
            spans[index] = (position, end)
            position = end + len(text)
        return spans if position == len(whole) else None

    def _end_of_turn(self, in_chat: str, at_end: str) -> int | None:
        """How far after the content the turn ends; None if both share no end-of-turn token."""
        match = self._end_token.search(_common_beginning(in_chat, at_end))
        return match.end() if match else None

    # --- growing prefixes

    def _start(self, messages: list[Message], index: int, whole: str) -> int:
        """Where the generation prompt of a turn ends."""
        prompt = self._render(messages[:index], generation_prompt=True)
        if not whole.startswith(prompt):
            raise MaskError(f"the prompt of messages[{index}] is not how the whole chat begins")
        return len(prompt)

    def _checked(
        self, messages: list[Message], index: int, whole: str, earliest: int, turn: _Turn
    ) -> Span:
        """The span of a turn by tracked contents, held against the prefixes."""
        start = self._start(messages, index, whole)
        if not earliest <= start <= turn.content_start:
            raise MaskError(f"messages[{index}] begins before its generation prompt ends")
        through = self._render(messages[: index + 1])
        if whole.startswith(through):
            if turn.end > len(through):
                raise MaskError(f"messages[{index}] ends before its end-of-turn token")
        elif not through.endswith(whole[turn.content_start : turn.content_end] + turn.tail):
            # Some templates write the last turn differently (Qwen3: with a reasoning block);
            # content and end must stay.
            raise MaskError(f"messages[{index}] is written differently when the chat goes on")
        blank = whole[start : turn.content_start].isspace()
        return (start if blank else turn.content_start), turn.end

    def _by_prefixes_alone(
        self, messages: list[Message], index: int, whole: str, earliest: int, why: str
    ) -> Span:
        """The span of a turn that the template rewrites: by prefixes, held against the content."""
        start = self._start(messages, index, whole)
        through = self._render(messages[: index + 1])
        turn = whole[start : len(through)]
        content = _squeeze(messages[index]["content"])
        if start < earliest or not whole.startswith(through) or not content:
            raise MaskError(why)
        for match in self._end_token.finditer(turn):
            if _squeeze(turn[: match.start()]) == content:
                return start, start + match.end()
        raise MaskError(why)


def _common_beginning(one: str, other: str) -> str:
    size = min(len(one), len(other))
    return one[: next((i for i in range(size) if one[i] != other[i]), size)]


def _squeeze(text: str) -> str:
    return "".join(text.split())
