"""The queue of each device, and the commands that change it: pause, resume, move."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import (
    DetachOption,
    Exit,
    JsonOption,
    TaskArgument,
    WatchOption,
    WatchRunOption,
    check_detach,
    say,
    settings,
    task_command,
)

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.v1.task_pb2 import Task


def queue(ctx: typer.Context, watch: WatchOption = False, as_json: JsonOption = False) -> None:
    """Show what runs on each device and what waits for it, in order; and what is paused."""
    from finetuned.cli.output import print_json_value, print_table, to_dict
    from finetuned.cli.rows import QUEUE_COLUMNS, QUEUE_STATES, queue_row

    with settings(ctx).client() as client:
        if watch:
            from finetuned.cli.board import QueueBoard, watch_board

            items = client.watch_tasks(QUEUE_STATES)
            raise typer.Exit(watch_board(items, QueueBoard(client), as_json=as_json))
        rows = _queue(client)
    if as_json:
        devices: dict[str, list[Task]] = {}
        for device, task in rows:
            devices.setdefault(device, []).append(task)
        print_json_value(
            [
                {"device": device, "tasks": [to_dict(task) for task in tasks]}
                for device, tasks in devices.items()
            ]
        )
        return
    if not rows:
        say("nothing runs, waits or is paused")
        return
    print_table(QUEUE_COLUMNS, (queue_row(device, task) for device, task in rows))


def pause(
    ctx: typer.Context,
    name: TaskArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the device is free.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Pause a task: its run saves a checkpoint and frees its device, and goes on later."""
    from finetuned.cli.output import print_json, state_word
    from finetuned.v1.task_pb2 import TaskState

    with settings(ctx).client() as client:
        task = client.pause_task(name)
        if wait:
            task = _until_idle(client, task)
    if as_json:
        print_json(task)
    elif task.state == TaskState.TASK_STATE_RUNNING:
        print(f"{task.display_name} pausing")
        say(f"watch it: {task_command('watch', task)}")
    else:
        print(f"{task.display_name} {state_word(task.state)}")
        if task.last_checkpoint:
            say(f"last checkpoint: {task.last_checkpoint}")
    if task.state == TaskState.TASK_STATE_PAUSED and not as_json:
        say(f"let it go on: {task_command('resume', task)}")
    if task.state in (TaskState.TASK_STATE_FAILED, TaskState.TASK_STATE_STOPPED):
        raise typer.Exit(Exit.FAILED if task.state == TaskState.TASK_STATE_FAILED else Exit.STOPPED)


def resume(
    ctx: typer.Context,
    name: TaskArgument,
    watch: WatchRunOption = False,
    detach: DetachOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let a paused task go on from its newest whole checkpoint. It waits while its device is busy.

    Number, parameters and output folder of the run stay what they are.
    """
    from finetuned.cli.follow import follow
    from finetuned.cli.output import print_json

    check_detach(watch, detach)
    with settings(ctx).client() as client:
        before = client.get_task(name)
        task = client.resume_task(before.name)
        if watch:
            raise typer.Exit(follow(client, task, as_json=as_json, after_seq=before.last_seq))
    if as_json:
        print_json(task)
        return
    print(_standing(task))
    say(f"watch it: {task_command('watch', task)}")


def move(
    ctx: typer.Context,
    name: TaskArgument,
    position: Annotated[
        int,
        typer.Argument(metavar="PLACE", help="From 1, the next to run. Beyond the end: last."),
    ],
    as_json: JsonOption = False,
) -> None:
    """Move a queued task to another place in the queue of its device."""
    from finetuned.cli.output import print_json

    with settings(ctx).client() as client:
        task = client.move_task(name, position)
    if as_json:
        print_json(task)
        return
    print(_standing(task))


def _standing(task: Task) -> str:
    from finetuned.cli.output import state_word

    place = f", place {task.queue_position}" if task.queue_position else ""
    return f"{task.display_name} {state_word(task.state)}{place}"


def _queue(client: Client) -> list[tuple[str, Task]]:
    """Devices with their tasks: what runs, what waits by its place, then what is paused."""
    from finetuned.cli.output import state_word
    from finetuned.cli.rows import QUEUE_STATES, device_of, place_of

    tasks = list(client.list_tasks(QUEUE_STATES))
    rows = [(device_of(client, task), task) for task in tasks]
    devices = [device.id for device in client.list_devices()]
    waiting = [row for row in rows if state_word(row[1].state) in QUEUE_STATES]
    return sorted(waiting, key=lambda row: place_of(row[0], row[1], devices))


def _until_idle(client: Client, task: Task) -> Task:
    """The task once it is paused, or has ended otherwise."""
    from finetuned._watch import ENDED
    from finetuned.v1.event_pb2 import Event
    from finetuned.v1.task_pb2 import TaskState
    from finetuned.v1.task_service_pb2 import Snapshot

    is_idle = {TaskState.TASK_STATE_PAUSED, *ENDED}
    if task.state in is_idle:
        return task
    for item in client.watch(task.name, task.last_seq):
        if isinstance(item, Snapshot) and item.task.state in is_idle:
            break
        if isinstance(item, Event) and item.state_change.new_state in is_idle:
            break
    return client.get_task(task.name)
