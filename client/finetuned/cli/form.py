"""`finetunectl params`: the parameters there are, as tables, or one with all that is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuned.cli.settings import JsonOption, say, settings

if TYPE_CHECKING:
    from finetuned.v1.parameter_service_pb2 import (
        Condition,
        GetParameterSchemaResponse,
        LocalizedText,
        ParameterField,
        ParameterSection,
    )

_WIDE = 110
"""From here on a terminal holds whole paths."""
_WIDEST = 180
"""From here on it holds whole values, too."""

LanguageOption = Annotated[
    str | None,
    typer.Option("--language", metavar="LANGUAGE", help="en or zh. [that of the locale]"),
]


def params(
    ctx: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|FIELD]", help="A section, or a field such as training.batch_size."
        ),
    ] = None,
    training_type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="sft (on chats) or pretrain (on text).")
    ] = "sft",
    language: LanguageOption = None,
    every: Annotated[
        bool, typer.Option("--all", help="Those in folds that are closed at first, too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the parameters: what there is to set, with ranges and defaults.

    With a section, all of it; with a field, its help. JSON: the schema, or the section or field.
    """
    from finetuned._language import language_of
    from finetuned.cli.output import print_json

    word = language_of(language)
    with settings(ctx).client(start=True) as client:
        schema = client.parameter_schema(training_type)
    section, field = _find(schema, what, training_type)
    if as_json:
        print_json(field or section or schema)
    elif field is not None:
        _show_field(schema, field, word)
    elif section is not None:
        _show_sections([section], _folds(schema), word)
    else:
        opened = {fold.name for fold in schema.folds if every or fold.expanded}
        _show_sections(schema.sections, opened, word)
        fields = [field for section in schema.sections for field in section.fields]
        hidden = sum(not _is_shown(field, opened) for field in fields)
        if hidden:
            say(f"{hidden} more: finetunectl params --all; one of them: finetunectl params FIELD")


def _find(
    schema: GetParameterSchemaResponse, what: str | None, training_type: str
) -> tuple[ParameterSection | None, ParameterField | None]:
    """The section or field that is named: by its path, or by its name where only one has it."""
    from finetuned._errors import FieldViolation
    from finetuned._parameters import UNKNOWN_FIELD
    from finetuned.cli.params import refused

    if what is None:
        return None, None
    for section in schema.sections:
        if section.name == what:
            return section, None
    found = [
        field
        for section in schema.sections
        for field in section.fields
        if field.path == what or field.path.partition(".")[2] == what
    ]
    if len(found) == 1:
        return None, found[0]
    sentence = f"names no parameter of {training_type}"
    close = [field.path for field in found] or _close(schema, what)
    if close:
        sentence += f"; did you mean {' or '.join(close)}?"
    else:
        sentence += f"; sections are {', '.join(section.name for section in schema.sections)}"
    raise refused([FieldViolation(what, sentence, UNKNOWN_FIELD)])


def _close(schema: GetParameterSchemaResponse, what: str) -> list[str]:
    import difflib

    from finetuned._parameters import closest

    paths = [field.path for section in schema.sections for field in section.fields]
    names = {path.partition(".")[2]: path for path in paths}
    sections = [section.name for section in schema.sections]
    result = [
        *difflib.get_close_matches(what, [*paths, *sections], n=2),
        *(names[name] for name in difflib.get_close_matches(what, names, n=2)),
        *(path for path in closest(what) if path in paths),
    ]
    return list(dict.fromkeys(result))[:3]


def _folds(schema: GetParameterSchemaResponse) -> set[str]:
    return {fold.name for fold in schema.folds}


def _is_shown(field: ParameterField, folds: set[str]) -> bool:
    return field.required or field.fold in folds


def _show_sections(sections: Iterable[ParameterSection], folds: set[str], language: str) -> None:
    from rich.text import Text

    from finetuned.cli.output import console, print_table

    out = console()
    # The heading has the section's name; what is cut off can be seen with the field's own help.
    is_narrow = out.width < _WIDE
    # Where lines are as long as they are, and where they hold it all, nothing is cut off.
    is_cut = out.width < _WIDEST
    has_required = False
    for section in sections:
        fields = [field for field in section.fields if _is_shown(field, folds)]
        if not fields:
            continue
        has_required = has_required or any(field.required for field in fields)
        out.print(Text(f"\n{section.name}", "bold").append(f"  {_in(section.label, language)}"))
        print_table(
            ("field", "values", "default", "label"),
            (
                (
                    field.path.partition(".")[2] if is_narrow else field.path,
                    _cut(_values(field), 44) if is_cut else _values(field),
                    _cut(_default(field), 12 if is_narrow else 30) if is_cut else _default(field),
                    _in(field.label, language) + (" *" if field.required else ""),
                )
                for field in fields
            ),
            wrapped=("values", "label"),
        )
    if has_required:
        out.print("\n* must be filled in, or be seen and confirmed")


def _show_field(schema: GetParameterSchemaResponse, field: ParameterField, language: str) -> None:
    from rich.text import Text

    from finetuned.cli.output import console, print_pairs

    out = console()
    out.print(Text(field.path, "bold").append(f"  {_in(field.label, language)}", "not bold"))
    out.print(Text(_in(field.help, language)))
    folds = {fold.name: _in(fold.label, language) for fold in schema.folds}
    must = "must be filled" if not field.HasField("default_value") else "to be seen and confirmed"
    print_pairs(
        [
            ("values", _values(field)),
            ("default", _default(field) or "empty"),
            ("unit", _in(field.unit, language)),
            ("note", _in(field.note, language)),
            ("required", must if field.required else ""),
            ("better", "leave it as it is" if field.discouraged else ""),
            ("shown", _conditions(field.visible_when)),
            ("can be set", _conditions(field.enabled_when)),
            ("fold", folds.get(field.fold, "")),
        ]
    )
    choices = [choice for choice in field.choices if _in(choice.label, language)]
    if choices:
        print("\nchoices")
        print_pairs((f"  {choice.value}", _in(choice.label, language)) for choice in choices)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _values(field: ParameterField) -> str:
    """Type and range, or the choices."""
    from finetuned._words import enum_name
    from finetuned.v1.parameter_service_pb2 import ParameterType

    name = enum_name(ParameterType, field.type).removeprefix("PARAMETER_TYPE_").lower()
    if field.choices:
        words = [choice.value for choice in field.choices]
        several = name == "multichoice"
        text = ("some of " if several else "") + ", ".join(words)
        return text + (", ..." if field.allows_other_choices else "")
    word = {"bool": "true, false", "int": "whole number", "float": "number"}.get(name, name)
    if field.type == ParameterType.PARAMETER_TYPE_DIRECTORY:
        word = "folder"
    low = f"{field.minimum:.10g}" if field.HasField("minimum") else ""
    high = f"{field.maximum:.10g}" if field.HasField("maximum") else ""
    if low and high:
        word += f" {low} to {high}"
    elif low or high:
        word += f" from {low}" if low else f" up to {high}"
    if field.HasField("step") and field.type == ParameterType.PARAMETER_TYPE_INT and field.step > 1:
        word += f", in steps of {field.step:.10g}"
    return word


def _default(field: ParameterField) -> str:
    from finetuned._violations import plain_value
    from finetuned.cli.output import value_text

    value = plain_value(field.default_value, field.path)
    return "" if value is None else value_text(value)


def _conditions(conditions: Any) -> str:
    """Such as `while lora.use_lora is true and training_type is sft`."""
    return "while " + " and ".join(map(_condition, conditions)) if conditions else ""


def _condition(condition: Condition) -> str:
    from finetuned._violations import plain_value
    from finetuned.cli.output import value_text
    from finetuned.v1.parameter_service_pb2 import ConditionOperator

    values = [plain_value(value, condition.field) for value in condition.values]
    words = " or ".join("empty" if value is None else value_text(value) for value in values)
    is_none_of = condition.operator == ConditionOperator.CONDITION_OPERATOR_NONE_OF
    return f"{condition.field} is {'not ' if is_none_of else ''}{words}"


def _in(text: LocalizedText, language: str) -> str:
    return text.zh if language == "zh" else text.en
