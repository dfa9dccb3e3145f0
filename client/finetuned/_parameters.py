"""Parameters from nested mappings. Names and types come from the descriptors, not from a list here.

What is checked is the shape alone: unknown names and wrong types. Ranges, choices and files are the
daemon's to judge, so that there is one set of rules.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import reprlib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from numbers import Real
from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from finetuned._errors import FieldViolation, InvalidArgument
from finetuned.v1.parameters_pb2 import Parameters, StringList

UNKNOWN_FIELD = "UNKNOWN_FIELD"
WRONG_TYPE = "WRONG_TYPE"
NOT_UTF8 = "NOT_UTF8"

SECTIONS = tuple(section.name for section in Parameters.DESCRIPTOR.fields)
"""Names to look others up in: protobuf's own mapping breaks on lone surrogates."""

_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
# Bounded in work too: a file's aliases can make a small value endless.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlist = _REPR.maxdict = 4
_REPR.maxlevel = 2
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")


def fields() -> dict[str, FieldDescriptor]:
    """Every parameter by its path, such as `training.batch_size`, in the order of the contract."""
    return {
        f"{section.name}.{field.name}": field
        for section in Parameters.DESCRIPTOR.fields
        for field in _message(section).fields
    }


def from_mapping(values: Mapping[str, Any] | Parameters | None) -> Parameters:
    """Parameters from a mapping of sections to mappings; None values count as absent.

    Raises:
        InvalidArgument: Names unknown or types wrong, all of them in `violations`.
    """
    if values is None:
        return Parameters()
    if isinstance(values, Parameters):
        return values
    parameters, violations = convert(values)
    if violations:
        raise InvalidArgument(
            "; ".join(f"{v.field}: {v.description}" for v in violations),
            reason="INVALID_FIELDS",
            violations=violations,
        )
    return parameters


def convert(
    values: Mapping[str, Any], *, parse_text: bool = False
) -> tuple[Parameters, list[FieldViolation]]:
    """Parameters from a mapping, with everything that is wrong with it.

    Args:
        values: Section to field to value.
        parse_text: Read strings given for other types as those, such as `2e-4` for a number and
            `a,b` for a list: what comes from a command line, or from YAML with its own ideas.

    Returns:
        What could be converted, and a violation for each field that could not.
    """
    parameters = Parameters()
    violations: list[FieldViolation] = []
    known = fields()
    # Whoever is not checked by types may give anything.
    given = cast("object", values)
    if not isinstance(given, Mapping):
        return parameters, [_wrong("parameters", "sections with fields", given)]
    for key, content in cast("Mapping[object, Any]", given).items():
        section = str(key)
        if section in known:
            violations.append(_unsectioned(section))
        elif section not in SECTIONS:
            violations.append(_unknown(section, content, known))
        elif content is None:
            continue
        elif not isinstance(content, Mapping):
            violations.append(no_section(section, content))
        else:
            for name, value in cast("Mapping[str, Any]", content).items():
                path = f"{section}.{name}"
                if not name:
                    violations.append(no_field(section))
                    continue
                if path not in known:
                    violations.append(_unknown(path, value, known))
                    continue
                problem = _set(getattr(parameters, section), known[path], path, value, parse_text)
                if problem is not None:
                    violations.append(problem)
    return parameters, violations


def flatten(parameters: Parameters) -> dict[str, Any]:
    """Every parameter that has a value, by its path; lists as lists of strings."""
    result: dict[str, Any] = {}
    for section, message in parameters.ListFields():
        for field, value in message.ListFields():
            result[f"{section.name}.{field.name}"] = (
                list(value.values) if isinstance(value, StringList) else value
            )
    return result


def is_utf8(text: object) -> bool:
    """Whether a text can be sent: Python keeps odd bytes of a command line as lone surrogates."""
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


def not_utf8(field: str) -> FieldViolation:
    """The violation of a text that can't be sent."""
    return FieldViolation(field, "holds bytes that are no UTF-8", NOT_UTF8)


def wrong_type(field: str, expected: str, value: object) -> FieldViolation:
    """The violation of a value of another type."""
    return _wrong(field, expected, value)


def no_section(section: str, value: object) -> FieldViolation:
    """The violation of a section that holds no fields."""
    return _wrong(section, "a section with fields", value)


def no_field(section: str) -> FieldViolation:
    """The violation of a field without a name."""
    names = [p.partition(".")[2] for p in fields() if p.startswith(f"{section}.")]
    return FieldViolation(
        section, f"names no field; those of {section} are {', '.join(names)}", UNKNOWN_FIELD
    )


def _unsectioned(path: str) -> FieldViolation:
    """The violation of a key with the whole path, which is no key of its section."""
    section, _, name = path.partition(".")
    return FieldViolation(
        path, f"stands outside its section: write {name} below {section}:", UNKNOWN_FIELD
    )


def _message(field: FieldDescriptor) -> Descriptor:
    assert field.message_type is not None, field.full_name
    return field.message_type


def _set(
    section: Any, field: FieldDescriptor, path: str, value: Any, parse_text: bool
) -> FieldViolation | None:
    if value is None:
        return None
    if parse_text and isinstance(value, str):
        value = _parse(field, value)
    if field.message_type is not None:
        if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
            return _wrong(path, "a list of names", value)
        items: list[Any] = list(value)
        if not all(isinstance(item, str) for item in items):
            return _wrong(path, "a list of names", items)
        if not all(map(is_utf8, items)):
            return not_utf8(path)
        # An empty list is a value too, and must be told from an absent one.
        getattr(section, field.name).CopyFrom(StringList(values=items))
        return None
    kind = field.cpp_type
    value = _plain(value)
    is_number = _is_number(value)
    if kind == FieldDescriptor.CPPTYPE_BOOL and not isinstance(value, bool):
        return _wrong(path, "true or false", value)
    if kind in _INTEGERS and not (is_number and value % 1 == 0):
        return _wrong(path, "a whole number", value)
    if kind in _FLOATS and not is_number:
        return _wrong(path, "a number", value)
    if kind == FieldDescriptor.CPPTYPE_STRING and not isinstance(value, str | os.PathLike):
        return _wrong(path, "a text", value)
    if isinstance(value, os.PathLike):
        value = os.fspath(cast("os.PathLike[str]", value))
    if isinstance(value, str) and not is_utf8(value):
        return not_utf8(path)
    try:
        if kind in _INTEGERS:
            value = int(value)
        elif kind in _FLOATS:
            value = float(value)
        setattr(section, field.name, value)
    except (ValueError, OverflowError):  # beyond 32 bits: it can't even be sent
        return _wrong(path, "a value that fits", value)
    return None


def _plain(value: Any) -> Any:
    """Truth values of numpy, and decimal numbers, as Python's own."""
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    if isinstance(value, Decimal) and not value.is_nan():
        # A power of ten without end is no whole number to be written out.
        is_whole = -(2**63) < value < 2**63 and value == value.to_integral_value()
        return int(value) if is_whole else float(value)
    return value


def _is_number(value: object) -> bool:
    """Whether it is a number, of numpy as well; Python's truth values are no numbers here."""
    return not isinstance(value, bool) and isinstance(value, Real)


def _parse(field: FieldDescriptor, text: str) -> Any:
    """The text as the field's type, or the text itself where it is none."""
    word = text.strip()
    if field.message_type is not None:
        if word.startswith("["):
            with contextlib.suppress(ValueError, RecursionError):
                return json.loads(word)
        return [item.strip() for item in word.strip("[]").split(",") if item.strip()]
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return True if word.lower() in _TRUE else False if word.lower() in _FALSE else text
    if field.cpp_type in (*_INTEGERS, *_FLOATS):
        for read in (int, float):
            try:
                number = read(word)
            except ValueError:
                continue
            return number
    return text


def _unknown(path: str, value: Any, known: Mapping[str, FieldDescriptor]) -> FieldViolation:
    section, _, name = path.partition(".")
    if not name and not isinstance(value, Mapping):
        # A field without its section, such as `batch_size`.
        homes = [p for p in known if p.endswith(f".{section}")] or _like(section, known)
        what = "is no section"
    elif not name:
        homes = difflib.get_close_matches(section, SECTIONS, n=1)
        what = "is no section"
    else:
        homes = [p for p in known if p.endswith(f".{name}")] or _like(path, known)
        what = "is no parameter"
    hint = f"; did you mean {homes[0]}?" if homes else ""
    if not homes and not name:
        hint = f"; sections are {', '.join(SECTIONS)}"
    return FieldViolation(path, what + hint, UNKNOWN_FIELD)


def closest(path: str) -> list[str]:
    """The parameter that was probably meant, by its path or name; none where nothing is like it."""
    known = fields()
    return [p for p in known if p.endswith(f".{path}")] or _like(path, known)


def _like(path: str, known: Mapping[str, FieldDescriptor]) -> list[str]:
    """Parameters whose name resembles it, has its initials, or contains it; own section first."""
    section, _, name = path.rpartition(".")
    by_name = {p.partition(".")[2]: p for p in known}
    own = {n: p for n, p in by_name.items() if p.startswith(f"{section}.")}
    for names in (own, by_name):
        close = (
            difflib.get_close_matches(name, names, n=1)
            or [n for n in names if "".join(word[0] for word in n.split("_")) == name]
            or [n for n in names if len(name) > 2 and name in n]
        )
        if close:
            return [names[close[0]]]
    return []


def _wrong(path: str, expected: str, value: Any) -> FieldViolation:
    return FieldViolation(path, f"must be {expected}, not {_REPR.repr(value)}", WRONG_TYPE)
