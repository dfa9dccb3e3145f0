"""GetMetrics: decode, call, encode."""

from __future__ import annotations

import re

from finetuned.v1 import task_service_pb2
from finetuned_daemon.errors import InvalidRequest, NotFound, Violation
from finetuned_daemon.events.curves import Place
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.manager import Manager
from finetuned_daemon.services import convert
from finetuned_daemon.services.paging import bad_page_token, negative, within
from finetuned_daemon.texts import Text

_MOST_POINTS_A_CURVE = 10_000
_LARGEST_PAGE = BY_NAME["metric_points"].default

_TOKEN = re.compile(r"metrics-([0-9]{1,9})-(-?[0-9]{1,18})-(.*)", re.DOTALL)
"""The run, so that all pages are of the same one, and where the page before ended."""


async def get_metrics(
    manager: Manager, request: task_service_pb2.GetMetricsRequest
) -> task_service_pb2.GetMetricsResponse:
    """Answers with the curves of a run, thinned out or a page of them.

    Raises:
        InvalidRequest: With every wrong field.
        NotFound: There is no such task or run.
    """
    violations = _check(request)
    run_of_page, place = _read_token(request, violations)
    if violations:
        raise InvalidRequest(violations)
    task = manager.get(request.name)
    asked_for = run_of_page or request.run
    if asked_for and manager.records.run(task.key, asked_for) is None:
        raise NotFound("run", f"{task.name}/runs/{asked_for}")
    run = asked_for or manager.records.newest_run(task.key)
    if not run:
        return task_service_pb2.GetMetricsResponse()
    async with manager.curves.of(task.key, run) as curves:
        next_place = None
        if request.max_points:
            pieces = await curves.thinned(request.metrics, request.after_step, request.max_points)
        else:
            pieces, next_place = curves.page(
                request.metrics, request.after_step, place, request.page_size or _LARGEST_PAGE
            )
    manager.get(request.name)  # NOT_FOUND: deleted while its log was read
    return task_service_pb2.GetMetricsResponse(
        series=[convert.series(piece) for piece in pieces],
        run=run,
        next_page_token=f"metrics-{run}-{next_place.step}-{next_place.metric}"
        if next_place
        else "",
    )


def _check(request: task_service_pb2.GetMetricsRequest) -> list[Violation]:
    violations = list[Violation]()
    for field, value in (("run", request.run), ("after_step", request.after_step)):
        if value < 0:
            violations.append(negative(field, value))
    if request.max_points:
        violations += within("max_points", request.max_points, 2, _MOST_POINTS_A_CURVE)
    violations += within("page_size", request.page_size, 0, _LARGEST_PAGE)
    for field in ("page_size", "page_token"):
        if request.max_points and getattr(request, field):
            text = Text(
                "does not go together with max_points, which brings the whole run at once",
                "不能与 max_points 同时使用；后者一次返回整个运行",
            )
            violations.append(Violation(field, text, "NOT_WITH_MAX_POINTS"))
    return violations


def _read_token(
    request: task_service_pb2.GetMetricsRequest, violations: list[Violation]
) -> tuple[int, Place | None]:
    """The run and the place of a page token; adds a violation where it is of no such answer."""
    if not request.page_token:
        return 0, None
    found = _TOKEN.fullmatch(request.page_token)
    if found is None or request.run not in (0, int(found[1])):
        violations.append(bad_page_token())
        return 0, None
    return int(found[1]), Place(int(found[2]), found[3])
