"""A grpc.aio server that knows its answers: `python bare.py FOLDER SOCKET`, the limit of `api`.

It has the same generated classes for requests and answers as the daemon, and nothing between them:
an answer is a message that lies ready, and is serialized for each call. For calls that change
something it commits its answer to an SQLite database first, synced as the daemon's is.

FOLDER holds `answers.json`: by gRPC's name for the method, the names of the message classes and the
answer's bytes in hexadecimal. Once it serves, `ready.json` there has its pid and its TCP port.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory, symbol_database
from grpc import aio

# Registers the messages.
from grpc_health.v1 import health_pb2  # noqa: F401

from finetuned.v1 import (  # noqa: F401
    parameter_service_pb2,
    system_service_pb2,
    task_service_pb2,
    template_service_pb2,
)


async def _serve(folder: Path, socket: Path) -> None:
    database = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE kept (key INTEGER PRIMARY KEY, body BLOB)")
    services: dict[str, dict[str, Any]] = {}
    for method, said in json.loads((folder / "answers.json").read_text()).items():
        _, service, name = method.split("/")
        request, answer = message_class(said["request"]), message_class(said["answer"])
        kept = database if said["is_write"] else None
        behaviour = _behaviour(answer.FromString(bytes.fromhex(said["bytes"])), kept)
        services.setdefault(service, {})[name] = grpc.unary_unary_rpc_method_handler(
            behaviour,
            request_deserializer=request.FromString,
            response_serializer=answer.SerializeToString,
        )
    server = aio.server()
    for service, handlers in services.items():
        generic = grpc.method_handlers_generic_handler(service, handlers)
        server.add_generic_rpc_handlers((generic,))
    server.add_insecure_port(f"unix:{socket}")
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready = folder / "ready.tmp"
    ready.write_text(json.dumps({"pid": os.getpid(), "port": port}))
    ready.replace(folder / "ready.json")
    await server.wait_for_termination()


def _behaviour(answer: Any, kept: sqlite3.Connection | None) -> Callable[[Any, Any], Any]:
    async def read(request: Any, context: Any) -> Any:
        return answer

    async def write(request: Any, context: Any) -> Any:
        assert kept is not None
        kept.execute("INSERT INTO kept (body) VALUES (?)", (answer.SerializeToString(),))
        return answer

    return read if kept is None else write


def message_class(name: str) -> Any:
    """The generated class of a message."""
    found = symbol_database.Default().pool.FindMessageTypeByName(name)
    return message_factory.GetMessageClass(found)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
