"""`finetunectl task fix`: put into a task what would mend its failed run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

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
    from finetuned.v1.event_pb2 import Result
    from finetuned.v1.task_pb2 import Task

_LAST_EVENTS = 50
"""Among which the end of the latest run is looked for, before all of its events are."""


@dataclass(frozen=True)
class Change:
    """One parameter of a fix."""

    field: str
    old: Any
    """None: it has no value."""
    new: Any
    """None: it loses its value."""


@dataclass(frozen=True)
class FixPlan:
    """What would mend a task."""

    changes: list[Change]
    why: str
    """Why they would mend it; without changes, what to do by hand."""
    is_known: bool
    """Whether a fix is known, be it in the task already."""


def fix(
    ctx: typer.Context,
    name: TaskArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    start: Annotated[bool, typer.Option("--start", help="Start it then.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Start it, and watch it to its end.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Mend a task whose run failed: show what to change and why, ask, and change it.

    The new run goes on from the newest whole checkpoint wherever it can. Exit status 1 where no fix
    is known; it is said then what to do by hand. A run that is paused on a full disk goes on by
    itself once there is room; to change its task is to stop it.
    """
    from finetuned._documents import sections
    from finetuned.cli.errors import show_trouble
    from finetuned.cli.follow import follow
    from finetuned.cli.output import print_json_line, print_json_value, state_word, to_dict
    from finetuned.v1.task_pb2 import PauseReason, TaskState

    options = settings(ctx)
    with options.client() as client:
        task = client.get_task(name)
        waits = task.pause_reason == PauseReason.PAUSE_REASON_DISK_FULL
        mendable = task.state in (TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_PENDING)
        if not (mendable or waits):
            show_trouble(
                f"{task_word(task)} is {state_word(task.state)}: there is nothing to mend",
                reason="NOTHING_TO_MEND",
                command=task_command("show", name),
                as_json=as_json,
            )
            raise typer.Exit(Exit.FAILED)
        plan = plan_fix(client, task)
        undo = _undo(task, plan.changes)
        if not as_json:
            _show(task, plan)
        if not plan.is_known:
            _show_unknown(task, plan, name, as_json)
            raise typer.Exit(Exit.FAILED)
        if plan.changes and not yes:
            flags = [flag for flag, on in (("--start", start), ("--watch", watch)) if on]
            command = task_command("fix", name, "--yes", *flags)
            change = "Stop and change" if waits else "Change"
            if not confirm(f"{change} task {task_word(task)} like this?", command):
                say("nothing was changed")
                raise typer.Exit(Exit.FAILED)
        if plan.changes and waits:
            task = client.stop_task(task.name)
        if plan.changes:
            values = {
                change.field: "" if change.new is None else change.new for change in plan.changes
            }
            task = client.update_task(task.name, sections(values), etag=task.etag)
            if not as_json:
                say(f"changed; undo it: {undo}")
        if (start or watch) and (plan.changes or not waits):
            seq = task.last_seq
            task = client.start_task(task.name, etag=task.etag)
            if watch:
                if as_json:
                    print_json_line({"fix": _content(plan, undo)})
                raise typer.Exit(follow(client, task, as_json=as_json, after_seq=seq))
    if as_json:
        print_json_value({**_content(plan, undo), "task": to_dict(task)})
    elif waits and not plan.changes:
        say("it goes on by itself once there is room")
    elif start:
        print(f"{task_word(task)} {state_word(task.state)}")
    else:
        say(f"start it: {task_command('start', task, '--watch')}")


def _content(plan: FixPlan, undo: str) -> dict[str, Any]:
    return {
        "changes": [vars(change) for change in plan.changes],
        "why": plan.why,
        "undo": undo,
    }


def plan_fix(client: Client, task: Task) -> FixPlan:
    """What would mend a task whose run failed, or which a check refuses."""
    from finetuned._parameters import flatten
    from finetuned.cli.failure import advice_text

    result = _result(client, task)
    if result is None or not result.HasField("fix"):
        plan = _by_check(client, task)
        if plan.is_known or result is None:
            return plan
        return FixPlan([], advice_text(result.advice), is_known=False)
    now = flatten(task.parameters)
    wanted = flatten(result.fix)
    # Not the newest, where a probe has followed it.
    run = next(run for run in client.list_runs(task.name) if run.number == task.run)
    ran_with = flatten(run.parameters)
    edited = [
        path
        for path, value in wanted.items()
        # What retries have changed is the run's alone.
        if value != ran_with.get(path, "")
        and now.get(path, "") not in (ran_with.get(path, ""), value)
    ]
    if edited and any(not path.startswith("data.resume") for path in edited):
        why = f"{', '.join(edited)} was changed since the run failed; try it with that"
        return FixPlan([], why, is_known=True)
    changes = _changes(task, wanted)
    if wanted and not changes:
        return FixPlan([], "the task has what would likely mend it already", is_known=True)
    return FixPlan(changes, advice_text(result.advice), is_known=True)


def _by_check(client: Client, task: Task) -> FixPlan:
    """What the check suggests where it would refuse a start."""
    errors = [v for v in client.validate(None, task=task.name) if v.severity == "error"]
    wanted = {
        v.suggested_field or v.field: v.suggested_value
        for v in errors
        if v.suggested_value is not None and "." in (v.suggested_field or v.field)
    }
    why = "; ".join(f"{v.field} {v.message}" for v in errors)
    if not errors:
        why = "no run of it has failed, and the check finds nothing that is wrong"
    return FixPlan(_changes(task, wanted), why, is_known=bool(wanted))


def _changes(task: Task, wanted: dict[str, Any]) -> list[Change]:
    from finetuned._parameters import flatten

    now = flatten(task.parameters)
    return [
        Change(path, now.get(path), None if value == "" else value)
        for path, value in wanted.items()
        if value != now.get(path, "")
    ]


def _result(client: Client, task: Task) -> Result | None:
    """How the latest run ended; None before the first end."""
    if not task.run:
        return None
    for after in (max(task.last_seq - _LAST_EVENTS, 0), 0):
        events = client.list_events(task.name, after, run=task.run)
        found = [event.result for event in events if event.WhichOneof("payload") == "result"]
        if found:
            return found[-1]  # a run that went on after a full disk has more than one
    return None


def _show(task: Task, plan: FixPlan) -> None:
    from finetuned.cli.output import print_pairs, reason_word, value_text

    word = "paused" if task.pause_reason else "failed"
    print_pairs([(word, reason_word(task.end_reason)), ("why", task.end_message)])
    if not plan.is_known:
        return
    print_pairs(
        [
            *(
                (
                    change.field,
                    f"{'(none)' if change.old is None else value_text(change.old)} -> "
                    f"{'(none)' if change.new is None else value_text(change.new)}",
                )
                for change in plan.changes
            ),
            ("because" if plan.changes else "nothing to change", plan.why),
        ]
    )


def _show_unknown(task: Task, plan: FixPlan, name: str, as_json: bool) -> None:
    from finetuned.cli.errors import show_trouble

    why = f": {plan.why}" if plan.why else ""
    if task.pause_reason:
        why += "; it goes on by itself once there is room"
    show_trouble(
        f"no fix is known{why}",
        reason="NO_FIX",
        command=task_command("logs" if task.run else "show", name),
        as_json=as_json,
    )


def _undo(task: Task, changes: list[Change]) -> str:
    """The command that sets the old values back."""
    from finetuned.cli.output import value_text

    words: list[str] = []
    for change in changes:
        if change.old is None:
            words += ["--unset", change.field]
        else:
            words += ["--set", f"{change.field}={value_text(change.old)}"]
    return task_command("edit", task, *words) if words else ""
