"""A notification as it is sent: small, stable, with no secret and nothing of the data in it.

`docs/notifications.md` describes its fields. They are only ever added to.
"""

from __future__ import annotations

import json
import math
import secrets
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetuned_daemon import logs
from finetuned_daemon.notify.causes import Cause
from finetuned_daemon.tasks import Run, Task
from finetuned_daemon.texts import Language, printable

_LONGEST_SENTENCE = 1000


@dataclass(frozen=True)
class Notification:
    """One notification."""

    id: str
    """Random; the same at each attempt and on each way."""
    body: str
    """JSON, to the byte as it is sent and signed."""

    @property
    def content(self) -> dict[str, Any]:
        """The body, read."""
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def data(self) -> dict[str, Any]:
        """What it says of the run."""
        data: dict[str, Any] = self.content["data"]
        return data


def make(
    type_: str, time_us: int, data: Mapping[str, object], *, title: str, sentence: str
) -> Notification:
    """A notification with a new id."""
    id_ = f"msg_{secrets.token_hex(12)}"
    content = {
        "id": id_,
        "type": type_,
        "timestamp": _moment(time_us),
        "data": {"title": title, "sentence": sentence, **data, "host": socket.gethostname()},
    }
    return Notification(id_, json.dumps(content, ensure_ascii=False, allow_nan=False))


def of_run(
    cause: Cause,
    time_us: int,
    task: Task,
    run: Run,
    *,
    state: str,
    output_path: str,
    language: Language,
) -> Notification:
    """The notification of an event of a run."""
    progress = run.progress
    ended = run.end_time or time_us
    data = {
        "task": task.name,
        "display_name": task.display_name,
        "training_type": task.training_type.value,
        "run": run.number,
        "is_probe": run.is_probe,
        "state": state,
        "reason": cause.reason,
        "next": cause.kind.next_command.format(task=task.task_id),
        "output_path": output_path or None,
        "last_checkpoint": run.last_checkpoint or None,
        "step": progress.step,
        "total_steps": progress.total_steps or None,
        "loss": _finite(progress.loss),
        "start_time": _moment(run.start_time) if run.start_time else None,
        "duration_seconds": round((ended - run.start_time) / 1e6, 1) if run.start_time else None,
    }
    which = f"({run.number})" if run.number > 1 else ""
    name = f"{printable(task.display_name)} {which}".rstrip()
    title = f"{name}: {cause.kind.label.within(language)}"
    return make(cause.kind.type, time_us, data, title=title, sentence=_sentence(cause, language))


def sample(time_us: int, language: Language) -> Notification:
    """What a test sends: of the type `test`, with the fields of a run that has completed."""
    data = {
        "task": "tasks/sft-0000000000",
        "display_name": "test",
        "training_type": "SFT",
        "run": 1,
        "is_probe": False,
        "state": "COMPLETED",
        "reason": "FINISHED",
        "next": "finetunectl task list",
        "output_path": None,
        "last_checkpoint": None,
        "step": 100,
        "total_steps": 100,
        "loss": 1.25,
        "start_time": _moment(time_us - 60_000_000),
        "duration_seconds": 60.0,
    }
    title = "finetuned：测试" if language == "zh" else "finetuned: a test"
    sentence = "通知可以送达。" if language == "zh" else "Notifications arrive."
    return make("test", time_us, data, title=title, sentence=sentence)


def _sentence(cause: Cause, language: Language) -> str:
    message = logs.redacted(printable(cause.message)).strip()
    if language == "zh" and cause.sentence.zh:
        has_more = message and message != cause.sentence.en
        message = f"{cause.sentence.zh}{message if has_more else ''}"
    message = message or cause.sentence.within(language)
    if len(message) > _LONGEST_SENTENCE:
        message = f"{message[: _LONGEST_SENTENCE - 4]} ..."
    return message


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _moment(time_us: int) -> str:
    moment = datetime.fromtimestamp(time_us / 1e6, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
