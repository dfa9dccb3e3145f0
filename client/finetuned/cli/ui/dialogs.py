"""What asks or tells over the view: a choice, a line to type, the help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from finetuned.cli.settings import visible
from finetuned.cli.ui.keys import GROUPS, Key


class Choice(ModalScreen[str]):
    """A question with its answers below each other; the answer's id, empty where it is left."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "leave", "Cancel")]

    def __init__(
        self,
        question: str,
        answers: Sequence[tuple[str, str]],
        details: Text | None = None,
    ) -> None:
        super().__init__()
        self._question = visible(question)
        self._details = details
        self._answers = answers

    def compose(self) -> ComposeResult:
        """Question, details, answers; the last answer does nothing."""
        with Vertical(classes="dialog"):
            yield Static(self._question, classes="question", markup=False)
            if self._details is not None:
                with VerticalScroll(classes="details"):
                    yield Static(self._details, markup=False)
            yield OptionList(
                *(Option(Text(visible(text)), id=name) for name, text in self._answers),
                Option(Text("Cancel"), id="cancel"),
            )

    def on_mount(self) -> None:
        """The first answer is at hand."""
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """It is answered."""
        name = event.option.id or ""
        self.dismiss("" if name == "cancel" else name)

    def action_leave(self) -> None:
        """No answer."""
        self.dismiss("")


class Ask(ModalScreen[str]):
    """A line to type; empty where it is left."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Cancel")]

    def __init__(self, question: str, placeholder: str) -> None:
        super().__init__()
        self._question = question
        self._placeholder = placeholder

    def compose(self) -> ComposeResult:
        """Question and line."""
        with Vertical(classes="dialog"):
            yield Static(self._question, classes="question", markup=False)
            yield Input(placeholder=self._placeholder)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """It is typed."""
        self.dismiss(event.value.strip())

    def action_leave(self) -> None:
        """Nothing."""
        self.dismiss("")


class Help(ModalScreen[None]):
    """All keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "dismiss", "Close")
    ]

    def compose(self) -> ComposeResult:
        """A table for each group of keys."""
        with VerticalScroll(classes="dialog help"):
            for title, keys in GROUPS:
                yield Static(Text(title, style="bold"))
                yield Static(_key_table(keys), classes="keys")
            yield Static(Text("Esc closes this. Arrows and the mouse do what they do elsewhere."))


def _key_table(keys: Sequence[Key]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True, min_width=6)
    table.add_column()
    for key in keys:
        table.add_row(Text(key.shown), Text(key.help))
    return table
