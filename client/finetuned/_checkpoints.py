"""Checkpoints of tasks: generators of calls as in `_calls`, and the methods of both clients."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from finetuned._caller import Caller
from finetuned._calls import READING_SECONDS, TASK_SERVICE, Call, Steps, T, resolve
from finetuned._checks import check_texts
from finetuned.v1 import task_service_pb2 as tasks
from finetuned.v1.task_pb2 import Checkpoint, ResumeChoice
from finetuned.v1.task_service_pb2 import DeleteCheckpointResponse

_CHOICES = {
    "newest": ResumeChoice.RESUME_CHOICE_NEWEST_CHECKPOINT,
    "best": ResumeChoice.RESUME_CHOICE_BEST_CHECKPOINT,
}


def resume_choice(
    resume: str | os.PathLike[str],
) -> tuple[ResumeChoice.ValueType, str]:
    """The choice that `newest` or `best` is; else unspecified, and the folder."""
    folder = os.fspath(resume)
    check_texts(resume=folder)
    if folder in _CHOICES:
        return _CHOICES[folder], ""
    return ResumeChoice.RESUME_CHOICE_UNSPECIFIED, folder


def list_checkpoints_page(
    name: str, verify: bool, page_token: str
) -> Steps[tasks.ListCheckpointsResponse]:
    """One page of ListCheckpoints; `name` is a resource name."""
    request = tasks.ListCheckpointsRequest(parent=name, verify=verify, page_token=page_token)
    page: tasks.ListCheckpointsResponse = yield Call(
        TASK_SERVICE, "ListCheckpoints", request, timeout=READING_SECONDS
    )
    return page


def delete_checkpoint(name: str) -> Steps[DeleteCheckpointResponse]:
    """DeleteCheckpoint. A repeat would be NOT_FOUND."""
    check_texts(name=name)
    request = tasks.DeleteCheckpointRequest(name=name)
    answer: DeleteCheckpointResponse = yield Call(
        TASK_SERVICE, "DeleteCheckpoint", request, repeatable=False, timeout=READING_SECONDS
    )
    return answer


class Checkpoints(Caller):
    """What `Client` does with checkpoints."""

    def list_checkpoints(self, name: str, *, verify: bool = False) -> Iterator[Checkpoint]:
        """The checkpoints of a task that still stand, newest first, page by page.

        One that is not whole says why in `problem`, and is never used.

        Args:
            name: The task.
            verify: Compare the hashes of all files, which takes as long as reading them; else
                names and sizes.
        """
        name = self._run(resolve(name))
        token = ""
        while True:
            page = self._run(list_checkpoints_page(name, verify, token))
            yield from page.checkpoints
            token = page.next_page_token
            if not token:
                return

    def delete_checkpoint(self, name: str) -> DeleteCheckpointResponse:
        """Delete a checkpoint: the files that its run recorded writing, and no others.

        Args:
            name: The checkpoint's `name`.

        Raises:
            NotFound: There is none of that name.
            FailedPrecondition: Its task has a run that is not over, or another goes on from it.
        """
        return self._run(delete_checkpoint(name))


class AsyncCheckpoints:
    """What `AsyncClient` does with checkpoints."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def list_checkpoints(
        self, name: str, *, verify: bool = False
    ) -> AsyncIterator[Checkpoint]:
        name = await self._run(resolve(name))
        token = ""
        while True:
            page = await self._run(list_checkpoints_page(name, verify, token))
            for checkpoint in page.checkpoints:
                yield checkpoint
            token = page.next_page_token
            if not token:
                return

    async def delete_checkpoint(self, name: str) -> DeleteCheckpointResponse:
        return await self._run(delete_checkpoint(name))

    list_checkpoints.__doc__ = Checkpoints.list_checkpoints.__doc__
    delete_checkpoint.__doc__ = Checkpoints.delete_checkpoint.__doc__
