"""A grpc.aio server of one unary and one stream method: `python bare_idle.py SOCKET`.

What `idle` is held against: generated stubs, a server, and nothing behind them. A stream sends a
snapshot, then a heartbeat as often as the daemon's do.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from finetuned.v1 import task_service_pb2, task_service_pb2_grpc

_HEARTBEAT_SECONDS = 5.0


class _Tasks(task_service_pb2_grpc.TaskServiceServicer):
    async def ListTasks(  # noqa: N802 - gRPC's name
        self, request: task_service_pb2.ListTasksRequest, context: Any
    ) -> task_service_pb2.ListTasksResponse:
        return task_service_pb2.ListTasksResponse()

    async def WatchTask(  # noqa: N802
        self, request: task_service_pb2.WatchTaskRequest, context: Any
    ) -> AsyncIterator[task_service_pb2.WatchTaskResponse]:
        yield task_service_pb2.WatchTaskResponse(snapshot=task_service_pb2.Snapshot())
        while True:
            await asyncio.sleep(_HEARTBEAT_SECONDS)
            yield task_service_pb2.WatchTaskResponse(heartbeat=task_service_pb2.Heartbeat())


async def _serve(socket: str) -> None:
    server = aio.server()
    task_service_pb2_grpc.add_TaskServiceServicer_to_server(_Tasks(), server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
