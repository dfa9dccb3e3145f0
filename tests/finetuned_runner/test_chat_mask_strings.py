"""A tracked string is its plain string in all it can be asked, and knows its characters' origin."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from finetuned_runner.chat_mask_strings import (
    DERIVED,
    MIXED,
    TEMPLATE,
    Tracked,
    concat,
    derived,
    join,
    runs_of,
    source_of,
)

SOURCES = [
    "<think>\nSo  it is.\n</think>\n\nUse `ls`. ",
    "aa a,b,,c\r\n\x0b怎么 👍🏽 ẞ",
    " \n ",
    "",
]
ALPHABET = ["a", ",", "\n", " ", "</think>", "aa", "e", "怎", "zz"]


def tracked(number: int) -> Tracked:
    text = SOURCES[number]
    return Tracked(text, ((len(text), number, 0),) if text else ())


def check(value: str, plain: str) -> None:
    """Equal in text, and each literal character is the one of its source."""
    assert value == plain
    runs = runs_of(value)
    assert sum(size for size, _, _ in runs) == len(plain)
    at = 0
    for size, source, place in runs:
        assert size > 0
        if source >= 0 and place != DERIVED:
            assert plain[at : at + size] == SOURCES[source][place : place + size]
        at += size


EXACT: list[Callable[[random.Random, str], Any]] = [
    lambda r, s: s.strip(),
    lambda r, s: s.lstrip(r.choice([None, "\n", " <"])),
    lambda r, s: s.rstrip(r.choice([None, "\n", ". "])),
    lambda r, s: s[r.randint(-9, 9) : r.randint(-9, 20)],
    lambda r, s: s[r.randrange(len(s))] if s else s,
    lambda r, s: s.split(r.choice(ALPHABET), r.choice([-1, 1, 2])),
    lambda r, s: s.split(None, r.choice([-1, 1])),
    lambda r, s: s.rsplit(r.choice([None, ",", "a"]), r.choice([-1, 1])),
    lambda r, s: s.splitlines(r.choice([True, False])),
    lambda r, s: list(s.partition(r.choice(ALPHABET))),
    lambda r, s: list(s.rpartition(r.choice(ALPHABET))),
    lambda r, s: s.removeprefix(r.choice(["<think>", "aa", "x"])),
    lambda r, s: s.removesuffix(r.choice([" ", "ẞ", "x"])),
    lambda r, s: s.replace(r.choice(ALPHABET), r.choice(["", "yy"]), r.choice([-1, 1])),
    lambda r, s: "head" + s + "tail",
    lambda r, s: s + s,
    lambda r, s: list(s),
]


@pytest.mark.parametrize("seed", range(40))
def test_what_templates_do_with_texts_keeps_every_characters_origin(seed: int) -> None:
    numbers = random.Random(seed)
    for number in range(len(SOURCES)):
        value: str = tracked(number)
        plain = SOURCES[number]
        for _ in range(5):
            operation, state = numbers.choice(EXACT), numbers.random()
            results = [operation(random.Random(state), text) for text in (value, plain)]
            if isinstance(results[0], list):
                assert len(results[0]) == len(results[1])
                for one, other in zip(*results, strict=True):
                    check(one, other)
                results = [join("|", result) for result in results]
            value, plain = results
            check(value, plain)
            assert all(source in (number, TEMPLATE) for _, source, _ in runs_of(value))


def test_what_is_not_followed_is_known_to_be_derived() -> None:
    """A changed text is never taken for the template's own."""
    value = tracked(0)
    for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
        changed = getattr(value, name)()
        assert changed == getattr(SOURCES[0], name)()
        assert runs_of(changed) == ((len(changed), 0, DERIVED),)
    filled = "%s!" % value  # noqa: UP031 - as templates do it
    for changed in (value[::-1], value * 2, 2 * value, filled, value.center(99), f"{value}"):
        assert source_of(changed) == 0
    assert source_of(derived("x", [{"a": [value]}, tracked(1)])) == MIXED
    assert source_of(derived("x", ["plain", 3])) == TEMPLATE
    assert runs_of(Tracked("of unknown origin")) == ((17, MIXED, DERIVED),)
    assert type(concat(["a", "b"])) is str
