"""What both clients do before a run: parameters, templates, training data, environment, quota.

Generators of calls, as in `_calls`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from finetuned._calls import (
    PARAMETER_SERVICE,
    READING_SECONDS,
    SYSTEM_SERVICE,
    TEMPLATE_SERVICE,
    Call,
    Steps,
    enum_number,
    mask_of,
    resolve,
    resolve_template,
    template_of,
    training_type_number,
)
from finetuned._checkpoints import resume_choice
from finetuned._checks import check_numbers, check_texts
from finetuned._errors import NotFound
from finetuned._parameters import convert, flatten, from_mapping
from finetuned._violations import ParameterViolation, from_messages, from_shape
from finetuned.v1 import dataset_service_pb2 as datasets
from finetuned.v1 import parameter_service_pb2 as parameter_service
from finetuned.v1 import system_service_pb2 as system
from finetuned.v1 import template_service_pb2 as templates
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.task_pb2 import TrainingType
from finetuned.v1.template_service_pb2 import Template

# The training environment is asked in a process that imports torch.
_ENVIRONMENT_SECONDS = 120.0


def parameter_schema(
    training_type: str | TrainingType.ValueType,
) -> Steps[parameter_service.GetParameterSchemaResponse]:
    """GetParameterSchema."""
    request = parameter_service.GetParameterSchemaRequest(
        training_type=training_type_number(training_type)
    )
    answer: parameter_service.GetParameterSchemaResponse = yield Call(
        PARAMETER_SERVICE, "GetParameterSchema", request
    )
    return answer


def validate(
    training_type: str | TrainingType.ValueType | None,
    parameters: Mapping[str, Any] | Parameters | None,
    device: str,
    template: str,
    task: str,
    allow_unfinished: bool,
) -> Steps[list[ParameterViolation]]:
    """ValidateParameters. What can't even be sent is in the answer too, before the rest."""
    check_texts(device=device, template=template, task=task)
    shape = [] if isinstance(parameters, Parameters) else convert(parameters or {})[1]
    request = parameter_service.ValidateParametersRequest(
        parameters=_sendable(parameters),
        device=device,
        template=(yield from resolve_template(template)) if template else "",
        task=(yield from resolve(task)) if task else "",
        allow_unfinished=allow_unfinished,
    )
    if training_type is not None:
        request.training_type = training_type_number(training_type)
    answer: parameter_service.ValidateParametersResponse = yield Call(
        PARAMETER_SERVICE, "ValidateParameters", request, timeout=READING_SECONDS
    )
    wrong = {violation.field for violation in shape}
    return from_shape(shape) + [
        violation for violation in from_messages(answer.violations) if violation.field not in wrong
    ]


def estimate(
    training_type: str | TrainingType.ValueType | None,
    parameters: Mapping[str, Any] | Parameters | None,
    device: str,
    template: str,
    task: str,
    resume: str | os.PathLike[str],
) -> Steps[parameter_service.EstimateTaskResponse]:
    """EstimateTask."""
    check_texts(device=device, template=template, task=task)
    choice, folder = resume_choice(resume)
    request = parameter_service.EstimateTaskRequest(
        parameters=from_mapping(parameters),
        device=device,
        template=(yield from resolve_template(template)) if template else "",
        task=(yield from resolve(task)) if task else "",
        resume=choice,
    )
    if folder:
        request.parameters.data.resume_from_checkpoint = folder
    if training_type is not None:
        request.training_type = training_type_number(training_type)
    answer: parameter_service.EstimateTaskResponse = yield Call(
        PARAMETER_SERVICE, "EstimateTask", request, timeout=READING_SECONDS
    )
    return answer


def create_template(
    display_name: str,
    training_type: str | TrainingType.ValueType | None,
    parameters: Mapping[str, Any] | Parameters | None,
    task: str,
    template_id: str,
    request_id: str,
) -> Steps[Template]:
    """CreateTemplate, repeatable by a request id of our own."""
    check_texts(display_name=display_name, template_id=template_id, request_id=request_id)
    request = templates.CreateTemplateRequest(
        template=Template(display_name=display_name, parameters=from_mapping(parameters)),
        template_id=template_id,
        task=(yield from resolve(task)) if task else "",
        request_id=request_id or str(uuid.uuid4()),
    )
    if training_type is not None:
        request.template.training_type = training_type_number(training_type)
    answer: templates.CreateTemplateResponse = yield Call(
        TEMPLATE_SERVICE, "CreateTemplate", request
    )
    return answer.template


def get_template(name: str) -> Steps[Template]:
    """GetTemplate, by any of its names."""
    return (yield from template_of(name))


def list_templates_page(
    training_type: str | TrainingType.ValueType | None, page_token: str
) -> Steps[templates.ListTemplatesResponse]:
    """One page of ListTemplates."""
    request = templates.ListTemplatesRequest(page_token=page_token)
    if training_type is not None:
        request.training_type = training_type_number(training_type)
    page: templates.ListTemplatesResponse = yield Call(TEMPLATE_SERVICE, "ListTemplates", request)
    return page


def update_template(
    name: str,
    parameters: Mapping[str, Any] | Parameters | None,
    display_name: str | None,
    reset: str | Iterable[str],
    etag: str,
) -> Steps[Template]:
    """UpdateTemplate. With an etag a repeat would be ABORTED, by the change that was made."""
    given = from_mapping(parameters)
    changed = {"display_name": display_name}
    mask = mask_of(changed, flatten(given), reset)
    check_texts(display_name="" if display_name is None else display_name, etag=etag)
    request = templates.UpdateTemplateRequest(
        template=Template(
            name=(yield from resolve_template(name)),
            display_name=display_name or "",
            parameters=given,
            etag=etag,
        ),
        update_mask=mask,
    )
    answer: templates.UpdateTemplateResponse = yield Call(
        TEMPLATE_SERVICE, "UpdateTemplate", request, repeatable=not etag
    )
    return answer.template


def delete_template(name: str, etag: str, allow_missing: bool) -> Steps[None]:
    """DeleteTemplate. A repeat would be NOT_FOUND, so it is made only where that is no error."""
    try:
        name = yield from resolve_template(name)
    except NotFound:
        if allow_missing:
            return
        raise
    check_texts(etag=etag)
    request = templates.DeleteTemplateRequest(name=name, etag=etag, allow_missing=allow_missing)
    yield Call(TEMPLATE_SERVICE, "DeleteTemplate", request, repeatable=allow_missing)


def inspect_request(
    path: str | os.PathLike[str],
    training_type: str | TrainingType.ValueType,
    tokenizer_path: str | os.PathLike[str],
    max_seq_length: int,
    bad_line_policy: str | datasets.BadLinePolicy.ValueType,
    max_rendered_samples: int | None,
    max_samples: int,
) -> datasets.InspectDatasetRequest:
    """The request of InspectDataset."""
    path, tokenizer_path = os.fspath(path), os.fspath(tokenizer_path)
    check_texts(path=path, tokenizer_path=tokenizer_path)
    shown = 0 if max_rendered_samples is None else max_rendered_samples
    check_numbers(max_seq_length=max_seq_length, max_rendered_samples=shown)
    check_numbers(64, max_samples=max_samples)
    return datasets.InspectDatasetRequest(
        path=path,
        training_type=training_type_number(training_type),
        tokenizer_path=tokenizer_path,
        max_seq_length=max_seq_length,
        bad_line_policy=enum_number(
            datasets.BadLinePolicy, "BAD_LINE_POLICY_", "bad_line_policy", bad_line_policy
        ),
        max_rendered_samples=max_rendered_samples,
        max_samples=max_samples,
    )


def inspect_item(
    response: datasets.InspectDatasetResponse,
) -> datasets.InspectionProgress | datasets.DatasetReport | None:
    """What a message of InspectDataset brings; None for what a later daemon may send."""
    match response.WhichOneof("response"):
        case "progress":
            return response.progress
        case "report":
            return response.report
        case _:
            return None


def check_environment(refresh: bool) -> Steps[system.CheckEnvironmentResponse]:
    """CheckEnvironment."""
    answer: system.CheckEnvironmentResponse = yield Call(
        SYSTEM_SERVICE,
        "CheckEnvironment",
        system.CheckEnvironmentRequest(refresh=refresh),
        timeout=_ENVIRONMENT_SECONDS,
    )
    return answer


def quota() -> Steps[system.GetQuotaResponse]:
    """GetQuota."""
    answer: system.GetQuotaResponse = yield Call(
        SYSTEM_SERVICE, "GetQuota", system.GetQuotaRequest()
    )
    return answer


def _sendable(parameters: Mapping[str, Any] | Parameters | None) -> Parameters:
    """Parameters, as far as they have the right shape."""
    return parameters if isinstance(parameters, Parameters) else convert(parameters or {})[0]
