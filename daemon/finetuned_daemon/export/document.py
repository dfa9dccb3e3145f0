"""Settings as YAML: what is not at its default, and as comments what is."""

from __future__ import annotations

import json
from typing import Any

from finetuned._version import __version__
from finetuned_daemon.export.settings import Settings, default_of, label_of
from finetuned_daemon.parameters.models import SECTIONS


def document(settings: Settings) -> str:
    """A file that `finetunectl train`, `check` and `task create` read, to the same parameters.

    JSON's scalars are YAML's, so that no YAML package is needed to write it.
    """
    lines = [
        f"# {settings.origin[0].upper()}{settings.origin[1:]}, written by finetuned {__version__}.",
        "# Look at it with `finetunectl check FILE`, train with `finetunectl train FILE`.",
        "",
        f"training_type: {settings.training_type.value.lower()}",
    ]
    if settings.device:
        lines.append(f"device: {_scalar(settings.device)}")
    for section in SECTIONS:
        inside = {p: v for p, v in settings.chosen.items() if p.partition(".")[0] == section}
        if inside:
            lines += ["", f"{section}:", *(_line(path, value) for path, value in inside.items())]
    unchanged = [path for path in settings.in_effect if path not in settings.chosen]
    lines += ["", f"# At their defaults in finetuned {__version__}:"]
    lines += [f"#   {path}: {_scalar(default_of(path))}" for path in unchanged]
    return "\n".join(lines) + "\n"


def _line(path: str, value: Any) -> str:
    default = default_of(path)
    note = label_of(path) if default is None else f"{label_of(path)}; default {_scalar(default)}"
    return f"  {path.partition('.')[2]}: {_scalar(value)}  # {note}"


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str):
        return f'"{"".join(map(_character, value))}"'
    text = json.dumps(value)
    # YAML 1.1 takes 1e-05 for a text and 1.0e-05 for a number.
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text


def _character(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08X}"
