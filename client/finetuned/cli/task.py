"""`finetunectl task`: tasks, one by one or all."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.checkpoint import (
    ResumeOption,
    checkpoints,
    delete_checkpoint,
    plan_resume,
    resume_of,
)
from finetuned.cli.edit import edit
from finetuned.cli.export import export_config
from finetuned.cli.fix import fix
from finetuned.cli.group import Commands
from finetuned.cli.queue import move, pause, resume
from finetuned.cli.settings import (
    DetachOption,
    Exit,
    JsonOption,
    NewestTaskArgument,
    NotStarted,
    TaskArgument,
    WatchOption,
    WatchRunOption,
    check_detach,
    confirm,
    one_file,
    say,
    settings,
    task_command,
    visible,
)
from finetuned.cli.train import (
    DataOption,
    DeviceOption,
    FileOption,
    LikeOption,
    ModelOption,
    NameOption,
    OutputOption,
    SetOption,
    TemplateOption,
    TypeOption,
    create,
    show_created,
    wish_of,
)

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.v1.event_pb2 import Event
    from finetuned.v1.task_pb2 import Run, Task

app = typer.Typer(cls=Commands, help="Tasks: what to train and how, and where it stands.")
_LEVELS = ("debug", "info", "warning", "error")


def create_task(
    ctx: typer.Context,
    file_argument: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The same as --file FILE; - is stdin.")
    ] = None,
    training_type: TypeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    file: FileOption = None,
    like: LikeOption = None,
    template: TemplateOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a task without starting it. Options as for `finetunectl train`."""
    file = one_file(file_argument, file)
    with settings(ctx).client() as client:
        wish = wish_of(
            client,
            training_type=training_type,
            model=model,
            data=data,
            output=output,
            name=name,
            device=device,
            file=file,
            like=like,
            template=template,
            assignments=assignments,
        )
        show_created(create(client, settings(ctx), wish, start=False), as_json)


def list_tasks(
    ctx: typer.Context,
    states: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="STATE", help="Only tasks in this state; again for more."),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=0, help="Only the newest N. [all]")
    ] = 0,
    names: Annotated[
        bool, typer.Option("-q", "--quiet", help="Names alone, one a line, for scripts.")
    ] = False,
    watch: WatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """List tasks, newest first."""
    from finetuned.cli.output import print_json, print_table
    from finetuned.cli.rows import TASK_COLUMNS, task_row

    if watch and names:
        raise typer.BadParameter("goes without --quiet", param_hint="--watch")
    with settings(ctx).client() as client:
        if watch:
            from finetuned.cli.board import TaskBoard, watch_board

            items = client.watch_tasks(states or ())
            raise typer.Exit(watch_board(items, TaskBoard(limit), as_json=as_json))
        tasks = list(islice(client.list_tasks(states or ()), limit or None))
    if as_json:
        print_json(tasks)
    elif names:
        for task in tasks:
            print(visible(task.display_name))
    elif not tasks:
        say("no tasks; make one: finetunectl train --model DIR --data FILE")
    else:
        print_table(TASK_COLUMNS, map(task_row, tasks))


def show(ctx: typer.Context, name: TaskArgument, as_json: JsonOption = False) -> None:
    """Show a task with its parameters."""
    from finetuned.cli.output import print_json

    with settings(ctx).client() as client:
        task = client.get_task(name)
        runs = [] if as_json else list(client.list_runs(task.name))
        result = "" if as_json else _result(client, task, runs)
    if as_json:
        print_json(task)
    else:
        _show_task(task, runs, result)


def start(
    ctx: typer.Context,
    name: TaskArgument,
    resume: ResumeOption = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="With --resume: start nothing, tell what it would be.")
    ] = False,
    watch: WatchRunOption = False,
    detach: DetachOption = False,
    as_json: JsonOption = False,
) -> None:
    """Start a run of a task. It waits while its device is busy."""
    from finetuned.cli.follow import follow
    from finetuned.cli.output import print_json, state_word

    check_detach(watch, detach)
    if resume is not None and not resume.strip():
        raise typer.BadParameter("newest, best, a step or a folder", param_hint="--resume")
    with settings(ctx).client() as client:
        before = client.get_task(name)
        source = resume_of(client, before, resume) if resume is not None else ""
        if plan:
            plan_resume(client, before, source, as_json)
            return
        task = client.start_task(before.name, resume=source)
        if watch:
            raise typer.Exit(follow(client, task, as_json=as_json, after_seq=before.last_seq))
    if as_json:
        print_json(task)
        return
    place = f", place {task.queue_position}" if task.queue_position else ""
    print(f"{task.display_name} {state_word(task.state)}{place}")


def stop(
    ctx: typer.Context,
    name: TaskArgument,
    discard: Annotated[bool, typer.Option("--discard", help="Save no checkpoint.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the run has ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Stop a task's run, with a checkpoint unless --discard is given."""
    from finetuned._errors import FailedPrecondition
    from finetuned._watch import ENDED
    from finetuned.cli.output import print_json, state_word

    with settings(ctx).client() as client:
        try:
            task = client.stop_task(name, discard=discard)
        except FailedPrecondition as error:
            if not wait or error.reason != "TASK_NOT_ACTIVE":
                raise
            task = client.get_task(name)
            if task.state not in ENDED:
                raise
            # It has ended by itself meanwhile: what was waited for is so.
        else:
            if wait:
                task = client.wait(task.name)
    if as_json:
        print_json(task)
        return
    if wait or task.end_time.seconds:
        print(f"{task.display_name} {state_word(task.state)}")
        if task.last_checkpoint:
            say(f"last checkpoint: {task.last_checkpoint}")
    else:
        print(f"{task.display_name} stopping")
        say(f"watch it: {task_command('watch', task)}")


def delete(
    ctx: typer.Context,
    name: TaskArgument,
    outputs: Annotated[
        bool,
        typer.Option("--outputs", help="Delete what its runs wrote into the output folder too."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a task, its runs and its log. Files in the output folder stay unless --outputs.

    Where it asks, it asks for these files separately.
    """
    from finetuned.cli.output import bytes_text, print_json

    with settings(ctx).client() as client:
        task = client.get_task(name)
        if not yes:
            command = task_command("delete", name, "--yes", *(["--outputs"] if outputs else []))
            if not confirm(f"Delete task {task.display_name}?", command):
                say("nothing was deleted")
                raise typer.Exit(Exit.FAILED)
            folders = {run.output_dir for run in client.list_runs(task.name) if run.output_dir}
            if folders and not outputs:
                say("its runs have written into:")
                for folder in sorted(folders):
                    say(f"  {folder}")
                outputs = confirm("Delete what they wrote there too?", command)
        answer = client.delete_task(task.name, etag=task.etag, delete_outputs=outputs)
    if as_json:
        print_json(answer)
        return
    print(f"{task.display_name} deleted")
    if answer.deleted_files:
        print(f"{answer.deleted_files} output files deleted, {bytes_text(answer.deleted_bytes)}")
    if answer.left_output_dirs:
        say("still there:")
        for folder in answer.left_output_dirs:
            say(f"  {folder}")


def watch(ctx: typer.Context, name: NewestTaskArgument = None, as_json: JsonOption = False) -> None:
    """Watch a task to the end of its run. Ctrl-C ends the watching, not the run."""
    from finetuned.cli.follow import follow
    from finetuned.v1.task_pb2 import TaskState

    with settings(ctx).client() as client:
        task = client.get_task(name) if name is not None else _newest(client)
        if task.state == TaskState.TASK_STATE_PENDING:
            say(f"not started yet; start it: {task_command('start', task)}")
        raise typer.Exit(follow(client, task, as_json=as_json))


def _newest(client: Client) -> Task:
    """The newest task that runs; else that waits or is paused; else whose run has ended.

    Raises:
        NotFound: There is none: what has never been started would be waited for in vain.
    """
    from finetuned._errors import NotFound

    for states in (("running",), ("queued", "paused"), ("completed", "stopped", "failed")):
        task = next(iter(client.list_tasks(states)), None)
        if task is not None:
            return task
    pending = next(iter(client.list_tasks()), None)
    if pending is None:
        raise NotFound("there is no task to watch", reason="NO_TASKS")
    raise NotStarted("no task has been started yet", task_command("start", pending, "--watch"))


def logs(
    ctx: typer.Context,
    name: TaskArgument,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the run has ended.")
    ] = False,
    level: Annotated[
        str, typer.Option("--level", metavar="LEVEL", help=f"At least {', '.join(_LEVELS)}.")
    ] = "info",
    as_json: JsonOption = False,
) -> None:
    """Show the log of a task: all its runs, oldest line first."""
    from finetuned.v1.event_pb2 import Event

    if level not in _LEVELS:
        raise typer.BadParameter(f"one of {', '.join(_LEVELS)}", param_hint="--level")
    shown = _LEVELS[_LEVELS.index(level) :]
    with settings(ctx).client() as client:
        if follow:
            for item in client.watch(name, until_end=True):
                if isinstance(item, Event):
                    _show_log(item, shown, as_json)
        else:
            for event in client.list_events(name):
                _show_log(event, shown, as_json)


def _show_log(event: Event, levels: tuple[str, ...], as_json: bool) -> None:
    from finetuned.cli.output import local, print_json_line, to_dict

    if event.WhichOneof("payload") != "log_line":
        return
    line = event.log_line
    # A level that a later daemon may send is shown rather than lost.
    if line.level in _LEVELS and line.level not in levels:
        return
    if as_json:
        print_json_line({"event": to_dict(event)})
    else:
        moment = f"{local(event.time):%Y-%m-%d %H:%M:%S}"
        text = visible(f"{line.logger}: {line.text}")
        print(f"{moment} {line.level.upper():7} {text}", flush=True)


def _result(client: Client, task: Task, runs: list[Run]) -> str:
    """Folder of the model that the last run has made; empty where it made none."""
    from finetuned.v1.task_pb2 import TaskState

    if not runs or task.state != TaskState.TASK_STATE_COMPLETED:
        return ""
    # It is one of the run's last events.
    events = client.list_events(task.name, max(task.last_seq - 20, 0), run=runs[0].number)
    paths = [e.result.output_path for e in events if e.WhichOneof("payload") == "result"]
    return paths[-1] if paths else ""


def _show_task(task: Task, runs: list[Run], result: str) -> None:
    from finetuned._parameters import flatten
    from finetuned.cli.output import (
        phase_word,
        print_pairs,
        print_table,
        progress_text,
        reason_word,
        state_text,
        time_text,
        type_word,
        value_text,
    )
    from finetuned.cli.rows import pause_text

    print_pairs(
        [
            ("name", task.display_name),
            ("id", task.name.removeprefix("tasks/")),
            ("type", type_word(task.training_type)),
            ("state", state_text(task.state).append(pause_text(task))),
            ("phase", phase_word(task.phase) if task.phase else ""),
            ("queue", f"place {task.queue_position}" if task.queue_position else ""),
            ("end", reason_word(task.end_reason)),
            ("why", task.end_message),
            ("steps", progress_text(task)),
            ("loss", f"{task.progress.loss:.4f}" if task.progress.HasField("loss") else ""),
            ("template", task.template.removeprefix("templates/")),
            ("device", task.device or "(the first GPU, or the CPU)"),
            ("result", result),
            ("checkpoint", task.last_checkpoint),
            ("created", time_text(task.create_time)),
            ("started", time_text(task.start_time)),
            ("ended", time_text(task.end_time)),
        ]
    )
    print("\nparameters")
    print_pairs(
        (f"  {path}", value_text(value)) for path, value in flatten(task.parameters).items()
    )
    if len(runs) > 1:
        print("\nruns")
        print_table(
            ("run", "state", "end", "device", "steps", "started", "ended"),
            (
                (
                    str(run.number),
                    state_text(run.state),
                    reason_word(run.end_reason),
                    run.device,
                    str(run.progress.step or ""),
                    time_text(run.start_time),
                    time_text(run.end_time),
                )
                for run in runs
            ),
        )


# In the order of their use, as the help lists them.
app.command("create")(create_task)
app.command("list")(list_tasks)
app.command("show")(show)
app.command("start")(start)
app.command("watch")(watch)
app.command("logs")(logs)
app.command("stop")(stop)
app.command("pause")(pause)
app.command("resume")(resume)
app.command("move")(move)
app.command("edit")(edit)
app.command("fix")(fix)
app.command("checkpoints")(checkpoints)
app.command("delete-checkpoint")(delete_checkpoint)
app.command("export-config")(export_config)
app.command("delete")(delete)
