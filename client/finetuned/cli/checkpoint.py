"""Checkpoints of a task: which there are, which to go on from, and what that will be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import (
    Exit,
    JsonOption,
    TaskArgument,
    confirm,
    say,
    settings,
    task_command,
    task_word,
)

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.v1.parameter_service_pb2 import ResumePlan
    from finetuned.v1.task_pb2 import Checkpoint, Task

ResumeOption = Annotated[
    str | None,
    typer.Option(
        "--resume",
        metavar="newest|best|STEP|PATH",
        help="Go on from a checkpoint of the task: the newest whole one, the one with the lowest "
        "evaluation loss, that of a step, or a folder. The task's own parameters stay.",
    ),
]

_CHOICES = ("newest", "best")
_EFFECTS = {
    "IMPOSSIBLE": ("impossible", "red"),
    "DIFFERENT_RUN": (
        "another run from here: losses are not those of an uninterrupted one",
        "yellow",
    ),
    "MAY_CHANGE": ("changed, and harmless", "green"),
    "CONTINUES": ("goes on", "dim"),
}


def checkpoints(
    ctx: typer.Context,
    name: TaskArgument,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Compare the hashes of all files: takes as long as reading."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a task that still stand, newest first.

    One that is not whole says why, and is never used.
    """
    from finetuned.cli.output import bytes_text, print_json, print_table, time_text

    with settings(ctx).client() as client:
        task = client.get_task(name)
        found = list(client.list_checkpoints(task.name, verify=verify))
    if as_json:
        print_json(found)
        return
    if not found:
        say("no checkpoints")
        return
    print_table(
        ("step", "run", "epoch", "eval loss", "", "size", "saved", "folder"),
        (
            (
                str(checkpoint.step),
                str(checkpoint.run),
                f"{checkpoint.epoch:.2f}",
                f"{checkpoint.eval_loss:.4f}" if checkpoint.HasField("eval_loss") else "",
                _marks(checkpoint),
                bytes_text(checkpoint.size_bytes),
                time_text(checkpoint.create_time),
                checkpoint.path,
            )
            for checkpoint in found
        ),
        wrapped=("folder",),
    )
    for checkpoint in found:
        if not checkpoint.is_whole:
            say(f"step {checkpoint.step} of run {checkpoint.run}: {checkpoint.problem}")
    if any(checkpoint.is_newest for checkpoint in found):
        say(f"go on from the newest: {task_command('start', task, '--resume', 'newest')}")


def delete_checkpoint(
    ctx: typer.Context,
    name: TaskArgument,
    step: Annotated[int, typer.Argument(metavar="STEP", help="The checkpoint's step.")],
    run: Annotated[
        int | None,
        typer.Option("--run", metavar="N", help="Its run. Default: the newest that has one."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a checkpoint: what its run wrote there, and nothing else."""
    from finetuned.cli.output import bytes_text, print_json

    with settings(ctx).client() as client:
        task = client.get_task(name)
        found = _of_step(client, task, step, run)
        if not yes:
            command = task_command("delete-checkpoint", name, str(step), "--yes")
            size = bytes_text(found.size_bytes)
            marks = f": the {_marks(found)} one" if found.is_newest or found.is_best else ""
            if not confirm(f"Delete {found.path} ({size}){marks}?", command):
                say("nothing was deleted")
                raise typer.Exit(Exit.FAILED)
        answer = client.delete_checkpoint(found.name)
    if as_json:
        print_json(answer)
        return
    size = bytes_text(answer.deleted_bytes)
    print(f"{found.path} deleted: {answer.deleted_files} files, {size}")
    if answer.folder_left:
        say("the folder is still there: it holds what the run has not written")


def resume_of(client: Client, task: Task, text: str) -> str:
    """What `Client.start_task` takes for `--resume`: `newest`, `best`, or a folder.

    Raises:
        InvalidArgument: There is no checkpoint of that step.
    """
    if text in _CHOICES:
        return text
    if text.isascii() and text.isdigit():
        return _of_step(client, task, int(text), None).path
    return str(Path(text).expanduser().absolute())


def plan_resume(client: Client, task: Task, resume: str, as_json: bool) -> None:
    """Tell what a run of the task would be that goes on so, and start nothing."""
    from finetuned._violations import from_messages
    from finetuned.cli.output import print_json
    from finetuned.cli.violations import print_violations

    answer = client.estimate(task=task.name, resume=resume)
    if as_json:
        print_json(answer.resume_plan)
    elif answer.HasField("resume_plan"):
        show_plan(answer.resume_plan)
        print_violations(from_messages(answer.violations), to_stderr=True)
    else:
        say("it would begin anew: choose a checkpoint by --resume")


def show_plan(plan: ResumePlan) -> None:
    """What a resume will be, gravest first."""
    from finetuned._violations import plain_value
    from finetuned.cli.output import console, enum_name, value_text
    from finetuned.v1.parameter_service_pb2 import ResumeEffect

    out = console()
    done = f"step {plan.step:,} of {plan.total_steps:,}"
    passes = f", {plan.epoch:.2f} passes over the data" if plan.epoch else ""
    out.print(f"goes on from {plan.checkpoint}", soft_wrap=True, markup=False)
    out.print(f"at {done}{passes}, {plan.num_tokens:,} tokens", soft_wrap=True, markup=False)
    if not plan.knows_parameters:
        say("the checkpoint does not say what it was made with: changes since can't be told")
    width = max((len(item.field) for item in plan.items), default=0)
    shown = ""
    for item in plan.items:
        effect = enum_name(ResumeEffect, item.effect).removeprefix("RESUME_EFFECT_")
        label, style = _EFFECTS.get(effect, (effect.lower(), ""))
        if effect != shown:
            out.print(f"  {label}", style=style, soft_wrap=True, markup=False)
            shown = effect
        values = [
            value_text(plain_value(getattr(item, side), item.field)) if item.HasField(side) else ""
            for side in ("then", "now")
        ]
        change = f"{values[0] or 'nothing'} -> {values[1] or 'nothing'}; " if any(values) else ""
        line = f"    {item.field:<{width}}  {change}{item.message}"
        out.print(line, soft_wrap=True, markup=False)


def _marks(checkpoint: Checkpoint) -> str:
    if not checkpoint.is_whole:
        return "not whole"
    marks = (("newest", checkpoint.is_newest), ("best", checkpoint.is_best))
    return ", ".join(word for word, is_so in marks if is_so)


def _of_step(client: Client, task: Task, step: int, run: int | None) -> Checkpoint:
    """The checkpoint of a step, of the newest run that has one unless `run` says which."""
    from finetuned._errors import FieldViolation
    from finetuned.cli.params import refused

    found = list(client.list_checkpoints(task.name))
    for checkpoint in found:
        if checkpoint.step == step and run in (None, checkpoint.run):
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found) or "none"
    of_run = "" if run is None else f" of run {run}"
    why = f"{task_word(task)} has no checkpoint of step {step}{of_run}; there are: {steps}"
    raise refused([FieldViolation("STEP", why, "CHECKPOINT_NOT_FOUND")])
