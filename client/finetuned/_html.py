"""A run as a panel of HTML for notebooks: no script, and every text in it escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from finetuned._tracker import Tracker
from finetuned._words import STATE_COLORS, duration_text, phase_word, reason_word, state_word
from finetuned.v1.task_pb2 import TaskState

# Readable on white and on black.
_CSS = {"blue": "#3b82f6", "green": "#22a355", "orange": "#e08600", "red": "#e5484d"}
_PANEL = (
    "font:13px/1.5 system-ui,sans-serif;max-width:720px;border:1px solid #8886;"
    "border-radius:6px;padding:10px 14px;margin:2px 0"
)
_LOG = (
    "font:12px/1.4 ui-monospace,monospace;margin:8px 0 0;padding:6px 8px;background:#8881;"
    "border-radius:4px;white-space:pre-wrap;overflow-wrap:anywhere"
)
_WIDTH, _HEIGHT, _MARGIN = 640, 150, 46
_LETTER = 6.5
"""Width of a letter of the curves' labels, about."""


def card(
    tracker: Tracker,
    curves: Mapping[str, Mapping[int, float]] | None = None,
    lines: Iterable[str] = (),
    note: str = "",
) -> str:
    """The panel.

    Args:
        tracker: What is known of the run.
        curves: Step to value by name; the first is drawn as a line, others dashed.
        lines: The last lines of the log.
        note: A sentence below.
    """
    result = tracker.result
    parts = [_head(tracker), _bar(tracker), _figures(tracker), curve_svg(curves or {})]
    text = "\n".join(lines)
    if text:
        parts.append(f'<pre style="{_LOG}">{escape(text)}</pre>')
    if tracker.has_ended and result is not None:
        parts.append(_line(result.message))
        if result.output_path:
            parts.append(f"<div>output <code>{escape(result.output_path)}</code></div>")
    elif tracker.has_ended:
        parts.append(_line(tracker.task.end_message))
    if tracker.pause:
        parts.append(_line(tracker.pause))
    if not tracker.is_connected:
        parts.append(_line("daemon connection lost, waiting ... the run goes on", "orange"))
    if note:
        parts.append(_line(note))
    return f'<div class="finetuned-task" style="{_PANEL}">{"".join(parts)}</div>'


def curve_svg(curves: Mapping[str, Mapping[int, float]]) -> str:
    """The curves in one drawing; empty where none has two points to draw."""
    drawn = {
        name: sorted((step, value) for step, value in points.items() if math.isfinite(value))
        for name, points in curves.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    steps = [step for points in drawn.values() for step, _ in points]
    if not steps or min(steps) == max(steps):
        return ""
    values = [value for points in drawn.values() for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    top_label, bottom_label = f"{high:.4g}", f"{low:.4g}"
    margin = max(_MARGIN, math.ceil(max(len(top_label), len(bottom_label)) * _LETTER) + 8)
    across, down = (_WIDTH - margin - 8) / (last - first), (_HEIGHT - 30) / (high - low)
    shapes: list[str] = []
    for number, (name, points) in enumerate(drawn.items()):
        places = [
            (margin + (step - first) * across, 8 + (high - value) * down) for step, value in points
        ]
        shapes.append(_shape(name, places, dashed=number > 0))
    names = ", ".join(drawn)
    label = escape(f"{names}, steps {first} to {last}, values {low:.4g} to {high:.4g}")
    bottom = _HEIGHT - 22
    # Between the first step and the last, which stand at the ends of the same line.
    room = int((_WIDTH - margin) / _LETTER) - 2 * len(f"  step {last}")
    shown = names if len(names) <= room else f"{names[: room - 1]}\u2026"
    axis = 'stroke="currentColor" stroke-opacity=".3"'
    text = 'fill="currentColor" fill-opacity=".7" font-size="11"'
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" role="img" aria-label="{label}" '
        f'style="display:block;margin-top:8px;max-width:{_WIDTH}px">'
        f'<path d="M{margin} 8V{bottom}H{_WIDTH - 8}" fill="none" {axis}/>'
        f'<text x="{margin - 4}" y="14" text-anchor="end" {text}>{top_label}</text>'
        f'<text x="{margin - 4}" y="{bottom}" text-anchor="end" {text}>{bottom_label}</text>'
        f'<text x="{margin}" y="{_HEIGHT - 6}" {text}>{first}</text>'
        f'<text x="{_WIDTH - 8}" y="{_HEIGHT - 6}" text-anchor="end" {text}>step {last}</text>'
        f'<text x="{(_WIDTH + margin) // 2}" y="{_HEIGHT - 6}" text-anchor="middle" {text}>'
        f"{escape(shown)}</text>{''.join(shapes)}</svg>"
    )


def _shape(name: str, places: Sequence[tuple[float, float]], *, dashed: bool) -> str:
    title = f"<title>{escape(name)}</title>"
    color = _CSS["orange"] if dashed else _CSS["blue"]
    if len(places) == 1:
        ((x, y),) = places
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}">{title}</circle>'
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 3"' if dashed else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}>'
        f"{title}</polyline>"
    )


def _color(tracker: Tracker) -> str:
    return _CSS.get(STATE_COLORS.get(state_word(tracker.state), ""), "inherit")


def _head(tracker: Tracker) -> str:
    task = tracker.task
    word = state_word(tracker.state)
    state = f'<span style="color:{_color(tracker)};font-weight:600">{escape(word)}</span>'
    details = [f"run {task.run}"] if task.run else []
    if tracker.has_ended:
        details.append(
            reason_word(tracker.result.end_reason if tracker.result else task.end_reason)
        )
    elif tracker.phase:
        details.append(phase_word(tracker.phase))
    elif tracker.state == TaskState.TASK_STATE_QUEUED and task.queue_position:
        details.append(f"place {task.queue_position} in the queue")
    details.append(task.name)
    rest = " &middot; ".join(escape(detail) for detail in details if detail)
    return (
        f"<div><b>{escape(task.display_name)}</b> &nbsp;{state} "
        f'<span style="opacity:.7">&nbsp;{rest}</span></div>'
    )


def _bar(tracker: Tracker) -> str:
    progress = tracker.progress
    if not progress.total_steps:
        return ""
    share = min(max(progress.step / progress.total_steps, 0), 1)
    return (
        f'<div role="progressbar" aria-valuemin="0" aria-valuemax="{progress.total_steps}" '
        f'aria-valuenow="{progress.step}" '
        'style="height:6px;border-radius:3px;background:#8883;margin:8px 0 4px;overflow:hidden">'
        f'<div style="height:6px;width:{share:.1%};background:{_color(tracker)}"></div></div>'
    )


def _figures(tracker: Tracker) -> str:
    return _line("  \u00b7  ".join(figures(tracker)))


def figures(tracker: Tracker) -> list[str]:
    """What is to be told of a run's progress, in short; empty before its first step."""
    progress = tracker.progress
    if not progress.total_steps:
        return []
    share = progress.step / progress.total_steps
    result = [f"{progress.step}/{progress.total_steps} steps ({share:.0%})"]
    if progress.epoch:
        result.append(f"epoch {progress.epoch:.2f}")
    if progress.HasField("loss"):
        result.append(f"loss {progress.loss:.4f}")
    if progress.HasField("learning_rate"):
        result.append(f"lr {progress.learning_rate:.2e}")
    if progress.tokens_per_second:
        result.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    is_running = tracker.state == TaskState.TASK_STATE_RUNNING
    if progress.HasField("eta_seconds") and is_running and tracker.is_connected:
        result.append(f"{duration_text(progress.eta_seconds)} left")
    return result


def _line(text: str, color: str = "") -> str:
    if not text:
        return ""
    style = f' style="color:{_CSS[color]}"' if color else ""
    return f"<div{style}>{escape(text)}</div>"
