"""The standard health check of gRPC, by hand: its package is none of a thin client's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetuned._caller import Caller
from finetuned._calls import HEALTH_SERVICE, Call, Steps, T
from finetuned._errors import DaemonUnavailable, DeadlineExceeded
from finetuned.v1.system_service_pb2 import GetSystemInfoRequest

# HealthCheckResponse{status: SERVING}: field 1, a varint of 1.
_SERVING = b"\x08\x01"


def is_serving() -> Steps[bool]:
    """Check of grpc.health.v1. Not repeated: an absent daemon is an answer."""
    try:
        answer: bytes = yield Call(
            HEALTH_SERVICE, "Check", GetSystemInfoRequest(), repeatable=False, may_start=False
        )
    except (DaemonUnavailable, DeadlineExceeded):
        return False
    return answer == _SERVING


class Healths(Caller):
    """How `Client` asks whether anybody is there."""

    def is_serving(self) -> bool:
        """Whether the daemon is there and takes calls, by the standard health check of gRPC.

        It is asked once, and never started: that nobody answers is an answer. `check_environment`
        tells whether it can train.

        Raises:
            Unauthenticated: It is there, and takes no calls with this token.
        """
        return self._run(is_serving())


class AsyncHealths:
    """How `AsyncClient` asks whether anybody is there."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def is_serving(self) -> bool:
        return await self._run(is_serving())

    is_serving.__doc__ = Healths.is_serving.__doc__
