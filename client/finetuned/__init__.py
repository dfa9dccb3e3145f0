"""Client of the fine-tuning daemon `finetuned`.

    >>> import finetuned
    >>> client = finetuned.Client(start_daemon=True)
    >>> data = {"train_file": "chats.jsonl", "model_path": "model", "output_dir": "out"}
    >>> task = client.train("sft", {"data": data}, device="cpu")
    >>> task.wait()
    <TaskHandle 'sft-...' 'sft_...' completed (finished) 3/3 steps loss 0.3333>
    >>> task.metrics().to_pandas()["loss"].min().round(4)
    np.float64(0.3333)

`AsyncClient` has the same methods for asyncio. Messages such as `Task` and `Event` are those of
`finetuned.v1`. Names are loaded on first use: `import finetuned` alone takes a millisecond and
does not import grpc.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finetuned._version import __version__

if TYPE_CHECKING:
    from finetuned._aio import AsyncClient as AsyncClient
    from finetuned._aio_handle import AsyncTaskHandle as AsyncTaskHandle
    from finetuned._client import Client as Client
    from finetuned._documents import template_document as template_document
    from finetuned._errors import Aborted as Aborted
    from finetuned._errors import AlreadyExists as AlreadyExists
    from finetuned._errors import DaemonNotStarted as DaemonNotStarted
    from finetuned._errors import DaemonUnavailable as DaemonUnavailable
    from finetuned._errors import DeadlineExceeded as DeadlineExceeded
    from finetuned._errors import EventsLost as EventsLost
    from finetuned._errors import FailedPrecondition as FailedPrecondition
    from finetuned._errors import FieldViolation as FieldViolation
    from finetuned._errors import FinetunedError as FinetunedError
    from finetuned._errors import InternalError as InternalError
    from finetuned._errors import InvalidArgument as InvalidArgument
    from finetuned._errors import NotFound as NotFound
    from finetuned._errors import OutOfRange as OutOfRange
    from finetuned._errors import PermissionDenied as PermissionDenied
    from finetuned._errors import PreconditionViolation as PreconditionViolation
    from finetuned._errors import ProbeFailed as ProbeFailed
    from finetuned._errors import ResourceExhausted as ResourceExhausted
    from finetuned._errors import RunFailed as RunFailed
    from finetuned._errors import Unauthenticated as Unauthenticated
    from finetuned._errors import Unimplemented as Unimplemented
    from finetuned._handle import TaskHandle as TaskHandle
    from finetuned._launch import start_daemon as start_daemon
    from finetuned._logs import LogEntry as LogEntry
    from finetuned._metrics import Metrics as Metrics
    from finetuned._metrics import Series as Series
    from finetuned._overview import TaskDeleted as TaskDeleted
    from finetuned._overview import TasksSynced as TasksSynced
    from finetuned._protos import proto_dir as proto_dir
    from finetuned._tls import TLS as TLS
    from finetuned._violations import ParameterViolation as ParameterViolation
    from finetuned._watch import ConnectionLost as ConnectionLost
    from finetuned._watch import LogReplaced as LogReplaced
    from finetuned._watch import WatchItem as WatchItem
    from finetuned.v1.dataset_service_pb2 import BadLinePolicy as BadLinePolicy
    from finetuned.v1.dataset_service_pb2 import DatasetReport as DatasetReport
    from finetuned.v1.dataset_service_pb2 import InspectionProgress as InspectionProgress
    from finetuned.v1.event_pb2 import Event as Event
    from finetuned.v1.event_pb2 import ProbeReport as ProbeReport
    from finetuned.v1.parameter_service_pb2 import EstimateTaskResponse as EstimateTaskResponse
    from finetuned.v1.parameter_service_pb2 import (
        GetParameterSchemaResponse as GetParameterSchemaResponse,
    )
    from finetuned.v1.parameters_pb2 import Parameters as Parameters
    from finetuned.v1.system_service_pb2 import CheckEnvironmentResponse as CheckEnvironmentResponse
    from finetuned.v1.system_service_pb2 import Device as Device
    from finetuned.v1.system_service_pb2 import GetQuotaResponse as GetQuotaResponse
    from finetuned.v1.system_service_pb2 import GetSystemInfoResponse as GetSystemInfoResponse
    from finetuned.v1.system_service_pb2 import WatchDevicesResponse as WatchDevicesResponse
    from finetuned.v1.task_pb2 import Checkpoint as Checkpoint
    from finetuned.v1.task_pb2 import EndReason as EndReason
    from finetuned.v1.task_pb2 import Run as Run
    from finetuned.v1.task_pb2 import RunPhase as RunPhase
    from finetuned.v1.task_pb2 import Task as Task
    from finetuned.v1.task_pb2 import TaskState as TaskState
    from finetuned.v1.task_pb2 import TrainingType as TrainingType
    from finetuned.v1.task_service_pb2 import DeleteCheckpointResponse as DeleteCheckpointResponse
    from finetuned.v1.task_service_pb2 import DeleteTaskResponse as DeleteTaskResponse
    from finetuned.v1.task_service_pb2 import Snapshot as Snapshot
    from finetuned.v1.template_service_pb2 import Template as Template

__all__ = [
    "TLS",
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncTaskHandle",
    "BadLinePolicy",
    "CheckEnvironmentResponse",
    "Checkpoint",
    "Client",
    "ConnectionLost",
    "DaemonNotStarted",
    "DaemonUnavailable",
    "DatasetReport",
    "DeadlineExceeded",
    "DeleteCheckpointResponse",
    "DeleteTaskResponse",
    "Device",
    "EndReason",
    "EstimateTaskResponse",
    "Event",
    "EventsLost",
    "FailedPrecondition",
    "FieldViolation",
    "FinetunedError",
    "GetParameterSchemaResponse",
    "GetQuotaResponse",
    "GetSystemInfoResponse",
    "InspectionProgress",
    "InternalError",
    "InvalidArgument",
    "LogEntry",
    "LogReplaced",
    "Metrics",
    "NotFound",
    "OutOfRange",
    "ParameterViolation",
    "Parameters",
    "PermissionDenied",
    "PreconditionViolation",
    "ProbeFailed",
    "ProbeReport",
    "ResourceExhausted",
    "Run",
    "RunFailed",
    "RunPhase",
    "Series",
    "Snapshot",
    "Task",
    "TaskDeleted",
    "TaskHandle",
    "TaskState",
    "TasksSynced",
    "Template",
    "TrainingType",
    "Unauthenticated",
    "Unimplemented",
    "WatchDevicesResponse",
    "WatchItem",
    "__version__",
    "proto_dir",
    "start_daemon",
    "template_document",
]

# Where a name lives; what is not here is an error class.
_HOMES = {
    "AsyncClient": "_aio",
    "AsyncTaskHandle": "_aio_handle",
    "TaskHandle": "_handle",
    "LogEntry": "_logs",
    "Client": "_client",
    "ConnectionLost": "_watch",
    "LogReplaced": "_watch",
    "Metrics": "_metrics",
    "Series": "_metrics",
    "TaskDeleted": "_overview",
    "TasksSynced": "_overview",
    "WatchDevicesResponse": "v1.system_service_pb2",
    "WatchItem": "_watch",
    "TLS": "_tls",
    "proto_dir": "_protos",
    "start_daemon": "_launch",
    "Event": "v1.event_pb2",
    "ProbeReport": "v1.event_pb2",
    "Parameters": "v1.parameters_pb2",
    "Device": "v1.system_service_pb2",
    "GetSystemInfoResponse": "v1.system_service_pb2",
    "Checkpoint": "v1.task_pb2",
    "EndReason": "v1.task_pb2",
    "Run": "v1.task_pb2",
    "RunPhase": "v1.task_pb2",
    "Task": "v1.task_pb2",
    "TaskState": "v1.task_pb2",
    "TrainingType": "v1.task_pb2",
    "ParameterViolation": "_violations",
    "BadLinePolicy": "v1.dataset_service_pb2",
    "DatasetReport": "v1.dataset_service_pb2",
    "InspectionProgress": "v1.dataset_service_pb2",
    "EstimateTaskResponse": "v1.parameter_service_pb2",
    "GetParameterSchemaResponse": "v1.parameter_service_pb2",
    "CheckEnvironmentResponse": "v1.system_service_pb2",
    "GetQuotaResponse": "v1.system_service_pb2",
    "DeleteCheckpointResponse": "v1.task_service_pb2",
    "DeleteTaskResponse": "v1.task_service_pb2",
    "Template": "v1.template_service_pb2",
    "template_document": "_documents",
    "Snapshot": "v1.task_service_pb2",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'finetuned' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"finetuned.{_HOMES.get(name, '_errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
