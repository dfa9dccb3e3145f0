"""TemplateService: decode, call, encode."""

from __future__ import annotations

from functools import partial
from typing import Any

from grpc import aio

from finetuned.v1 import template_service_pb2, template_service_pb2_grpc
from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.manager import Manager
from finetuned_daemon.parameters import protos
from finetuned_daemon.services import convert
from finetuned_daemon.services.paging import check_page_size, page_token
from finetuned_daemon.services.ready import Ready, joined
from finetuned_daemon.services.repeats import request_id
from finetuned_daemon.template_manager import NewTemplate, TemplateManager
from finetuned_daemon.templates import Template

_Context = aio.ServicerContext[Any, Any]


class TemplateService(template_service_pb2_grpc.TemplateServiceServicer):
    """Named sets of parameters."""

    def __init__(self, templates: TemplateManager, manager: Manager) -> None:
        self._templates = templates
        self._manager = manager
        self._ready = Ready[Template, int](lambda template, _: convert.template(template), 128)

    async def CreateTemplate(  # noqa: N802, D102 - described in the proto, as all rpcs here
        self, request: template_service_pb2.CreateTemplateRequest, context: _Context
    ) -> template_service_pb2.CreateTemplateResponse:
        wrong = list[Violation]()
        training_type = convert.training_type(request.template.training_type, wrong)
        repeat = request_id(request, _created, wrong)
        answer = self._templates.create(
            NewTemplate(
                training_type=training_type,
                parameters=protos.to_dict(request.template.parameters),
                display_name=request.template.display_name,
                template_id=request.template_id,
                wrong=wrong,
            ),
            partial(self._manager.get, request.task) if request.task else None,
            repeat,
        )
        if isinstance(answer, bytes):
            return template_service_pb2.CreateTemplateResponse.FromString(answer)
        return _created(answer)

    async def GetTemplate(  # noqa: N802, D102
        self, request: template_service_pb2.GetTemplateRequest, context: _Context
    ) -> Any:  # its bytes
        template = self._templates.get(request.name)
        return joined(
            template_service_pb2.GetTemplateResponse.TEMPLATE_FIELD_NUMBER,
            [self._ready.of(template.template_id, template, 0)],
        )

    async def ListTemplates(  # noqa: N802, D102
        self, request: template_service_pb2.ListTemplatesRequest, context: _Context
    ) -> Any:  # its bytes
        violations = check_page_size(request.page_size)
        start = page_token("templates", request.page_token, violations)
        training_type = convert.training_type(request.training_type, violations)
        if violations:
            raise InvalidRequest(violations)
        size = request.page_size or 100
        templates = self._templates.list(
            training_type, request.display_name, skipped=start, limit=size + 1
        )
        token = f"templates-{start + size}" if len(templates) > size else ""
        return joined(
            template_service_pb2.ListTemplatesResponse.TEMPLATES_FIELD_NUMBER,
            [self._ready.of(template.template_id, template, 0) for template in templates[:size]],
            template_service_pb2.ListTemplatesResponse(next_page_token=token),
        )

    async def UpdateTemplate(  # noqa: N802, D102
        self, request: template_service_pb2.UpdateTemplateRequest, context: _Context
    ) -> template_service_pb2.UpdateTemplateResponse:
        template = self._templates.update(
            request.template.name,
            display_name=request.template.display_name,
            given=protos.to_dict(request.template.parameters),
            paths=convert.mask_paths(request.update_mask),
            etag=request.template.etag,
        )
        return template_service_pb2.UpdateTemplateResponse(template=convert.template(template))

    async def DeleteTemplate(  # noqa: N802, D102
        self, request: template_service_pb2.DeleteTemplateRequest, context: _Context
    ) -> template_service_pb2.DeleteTemplateResponse:
        self._templates.delete(request.name, etag=request.etag, allow_missing=request.allow_missing)
        return template_service_pb2.DeleteTemplateResponse()


def _created(template: Template) -> template_service_pb2.CreateTemplateResponse:
    return template_service_pb2.CreateTemplateResponse(template=convert.template(template))
