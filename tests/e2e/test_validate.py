"""ValidateParameters through the bare protos: all at once, in both languages, nothing written."""

from __future__ import annotations

import json
import re
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameter_service_pb2 as pb2
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2

SFT = task_pb2.TRAINING_TYPE_SFT
HAN = re.compile("[\u4e00-\u9fff]")
CHINESE = (("accept-language", "zh-CN,zh;q=0.9,en;q=0.8"),)


def parameters(scene: Scene, **values: Any) -> parameters_pb2.Parameters:
    """Those of the scene, with values by path (`training__batch_size`)."""
    result = scene.parameters()
    for name, value in values.items():
        section, field = name.split("__")
        setattr(getattr(result, section), field, value)
    return result


def validate(
    daemon: Daemon, given: parameters_pb2.Parameters, metadata: Any = (), **fields: Any
) -> pb2.ValidateParametersResponse:
    fields.setdefault("training_type", SFT)
    request = pb2.ValidateParametersRequest(parameters=given, device="cpu", **fields)
    return daemon.parameters.ValidateParameters(request, metadata=metadata)


def test_five_at_once_in_both_languages(daemon: Daemon, scene: Scene) -> None:
    given = parameters(
        scene,
        data__train_file=str(scene.root / "absent"),
        training__batch_size=0,
        training__optimizer="nope",
        optimization__bf16=True,
        training__early_stopping_patience=3,
    )
    english, chinese = validate(daemon, given), validate(daemon, given, CHINESE)
    assert not english.valid
    assert {(v.field, v.reason) for v in english.violations} == {
        ("data.train_file", "FILE_NOT_FOUND"),
        ("training.batch_size", "OUT_OF_RANGE"),
        ("training.optimizer", "NOT_A_CHOICE"),
        ("optimization.bf16", "FP16_WITH_BF16"),
        ("training.early_stopping_patience", "EARLY_STOPPING_WITHOUT_EVALUATION"),
    }
    for one, other in zip(english.violations, chinese.violations, strict=True):
        assert (one.field, one.reason, one.severity) == (other.field, other.reason, other.severity)
        assert not HAN.search(one.message)
        assert HAN.search(other.message)
    suggested = {v.field: v for v in english.violations}
    assert suggested["training.batch_size"].suggested_value.number_value == 1
    assert suggested["optimization.bf16"].suggested_field == "optimization.fp16"
    assert english.parameters.training.batch_size == 2, "what is wrong is shown as its default"
    assert english.parameters.optimization.bf16 is True
    tasks = daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks
    assert not tasks


def test_warnings_and_notices_forbid_nothing(daemon: Daemon, scene: Scene) -> None:
    answer = validate(daemon, parameters(scene, training__max_steps=3, training__warmup_steps=5))
    assert answer.valid
    assert [(v.reason, v.severity) for v in answer.violations] == [
        ("WARMUP_LONGER_THAN_RUN", pb2.SEVERITY_WARNING),
        ("FP16_UNAVAILABLE_ON_CPU", pb2.SEVERITY_NOTICE),
    ]
    given = parameters(scene, training__max_steps=3, training__warmup_steps=5)
    task = daemon.create(given, start=True)
    daemon.wait(task.name, "COMPLETED")


def test_an_unfinished_task_is_in_order_until_it_is_to_start(daemon: Daemon, scene: Scene) -> None:
    empty = parameters_pb2.Parameters()
    assert validate(daemon, empty, allow_unfinished=True).valid
    missing = {v.field for v in validate(daemon, empty).violations if v.reason == "REQUIRED"}
    assert missing == {"data.train_file", "data.model_path", "data.output_dir"}
    task = daemon.create(empty)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_absent_fields_are_the_templates_or_the_tasks(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(parameters(scene, training__batch_size=8))
    answer = validate(daemon, parameters_pb2.Parameters(), training_type=0, task=task.name)
    assert answer.valid
    assert answer.parameters.training.batch_size == 8
    answer = validate(
        daemon,
        parameters_pb2.Parameters(),
        training_type=0,
        template="templates/pretrain",
        allow_unfinished=True,
    )
    assert answer.parameters.lora.use_lora is False
    for fields, code in (
        ({"training_type": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"template": "templates/none"}, grpc.StatusCode.NOT_FOUND),
        ({"task": "tasks/none"}, grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            validate(daemon, parameters_pb2.Parameters(), **fields)
        assert caught.value.code() is code


def test_another_tasks_results_in_the_output_folder_are_named(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(), start=True)
    daemon.wait(task.name, "COMPLETED")
    (warning, *_) = validate(daemon, scene.parameters()).violations
    assert (warning.reason, warning.severity) == ("OUTPUT_OF_ANOTHER_TASK", pb2.SEVERITY_WARNING)
    assert task.name in warning.message
    own = validate(daemon, scene.parameters(), training_type=0, task=task.name)
    assert "OUTPUT_OF_ANOTHER_TASK" not in [v.reason for v in own.violations]


def test_create_and_update_say_the_same_in_the_callers_language(
    daemon: Daemon, scene: Scene
) -> None:
    bad = parameters(scene, training__batch_size=0, optimization__bf16=True)
    task = daemon.create(scene.parameters())
    messages = {
        (v.field, v.message)
        for v in validate(daemon, bad, CHINESE).violations
        if v.severity == pb2.SEVERITY_ERROR
    }
    wanted = task_pb2.Task(training_type=SFT, parameters=bad, device="cpu")
    edit = task_pb2.Task(name=task.name, parameters=bad)
    for call, request in (
        (daemon.tasks.CreateTask, task_service_pb2.CreateTaskRequest(task=wanted)),
        (daemon.tasks.UpdateTask, task_service_pb2.UpdateTaskRequest(task=edit)),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request, metadata=CHINESE)
        status = rpc_status.from_call(caught.value)
        assert status is not None
        details = error_details_pb2.BadRequest()
        assert any(packed.Unpack(details) for packed in status.details)
        assert {(v.field, v.description) for v in details.field_violations} == messages


def test_a_suggestion_can_be_put_into_the_request_as_it_comes(daemon: Daemon, scene: Scene) -> None:
    """A front-end needs no knowledge of fields: path and value are those of the JSON form."""
    given = json_format.MessageToDict(
        parameters(scene, training__batch_size=500, optimization__bf16=True),
        preserving_proto_field_name=True,
    )
    for _ in range(5):
        answer = validate(daemon, json_format.ParseDict(given, parameters_pb2.Parameters()))
        wrong = [v for v in answer.violations if v.severity == pb2.SEVERITY_ERROR]
        if not wrong:
            break
        section, field = (wrong[0].suggested_field or wrong[0].field).split(".")
        value = json.loads(json_format.MessageToJson(wrong[0].suggested_value))
        given.setdefault(section, {})[field] = value
    assert answer.valid
