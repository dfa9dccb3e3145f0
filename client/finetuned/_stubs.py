"""The services' stubs on one channel, for both clients."""

from __future__ import annotations

from typing import Any

from finetuned import _calls
from finetuned.v1.dataset_service_pb2_grpc import DatasetServiceStub
from finetuned.v1.parameter_service_pb2_grpc import ParameterServiceStub
from finetuned.v1.system_service_pb2 import GetSystemInfoRequest
from finetuned.v1.system_service_pb2_grpc import SystemServiceStub
from finetuned.v1.task_service_pb2_grpc import TaskServiceStub
from finetuned.v1.template_service_pb2_grpc import TemplateServiceStub


class HealthStub:
    """`grpc.health.v1.Health`, of which the check of the whole server is all that is needed."""

    def __init__(self, channel: Any) -> None:
        # An empty HealthCheckRequest asks for the server as a whole; an empty message of any type
        # has the same bytes: none.
        self.Check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=GetSystemInfoRequest.SerializeToString,
            response_deserializer=bytes,
        )


def stubs(channel: Any) -> dict[str, Any]:
    """Each service's stub by its name; the channel is one of `grpc` or of `grpc.aio`."""
    return {
        _calls.TASK_SERVICE: TaskServiceStub(channel),
        _calls.SYSTEM_SERVICE: SystemServiceStub(channel),
        _calls.PARAMETER_SERVICE: ParameterServiceStub(channel),
        _calls.TEMPLATE_SERVICE: TemplateServiceStub(channel),
        _calls.DATASET_SERVICE: DatasetServiceStub(channel),
        _calls.HEALTH_SERVICE: HealthStub(channel),
    }
