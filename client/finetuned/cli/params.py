"""From files and options to a task: what to train, with which parameters.

Nothing here knows a list of parameters: names and types come from the contract's descriptors.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import yaml

from finetuned._errors import FieldViolation, InvalidArgument
from finetuned._local import PATHS
from finetuned._parameters import (
    SECTIONS,
    UNKNOWN_FIELD,
    WRONG_TYPE,
    convert,
    is_utf8,
    no_field,
    no_section,
    not_utf8,
)
from finetuned.v1.parameters_pb2 import Parameters

OUTPUT_FOLDER = "finetuned-output"
"""Where outputs go by default, a folder for each task, below the current folder."""

_TYPES = ("sft", "pretrain")

_LONGEST_BYTES = 16 << 20
"""Of a parameter file; a record of a run with very long lists has a few."""
# Words of YAML and JSON for "nothing"; BaseLoader leaves them texts.
_NOTHING = (None, "", "null", "~")
# Keys beside the sections, with the names that they go by.
_KEYS = {
    "training_type": "training_type",
    "type": "training_type",
    "display_name": "display_name",
    "name": "display_name",
    "device": "device",
    "template": "template",
    "kind": "kind",
}
_KINDS = ("task", "template")
_RECORD = "training_record"
_ASKED = ("training_type", "device", "parameters")
DUPLICATE_KEY = "DUPLICATE_KEY"


@dataclass
class Wish:
    """What the user asked for, as text: from a file, overridden by options and `--set`."""

    training_type: str | None = None
    display_name: str | None = None
    device: str | None = None
    template: str | None = None
    kind: str | None = None
    """`template`: the display name is a template's; empty or `task`: a task's."""
    recorded_files: Any = None
    """What the record of a run says of the files that were read."""
    sections: dict[str, Any] = field(default_factory=dict[str, Any])
    violations: list[FieldViolation] = field(default_factory=list[FieldViolation])

    def for_task(self) -> None:
        """Forget a name that is a template's: a task made from its file has a name of its own."""
        if self.kind == "template":
            self.display_name = None

    def put(self, path: str, value: Any) -> None:
        """Set a parameter by its path; None says nothing."""
        if value is None:
            return
        section, dot, name = path.partition(".")
        if not dot:
            self.sections[section] = value
        elif isinstance(self.sections.get(section), dict):
            self.sections[section][name] = value
        else:
            self.sections[section] = {name: value}

    def set_all(self, assignments: Sequence[str]) -> None:
        """Apply `--set section.field=value` options."""
        for assignment in assignments:
            path, sign, value = assignment.partition("=")
            section, _, name = path.strip().partition(".")
            if not sign or not section:
                wants = f"wants section.field=value, not {assignment!r}"
                self.violations.append(FieldViolation("--set", wants, "BAD_ASSIGNMENT"))
            elif not name and section in SECTIONS:
                self.violations.append(no_field(section))
            else:
                self.put(path.strip(), value.strip())


@dataclass(frozen=True)
class Draft:
    """A task to create."""

    training_type: str
    parameters: Parameters
    display_name: str
    device: str
    template: str
    violations: list[FieldViolation]
    """What is wrong here already; `parameters` holds the rest."""


def read_file(path: Path) -> Wish:
    """A parameter file: sections at the top or under `parameters`, beside type, name, and device.

    The `training_record.json` of a run stands for what the run was asked for.

    Raises:
        InvalidArgument: It can't be read, or is neither YAML nor JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_BYTES + 1)
        if len(data) > _LONGEST_BYTES:
            raise _bad_file(path, f"is longer than {_LONGEST_BYTES >> 20} MiB, and no such file")
        text = data.decode("utf-8")
        # BaseLoader leaves every scalar a text, and the field's type says how to read it: `no`
        # stays "no" for a strategy, and 2e-4 is a number, as YAML 1.1 would not have it.
        content: Any = _json(text) if path.suffix == ".json" else _yaml(text)
    except _Duplicate as error:
        raise _bad_file(path, str(error), DUPLICATE_KEY) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _bad_file(path, _why_unread(error)) from error
    if isinstance(content, str | None) and content in _NOTHING:
        content = {}
    if not isinstance(content, dict):
        raise _bad_file(path, "must hold sections such as `training:` with parameters below them")
    wish = Wish()
    document = cast("dict[str, Any]", content)
    if document.get("kind") == _RECORD:  # what a run leaves says more than what it was asked for
        wish.recorded_files = document.get("files")
        document = {key: value for key, value in document.items() if key in _ASKED}
    nested: Any = document.pop("parameters", None)
    if not isinstance(nested, dict):
        if nested not in _NOTHING:
            wish.violations.append(no_section("parameters", nested))
        nested = {}
    below = cast("dict[str, Any]", nested)
    wish.violations += [
        FieldViolation(key, "stands below `parameters` and beside it; keep one", DUPLICATE_KEY)
        for key in document
        if key in below
    ]
    _find_synonyms(document, wish)
    for key, value in (below | document).items():
        if isinstance(value, dict) and key not in _KEYS:
            wish.sections[key] = dict(cast("dict[str, Any]", value))
        elif value in _NOTHING:
            if key not in _KEYS:
                wish.sections[key] = {}
        elif key in _KEYS and not isinstance(value, dict | list):
            setattr(wish, _KEYS[key], str(value))
        elif key in _KEYS:
            wish.violations.append(FieldViolation(key, "must be a text", WRONG_TYPE))
        elif key.partition(".")[0] in SECTIONS and "." in key:
            wish.sections[key] = value  # reported with the parameters: it wants its section
        elif key in SECTIONS:
            wish.violations.append(no_section(key, value))
        else:
            close = difflib.get_close_matches(key, [*_KEYS, "parameters"], n=1)
            if close:
                hint = f"is no key; did you mean {close[0]}?"
                wish.violations.append(FieldViolation(key, hint, UNKNOWN_FIELD))
            else:
                wish.sections[key] = value  # reported with the parameters, with a hint
    return wish


class _Duplicate(ValueError):
    """A mapping names a key twice; which of the values is meant nobody knows."""


class _OnceLoader(yaml.BaseLoader):
    """Scalars as texts, and each key of a mapping but once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping, if it names no key twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise _Duplicate(f"names {name!r} in line {lines[name]} and again in line {line}")
            lines[name] = line
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_OnceLoader)  # noqa: S506 (makes no objects)


def _json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                with contextlib.suppress(yaml.YAMLError):
                    _yaml(text)  # most JSON is YAML too, whose reader knows the lines
                raise _Duplicate(f"names {name!r} twice")
            result[name] = value
        return result

    return json.loads(text, object_pairs_hook=once)


def _find_synonyms(document: Mapping[str, Any], wish: Wish) -> None:
    """Report keys that say the same thing, such as `type` and `training_type`."""
    seen: dict[str, str] = {}
    for key in document:
        meant = _KEYS.get(key)
        if meant is not None and seen.setdefault(meant, key) != key:
            says = f"says the same as {seen[meant]}; keep one"
            wish.violations.append(FieldViolation(key, says, DUPLICATE_KEY))


def _bad_file(path: Path, why: str, reason: str = "BAD_FILE") -> InvalidArgument:
    violation = FieldViolation(str(path), why, reason)
    return InvalidArgument(f"{path} {why}", reason=reason, violations=[violation])


def _why_unread(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "is not there: no such file"
        case OSError():
            return f"can't be read: {error.strerror or error}"
        case UnicodeDecodeError():
            return f"can't be read: it is no UTF-8 text from byte {error.start} on"
        case RecursionError():
            return "can't be read: it is nested too deeply"
        case _:
            return f"can't be read: {' '.join(str(error).split())}"


def draft(wish: Wish, *, output_default: bool = True) -> Draft:
    """The task that a wish stands for, with everything that is wrong with it.

    Args:
        wish: What was asked for.
        output_default: Choose an output folder where none is given.
    """
    violations = list(wish.violations)
    training_type = (wish.training_type or "sft").lower().removeprefix("training_type_")
    if training_type not in _TYPES:
        violations.append(
            FieldViolation(
                "training_type",
                f"must be {' or '.join(_TYPES)}, not {wish.training_type!r}",
                "NOT_A_CHOICE",
            )
        )
        training_type = "sft"
    if wish.kind not in (None, *_KINDS):
        violations.append(
            FieldViolation(
                "kind", f"must be {' or '.join(_KINDS)}, not {wish.kind!r}", "NOT_A_CHOICE"
            )
        )
    parameters, wrong = convert(_without_nulls(wish.sections), parse_text=True)
    violations += wrong
    for path in PATHS:
        section_name, name = path.split(".")
        section = getattr(parameters, section_name)
        if getattr(section, name):
            try:
                whole = str(Path(getattr(section, name)).expanduser().absolute())
            except RuntimeError as error:  # `~` or `~name` of somebody without a home
                violations.append(FieldViolation(path, f"can't be found: {error}", "BAD_PATH"))
                continue
            if is_utf8(whole):
                setattr(section, name, whole)
            else:
                violations.append(not_utf8(path))  # the current folder has such a name
    texts = {
        "display_name": wish.display_name or "",
        "device": wish.device or "",
        "template": wish.template or "",
    }
    for field_name, text in texts.items():
        if not is_utf8(text):
            violations.append(not_utf8(field_name))
            texts[field_name] = ""
    if output_default and not parameters.data.output_dir:
        folder = texts["display_name"].replace("/", "_").strip(". ") or (
            f"{training_type}_{time.strftime('%Y%m%d_%H%M%S')}_{secrets.token_hex(2)}"
        )
        whole = str(Path(OUTPUT_FOLDER, folder).absolute())
        if is_utf8(whole):
            parameters.data.output_dir = whole
        else:
            violations.append(not_utf8("data.output_dir"))
    return Draft(
        training_type,
        parameters,
        texts["display_name"],
        texts["device"],
        texts["template"],
        violations,
    )


def refused(violations: list[FieldViolation]) -> InvalidArgument:
    """The error that names all of these."""
    return InvalidArgument(
        "; ".join(f"{v.field}: {v.description}" for v in violations),
        reason="INVALID_FIELDS",
        violations=violations,
    )


def _without_nulls(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with YAML's words for "nothing" as None; an empty text stays for texts alone."""
    result: dict[str, Any] = {}
    for section, content in sections.items():
        if section not in SECTIONS or not isinstance(content, dict):
            result[section] = content
            continue
        result[section] = {
            name: None if value in ("null", "~") else value
            for name, value in cast("dict[str, Any]", content).items()
        }
    return result
