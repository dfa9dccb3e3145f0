"""The protos: their lint, the freshness of the stubs, and that every other table says the same."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from conftest import REPOSITORY
from finetuned.v1 import (
    event_pb2,
    parameters_pb2,
    system_service_pb2,
    task_pb2,
)
from finetuned_daemon import devices, tasks
from finetuned_daemon.parameters.models import SECTIONS
from finetuned_daemon.runs import contract

STUBS = REPOSITORY / "client/finetuned/v1"


def test_the_protos_pass_buf_lint() -> None:
    buf = Path(sys.executable).parent / "buf"
    result = subprocess.run(
        [buf, "lint"], cwd=REPOSITORY / "proto", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_committed_stubs_are_what_the_protos_generate(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, REPOSITORY / "proto/generate.py", tmp_path],
        check=True,
        capture_output=True,
    )
    fresh = {path.name: path.read_text() for path in (tmp_path / "finetuned/v1").iterdir()}
    committed = {
        path.name: path.read_text()
        for path in STUBS.iterdir()
        if path.suffix in (".py", ".pyi") and path.name != "__init__.py"
    }
    assert fresh == committed, "run `make proto` and commit the result"


def test_the_floors_of_grpcio_and_protobuf_are_those_that_the_stubs_check() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    floors = dict(
        re.match(r"([a-z-]+)>=([0-9.]+)", requirement).groups()  # type: ignore[union-attr]
        for requirement in project["dependencies"]
    )
    grpc_stub = (STUBS / "task_service_pb2_grpc.py").read_text()
    proto_stub = (STUBS / "task_service_pb2.py").read_text()
    assert floors["grpcio"] in re.findall(r"GRPC_GENERATED_VERSION = '([0-9.]+)'", grpc_stub)
    assert floors["protobuf"] in re.findall(r"Protobuf Python Version: ([0-9.]+)", proto_stub)


PAYLOADS = {"PhaseChange": contract.PhaseChange, "Progress": contract.Progress} | {
    name: getattr(contract, name)
    for name in (
        *("Metrics", "LogLine", "CheckpointSaved", "CheckpointDeleted", "Evaluation", "Notice"),
        "ProbeReport",
    )
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_a_runner_reports_has_the_fields_of_its_message(name: str) -> None:
    message: Descriptor = (
        task_pb2.Progress.DESCRIPTOR if name == "Progress" else getattr(event_pb2, name).DESCRIPTOR
    )
    assert list(PAYLOADS[name].model_fields) == [field.name for field in message.fields]


def test_every_kind_of_event_is_one_of_the_oneof() -> None:
    oneof = [f.name for f in event_pb2.Event.DESCRIPTOR.oneofs_by_name["payload"].fields]
    of_the_daemon = {"state_change", "result", "task_edited"}
    assert set(contract.PAYLOADS) == set(oneof) - of_the_daemon


@pytest.mark.parametrize(
    ("enum", "names"),
    [
        (task_pb2.DESCRIPTOR.enum_types_by_name["TaskState"], list(tasks.TaskState)),
        (task_pb2.DESCRIPTOR.enum_types_by_name["RunPhase"], list(contract.RunPhase)),
        (task_pb2.DESCRIPTOR.enum_types_by_name["EndReason"], list(contract.EndReason)),
        (task_pb2.DESCRIPTOR.enum_types_by_name["TrainingType"], list(contract.TrainingType)),
        (system_service_pb2.DESCRIPTOR.enum_types_by_name["DeviceType"], list(devices.DeviceType)),
    ],
)
def test_enums_of_the_daemon_are_those_of_the_protos(
    enum: EnumDescriptor, names: list[str]
) -> None:
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
    expected = [f"{prefix}_UNSPECIFIED", *(f"{prefix}_{name}" for name in names)]
    if enum.name == "DeviceType":
        expected.sort()
        assert sorted(value.name for value in enum.values) == expected
    else:
        assert [value.name for value in enum.values] == expected


def test_every_end_reason_has_its_state_and_sentence_as_the_proto_says() -> None:
    assert set(tasks.ENDS) == set(contract.EndReason)
    text = (REPOSITORY / "proto/finetuned/v1/task.proto").read_text()
    for reason, end in tasks.ENDS.items():
        comment = re.search(rf"// (.*)\n  END_REASON_{reason} =", text)
        assert comment is not None
        assert comment[1].endswith(f"{end.state}."), f"{reason} ends as {end.state}"
        assert end.sentence.en.endswith(".")


TYPES = {
    FieldDescriptor.TYPE_STRING: "str",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_INT32: "int",
    FieldDescriptor.TYPE_DOUBLE: "float",
    FieldDescriptor.TYPE_MESSAGE: "list[str]",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_parameters_have_the_same_names_and_types_in_protos_and_models(section: str) -> None:
    message = parameters_pb2.Parameters.DESCRIPTOR.fields_by_name[section].message_type
    of_models = dict[str, str]()
    for name, info in SECTIONS[section].model_fields.items():
        annotation = str(info.annotation).replace("typing.", "")
        of_models[name] = (
            "str"
            if annotation.startswith("Literal") or annotation == "str | None"
            else annotation.removeprefix("<class '").removesuffix("'>")
        )
    assert of_models == {field.name: TYPES[field.type] for field in message.fields}
    assert all(field.has_presence for field in message.fields), "absent can be told from a value"
