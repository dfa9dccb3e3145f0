"""Settings as files: generators of calls as in `_calls`, and the methods of both clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuned._caller import Caller
from finetuned._calls import TASK_SERVICE, Call, Steps, T, enum_number, resolve
from finetuned.v1 import task_service_pb2 as tasks
from finetuned.v1.task_service_pb2 import ConfigFormat, ExportTaskConfigResponse


def export_config(
    name: str, run: int, file_format: str | ConfigFormat.ValueType
) -> Steps[ExportTaskConfigResponse]:
    """ExportTaskConfig."""
    request = tasks.ExportTaskConfigRequest(
        run=run,
        format=enum_number(ConfigFormat, "CONFIG_FORMAT_", "format", file_format),
        name=(yield from resolve(name)),
    )
    answer: ExportTaskConfigResponse = yield Call(TASK_SERVICE, "ExportTaskConfig", request)
    return answer


class Exports(Caller):
    """What `Client` can export."""

    def export_config(
        self,
        name: str,
        *,
        run: int = 0,
        format: str | ConfigFormat.ValueType = "yaml",  # noqa: A002 - the rpc's own word
    ) -> ExportTaskConfigResponse:
        """The settings of a task as a file: its `content`, and a `file_name` for it.

        `left_out` names what a script trains without.

        Args:
            name: The task.
            run: Number of the run whose settings are meant. 0: the task's as they are now.
            format: `yaml`, which `finetunectl train` reads; or `script`, a Python program that
                trains alike with torch, transformers and peft alone.

        Raises:
            NotFound: No such task, or no such run.
            InvalidArgument: A script of a task that lacks its model, data or output folder.
        """
        return self._run(export_config(name, run, format))


class AsyncExports:
    """What `AsyncClient` can export."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def export_config(
        self,
        name: str,
        *,
        run: int = 0,
        format: str | ConfigFormat.ValueType = "yaml",  # noqa: A002 - the rpc's own word
    ) -> ExportTaskConfigResponse:
        return await self._run(export_config(name, run, format))

    export_config.__doc__ = Exports.export_config.__doc__
