"""Training in one call, and handles of tasks: the methods of both clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from finetuned._aio_handle import AsyncTaskHandle
from finetuned._caller import Caller
from finetuned._calls import Steps, T, TaskName, create_task, get_task
from finetuned._handle import TaskHandle
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.task_pb2 import Task, TrainingType

if TYPE_CHECKING:
    from finetuned._aio import AsyncClient
    from finetuned._client import Client


class Trains(Caller):
    """How `Client` trains."""

    def train(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        request_id: str = "",
        template: str = "",
        update_template: bool = False,
        wait: bool = False,
    ) -> TaskHandle:
        """Create a task and start it, in one step.

        >>> data = {"train_file": "chats.jsonl", "model_path": "model", "output_dir": "out"}
        >>> client.train("sft", {"data": data}, task_id="farewells", device="cpu", wait=True)
        <TaskHandle 'farewells' 'sft_...' completed (finished) 3/3 steps loss 0.3333>

        Arguments and errors are those of `create_task`, and `wait`.

        Args:
            training_type: `sft` or `pretrain`.
            parameters: Section to field to value.
            display_name: What a user sees; unique. Empty: made from type and time.
            device: `cpu`, `cuda:0` ... Empty: the first GPU if there is one, else the CPU.
            task_id: The id within `tasks/{task_id}`. Empty: the daemon chooses.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.
            template: Any name of a template, for absent parameters.
            update_template: Write the task's parameters into that custom template too.
            wait: Return when the run has ended; without it, at once.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            RunFailed: The run has failed, and `wait` is set.
        """
        task = self._run(
            create_task(
                training_type,
                parameters,
                display_name,
                device,
                task_id,
                True,
                request_id,
                False,
                template,
                update_template,
            )
        )
        handle = self._handle(task)
        return handle.wait() if wait else handle

    def task(self, name: TaskName) -> TaskHandle:
        """A task to work with: its attributes, and verbs such as `start`, `wait` and `metrics`.

        >>> client.task("Greetings")
        <TaskHandle 'greetings' 'Greetings' pending>

        Args:
            name: Any name of the task, or a handle; or the `Task` itself, which is not asked for
                again.

        Raises:
            NotFound: No such task.
        """
        return self._handle(name if isinstance(name, Task) else self._run(get_task(name)))

    def _handle(self, task: Task) -> TaskHandle:
        return TaskHandle(cast("Client", self), task)


class AsyncTrains:
    """How `AsyncClient` trains."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def train(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        request_id: str = "",
        template: str = "",
        update_template: bool = False,
        wait: bool = False,
    ) -> AsyncTaskHandle:
        task = await self._run(
            create_task(
                training_type,
                parameters,
                display_name,
                device,
                task_id,
                True,
                request_id,
                False,
                template,
                update_template,
            )
        )
        handle = self._handle(task)
        return await handle.wait() if wait else handle

    async def task(self, name: TaskName) -> AsyncTaskHandle:
        return self._handle(name if isinstance(name, Task) else await self._run(get_task(name)))

    def _handle(self, task: Task) -> AsyncTaskHandle:
        return AsyncTaskHandle(cast("AsyncClient", self), task)

    train.__doc__ = Trains.train.__doc__
    task.__doc__ = Trains.task.__doc__
