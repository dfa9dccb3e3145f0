"""The worker: what it remembers, how many at once, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import sys
from pathlib import Path

import pytest

from daemon_process import eventually
from finetuned._paths import paths
from finetuned_daemon.config import Config
from finetuned_daemon.dataset.report import InspectRequest, MeasureRequest, Progress
from finetuned_daemon.dataset.worker import Worker
from finetuned_daemon.errors import InvalidRequest, LimitReached, Stopping, WrongState
from finetuned_daemon.runs.contract import TrainingType
from tiny import chats, make_model, write_jsonl

SFT = TrainingType.SFT
PYTHON = shlex.quote(sys.executable)


def make_worker(tmp_path: Path, script: str) -> Worker:
    """A worker whose Python is a shell script."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (tmp_path / "state").mkdir()
    folders = paths(tmp_path / "state", tmp_path / "run")
    return Worker(Config(paths=folders, runner_python=str(python)))


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().splitlines())


async def test_a_measurement_is_remembered_until_data_or_tokenizer_change(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, f'echo "$@" >> {tmp_path}/starts\nexec {PYTHON} "$@"')
    model = make_model(tmp_path / "model")
    path = write_jsonl(tmp_path / "chats.jsonl", chats(6))
    request = MeasureRequest(
        training_type=SFT, train_file=str(path), tokenizer_path=str(model), max_seq_length=128
    )
    first = await worker.measure(request)
    assert (first.train_samples, first.exact) == (6, True)
    assert await worker.measure(request) is first
    assert starts(tmp_path) == 1
    write_jsonl(path, chats(7))
    assert (await worker.measure(request)).train_samples == 7
    for number, name in enumerate(("chat_template.jinja", "vocab.json"), 3):
        (model / name).touch()
        assert (await worker.measure(request)).train_samples == 7
        assert starts(tmp_path) == number
    await worker.close()


async def test_who_asks_for_the_same_measurement_shares_one_process(tmp_path: Path) -> None:
    """A front-end that asks at every keystroke is never told that too many ask."""
    worker = make_worker(tmp_path, f'echo "$@" >> {tmp_path}/starts\nexec {PYTHON} "$@"')
    model = make_model(tmp_path / "model")
    path = write_jsonl(tmp_path / "chats.jsonl", chats(6))
    request = MeasureRequest(
        training_type=SFT, train_file=str(path), tokenizer_path=str(model), max_seq_length=128
    )
    askers = [asyncio.ensure_future(worker.measure(request)) for _ in range(5)]
    await asyncio.to_thread(eventually, (tmp_path / "starts").exists, "the process starts")
    askers.pop().cancel()  # the others go on waiting
    answers = await asyncio.gather(*askers)
    assert {answer.train_samples for answer in answers} == {6}
    assert starts(tmp_path) == 1
    await worker.close()


async def test_a_measurement_that_nobody_waits_for_any_more_ends(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, f"echo $$ > {tmp_path}/pid\nexec sleep 1000")
    request = MeasureRequest(
        training_type=SFT, train_file="/x", tokenizer_path="/y", max_seq_length=128
    )
    askers = [asyncio.ensure_future(worker.measure(request)) for _ in range(2)]
    file = tmp_path / "pid"
    await asyncio.to_thread(eventually, lambda: file.exists() and file.read_text(), "it runs")
    for asker in askers:
        asker.cancel()
    await asyncio.wait(askers)
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    await worker.close()


async def test_what_cant_be_measured_is_an_invalid_field(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, f'exec {PYTHON} "$@"')
    path = write_jsonl(tmp_path / "chats.jsonl", chats(6))
    request = MeasureRequest(
        training_type=SFT, train_file=str(path), tokenizer_path=str(tmp_path), max_seq_length=128
    )
    with pytest.raises(InvalidRequest) as caught:
        await worker.measure(request)
    [violation] = caught.value.violations
    assert (violation.field, violation.reason) == ("data.tokenizer_path", "TOKENIZER_UNUSABLE")
    assert violation.message.zh.startswith("无法加载")


async def test_a_doubtful_template_is_remembered_until_files_change_or_are_measured_again(
    tmp_path: Path,
) -> None:
    """Of a measurement and of an inspection, for any length and without a process."""
    worker = make_worker(tmp_path, f'echo "$@" >> {tmp_path}/starts\nexec {PYTHON} "$@"')
    model = make_model(tmp_path / "model", "endless")
    path = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    request = MeasureRequest(
        training_type=SFT, train_file=str(path), tokenizer_path=str(model), max_seq_length=128
    )
    assert await worker.refused(request) == []
    with pytest.raises(InvalidRequest) as caught:
        await worker.measure(request)
    [violation] = caught.value.violations
    longer = request.model_copy(update={"max_seq_length": 256})
    assert await worker.refused(longer) == [violation]
    assert await worker.refused(request.model_copy(update={"max_samples": 1})) == []
    (model / "chat_template.jinja").touch()
    assert await worker.refused(request) == []
    inspection = InspectRequest(training_type=SFT, path=str(path), tokenizer_path=str(model))
    async for _ in worker.inspect(inspection):
        pass
    assert await worker.refused(request) == [violation]
    with_evaluation = request.model_copy(update={"eval_file": str(path)})
    assert await worker.refused(with_evaluation) == [violation]
    assert starts(tmp_path) == 2
    # As an environment that was brought up to date would answer.
    measured = '{"kind": "measured", "exact": true, "train": {"samples": 3}}'
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{measured}'\n")
    assert (await worker.measure(request)).train_samples == 3
    assert await worker.refused(request) == []
    await worker.close()


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo first >&2; echo last words >&2; exit 3", r"last words \(exit status 3\)"),
        ("kill -9 $$", "signal SIGKILL"),
        ("echo hello", "is no answer"),
    ],
)
async def test_a_process_that_gives_no_answer_is_an_environment_that_is_not_ready(
    tmp_path: Path, script: str, why: str
) -> None:
    worker = make_worker(tmp_path, script)
    with pytest.raises(WrongState, match=why) as caught:
        async for _ in worker.inspect(InspectRequest(training_type=SFT, path="/x")):
            pass
    assert caught.value.reason == "ENVIRONMENT_NOT_READY"


async def test_a_python_that_is_not_there_is_an_environment_that_is_not_ready(
    tmp_path: Path,
) -> None:
    worker = make_worker(tmp_path, "")
    (tmp_path / "python").unlink()
    with pytest.raises(WrongState, match="No such file"):
        async for _ in worker.inspect(InspectRequest(training_type=SFT, path="/x")):
            pass


PATIENT = """echo $$ >> pids
echo '{"kind": "progress", "bytes_read": 0, "bytes_total": 0, "samples": 0, "bad_lines": 0}'
exec cat > /dev/null"""
"""Tells its progress, and then waits for what never comes."""


async def test_two_at_once_are_answered_a_third_is_refused_and_all_end_with_the_worker(
    tmp_path: Path,
) -> None:
    worker = make_worker(tmp_path, PATIENT)
    request = InspectRequest(training_type=SFT, path="/x")
    async with (
        contextlib.aclosing(worker.inspect(request)) as first,
        contextlib.aclosing(worker.inspect(request)) as second,
    ):
        assert isinstance(await anext(first), Progress)
        assert isinstance(await anext(second), Progress)
        with pytest.raises(LimitReached):
            await anext(worker.inspect(request))
        await second.aclose()
        third = worker.inspect(request)
        assert isinstance(await anext(third), Progress)
        waiting = [asyncio.ensure_future(anext(answers)) for answers in (first, third)]
        await asyncio.sleep(0)
        await worker.close()
        for answer in waiting:
            with pytest.raises(Stopping):
                await answer
    with pytest.raises(Stopping):
        await anext(worker.inspect(request))
    pids = [int(pid) for pid in (tmp_path / "state" / "pids").read_text().split()]
    assert len(pids) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_whoever_is_cancelled_leaves_no_process_and_makes_room(tmp_path: Path) -> None:
    worker = make_worker(tmp_path, PATIENT)
    request = MeasureRequest(
        training_type=SFT, train_file="/x", tokenizer_path="/y", max_seq_length=128
    )
    pids = tmp_path / "state" / "pids"
    for number in range(1, 4):
        asked = asyncio.ensure_future(worker.measure(request))
        await asyncio.to_thread(
            eventually,
            lambda: pids.exists() and len(pids.read_text().split()) == number,  # noqa: B023
            "the process has started",
        )
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
