"""InspectDataset on a real daemon: the stream, its errors, and the process behind it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from daemon_process import Daemon, eventually
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    parameters_pb2,
    task_pb2,
    task_service_pb2,
)
from tiny import chats, make_model, write_jsonl

SFT = task_pb2.TRAINING_TYPE_SFT


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that no test ends."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon")).start()
    yield daemon
    daemon.close()


def inspect(
    daemon: Daemon, path: Path | str, *, language: str = "en", **fields: Any
) -> list[dataset_service_pb2.InspectDatasetResponse]:
    """All messages of the stream."""
    return list(begin(daemon, path, language=language, **fields))


def begin(daemon: Daemon, path: Path | str, *, language: str = "en", **fields: Any) -> Any:
    request = dataset_service_pb2.InspectDatasetRequest(
        path=str(path), **{"training_type": SFT, **fields}
    )
    return daemon.datasets.InspectDataset(
        request, timeout=60, metadata=[("accept-language", language)]
    )


def workers(daemon: Daemon) -> list[psutil.Process]:
    """The processes that inspect for a daemon."""
    assert daemon.process is not None
    children = psutil.Process(daemon.process.pid).children()
    return [child for child in children if "--inspect" in child.cmdline()]


class Held:
    """A file that is not read to its end before `release`: its worker stands still meanwhile."""

    def __init__(self, daemon: Daemon, path: Path) -> None:
        line = json.dumps(chats(1)[0]) + "\n"
        path.write_text(line * 100_000)
        before = set(workers(daemon))
        self.call = begin(daemon, path)
        assert next(self.call).HasField("progress")
        [self.worker] = set(workers(daemon)) - before
        self.worker.suspend()


# --- what is told


def test_a_stream_ends_with_the_report_after_its_progress(
    shared: Daemon, tmp_path: Path, model: Path
) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", chats(40))
    *progress, last = inspect(shared, path, tokenizer_path=str(model), max_rendered_samples=2)
    assert progress
    assert all(message.HasField("progress") for message in progress)
    assert progress[-1].progress.bytes_read == path.stat().st_size
    assert progress[-1].progress.samples == 40
    report = last.report
    assert report.format == dataset_service_pb2.DATA_FORMAT_MESSAGES
    assert (report.usable, report.problem, report.tokenizer_problem) == (True, "", "")
    assert (report.samples, report.train_samples, report.size_bytes) == (
        40,
        40,
        path.stat().st_size,
    )
    assert [(count.role, count.turns) for count in report.roles] == [
        ("user", 40),
        ("assistant", 40),
    ]
    assert sum(b.samples for b in report.token_lengths.histogram) == 40
    assert 0 < report.learned_tokens < report.tokens
    assert len(report.rendered_samples) == 2
    learned = [piece.text for piece in report.rendered_samples[0].pieces if piece.learned]
    assert learned == [f"{chats(1)[0]['messages'][1]['content']}<|im_end|>"]


@pytest.mark.parametrize(
    ("language", "problem", "message"),
    [
        ("en", "1 line can't be used; the first is line 2: not JSON", "not JSON"),
        ("zh-CN", "有 1 行无法使用；第一处是第 2 行：不是 JSON", "不是 JSON"),
    ],
)
def test_bad_lines_are_told_in_the_callers_language_and_judged_by_the_policy(
    shared: Daemon, tmp_path: Path, language: str, problem: str, message: str
) -> None:
    path = tmp_path / "chats.jsonl"
    good = json.dumps(chats(1)[0])
    path.write_text(f"{good}\n{{\n")
    report = inspect(shared, path, language=language)[-1].report
    assert not report.usable
    assert report.problem.startswith(problem)
    [bad] = report.bad_lines
    assert (bad.line, bad.byte_offset, bad.reason) == (2, len(good) + 1, "NOT_JSON")
    assert bad.excerpt == "{"
    assert bad.message.startswith(message)
    skipping = inspect(shared, path, bad_line_policy=dataset_service_pb2.BAD_LINE_POLICY_SKIP)
    assert skipping[-1].report.usable
    assert skipping[-1].report.bad_line_count == 1


def test_a_tokenizer_without_a_chat_template_is_a_problem_and_no_error(
    shared: Daemon, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    folder = make_model(tmp_path / "base", None)
    report = inspect(shared, path, tokenizer_path=str(folder), language="zh")[-1].report
    assert report.tokenizer_problem.startswith("无法写出对话")
    assert report.samples == 3


def test_what_an_inspection_found_uncertain_a_check_and_a_start_refuse_at_once(
    shared: Daemon, tmp_path: Path
) -> None:
    """With its sentence, at the field that would mend it; nothing is written or queued."""
    path = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    folder = make_model(tmp_path / "doubtful", "endless")
    given = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(path), model_path=str(folder), output_dir=str(tmp_path / "out")
        )
    )
    question = parameter_service_pb2.ValidateParametersRequest(
        parameters=given, training_type=SFT, device="cpu"
    )
    assert shared.parameters.ValidateParameters(question).valid, "nobody has looked yet"
    report = inspect(shared, path, tokenizer_path=str(folder))[-1].report
    answer = shared.parameters.ValidateParameters(question)
    [found] = [v for v in answer.violations if v.severity == parameter_service_pb2.SEVERITY_ERROR]
    assert not answer.valid
    assert (found.field, found.message) == ("data.tokenizer_path", report.tokenizer_problem)
    request = task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(
            display_name="doubtful", training_type=SFT, parameters=given, device="cpu"
        ),
        start=True,
    )
    with pytest.raises(grpc.RpcError) as caught:
        shared.tasks.CreateTask(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not certain" in (caught.value.details() or "")
    assert not shared.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks


# --- errors


def violations(error: grpc.RpcError) -> dict[str, str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    for detail in status.details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            return {v.field: v.reason for v in bad.field_violations}
    return {}


def test_every_wrong_field_is_named_at_once(shared: Daemon, tmp_path: Path) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        inspect(
            shared,
            tmp_path / "missing.jsonl",
            training_type=task_pb2.TRAINING_TYPE_UNSPECIFIED,
            tokenizer_path="models/base",
            max_seq_length=8193,
            bad_line_policy=9,
            max_rendered_samples=21,
            max_samples=-1,
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations(caught.value) == {
        "path": "FILE_NOT_FOUND",
        "training_type": "REQUIRED",
        "tokenizer_path": "NOT_ABSOLUTE",
        "max_seq_length": "OUT_OF_RANGE",
        "bad_line_policy": "NOT_A_CHOICE",
        "max_rendered_samples": "OUT_OF_RANGE",
        "max_samples": "OUT_OF_RANGE",
    }


@pytest.mark.parametrize(
    ("path", "reason"),
    [("", "REQUIRED"), ("chats.jsonl", "NOT_ABSOLUTE"), ("/", "NOT_A_FILE"), ("/\0", "NOT_A_PATH")],
)
def test_a_path_must_be_a_file_that_is_there(shared: Daemon, path: str, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        inspect(shared, path)
    assert violations(caught.value) == {"path": reason}


def test_an_environment_that_cant_run_is_said_with_its_own_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'No module named finetuned_runner' >&2\nexit 3\n")
    python.chmod(0o755)
    daemon = Daemon(tmp_path, "--runner-python", str(python)).start()
    try:
        path = write_jsonl(tmp_path / "chats.jsonl", chats(1))
        with pytest.raises(grpc.RpcError) as caught:
            inspect(daemon, path)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        details = caught.value.details()
        assert "No module named finetuned_runner (exit status 3)" in details
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info)
        assert info.reason == "ENVIRONMENT_NOT_READY"
    finally:
        daemon.close()


# --- the process behind a call


def test_a_call_that_is_cancelled_takes_its_process_with_it(shared: Daemon, tmp_path: Path) -> None:
    held = Held(shared, tmp_path / "chats.jsonl")
    held.call.cancel()
    eventually(lambda: not held.worker.is_running(), "the worker is gone")
    path = write_jsonl(tmp_path / "few.jsonl", chats(3))
    assert inspect(shared, path)[-1].report.samples == 3


def test_a_third_call_at_once_is_refused_and_served_when_one_has_ended(
    shared: Daemon, tmp_path: Path
) -> None:
    first, second = (Held(shared, tmp_path / f"{number}.jsonl") for number in (1, 2))
    path = write_jsonl(tmp_path / "few.jsonl", chats(3))
    with pytest.raises(grpc.RpcError) as caught:
        inspect(shared, path)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    first.worker.resume()
    *_, last = first.call
    assert last.report.samples == 100_000
    assert inspect(shared, path)[-1].report.samples == 3
    second.call.cancel()
    eventually(lambda: not second.worker.is_running(), "the worker is gone")


def test_the_daemon_stops_at_once_and_tells_who_is_waiting(daemon: Daemon, tmp_path: Path) -> None:
    held = Held(daemon, tmp_path / "chats.jsonl")
    ended = []

    def read() -> None:
        try:
            list(held.call)
        except grpc.RpcError as error:
            ended.append(error.code())

    reader = threading.Thread(target=read)
    reader.start()
    assert daemon.stop() == 0
    reader.join(20)
    assert ended == [grpc.StatusCode.UNAVAILABLE]
    assert not held.worker.is_running()
