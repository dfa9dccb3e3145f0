"""Everything that can be sent to the daemon: each rpc of each service, from their descriptors."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st

import finetuned.v1
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    parameters_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)
from hostile.victim import BARE, HELD, IDLE, TEMPLATE, Victim

_STANDARD = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
"""Services that are not ours: their errors carry no details."""


@dataclass(frozen=True)
class Rpc:
    """One rpc."""

    descriptor: MethodDescriptor

    @property
    def name(self) -> str:
        """Such as `TaskService.GetTask`."""
        return f"{self.descriptor.containing_service.name}.{self.descriptor.name}"

    @property
    def path(self) -> str:
        """As gRPC calls it."""
        return f"/{self.descriptor.containing_service.full_name}/{self.descriptor.name}"

    @property
    def is_ours(self) -> bool:
        """Whether its errors are ours, with typed details."""
        return self.descriptor.containing_service.full_name.startswith("finetuned.")

    @property
    def request(self) -> type[Message]:
        """Class of the request."""
        return GetMessageClass(self.descriptor.input_type)

    @property
    def response(self) -> type[Message]:
        """Class of the answer."""
        return GetMessageClass(self.descriptor.output_type)


@cache
def rpcs() -> list[Rpc]:
    """Each rpc of each service that there is a proto of, by name."""
    files = [
        importlib.import_module(f"finetuned.v1.{module.name}").DESCRIPTOR
        for module in pkgutil.iter_modules(finetuned.v1.__path__)
        if module.name.endswith("_pb2")
    ]
    found = [
        Rpc(method)
        for file in (*files, *_STANDARD)
        for service in file.services_by_name.values()
        for method in service.methods
    ]
    return sorted(found, key=lambda rpc: (not rpc.is_ours, rpc.name))


# --- strategies

_ODD_TEXTS = (
    "", " ", "\0", "\n", "a\nb", "\x1b[31m", "\u202egnp.exe", "\ufeff", "\ufffd", "\U0010ffff",
    "e\u0301", "%", "%s", "{}", "${HOME}", "~", "~root", "..", "../..", "/", "//", "/dev/zero",
    "/dev/stdin",
    "/proc/self/environ", "/proc/self/fd/0", "C:\\", "NaN", "-1", "1e999", "tasks/", "tasks", "-",
    "tasks/held/runs/1/checkpoints/1", "templates/", "' OR 1=1 --", "\"; DROP TABLE tasks",
    "a" * 63, "a" * 65, "tasks/" + "a" * 200, "x" * 5000, "\u4e2d" * 3000, "/" + "d/" * 3000,
    "tasks-1", "runs-1", "templates-1", "templates-99999999999999999",
    "tasks-9223372036854775807", "checkpoints-0", "tasks-\u0661",
    "tasks/../held", "tasks/held/", "TASKS/held", "request-1", "cpu", "cuda:0", "cuda:999", "1",
)  # fmt: skip

_PATHS = (
    "parameters", "parameters.training", "parameters.training.batch_size", "display_name", "*", "",
    "parameters..", "parameters.training.batch_size.x", "name", "state", "etag", "task.device",
    "device", "template", "parameters.data.train_file",
)  # fmt: skip

_WHOLE = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
}
_FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
_MOST_FIELDS = 5
_FEW_FIELDS = 2
"""Changed in a request that is in order."""
_NAMES = ("name", "parent", "task", "template")
"""Fields that name a resource."""
_DEEPEST = 4


class Strategies:
    """Strategies for messages, from their descriptors; names of the victim are among the texts."""

    def __init__(self, victim: Victim) -> None:
        scene = victim.scene
        names = [HELD, IDLE, BARE, TEMPLATE, *victim.names()]
        places = [str(scene.model), str(scene.data), str(scene.output), str(scene.root)]
        places += [f"{IDLE}/runs/1", f"{IDLE}/runs/1/checkpoints/1"]
        places += [str(victim.daemon.paths.state_dir), str(victim.daemon.paths.token)]
        known = st.sampled_from(sorted({*names, *places}))
        odd = st.sampled_from(_ODD_TEXTS)
        self._text = st.one_of(known, odd, st.sampled_from(_PATHS), st.text(max_size=30))
        self._name = st.one_of(st.sampled_from(names), st.sampled_from(names), self._text)
        self._seeds = {
            seed.DESCRIPTOR.full_name: [s for s in _seeds(victim) if type(s) is type(seed)]
            for seed in _seeds(victim)
        }

    def message(self, rpc: Rpc) -> st.SearchStrategy[Message]:
        """Requests of an rpc: of drawn fields alone, or one in order with drawn ones in it."""

        @st.composite
        def draw_one(draw: st.DrawFn) -> Message:
            seeds = self._seeds.get(rpc.descriptor.input_type.full_name, [])
            message = rpc.request()
            if seeds and draw(st.booleans()):
                message.CopyFrom(draw(st.sampled_from(seeds)))
                self._fill(draw, message, 0, _FEW_FIELDS)
            else:
                self._fill(draw, message, 0)
            return message

        return draw_one()

    def body(self, rpc: Rpc) -> st.SearchStrategy[bytes]:
        """Bodies of requests that are no protos, or nearly so: drawn bytes, and torn messages."""

        @st.composite
        def torn(draw: st.DrawFn) -> bytes:
            data = bytearray(draw(self.message(rpc)).SerializeToString())
            for _ in range(draw(st.integers(1, 4))):
                place = draw(st.integers(0, len(data)))
                if draw(st.booleans()):
                    data[place : place + 1] = draw(st.binary(max_size=4))
                else:
                    del data[place : place + draw(st.integers(1, 20))]
            return bytes(data)

        deep = st.integers(1, 2000).map(lambda depth: b"\x0a" * depth)
        return st.one_of(st.binary(max_size=200), torn(), deep)

    def _fill(self, draw: st.DrawFn, message: Any, depth: int, most: int = _MOST_FIELDS) -> None:
        descriptor: Descriptor = message.DESCRIPTOR
        fields = list(descriptor.fields)
        if not fields:
            return
        chosen = draw(st.lists(st.sampled_from(fields), max_size=most, unique=True))
        for field in chosen:
            self._set(draw, message, field, depth)

    def _set(self, draw: st.DrawFn, message: Any, field: FieldDescriptor, depth: int) -> None:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            return  # no request of ours has one; a test says so
        if field.is_repeated:
            count = draw(st.integers(0, 3))
            if draw(st.integers(0, 40)) == 0:
                count = 2000  # a list that nobody sends
            target = getattr(message, field.name)
            if entry is None:
                drawn = [draw(self._scalar(field)) for _ in range(min(count, 3))]
                target.extend((drawn * count)[:count] if drawn else [])
            elif depth < _DEEPEST:
                for _ in range(min(count, 3)):
                    self._fill(draw, target.add(), depth + 1)
        elif entry is None:
            setattr(message, field.name, draw(self._scalar(field)))
        elif depth < _DEEPEST:
            part = getattr(message, field.name)
            part.SetInParent()
            self._fill(draw, part, depth + 1)

    def _scalar(self, field: FieldDescriptor) -> st.SearchStrategy[Any]:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        if kind == FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return st.binary(max_size=100)
            return self._name if field.name in _NAMES else self._text
        if kind in _FLOATS:
            width: Any = 64 if kind == FieldDescriptor.CPPTYPE_DOUBLE else 32
            return st.one_of(st.floats(width=width), st.sampled_from([0.0, -0.0, 0.5, 1.0]))
        least, most = _WHOLE[kind]
        usual = st.integers(max(least, -3), 12)
        return st.one_of(usual, st.integers(least, most), st.sampled_from([least, most]))


def _seeds(victim: Victim) -> list[Message]:
    """Requests that are in order, or nearly so, from which others are made."""
    scene = victim.scene
    parameters = scene.parameters(batch_size=2)
    pretrain = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(train_file=str(scene.data), model_path=str(scene.model))
    )
    sft = task_pb2.TRAINING_TYPE_SFT
    seeds: list[Message] = [
        task_service_pb2.CreateTaskRequest(
            task=task_pb2.Task(training_type=sft, parameters=parameters), validate_only=True
        ),
        task_service_pb2.CreateTaskRequest(
            task=task_pb2.Task(training_type=task_pb2.TRAINING_TYPE_PRETRAIN, parameters=pretrain),
            start=True,
        ),
        task_service_pb2.UpdateTaskRequest(
            task=task_pb2.Task(name=BARE, parameters=parameters), validate_only=True
        ),
        task_service_pb2.UpdateTaskRequest(task=task_pb2.Task(name=HELD, display_name="other")),
        task_service_pb2.DeleteCheckpointRequest(name=f"{IDLE}/runs/1/checkpoints/1"),
        parameter_service_pb2.ValidateParametersRequest(training_type=sft, parameters=parameters),
        parameter_service_pb2.EstimateTaskRequest(training_type=sft, parameters=parameters),
        parameter_service_pb2.EstimateTaskRequest(task=IDLE),
        template_service_pb2.CreateTemplateRequest(
            template=template_service_pb2.Template(display_name="one", training_type=sft)
        ),
        template_service_pb2.UpdateTemplateRequest(
            template=template_service_pb2.Template(name=TEMPLATE, display_name="custom")
        ),
        dataset_service_pb2.InspectDatasetRequest(path=str(scene.data), training_type=sft),
        dataset_service_pb2.InspectDatasetRequest(path="/nowhere.jsonl", training_type=sft),
    ]
    # What is about a task, a run or a list of them, by the field that names it.
    for rpc in rpcs():
        for field in ("name", "parent", "task", "template"):
            found = rpc.descriptor.input_type.fields_by_name.get(field)
            if rpc.is_ours and found is not None and found.message_type is None:
                seeds += [rpc.request(**{field: name}) for name in (HELD, IDLE, BARE, TEMPLATE)]
    return seeds
