"""From files and options to a task: what to train, with which parameters.

Nothing here knows a list of parameters: names and types come from the contract's descriptors.
"""

from __future__ import annotations

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

# The one thing that the contract's types don't say: which texts are paths.
_PATHS = (
    "data.train_file",
    "data.eval_file",
    "data.output_dir",
    "data.model_path",
    "data.tokenizer_path",
    "data.resume_from_checkpoint",
    "lora.peft_config_path",
)
_TYPES = ("sft", "pretrain")
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
}


@dataclass
class Wish:
    """What the user asked for, as text: from a file, overridden by options and `--set`."""

    training_type: str | None = None
    display_name: str | None = None
    device: str | None = None
    template: str | None = None
    sections: dict[str, Any] = field(default_factory=dict[str, Any])
    violations: list[FieldViolation] = field(default_factory=list[FieldViolation])

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

    Raises:
        InvalidArgument: It can't be read, or is neither YAML nor JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # BaseLoader leaves every scalar a text, and the field's type says how to read it: `no`
        # stays "no" for a strategy, and 2e-4 is a number, as YAML 1.1 would not have it.
        content: Any = (
            json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506 (makes no objects)
        )
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _bad_file(path, _why_unread(error)) from error
    if isinstance(content, str | None) and content in _NOTHING:
        content = {}
    if not isinstance(content, dict):
        raise _bad_file(path, "must hold sections such as `training:` with parameters below them")
    wish = Wish()
    document = cast("dict[str, Any]", content)
    nested: Any = document.pop("parameters", None)
    if not isinstance(nested, dict):
        if nested not in _NOTHING:
            wish.violations.append(no_section("parameters", nested))
        nested = {}
    for key, value in (cast("dict[str, Any]", nested) | document).items():
        if isinstance(value, dict) and key not in _KEYS:
            wish.sections[key] = dict(cast("dict[str, Any]", value))
        elif value in _NOTHING:
            if key not in _KEYS:
                wish.sections[key] = {}
        elif key in _KEYS and not isinstance(value, dict | list):
            setattr(wish, _KEYS[key], str(value))
        elif key in _KEYS:
            wish.violations.append(FieldViolation(key, "must be a text", WRONG_TYPE))
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


def _bad_file(path: Path, why: str) -> InvalidArgument:
    violation = FieldViolation(str(path), why, "BAD_FILE")
    return InvalidArgument(f"{path} {why}", reason="BAD_FILE", violations=[violation])


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
    parameters, wrong = convert(_without_nulls(wish.sections), parse_text=True)
    violations += wrong
    for path in _PATHS:
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
