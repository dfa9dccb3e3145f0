"""`Client` and `AsyncClient` are one interface, and so are the handles; both reach every rpc."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool

import finetuned
from finetuned import AsyncClient, AsyncTaskHandle, Client, TaskHandle, v1
from finetuned._session import Attempts
from finetuned._stubs import stubs

REPOSITORY = Path(__file__).parents[2]

# Both classes of a pair, and what neither awaits: it asks nobody.
PAIRS = {
    "client": (Client, AsyncClient, {"with_options"}),
    "task": (TaskHandle, AsyncTaskHandle, set[str]()),
}

# Each rpc of each service, and the method of both clients that makes it.
RPCS = {
    "DatasetService.InspectDataset": "inspect_dataset",
    "Health.Check": "is_serving",
    "ParameterService.EstimateTask": "estimate",
    "ParameterService.GetParameterSchema": "parameter_schema",
    "ParameterService.ValidateParameters": "validate",
    "SystemService.CheckEnvironment": "check_environment",
    "SystemService.GetQuota": "quota",
    "SystemService.GetSystemInfo": "system_info",
    "SystemService.ListDevices": "list_devices",
    "SystemService.Shutdown": "shutdown",
    "SystemService.WatchDevices": "watch_devices",
    "TaskService.CreateTask": "create_task",
    "TaskService.DeleteCheckpoint": "delete_checkpoint",
    "TaskService.DeleteTask": "delete_task",
    "TaskService.ExportTaskConfig": "export_config",
    "TaskService.GetMetrics": "metrics",
    "TaskService.GetTask": "get_task",
    "TaskService.ListCheckpoints": "list_checkpoints",
    "TaskService.ListEvents": "list_events",
    "TaskService.ListRuns": "list_runs",
    "TaskService.ListTasks": "list_tasks",
    "TaskService.MoveTask": "move_task",
    "TaskService.PauseTask": "pause_task",
    "TaskService.ResumeTask": "resume_task",
    "TaskService.StartTask": "start_task",
    "TaskService.StopTask": "stop_task",
    "TaskService.UpdateTask": "update_task",
    "TaskService.WatchTask": "watch",
    "TaskService.WatchTasks": "watch_tasks",
    "TemplateService.CreateTemplate": "create_template",
    "TemplateService.DeleteTemplate": "delete_template",
    "TemplateService.GetTemplate": "get_template",
    "TemplateService.ListTemplates": "list_templates",
    "TemplateService.UpdateTemplate": "update_template",
}

# Arguments that each method needs, beyond its defaults.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "create_task": ("sft",),
    "create_template": ("a", "sft"),
    "delete_checkpoint": ("tasks/a/runs/1/checkpoints/1",),
    "inspect_dataset": ("/a",),
    "move_task": ("tasks/a", 1),
    "parameter_schema": ("sft",),
}


def methods(kind: type) -> list[str]:
    return sorted(
        name
        for name in dir(kind)
        if not name.startswith("_") and inspect.isroutine(getattr(kind, name))
    )


EACH = [(pair, name) for pair, (sync, _, _) in PAIRS.items() for name in methods(sync)]


def parameters(function: Any) -> list[tuple[str, Any, Any, Any]]:
    signature = inspect.signature(function).parameters
    return [(p.name, p.kind, p.default, p.annotation) for p in signature.values()]


@pytest.mark.parametrize("pair", PAIRS)
def test_both_have_the_same_methods_and_attributes(pair: str) -> None:
    sync, aio, _ = PAIRS[pair]
    assert [name for name in dir(aio) if not name.startswith("_")] == [
        name for name in dir(sync) if not name.startswith("_")
    ]


@pytest.mark.parametrize(("pair", "name"), [*EACH, ("client", "__init__")])
def test_a_method_takes_the_same_arguments_in_both(pair: str, name: str) -> None:
    sync, aio, _ = PAIRS[pair]
    assert parameters(getattr(sync, name)) == parameters(getattr(aio, name))


@pytest.mark.parametrize(("pair", "name"), EACH)
def test_every_method_of_the_async_one_is_awaited_or_iterated(pair: str, name: str) -> None:
    sync, aio, plain = PAIRS[pair]
    method = getattr(aio, name)
    if name in plain:
        assert not inspect.iscoroutinefunction(method)
        return
    is_iterated = inspect.signature(method).return_annotation.startswith("Async") and (
        "Iterator" in inspect.signature(method).return_annotation
        or "Generator" in inspect.signature(method).return_annotation
    )
    assert inspect.iscoroutinefunction(method) != is_iterated
    returned = inspect.signature(getattr(sync, name)).return_annotation
    assert is_iterated == returned.startswith(("Iterator", "Generator"))


@pytest.mark.parametrize(("pair", "name"), EACH)
def test_a_method_is_described_in_full_in_both(pair: str, name: str) -> None:
    sync, aio, _ = PAIRS[pair]
    assert getattr(sync, name).__doc__
    assert getattr(aio, name).__doc__ == getattr(sync, name).__doc__


def services() -> set[str]:
    """Every rpc of the contract, by the descriptors."""
    pool = descriptor_pool.Default()
    found = set()
    for module in pkgutil.iter_modules(v1.__path__):
        if module.name.endswith("_pb2"):
            importlib.import_module(f"finetuned.v1.{module.name}")
            file = pool.FindFileByName(f"finetuned/v1/{module.name.removesuffix('_pb2')}.proto")
            for service in file.services_by_name.values():
                found |= {f"{service.name}.{method.name}" for method in service.methods}
    return found


def test_the_table_has_every_rpc_of_the_contract() -> None:
    assert set(RPCS) == services() | {"Health.Check"}


class Recorder:
    """Stands where a channel would, and notes which rpcs are called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def _method(self, path: str, **_: Any) -> Any:
        name = path.removeprefix("/finetuned.v1.").removeprefix("/grpc.health.v1.")

        def call(*_: Any, **__: Any) -> Any:
            self.called.append(name.replace("/", "."))
            raise Called

        return call

    unary_unary = unary_stream = _method


class Called(BaseException):
    """Ends a method where it has made its call."""


async def call(kind: type, rpc: str) -> list[str]:
    """Calls the method of an rpc; the rpcs that it makes first."""
    name = RPCS[rpc]
    client = kind("unix:/nowhere")
    recorder = Recorder()
    client._stubs.update(stubs(recorder))
    client._session.endpoint = client._session.locate()  # so that no channel is opened
    resource = "templates/a" if "template" in name else "tasks/a"
    needs_name = any(
        p.name == "name" for p in inspect.signature(getattr(kind, name)).parameters.values()
    )
    with pytest.raises(Called):
        answer = getattr(client, name)(*ARGUMENTS.get(name, (resource,) if needs_name else ()))
        if inspect.isasyncgen(answer):
            await anext(answer)
        elif inspect.isawaitable(answer):
            await answer
        elif inspect.isgenerator(answer):
            next(answer)
    return recorder.called


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("rpc", RPCS)
async def test_each_rpc_is_made_by_its_method(rpc: str, kind: type) -> None:
    assert await call(kind, rpc) == [rpc]


def safe_to_repeat() -> set[str]:
    """The rpcs that the contract calls safe to repeat, as their comments say."""
    found = set()
    for file in (REPOSITORY / "proto/finetuned/v1").glob("*_service.proto"):
        text = file.read_text()
        (service,) = re.findall(r"^service (\w+)", text, re.M)
        for comment, rpc in re.findall(r"((?:^  //.*\n)+)^  rpc (\w+)\(", text, re.M):
            if re.search(r"Safe to\s+repeat", comment.replace("  //", "")):
                found.add(f"{service}.{rpc}")
    return found


@pytest.mark.parametrize("module", ["_caller", "_aio"])
async def test_a_call_is_repeated_where_the_contract_says_that_it_may_be(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated: dict[str, bool] = {}
    rpc = ""

    def attempts(session: Any, name: str, *, repeatable: bool, **options: Any) -> Attempts:
        repeated[rpc] = repeatable
        return Attempts(session, name, repeatable=repeatable, **options)

    monkeypatch.setattr(f"finetuned.{module}.Attempts", attempts)
    for rpc in sorted(RPCS):
        if rpc != "DatasetService.InspectDataset":  # a stream, which no `_send` makes
            await call(Client if module == "_caller" else AsyncClient, rpc)
    unsafe = {rpc for rpc, is_repeated in repeated.items() if not is_repeated}
    # After a lost answer nobody is there; and that nobody is there is an answer.
    own_choice = {"SystemService.Shutdown", "Health.Check"}
    assert unsafe == (set(repeated) - safe_to_repeat()) | own_choice
    assert "TaskService.DeleteTask" in unsafe


def test_every_verb_of_a_handle_says_where_it_is_described() -> None:
    """`As Client.x` names a method that there is."""
    source = Path(inspect.getfile(TaskHandle)).read_text()
    docs = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    named = [word.split("`")[0].removesuffix(".") for d in docs for word in d.split("`Client.")[1:]]
    assert named
    assert all(hasattr(finetuned.Client, name) for name in named)
