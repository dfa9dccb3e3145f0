"""What a terminal is told is text: names of files and log lines steer it nowhere."""

from __future__ import annotations

import pytest
from rich.text import Text

from finetuned.cli.output import console
from finetuned.cli.settings import say, visible

EVIL = "a\x1b]0;owned\x07b\x1b[2Jc\x9bd\re"


def test_nothing_but_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """By neither way of printing; line feeds and other languages stay."""
    out = console()
    out.print(EVIL)
    out.print(Text(EVIL))
    say(EVIL)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "owned" in text
        assert all(c.isprintable() or c == "\n" for c in text)
    assert visible("中\n\té") == "中\n\té"
