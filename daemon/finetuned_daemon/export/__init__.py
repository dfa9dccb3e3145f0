"""A task's settings as files that stand for themselves: YAML for `finetunectl`, or a script.

The script trains alike with torch, transformers and peft alone, so that nobody is bound to this
program.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.export.document import document
from finetuned_daemon.export.script import left_out, script
from finetuned_daemon.export.settings import Settings
from finetuned_daemon.texts import Text

__all__ = ["ConfigFormat", "Exported", "Settings", "export"]

# The paths that a script can't do without.
_NEEDED = ("data.model_path", "data.train_file", "data.output_dir")


class ConfigFormat(StrEnum):
    """What settings are written out as; names as in `finetuned.v1.ConfigFormat`."""

    YAML = "YAML"
    SCRIPT = "SCRIPT"


@dataclass(frozen=True)
class Exported:
    """A file to be written by whoever asked."""

    name: str
    content: str
    left_out: list[str] = field(default_factory=list[str])
    """Settings that the file trains without, each as path, value and label."""


def export(settings: Settings, file_format: ConfigFormat) -> Exported:
    """The file of these settings.

    Raises:
        InvalidRequest: A script would lack its model, data or output folder.
    """
    stem = settings.file_stem
    if file_format is ConfigFormat.YAML:
        return Exported(f"{stem}.yaml", document(settings))
    missing = [path for path in _NEEDED if not settings.in_effect.get(path)]
    if missing:
        text = Text("is not set, and a script can't do without it", "尚未设置，脚本不能没有它")
        raise InvalidRequest([Violation(path, text, "REQUIRED") for path in missing])
    return Exported(f"{stem}.py", script(settings), left_out(settings))
