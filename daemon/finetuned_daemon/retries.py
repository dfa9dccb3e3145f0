"""The policy `extensions.retry_out_of_memory`: a run that ran out of memory goes on with less.

The next run of the same task gets the parameters of the run with half the batch and twice the
accumulation, and goes on from the newest whole checkpoint. The task keeps its own parameters: the
run's record shows what it ran with. How many runs in a row were started so stands in the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from finetuned_daemon.fixes import Failure, Fix, patched, smaller_batch
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason, FixValue, Notice, TrainingType
from finetuned_daemon.tasks import Run
from finetuned_daemon.validation.check import errors
from finetuned_daemon.validation.checkpoint import check_checkpoint

MOST_RETRIES = 3
"""In a row; a start by somebody counts anew."""

RESUME = "data.resume_from_checkpoint"
SIZES = ("training.batch_size", "training.gradient_accumulation_steps")

_REASONS = frozenset({EndReason.DEVICE_OUT_OF_MEMORY, EndReason.HOST_OUT_OF_MEMORY})


def retry_fix(run: Run, failure: Failure) -> Fix | None:
    """What the policy changes for another run; None where it starts none."""
    if not run.parameters.extensions.retry_out_of_memory or failure.reason not in _REASONS:
        return None
    if run.is_probe or run.stop is not None or run.retry >= MOST_RETRIES:
        return None
    return smaller_batch(failure)


def next_run(run: Run, values: Mapping[str, FixValue]) -> Run:
    """The run that follows `run`, with other values in its parameters."""
    parameters = patched(run.parameters, values)
    if parameters is None:
        raise AssertionError(f"{values} are no parameters")
    planned = run.planned_checkpoints
    return Run(
        task_key=run.task_key,
        number=run.number + 1,
        device=run.device,
        parameters=parameters,
        # Out of what was reserved for the run that it follows; at least one, as for every run.
        planned_checkpoints=planned and max(1, planned - run.saved_checkpoints),
        retry=run.retry + 1,
        request_id=run.request_id,
    )


def notice(old: Run, new: Run) -> Notice:
    """Says what the policy has changed, and where the next run begins."""
    (size, steps), (less, more) = (
        (p.training.batch_size, p.training.gradient_accumulation_steps)
        for p in (old.parameters, new.parameters)
    )
    begins = new.parameters.data.resume_from_checkpoint
    return Notice(
        field=SIZES[0],
        reason="RETRIED_OUT_OF_MEMORY",
        message=f"Run {old.number} ran out of memory; run {new.number} (retry {new.retry} of at "
        f"most {MOST_RETRIES}) has {SIZES[0]} {size} -> {less}, {SIZES[1]} {steps} -> {more}, and "
        + (f"goes on from {begins}." if begins else "begins anew: there is no whole checkpoint."),
    )


def with_resume(fix: Fix, run: Run, training_type: TrainingType) -> dict[str, FixValue]:
    """The values of a fix, and from where a run with it begins."""
    values = dict(fix.values)
    parameters = patched(run.parameters, values)
    if parameters is None or _attaches_lora(parameters, training_type):
        return values  # the folder to resume is where the weights come from, and stays it
    if fix.resumes:
        newest = newest_checkpoint(run, parameters, training_type)
        if newest:
            values[RESUME] = newest
    elif fix.resumes is False and parameters.data.resume_from_checkpoint:
        values[RESUME] = ""
    return values


def newest_checkpoint(run: Run, parameters: Parameters, training_type: TrainingType) -> str:
    """The newest checkpoint from which a run with these parameters can go on; empty: none.

    What `run` saved, else what it went on from itself; each has to be whole.
    """
    for folder in _checkpoints(run):
        resumed = patched(parameters, {RESUME: folder})
        if resumed is None:
            continue
        try:
            if not errors(check_checkpoint(resumed, training_type, None)):
                return folder
        except OSError:  # on its way out, or on a disk that is gone
            continue
    return ""


def _checkpoints(run: Run) -> Iterator[str]:
    if run.output_dir:
        found = dict[int, str]()
        for path in Path(run.output_dir).glob("checkpoint-*"):
            name = path.name.removeprefix("checkpoint-")
            if name.isdecimal():
                found[int(name)] = str(path)
        for number in sorted(found, reverse=True):
            yield found[number]
    if run.parameters.data.resume_from_checkpoint:
        yield run.parameters.data.resume_from_checkpoint


def _attaches_lora(parameters: Parameters, training_type: TrainingType) -> bool:
    return (
        training_type is TrainingType.SFT
        and parameters.lora.use_lora
        and parameters.data.attach_lora
    )
