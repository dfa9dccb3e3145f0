"""Which parts of a rendering are which assistant turn, by the origin of its characters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from finetuned_runner.chat_mask_strings import MIXED, TEMPLATE
from finetuned_runner.chat_mask_tracking import NOWHERE, Field, Piece, Trace


class MaskError(Exception):
    """It is not certain which text of a chat is the assistant's; the message says why."""


@dataclass(frozen=True)
class Turn:
    """Where a turn stands in a rendering."""

    index: int
    start: int
    stop: int
    own: list[Piece]
    """The pieces that are its message's text, in order."""

    @property
    def first(self) -> int:
        """Where its message's text begins; without any, its end."""
        return self.own[0].start if self.own else self.stop

    @property
    def last(self) -> int:
        """Where its message's text ends; without any, its beginning."""
        return self.own[-1].stop if self.own else self.start


def find_turns(messages: list[dict[str, Any]], trace: Trace) -> dict[int, Turn]:
    """Where each assistant turn stands, by index of its message and in order.

    Raises:
        MaskError: One is not written as a turn of its own, whole, unchanged and once.
    """
    text = trace.text
    written: dict[int, list[Piece]] = {
        index: [] for index, message in enumerate(messages) if message["role"] == "assistant"
    }
    for piece in trace.pieces:
        start, stop, source, _, turn = piece
        if turn in written:
            written[turn].append(piece)
        elif source == TEMPLATE or text[start:stop].isspace():
            pass
        elif source == MIXED:
            raise MaskError("the template mixes the texts of several messages")
        elif piece.message in written and piece.field in (Field.CONTENT, Field.REASONING):
            raise MaskError(
                f"the template writes the text of messages[{piece.message}] elsewhere than in its "
                "turn"
            )
    turns = {index: _find_turn(messages[index], text, index, written[index]) for index in written}
    if any(one.stop > other.start for one, other in pairwise(turns.values())):
        raise MaskError("the template reorders messages")
    return turns


def _find_turn(message: dict[str, Any], text: str, index: int, pieces: list[Piece]) -> Turn:
    where = f"messages[{index}]"
    if not pieces:
        raise MaskError(f"the template leaves out {where}")
    if any(one.stop != other.start for one, other in pairwise(pieces)):
        raise MaskError(f"the template writes {where} in several places")
    own: list[Piece] = []
    fields: set[Field] = set()
    for piece in pieces:
        if piece.source == TEMPLATE:
            continue
        if piece.message == index:
            if piece.is_derived and piece.field in (Field.CONTENT, Field.REASONING):
                raise MaskError(f"the template changes the text of {where}")
            own.append(piece)
            fields.add(piece.field)
        elif not text[piece.start : piece.stop].isspace():
            raise MaskError(f"the template writes other text into {where}")
    if message.get("tool_calls"):
        if Field.CALL not in fields:
            raise MaskError(f"the template leaves out the tool calls of {where}")
    elif Field.CONTENT not in fields:
        if content_text(message).strip():
            raise MaskError(f"the template leaves out the content of {where}")
        if not own and message.get("reasoning_content"):
            raise MaskError(f"the template leaves out the reasoning of {where}")
    return Turn(index, pieces[0].start, pieces[-1].stop, own)


def skeleton(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, trace: Trace
) -> tuple[object, ...]:
    """All that a template wrote itself, and where it put whose text."""
    text = trace.text
    return (
        bool(tools),
        *[message["role"] for message in messages],
        *[
            (turn, text[start:stop] if source == TEMPLATE else source)
            for start, stop, source, _, turn in trace.pieces
        ],
    )


def stretches(messages: list[dict[str, Any]], trace: Trace, until: int) -> list[tuple[int, str]]:
    """The text up to a place, turn by turn; that of answers is left out."""
    found: list[tuple[int, str]] = []
    for piece in trace.pieces:
        if piece.start >= until:
            break
        turn, text = piece.turn, trace.text[piece.start : piece.stop]
        if turn != NOWHERE and messages[turn]["role"] == "assistant":
            text = ""
        if found and found[-1][0] == turn:
            found[-1] = (turn, found[-1][1] + text)
        else:
            found.append((turn, text))
    return found


def content_text(message: dict[str, Any]) -> str:
    """The content of a message, whichever form its template reads."""
    content = message["content"]
    return content if isinstance(content, str) else str(content[0]["text"])
