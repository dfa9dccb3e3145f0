"""ParameterService: decode, call, encode."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import Any

from grpc import aio

from finetuned.v1 import parameter_service_pb2, parameter_service_pb2_grpc
from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.manager import Manager
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.schema import build_schema
from finetuned_daemon.planner import Planner
from finetuned_daemon.requests import Given, merged, training_type_missing
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.task_requests import ResumeChoice, StartOptions
from finetuned_daemon.tasks import Task
from finetuned_daemon.template_manager import TemplateManager
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.check import errors
from finetuned_daemon.validation.checkpoint import check_hashes
from finetuned_daemon.validation.judge import Judge

_Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class _Asked:
    """What is to be judged or planned."""

    training_type: TrainingType
    given: Given
    device: str
    task: Task | None


class ParameterService(parameter_service_pb2_grpc.ParameterServiceServicer):
    """What the parameters are, whether given ones can be used, and what a run will take."""

    def __init__(
        self, judge: Judge, planner: Planner, manager: Manager, templates: TemplateManager
    ) -> None:
        self._judge = judge
        self._planner = planner
        self._manager = manager
        self._templates = templates

    async def GetParameterSchema(  # noqa: N802, D102 - described in the proto, as all rpcs here
        self, request: parameter_service_pb2.GetParameterSchemaRequest, context: _Context
    ) -> parameter_service_pb2.GetParameterSchemaResponse:
        training_type = convert.training_type(request.training_type)
        if training_type is None:
            raise InvalidRequest([training_type_missing()])
        return build_schema(training_type)

    async def ValidateParameters(  # noqa: N802, D102
        self, request: parameter_service_pb2.ValidateParametersRequest, context: _Context
    ) -> parameter_service_pb2.ValidateParametersResponse:
        asked = self._asked(request)
        judgement = await self._judge.judge(
            asked.given,
            asked.training_type,
            asked.device,
            complete=not request.allow_unfinished,
            task=asked.task,
        )
        violations = judgement.violations
        if not judgement.errors:
            violations = await self._planner.with_plan(judgement, asked.training_type)
        return parameter_service_pb2.ValidateParametersResponse(
            violations=[convert.violation(v, language(context)) for v in violations],
            valid=not errors(violations),
            parameters=protos.to_proto(judgement.resolved),
        )

    async def EstimateTask(  # noqa: N802, D102
        self, request: parameter_service_pb2.EstimateTaskRequest, context: _Context
    ) -> parameter_service_pb2.EstimateTaskResponse:
        asked = self._asked(request)
        choice = convert.resume_choice(request.resume)
        if choice:
            asked = await self._resuming(asked, choice, protos.to_dict(request.parameters))
        judgement = await self._judge.judge(
            asked.given, asked.training_type, asked.device, complete=True, task=asked.task
        )
        if judgement.errors:
            raise InvalidRequest(judgement.errors)
        broken = await asyncio.to_thread(check_hashes, judgement.resolved, asked.training_type)
        if broken:  # a start would refuse it
            raise InvalidRequest(broken)
        estimate = await self._planner.estimate(judgement, asked.training_type)
        return convert.estimate(estimate, language(context))

    async def _resuming(self, asked: _Asked, choice: ResumeChoice, given: Given) -> _Asked:
        """What is asked about a run of the task that goes on from one of its checkpoints."""
        if asked.task is None:
            text = Text("is required with resume", "使用 resume 时必填")
            raise InvalidRequest([Violation("task", text, "REQUIRED")])
        options = StartOptions(resume=choice)
        resumed = await self._manager.checkpoints.resume(asked.task, options)
        return replace(asked, given=merged(resumed.parameters, given))

    def _asked(
        self,
        request: parameter_service_pb2.ValidateParametersRequest
        | parameter_service_pb2.EstimateTaskRequest,
    ) -> _Asked:
        """What a request is about, with what it leaves to a template or task."""
        given: Given = protos.to_dict(request.parameters)
        training_type = convert.training_type(request.training_type)
        device, task = request.device, None
        if request.task:
            task = self._manager.get(request.task)
            given = merged(task.parameters, given)
            if training_type not in (None, task.training_type):
                raise InvalidRequest([_other_type("task", task.training_type)])
            training_type = task.training_type
            device = device or task.device
        elif request.template:
            template = self._templates.get(request.template)
            given = merged(template.parameters, given)
            if training_type not in (None, template.training_type):
                raise InvalidRequest([_other_type("template", template.training_type)])
            training_type = template.training_type
        if training_type is None:
            raise InvalidRequest([training_type_missing()])
        return _Asked(training_type, given, device, task)


def _other_type(field: str, training_type: TrainingType) -> Violation:
    kind = training_type.lower()
    text = Text(
        f"is for {kind}, not for the training type given", f"用于 {kind}，与所给训练类型不符"
    )
    return Violation(field, text, f"{field.upper()}_OF_OTHER_TYPE")
