"""Renders a chat template so that the origin of every character is known.

The template is compiled in transformers' own environment for templates, with three changes that
don't alter what it writes: the contents of messages are `Tracked`, joining and filters keep the
origin, and each loop over messages tells which message it is at. What a template writes at a
message is that message's turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from threading import Lock
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.environment import Environment, Template
from jinja2.runtime import Macro
from jinja2.visitor import NodeTransformer
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # pyright: ignore[reportPrivateUsage]
)

from finetuned_runner.chat_mask_strings import (
    DERIVED,
    TEMPLATE,
    Tracked,
    concat,
    derived,
    join,
    runs_of,
    source_of,
)

NOWHERE = -1
"""Turn of what a template writes outside of its loops over messages."""


class Field(IntEnum):
    """Which of a message's fields a text comes from."""

    CONTENT = 0
    REASONING = 1
    CALL = 2
    OTHER = 3


_FIELDS = {
    "content": Field.CONTENT,
    "reasoning_content": Field.REASONING,
    "thinking": Field.REASONING,
    "tool_calls": Field.CALL,
}
_TOOLS = 1 << 40
"""Source of the list of tools: no message's."""


class Piece(NamedTuple):
    """Characters in a row of one origin, within one turn."""

    start: int
    stop: int
    source: int
    place: int
    """Where in the source it begins; `DERIVED`: not literally there."""
    turn: int
    """Index of the message at which the template wrote it, or `NOWHERE`."""

    @property
    def is_derived(self) -> bool:
        """Whether it is made of its source, but not literally in it."""
        return self.source != TEMPLATE and self.place == DERIVED

    @property
    def message(self) -> int:
        """Index of the message whose text it is; none for the template's and mixed ones."""
        return self.source >> 2 if self.source >= 0 else self.source

    @property
    def field(self) -> Field:
        """The field of the message."""
        return Field(self.source & 3)


@dataclass(frozen=True)
class Trace:
    """A rendering and its pieces, without gaps and in order."""

    text: str
    pieces: list[Piece]


class Tracker:
    """Renders one template."""

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        # Nothing public gives the environment in which transformers runs templates.
        compiled: Any = _compile_jinja_template(template)
        self._template = self._compile(compiled.environment, template)
        self._variables = variables
        self._indices: dict[int, int] = {}
        self._loops: list[tuple[int, int]] = []
        self._lock = Lock()

    def render(
        self, messages: list[dict[str, Any]], tools: object, *, generation_prompt: bool
    ) -> Trace:
        """Renders a chat. Raises whatever the template raises."""
        with self._lock:
            return self._render(messages, tools, generation_prompt)

    def _render(
        self, messages: list[dict[str, Any]], tools: object, generation_prompt: bool
    ) -> Trace:
        tracked = [_track_message(index, message) for index, message in enumerate(messages)]
        self._indices = {id(message): index for index, message in enumerate(tracked)}
        loops: list[tuple[int, int]] = []
        self._loops = loops
        pieces: list[Piece] = []
        parts: list[str] = []
        at = 0
        source, place, turn, start = TEMPLATE, 0, NOWHERE, 0
        for part in self._template.generate(
            messages=tracked,
            tools=_track(tools, _TOOLS),
            documents=None,
            add_generation_prompt=generation_prompt,
            **self._variables,
        ):
            parts.append(part)
            now = loops[-1][1] if loops else NOWHERE
            for size, its_source, its_place in runs_of(part):
                if (
                    its_source != source
                    or now != turn
                    or (its_source != TEMPLATE and (place < 0 or its_place != place + at - start))
                ):
                    if at > start:
                        pieces.append(Piece(start, at, source, place, turn))
                    source, place, turn, start = its_source, its_place, now, at
                at += size
        if at > start:
            pieces.append(Piece(start, at, source, place, turn))
        return Trace("".join(parts), pieces)

    def _compile(self, environment: Environment, source: str) -> Template:
        own: Any = environment.overlay()
        own.concat = concat
        own.code_generator_class = _CodeGenerator
        own.getattr = _quick(functools.partial(type(environment).getattr, own), _DICT_NAMES)
        own.getitem = _quick(functools.partial(type(environment).getitem, own), frozenset())
        own.call = _following_calls(functools.partial(type(environment).call, own))  # type: ignore[attr-defined]
        own.filters = {name: _following(f) for name, f in environment.filters.items()}
        own.filters["join"] = _following(_join(environment.filters["join"]))
        setattr(own, _ENTER, self._enter)
        setattr(own, _LEAVE, self._leave)
        tree = _LoopMarks().visit(own.parse(source))
        code = own.compile(tree, filename="<chat template>")
        return Template.from_code(own, code, dict(environment.globals))

    def _enter(self, loop: int, item: object) -> None:
        self._leave(loop)  # the round before, which `continue` may have cut short
        index = self._indices.get(id(item))
        if index is None and isinstance(item, dict):
            content = item.get("content")  # a template may copy messages into mappings of its own
            if isinstance(content, Tracked) and (source := source_of(content)) >= 0:
                index = source >> 2
        if index is not None:
            self._loops.append((loop, index))

    def _leave(self, loop: int) -> None:
        for depth, (number, _) in enumerate(self._loops):
            if number == loop:
                del self._loops[depth:]
                return


def _track_message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    # The role stays plain: what a template writes of it is its own header.
    return {
        key: value if key == "role" else _track(value, index << 2 | _FIELDS.get(key, Field.OTHER))
        for key, value in message.items()
    }


def _track(value: Any, source: int) -> Any:
    if isinstance(value, str):
        return Tracked(value, ((len(value), source, 0),) if value else ())
    if isinstance(value, dict):
        return {
            _track(key, source): item if key == "type" else _track(item, source)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_track(item, source) for item in value]
    return value


# --- the environment's changes

_DICT_NAMES = frozenset(dir(dict))
_ENTER, _LEAVE = "finetuned_enter", "finetuned_leave"


class _LoopMarks(NodeTransformer):
    """Has every loop say at which item it is, and when it has ended."""

    def __init__(self) -> None:
        self._count = 0

    def visit_For(self, node: nodes.For) -> nodes.Node | list[nodes.Node]:  # noqa: N802
        """Marks a loop, and those within it."""
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            return node
        self._count += 1
        number = nodes.Const(self._count)
        name = nodes.Name(node.target.name, "load")
        node.body.insert(0, _statement(node, _ENTER, [number, name]))
        return [node, _statement(node, _LEAVE, [number])]


def _statement(near: nodes.Node, function: str, arguments: list[nodes.Expr]) -> nodes.ExprStmt:
    call = nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)
    made = nodes.ExprStmt(call).set_lineno(near.lineno, override=True)
    assert isinstance(made, nodes.ExprStmt)
    if near.environment is not None:
        made.set_environment(near.environment)
    return made


class _CodeGenerator(CodeGenerator):
    def visit_Call(  # noqa: N802
        self, node: nodes.Call, frame: Any, forward_caller: bool = False
    ) -> None:
        """The marks of loops, as plain calls: through the sandbox they would take a third more."""
        if not isinstance(node.node, nodes.Name) or node.node.name not in (_ENTER, _LEAVE):
            super().visit_Call(node, frame, forward_caller=forward_caller)
            return
        self.write(f"environment.{node.node.name}(")
        for argument in node.args:
            self.visit(argument, frame)
            self.write(", ")
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:  # noqa: N802
        """`a ~ b`: jinja's own joins plain strings only."""
        self.write("environment.concat(map(str, (")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")


def _quick(get: Callable[[Any, Any], Any], excluded: frozenset[str]) -> Callable[[Any, Any], Any]:
    """The field of a message without the sandbox's checks, which take longer than all else."""

    def quick(item: Any, key: Any) -> Any:
        if type(item) is dict and type(key) is str and key in item and key not in excluded:
            return item[key]
        return get(item, key)

    return quick


def _following(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose result has an origin where its arguments have one."""

    @functools.wraps(function)
    def follow(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        if isinstance(result, str) and not isinstance(result, Tracked):
            return derived(result, [args, options])
        return result

    return follow


def _following_calls(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same for functions and methods, which a sandboxed template calls through this one."""

    def follow(context: Any, function: Any, *args: Any, **options: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if type(owner) is str and function.__name__ == "join" and len(args) == 1:
            return join(owner, args[0])
        result = call(context, function, *args, **options)
        # A macro's result is concatenated, which keeps the origin.
        if type(result) is str and result and not isinstance(function, Macro):
            return derived(result, [owner, args, options])
        return result

    return follow


def _join(plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def join_filter(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        if attribute is not None:
            return plain(context, value, d, attribute)
        return join(d, map(str, value))

    return join_filter
