"""How a failed run is shown: what it can be judged by, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from finetuned._language import language_of
from finetuned.cli.output import console

if TYPE_CHECKING:
    from finetuned.v1.event_pb2 import Evidence, Result
    from finetuned.v1.parameter_service_pb2 import LocalizedText

_LOG_LINES = 5
"""Shown of the log; a traceback follows it, and `task logs` has all of it."""
_SAMPLES = 8


def advice_text(advice: LocalizedText) -> str:
    """The sentence in the language of the locale."""
    return advice.zh if language_of(None) == "zh" else advice.en


def evidence_rows(result: Result) -> list[tuple[str, str]]:
    """Names and values of what a failed run can be judged by."""
    if not result.HasField("evidence"):
        return []
    evidence = result.evidence
    return [
        ("last metrics", _metrics(evidence)),
        ("samples", _samples(evidence)),
        ("sample", " ".join(evidence.sample_excerpt.split())),
    ]


def print_last_words(result: Result) -> None:
    """The end of the log, then the traceback."""
    lines = list(result.evidence.log_lines[-_LOG_LINES:])
    text = "\n".join([*lines, result.detail.rstrip()]).strip("\n")
    if text:
        console().print(Text(text, style="dim"), soft_wrap=True)


def _metrics(evidence: Evidence) -> str:
    if not evidence.last_metrics:
        return ""
    values = "  ".join(
        f"{name} {value:.4g}" for name, value in sorted(evidence.last_metrics.items())
    )
    return f"step {evidence.last_metrics_step}  {values}"


def _samples(evidence: Evidence) -> str:
    lines = evidence.sample_lines
    if not lines:
        return ""
    shown = ", ".join(map(str, lines[:_SAMPLES]))
    more = f" and {len(lines) - _SAMPLES} more" if len(lines) > _SAMPLES else ""
    word = "line" if len(lines) == 1 else "lines"
    return f"{word} {shown}{more} of {Path(evidence.sample_file).name}"
