"""What can be done with the chosen task. Errors of the daemon are shown, with every wrong field."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.text import Text
from textual import work
from textual.app import App

from finetuned._errors import FinetunedError, InternalError, InvalidArgument
from finetuned._watch import ENDED
from finetuned.cli.output import bytes_text, value_text
from finetuned.cli.settings import Settings, task_word, visible
from finetuned.cli.ui.dialogs import Ask, Choice
from finetuned.cli.ui.panes import CheckpointsPane, RunsPane
from finetuned.cli.ui.table import TaskTable
from finetuned.v1.task_pb2 import PauseReason, Task, TaskState

if TYPE_CHECKING:
    from finetuned._aio import AsyncClient
    from finetuned.cli.fix import FixPlan

T = TypeVar("T")

_ERROR_SECONDS = 12.0

WAITING = frozenset({TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_RUNNING})
"""The states in which a run is going on or waits for its device."""
UNDER_WAY = WAITING | {TaskState.TASK_STATE_PAUSED}
"""The states in which a run is not over."""
STARTABLE = ENDED | {TaskState.TASK_STATE_PENDING}


class Acts(App[int]):
    """The verbs of the view; each asks first where something would be lost."""

    client: AsyncClient
    options: Settings
    table: TaskTable
    checkpoints: CheckpointsPane
    runs: RunsPane

    async def attempt(self, call: Awaitable[T], done: Callable[[T], str] | str) -> T | None:
        """Await a call of the daemon and say what came of it; None where it failed."""
        try:
            answer = await call
        except FinetunedError as error:
            self.show_error(error)
            return None
        told = done if isinstance(done, str) else done(answer)
        if told:
            self.say(told)
        return answer

    def say(self, text: str) -> None:
        """Tell for a moment."""
        self.notify(visible(text), markup=False)

    def show_error(self, error: FinetunedError) -> None:
        """Tell what is wrong: every field, where fields are."""
        self.notify(
            visible(error_text(error)), severity="error", timeout=_ERROR_SECONDS, markup=False
        )

    @work(group="act")
    async def action_start(self) -> None:
        """Start it: anew, or on from a checkpoint."""
        task = self.table.current
        if task is None or not self.allows("start"):
            return
        resume = "anew"
        if task.last_checkpoint:
            answers = [
                ("newest", "Go on from the newest checkpoint"),
                ("best", "Go on from the best checkpoint"),
                ("anew", "Start anew"),
            ]
            resume = await self.push_screen_wait(Choice(f"Start {task_word(task)}", answers))
        if resume:
            await self._start(task, "" if resume == "anew" else resume)

    async def _start(self, task: Task, resume: str) -> None:
        def told(started: Task) -> str:
            place = started.queue_position
            return f"{task_word(task)} started" + (f", place {place} in the queue" if place else "")

        await self.attempt(self.client.start_task(task.name, resume=resume), told)

    @work(group="act")
    async def action_resume_from(self) -> None:
        """Start it on from the checkpoint under the cursor."""
        task = self.table.current
        checkpoint = self.checkpoints.chosen
        if task is None or checkpoint is None:
            return
        where = f"step {checkpoint.step} of run {checkpoint.run}"
        answers = [("start", f"Start {task_word(task)} on from here")]
        if await self.push_screen_wait(Choice(f"Checkpoint at {where}", answers)):
            await self._start(task, checkpoint.path)

    @work(group="act")
    async def action_pause(self) -> None:
        """Pause it, or let it go on."""
        task = self.table.current
        if task is None or not self.allows("pause"):
            return
        word = task_word(task)
        if task.state == TaskState.TASK_STATE_PAUSED:
            await self.attempt(self.client.resume_task(task.name), f"{word} goes on")
        else:
            await self.attempt(self.client.pause_task(task.name), f"{word} is pausing")

    @work(group="act")
    async def action_stop(self) -> None:
        """Stop it, with a checkpoint."""
        await self._stop(discard=False)

    @work(group="act")
    async def action_discard(self) -> None:
        """Stop it, without one."""
        await self._stop(discard=True)

    async def _stop(self, *, discard: bool) -> None:
        task = self.table.current
        if task is None or not self.allows("stop"):
            return
        word = task_word(task)
        what = "Stop it; what it has not saved is lost" if discard else "Save and stop it"
        if await self.push_screen_wait(Choice(f"Stop {word}?", [("stop", what)])):
            call = self.client.stop_task(task.name, discard=discard)
            await self.attempt(call, f"{word} is stopping")

    @work(group="act")
    async def action_probe(self) -> None:
        """Measure what a run would take."""
        task = self.table.current
        if task is not None and self.allows("probe"):
            call = self.client.start_probe(task.name)
            await self.attempt(call, f"{task_word(task)} is probed; events tell the result")

    @work(group="act")
    async def action_move_in_queue(self, by: int) -> None:
        """Another place in the queue."""
        task = self.table.current
        if task is None or not task.queue_position:
            return
        place = max(task.queue_position + by, 1)
        await self.attempt(
            self.client.move_task(task.name, place),
            lambda moved: f"{task_word(task)}: place {moved.queue_position}",
        )

    @work(group="act")
    async def action_delete(self) -> None:
        """Delete it, with or without outputs."""
        task = self.table.current
        if task is None or not self.allows("delete"):
            return
        word = task_word(task)
        answers = [
            ("keep", "Delete the task; its outputs stay"),
            ("outputs", "Delete the task and what its runs wrote"),
        ]
        answer = await self.push_screen_wait(Choice(f"Delete {word}?", answers))
        if answer:
            call = self.client.delete_task(
                task.name, etag=task.etag, delete_outputs=answer == "outputs"
            )
            await self.attempt(
                call,
                lambda gone: (
                    f"{word} deleted"
                    + (f", {bytes_text(gone.deleted_bytes)} freed" if gone.deleted_bytes else "")
                ),
            )

    @work(group="act")
    async def action_fix(self) -> None:
        """Show what would mend it, and change it."""
        task = self.table.current
        if task is None or not self.allows("fix"):
            return
        word = task_word(task)
        plan = await self.attempt(asyncio.to_thread(self._plan, task.name), "")
        if plan is None:
            return
        if not plan.is_known:
            self.say(f"no fix is known{': ' * bool(plan.why)}{plan.why}")
            return
        answers = [("start", "Change it like this, and start it"), ("change", "Only change it")]
        if not plan.changes:
            answers = [("start", "Start it")]
        answer = await self.push_screen_wait(Choice(f"Mend {word}", answers, _plan_text(plan)))
        if not answer:
            return
        await self.attempt(self._mend(task.name, plan, start=answer == "start"), f"{word} changed")

    def _plan(self, name: str) -> FixPlan:
        from finetuned.cli.fix import plan_fix

        with self.options.client() as client:
            return plan_fix(client, client.get_task(name))

    async def _mend(self, name: str, plan: FixPlan, *, start: bool) -> None:
        from finetuned._documents import sections

        task = await self.client.get_task(name)
        if plan.changes:
            if task.pause_reason == PauseReason.PAUSE_REASON_DISK_FULL:
                task = await self.client.stop_task(name)
            values = {one.field: "" if one.new is None else one.new for one in plan.changes}
            task = await self.client.update_task(name, sections(values), etag=task.etag)
        if start:
            await self.client.start_task(name, etag=task.etag)

    @work(group="act")
    async def action_create(self) -> None:
        """Create a task from a file."""
        answer = await self.push_screen_wait(
            Ask("Create a task from a file of parameters", "path of a YAML or JSON file")
        )
        if not answer:
            return
        task = await self.attempt(
            asyncio.to_thread(self._create, answer),
            lambda task: f"{task_word(task)} created; s starts it",
        )
        if task is not None:
            self.table.tasks[task.name] = task
            self.table.renew()
            self.table.choose(task.name)

    def _create(self, path: str) -> Task:
        from finetuned.cli.train import create, wish_of

        with self.options.client() as client:
            wish = wish_of(client, file=Path(path).expanduser())
            return create(client, self.options, wish, start=False)

    def action_copy(self) -> None:
        """Copy the path that is meant: of what is under the cursor, else of the newest output."""
        path = self._path()
        if path:
            self.copy_to_clipboard(path)
            self.say(f"copied: {path}")
        else:
            self.say("there is no path yet")

    def _path(self) -> str:
        focused = self.focused
        if isinstance(focused, CheckpointsPane) and focused.chosen is not None:
            return focused.chosen.path
        runs = self.runs
        if isinstance(focused, RunsPane) and runs.chosen is not None:
            return runs.chosen.output_dir
        task = self.table.current
        newest = runs.runs[0].output_dir if runs.runs else ""
        return (task.last_checkpoint if task is not None else "") or newest

    def allows(self, action: str) -> bool:
        """Whether it can be done with the chosen task as it stands."""
        task = self.table.current
        if action not in _STATES:
            return True
        return task is not None and task.state in _STATES[action]


_STATES = {
    "start": STARTABLE,
    "probe": STARTABLE,
    "delete": STARTABLE,
    "pause": UNDER_WAY,
    "stop": UNDER_WAY,
    "discard": UNDER_WAY,
    "move_in_queue": frozenset({TaskState.TASK_STATE_QUEUED}),
    "fix": frozenset(
        {
            TaskState.TASK_STATE_FAILED,
            TaskState.TASK_STATE_PAUSED,
            TaskState.TASK_STATE_PENDING,
        }
    ),
}


def error_text(error: FinetunedError) -> str:
    """The error with every wrong field."""
    if isinstance(error, InvalidArgument) and error.violations:
        return "\n".join(
            f"{wrong.field.removeprefix('task.').removeprefix('parameters.') or 'request'}: "
            f"{wrong.description}"
            for wrong in error.violations
        )
    if isinstance(error, InternalError):
        return f"{error.message} (request {error.request_id})"
    return error.message


def _plan_text(plan: FixPlan) -> Text:
    text = Text()
    for change in plan.changes:
        old = "(none)" if change.old is None else value_text(change.old)
        new = "(none)" if change.new is None else value_text(change.new)
        text.append(f"{change.field}  ", style="bold")
        text.append(visible(old), style="red").append(" → ")
        text.append(f"{visible(new)}\n", style="green")
    return text.append(visible(plan.why))
