"""DatasetService: decode, ask the worker, encode."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from grpc import aio

from finetuned.v1 import dataset_service_pb2, dataset_service_pb2_grpc
from finetuned_daemon.errors import InvalidRequest, Stopping, Violation
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.services.paging import negative
from finetuned_daemon.texts import Language, Text
from finetuned_daemon.validation.paths import check_file, check_folder, check_outside

if TYPE_CHECKING:
    from finetuned_daemon.dataset.formats import DataFormat
    from finetuned_daemon.dataset.report import BadLinePolicy, InspectRequest, Progress, Report
    from finetuned_daemon.dataset.worker import Worker

_Context = aio.ServicerContext[Any, Any]

_SHORTEST, _LONGEST = 128, 8192
_DEFAULT_LENGTH = 512
_MOST_RENDERED = 20
_DEFAULT_RENDERED = 3


class DatasetService(dataset_service_pb2_grpc.DatasetServiceServicer):
    """Looks at training data before it is used."""

    def __init__(self, worker: Worker, *, stopping: asyncio.Event) -> None:
        self._worker = worker
        self._stopping = stopping

    async def InspectDataset(  # noqa: N802, D102 - described in the proto
        self, request: dataset_service_pb2.InspectDatasetRequest, context: _Context
    ) -> AsyncIterator[dataset_service_pb2.InspectDatasetResponse]:
        # With the first question: a daemon that is asked none starts sooner without.
        from finetuned_daemon.dataset.report import Progress

        asked = await asyncio.to_thread(_decode, request, self._worker.own_folders)
        speaking = language(context)
        answers = self._worker.inspect(asked)
        async with contextlib.aclosing(_until(self._stopping, answers)) as messages:
            async for message in messages:
                if isinstance(message, Progress):
                    yield dataset_service_pb2.InspectDatasetResponse(progress=_progress(message))
                else:
                    yield dataset_service_pb2.InspectDatasetResponse(
                        report=_report(message, speaking)
                    )


async def _until(
    stopping: asyncio.Event, answers: AsyncGenerator[Progress | Report]
) -> AsyncGenerator[Progress | Report]:
    """Passes answers on, until the daemon is about to end.

    Raises:
        Stopping: It is.
    """
    stop = asyncio.ensure_future(stopping.wait())
    following: asyncio.Future[Progress | Report | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(answers, None))
            await asyncio.wait((following, stop), return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                raise Stopping
            answer = following.result()
            if answer is None:
                return
            yield answer
    finally:
        stop.cancel()
        if following is not None:
            following.cancel()
            await asyncio.wait((following,))
        await answers.aclose()


# --- decoding


def _decode(
    request: dataset_service_pb2.InspectDatasetRequest, own_folders: Sequence[str]
) -> InspectRequest:
    """The request in the worker's words; no path may lie in `own_folders`.

    Raises:
        InvalidRequest: Naming every wrong field.
    """
    from finetuned_daemon.dataset.report import InspectRequest

    found = check_outside("path", request.path, own_folders) or _check_path(request)
    training_type = convert.training_type(request.training_type, found)
    if not request.training_type:
        text = Text(
            "must be TRAINING_TYPE_SFT or TRAINING_TYPE_PRETRAIN",
            "必须是 TRAINING_TYPE_SFT 或 TRAINING_TYPE_PRETRAIN",
        )
        found.append(Violation("training_type", text, "REQUIRED"))
    if request.tokenizer_path:
        found += check_outside(
            "tokenizer_path", request.tokenizer_path, own_folders
        ) or check_folder("tokenizer_path", request.tokenizer_path)
    length = request.max_seq_length or _DEFAULT_LENGTH
    if not _SHORTEST <= length <= _LONGEST:
        found.append(_out_of_range("max_seq_length", _SHORTEST, _LONGEST, length))
    policy = _policy(request.bad_line_policy)
    if policy is None:
        text = Text(
            f"there is no policy {request.bad_line_policy}", f"没有策略 {request.bad_line_policy}"
        )
        found.append(Violation("bad_line_policy", text, "NOT_A_CHOICE"))
    rendered = (
        request.max_rendered_samples
        if request.HasField("max_rendered_samples")
        else _DEFAULT_RENDERED
    )
    if not 0 <= rendered <= _MOST_RENDERED:
        found.append(_out_of_range("max_rendered_samples", 0, _MOST_RENDERED, rendered))
    if request.max_samples < 0:
        found.append(negative("max_samples", request.max_samples))
    if found or training_type is None or policy is None:
        raise InvalidRequest(found)
    return InspectRequest(
        training_type=training_type,
        path=request.path,
        tokenizer_path=request.tokenizer_path,
        max_seq_length=length,
        bad_line_policy=policy,
        max_rendered_samples=rendered,
        max_samples=request.max_samples,
    )


def _policy(number: int) -> BadLinePolicy | None:
    """The policy that a request names; None: there is no such one."""
    from finetuned_daemon.dataset.report import BadLinePolicy

    if number == dataset_service_pb2.BAD_LINE_POLICY_UNSPECIFIED:
        return BadLinePolicy.FAIL
    if number not in dataset_service_pb2.BadLinePolicy.values():
        return None
    name = dataset_service_pb2.BadLinePolicy.Name(number)  # type: ignore[arg-type]
    return BadLinePolicy(name.removeprefix("BAD_LINE_POLICY_"))


def _check_path(request: dataset_service_pb2.InspectDatasetRequest) -> list[Violation]:
    if not request.path:
        return [Violation("path", Text("is required", "必填"), "REQUIRED")]
    return check_file("path", request.path)


def _out_of_range(field: str, least: int, most: int, value: int) -> Violation:
    text = Text(
        f"must be from {least} to {most}, not {value}",
        f"必须在 {least} 到 {most} 之间，而不是 {value}",
    )
    return Violation(field, text, "OUT_OF_RANGE", suggested=min(max(value, least), most))


# --- encoding


def _progress(progress: Progress) -> dataset_service_pb2.InspectionProgress:
    return dataset_service_pb2.InspectionProgress(**progress.model_dump(exclude={"kind"}))


def _report(report: Report, speaking: Language) -> dataset_service_pb2.DatasetReport:
    return dataset_service_pb2.DatasetReport(
        format=_format(report.format),
        formats=[
            dataset_service_pb2.FormatCount(format=_format(count.format), samples=count.samples)
            for count in report.formats
        ],
        usable=not report.problem.en,
        problem=report.problem.within(speaking),
        samples=report.samples,
        size_bytes=report.size_bytes,
        bad_line_count=report.bad_line_count,
        bad_lines=[
            dataset_service_pb2.BadDataLine(
                line=bad.line,
                byte_offset=bad.byte_offset,
                reason=bad.reason,
                message=bad.message.within(speaking),
                excerpt=bad.excerpt,
            )
            for bad in report.bad_lines
        ],
        duplicates=report.duplicates,
        roles=[dataset_service_pb2.RoleCount(**count.model_dump()) for count in report.roles],
        turns=[dataset_service_pb2.TurnCount(**count.model_dump()) for count in report.turns],
        token_lengths=(
            dataset_service_pb2.TokenLengths(**report.token_lengths.model_dump())
            if report.token_lengths
            else None
        ),
        cut_samples=report.cut_samples,
        empty_samples=report.empty_samples,
        tokens=report.tokens,
        learned_tokens=report.learned_tokens,
        train_samples=report.train_samples,
        rendered_samples=[
            dataset_service_pb2.RenderedSample(**sample.model_dump())
            for sample in report.rendered_samples
        ],
        tokenizer_problem=report.tokenizer_problem.within(speaking),
    )


def _format(kind: DataFormat | None) -> dataset_service_pb2.DataFormat.ValueType:
    if kind is None:
        return dataset_service_pb2.DATA_FORMAT_UNSPECIFIED
    return dataset_service_pb2.DataFormat.Value(f"DATA_FORMAT_{kind.value}")
