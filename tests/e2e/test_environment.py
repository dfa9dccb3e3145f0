"""CheckEnvironment through the bare protos, and the start that checks the same by itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import parameter_service_pb2, task_pb2, task_service_pb2
from finetuned.v1 import system_service_pb2 as pb2
from pythons import python_without

HAN = re.compile("[\u4e00-\u9fff]")
TRAINING = {"accelerate", "jinja2", "peft", "pydantic", "safetensors", "torch", "transformers"}

MakeDaemon = Callable[..., Daemon]


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """Starts daemons with options; each with a state folder of its own."""
    made = list[Daemon]()

    def make(*options: str) -> Daemon:
        root = tmp_path / f"daemon-{len(made)}"
        root.mkdir()
        made.append(Daemon(root, *options))
        return made[-1].start()

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """A Python without any package."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin/python")


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what the probe of a daemon that is started later answers."""
    script = tmp_path / "probe.json"
    monkeypatch.setenv("FAKE_PROBE", str(script))

    def say(**answer: Any) -> None:
        script.write_text(json.dumps({"count": str(tmp_path / "count"), **answer}))

    say()
    return say


def check(
    daemon: Daemon, language: str = "en", *, refresh: bool = False
) -> pb2.CheckEnvironmentResponse:
    request = pb2.CheckEnvironmentRequest(refresh=refresh)
    return daemon.system.CheckEnvironment(
        request, metadata=(("accept-language", language),), timeout=60
    )


def test_a_machine_that_is_ready_says_so(
    make_daemon: MakeDaemon, says: Callable[..., None]
) -> None:
    daemon = make_daemon()
    answer = check(daemon)
    by_name = {item.name: item for item in answer.items}
    assert {"python", "finetuned", "driver", "device/cpu", "disk"} | TRAINING <= set(by_name)
    assert not [i for i in answer.items if i.status == pb2.CHECK_STATUS_ERROR]
    assert by_name["torch"].wanted == ">=2.6"
    assert by_name["torch"].found
    assert answer.runner_python == sys.executable
    assert answer.check_time.seconds > 0
    cpu = answer.devices[-1]
    assert (cpu.device, cpu.bf16, cpu.fp16, cpu.tf32) == ("cpu", True, False, False)
    assert (cpu.four_bit, cpu.eight_bit_optimizer) == (True, True)


def test_sentences_come_in_the_caller_s_language_and_name_what_to_do(
    make_daemon: MakeDaemon, says: Callable[..., None], bare_python: str
) -> None:
    daemon = make_daemon("--runner-python", bare_python)
    english, chinese = check(daemon), check(daemon, "zh-CN")
    assert english.status == chinese.status == pb2.CHECK_STATUS_ERROR
    for one, other in zip(english.items, chinese.items, strict=True):
        assert (one.name, one.reason, one.status) == (other.name, other.reason, other.status)
        if one.status == pb2.CHECK_STATUS_ERROR:
            assert one.reason
            assert one.remedy
            assert not HAN.search(one.message + one.remedy)
        if one.message:
            assert HAN.search(other.message)


def test_a_start_with_a_python_without_packages_is_refused_and_names_each(
    make_daemon: MakeDaemon, scene: Scene, bare_python: str
) -> None:
    daemon = make_daemon("--runner-python", bare_python)
    task = daemon.create(scene.play(steps=1))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    status = rpc_status.from_call(caught.value)
    failure, info = error_details_pb2.PreconditionFailure(), error_details_pb2.ErrorInfo()
    for detail in status.details:
        detail.Unpack(failure)
        detail.Unpack(info)
    assert info.reason == "ENVIRONMENT_NOT_READY"
    text = " ".join(violation.description for violation in failure.violations)
    for package in {"finetuned", *TRAINING}:
        assert f"{package} " in text
    assert f"{bare_python} -m pip install 'finetuned[train]" in text
    assert daemon.get(task.name).state == task_pb2.TASK_STATE_PENDING


def test_a_start_in_4_bits_is_refused_where_bitsandbytes_is_missing_with_what_brings_it(
    make_daemon: MakeDaemon, scene: Scene, says: Callable[..., None], tmp_path: Path
) -> None:
    python = python_without(tmp_path / "plain", "bitsandbytes")
    daemon = make_daemon("--runner-python", python)
    parameters = scene.play(steps=1)
    parameters.optimization.use_qlora = True
    parameters.training.optimizer = "adamw_8bit"
    task = daemon.create(parameters)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "bitsandbytes is not installed" in caught.value.details()
    assert f"{python} -m pip install 'finetuned[qlora]'" in caught.value.details()
    request = parameter_service_pb2.ValidateParametersRequest(
        training_type=task_pb2.TRAINING_TYPE_SFT, parameters=parameters, device="cpu"
    )
    found = daemon.parameters.ValidateParameters(request).violations
    assert {v.field for v in found if v.reason == "BITSANDBYTES_MISSING"} == {
        "optimization.use_qlora",
        "training.optimizer",
    }
    # All else trains there.
    daemon.wait(daemon.create(scene.play(steps=1), start=True).name, "COMPLETED")


def test_a_creation_with_start_is_refused_alike_and_leaves_no_task(
    make_daemon: MakeDaemon, scene: Scene, bare_python: str
) -> None:
    daemon = make_daemon("--runner-python", bare_python)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.create(scene.play(steps=1), start=True)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert not daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks


def test_a_run_starts_while_the_probe_hangs(
    make_daemon: MakeDaemon, says: Callable[..., None], scene: Scene
) -> None:
    says(hang=True)
    daemon = make_daemon()
    task = daemon.create(scene.play(steps=1), start=True)
    daemon.wait(task.name, "COMPLETED")
    assert daemon.stop() == 0  # and not killed, which would leave the probe behind


def test_a_restarted_daemon_asks_nothing_again_until_told_to(
    make_daemon: MakeDaemon, says: Callable[..., None], tmp_path: Path
) -> None:
    daemon = make_daemon()
    first = check(daemon)
    daemon.kill()
    daemon.start()
    assert check(daemon).check_time == first.check_time
    assert (tmp_path / "count").read_bytes() == b"."
    assert check(daemon, refresh=True).check_time != first.check_time
    assert (tmp_path / "count").read_bytes() == b".."


def test_a_daemon_that_stops_ends_its_probe_at_once(
    make_daemon: MakeDaemon, says: Callable[..., None], tmp_path: Path
) -> None:
    says(hang=True)
    daemon = make_daemon()
    call = daemon.system.CheckEnvironment.future(pb2.CheckEnvironmentRequest(), timeout=60)
    text = eventually(
        lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the probe hangs"
    )
    begin = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - begin < 10
    assert not psutil.pid_exists(int(text))
    assert call.exception() is not None
