"""Explains how a run ended: what it can be judged by, what would mend it, whether it is retried."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetuned.v1 import event_pb2
from finetuned_daemon.devices import CPU, list_devices
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.fixes import Failure, advice_of, fix_of
from finetuned_daemon.retries import RESUME, SIZES, next_run, notice, retry_fix, with_resume
from finetuned_daemon.runs.contract import FixValue, Notice, Result
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.tasks import ENDS, Run, Task, TaskState
from finetuned_daemon.texts import NOTHING, Text

_log = logging.getLogger(__name__)

EVENTS_LOOKED_AT = 500
"""Of the end of a task's log."""

_LOG_LINES = 20
_LOG_CHARACTERS = 4000
_SAMPLES = 1000
_EXCERPT_CHARACTERS = 500


@dataclass(frozen=True)
class Evidence:
    """What a failed run can be judged by; fields as in `finetuned.v1.Evidence`."""

    last_metrics_step: int
    last_metrics: Mapping[str, float]
    log_lines: Sequence[str]
    sample_lines: Sequence[int]
    sample_excerpt: str
    sample_file: str


@dataclass(frozen=True)
class Explanation:
    """What there is to say of an end; of one that is no failure, nothing."""

    evidence: Evidence | None = None
    fix: Mapping[str, FixValue] | None = None
    """A patch of the task's parameters by path; empty: they will do. None: none is known."""
    advice: Text = NOTHING
    """Why the fix would mend it; without one, what to do by hand."""
    retry: Run | None = None
    """The run that the policy starts in its place."""
    notice: Notice | None = None
    """What the retry has changed."""


class Explainer:
    """Explains ends; looks at checkpoints, and at what is known of devices."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def explain(
        self,
        run: Run,
        task: Task,
        outcome: Result,
        exit_: Exit,
        events: Callable[[], Sequence[event_pb2.Event]],
    ) -> Explanation:
        """Explains the end of a run.

        Args:
            run: As it was until now.
            task: Its task.
            outcome: How it ended.
            exit_: How its process ended.
            events: Reads the last events of the run, oldest first.
        """
        if ENDS[outcome.end_reason].state is not TaskState.FAILED:
            return Explanation()
        try:
            return self._explain(run, task, outcome, exit_, events())
        except Exception:  # noqa: BLE001 - see below
            # Files and drivers are looked at that may be what broke: the end is recorded all the
            # same, or the device would never be free again.
            _log.exception("the end of run %d of %s can't be explained", run.number, task.name)
            return Explanation(advice=advice_of(outcome.end_reason, field=outcome.field))

    def _explain(
        self,
        run: Run,
        task: Task,
        outcome: Result,
        exit_: Exit,
        events: Sequence[event_pb2.Event],
    ) -> Explanation:
        evidence = gather(run, outcome, events)
        failure = Failure(
            reason=outcome.end_reason,
            training_type=task.training_type,
            parameters=run.parameters,
            device=run.device,
            phase=task.phase,
            step=outcome.step,
            saved_checkpoints=run.saved_checkpoints,
            can=self._capability(run.device),
            may_be_memory=exit_.signal == "SIGKILL" and exit_.oom_kills is None,
            was_killed=exit_.signal == "SIGKILL" and exit_.oom_kills == 0,
            hint=outcome.fix,
        )
        fix = retry_fix(run, failure)
        if fix is not None:
            retry = next_run(run, with_resume(fix, run, task.training_type))
            return Explanation(evidence, retry=retry, notice=notice(run, retry))
        fix = fix_of(failure)
        if fix is None:
            advice = advice_of(outcome.end_reason, field=outcome.field, in_fp16=failure.in_fp16)
            return Explanation(evidence, advice=advice)
        values = with_resume(fix, run, task.training_type)
        return Explanation(evidence, {**_of_retries(run), **values}, fix.why)

    def _capability(self, device: str) -> Capability | None:
        if device == CPU:
            return None  # nothing of what it can do makes a fix
        found = [known for known in list_devices() if known.id == device]
        return self._environment.capability(found[0]) if found else None


def gather(run: Run, outcome: Result, events: Sequence[event_pb2.Event]) -> Evidence:
    """What is left to judge a failed run by, bounded."""
    step, values = run.progress.step, dict[str, float]()
    if run.progress.loss is not None:
        values["loss"] = run.progress.loss
    if run.progress.learning_rate is not None:
        values["learning_rate"] = run.progress.learning_rate
    lines = list[str]()
    for event in events:
        if event.HasField("metrics"):
            step, values = event.metrics.step, dict(event.metrics.values)
        elif event.HasField("log_line"):
            lines += [f"{event.log_line.level}: {line}" for line in _lines(event.log_line.text)]
    lines = lines[-_LOG_LINES:]
    while sum(map(len, lines)) > _LOG_CHARACTERS:
        del lines[0]
    return Evidence(
        last_metrics_step=step if values else 0,
        last_metrics=values,
        log_lines=lines,
        sample_lines=outcome.samples[:_SAMPLES],
        sample_excerpt=outcome.excerpt[:_EXCERPT_CHARACTERS],
        sample_file=outcome.sample_file,
    )


def _lines(text: str) -> list[str]:
    return [line[: _LOG_CHARACTERS // 4] for line in text.splitlines()]


def _of_retries(run: Run) -> dict[str, FixValue]:
    """What retries have changed: a fix builds on it, and the task has its own values still."""
    if not run.retry:
        return {}
    training = run.parameters.training
    values: dict[str, FixValue] = dict(
        zip(SIZES, (training.batch_size, training.gradient_accumulation_steps), strict=True)
    )
    if run.parameters.data.resume_from_checkpoint:
        values[RESUME] = run.parameters.data.resume_from_checkpoint
    return values
