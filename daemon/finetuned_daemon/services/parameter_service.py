"""ParameterService: decode, call, encode."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from grpc import aio

from finetuned.v1 import parameter_service_pb2, parameter_service_pb2_grpc
from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.manager import Manager
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.schema import build_schema
from finetuned_daemon.requests import Given, check_training_type, merged
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.task_requests import StartOptions
from finetuned_daemon.tasks import Task
from finetuned_daemon.template_manager import TemplateManager
from finetuned_daemon.texts import Text

if TYPE_CHECKING:
    from finetuned_daemon.planner import Planner
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
        wrong = list[Violation]()
        training_type = convert.training_type(request.training_type, wrong)
        wrong += check_training_type(training_type, wrong)
        if wrong or training_type is None:
            raise InvalidRequest(wrong)
        return build_schema(training_type)

    async def ValidateParameters(  # noqa: N802, D102
        self, request: parameter_service_pb2.ValidateParametersRequest, context: _Context
    ) -> parameter_service_pb2.ValidateParametersResponse:
        asked = self._asked(request, [])
        judgement = await self._judge.judge(
            asked.given,
            asked.training_type,
            asked.device,
            complete=not request.allow_unfinished,
            task=asked.task,
        )
        # A daemon that nobody asks starts sooner without.
        from finetuned_daemon.validation.check import errors

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
        wrong = list[Violation]()
        choice = convert.resume_choice(request.resume, wrong)
        if choice and not request.task:
            text = Text("is required with resume", "使用 resume 时必填")
            wrong.append(Violation("task", text, "REQUIRED"))
        asked = self._asked(request, wrong)
        if choice and asked.task:
            options = StartOptions(resume=choice)
            resumed = await self._manager.checkpoints.resume(asked.task, options)
            given = merged(resumed.parameters, protos.to_dict(request.parameters))
            asked = replace(asked, given=given)
        judgement = await self._judge.judge(
            asked.given, asked.training_type, asked.device, complete=True, task=asked.task
        )
        if judgement.errors:
            raise InvalidRequest(judgement.errors)
        from finetuned_daemon.validation.checkpoint import check_hashes

        broken = await asyncio.to_thread(check_hashes, judgement.resolved, asked.training_type)
        if broken:  # a start would refuse it
            raise InvalidRequest(broken)
        estimate = await self._planner.estimate(judgement, asked.training_type)
        return convert.estimate(estimate, language(context))

    def _asked(
        self,
        request: parameter_service_pb2.ValidateParametersRequest
        | parameter_service_pb2.EstimateTaskRequest,
        wrong: list[Violation],
    ) -> _Asked:
        """What a request is about, with what it leaves to a template or task.

        Args:
            request: As it came.
            wrong: What was found wrong with it before.

        Raises:
            NotFound: There is no such task or template.
            InvalidRequest: With every wrong field beside the parameters.
        """
        given: Given = protos.to_dict(request.parameters)
        training_type = convert.training_type(request.training_type, wrong)
        task = self._manager.get(request.task) if request.task else None
        template = self._templates.get(request.template) if request.template else None
        if task is not None:
            given = merged(task.parameters, given)
            if training_type not in (None, task.training_type):
                wrong.append(_other_type("task", task.training_type))
            training_type = task.training_type
        if template is not None:
            if task is None:
                given = merged(template.parameters, given)
            if training_type not in (None, template.training_type):
                wrong.append(_other_type("template", template.training_type))
            training_type = training_type or template.training_type
        wrong += check_training_type(training_type, wrong)
        if wrong or training_type is None:
            raise InvalidRequest(wrong)
        device = request.device or (task.device if task else "")
        return _Asked(training_type, given, device, task)


def _other_type(field: str, training_type: TrainingType) -> Violation:
    kind = training_type.lower()
    text = Text(
        f"is for {kind}, not for the training type given", f"用于 {kind}，与所给训练类型不符"
    )
    return Violation(field, text, f"{field.upper()}_OF_OTHER_TYPE")
