"""Tokens are made while the run trains, in processes of their own, and kept by content."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetuned_daemon.runs.contract import EndReason, Notice, Progress, Spec, TrainingType
from tiny import chats, documents, write_jsonl


def many(path: Path, count: int, *, long_prompts: int = 0) -> Path:
    """Chats enough that processes make their tokens; the last have prompts of 300 words."""
    made = [
        {"messages": [{"role": "user", "content": f"Number {number}?"}, *chat["messages"][1:]]}
        for number, chat in enumerate(chats(count))
    ]
    for chat in made[count - long_prompts :]:
        chat["messages"][0]["content"] += " word" * 300
    return write_jsonl(path, made)


@pytest.fixture
def processes(monkeypatch):
    """Lets two processes make the tokens, whatever the file's size."""
    from finetuned_runner import preparation

    monkeypatch.setattr(preparation, "_SMALL_FILE", 0)
    monkeypatch.setattr(preparation, "_LARGE_FILE", 0)


def prepare(spec: Spec, report: Any) -> tuple[Any, Any]:
    """The preparation of a spec's training data, and its samples."""
    from finetuned_runner import data
    from finetuned_runner.encoding import open_tokenizer

    prepared = data.begin(spec, report)
    tokenizer = open_tokenizer(spec.parameters.data.model_path or "")
    length = spec.parameters.training.max_seq_length
    return prepared.train, prepared.train.samples(tokenizer, length, lambda largest: None)


def all_of(samples: Any) -> list[tuple[list[int], list[int]]]:
    found = [samples[index] for index in range(len(samples))]
    return [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in found]


@pytest.fixture
def report(tmp_path):
    from finetuned_runner.report import Report

    return Report(tmp_path)


@pytest.mark.parametrize("kind", TrainingType)
def test_processes_make_the_tokens_that_this_process_makes(
    shop, tmp_path, report, monkeypatch, kind
):
    """However many make them, they are the same, and so they are from the cache."""
    from finetuned_runner import preparation

    if kind is TrainingType.SFT:
        file = many(tmp_path / "chats.jsonl", 300, long_prompts=20)
    else:
        file = write_jsonl(tmp_path / "texts.jsonl", documents(300))
    spec = shop.make(kind=kind, data={"train_file": str(file)}).spec
    _, here = prepare(spec, report)
    expected = all_of(here)
    if kind is TrainingType.SFT:
        assert len(expected) == 280
    cached = spec.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    monkeypatch.setattr(preparation, "_SMALL_FILE", 0)
    monkeypatch.setattr(preparation, "_LARGE_FILE", 0)
    _, made = prepare(cached, report)
    assert all_of(made) == expected
    monkeypatch.setattr(preparation.Preparation, "_take", None)  # a hit reads no data
    monkeypatch.setattr(preparation.ChatPreparation, "_take", None)
    _, found = prepare(cached, report)
    assert all_of(found) == expected


def test_training_begins_before_all_tokens_are_made(shop, tmp_path, report, processes, monkeypatch):
    """How many samples there are is known once the doubtful ones are made; the rest may follow."""
    from finetuned_runner import preparation

    monkeypatch.setattr(preparation, "_BATCH", 1)
    gate = threading.Event()
    original = preparation.ChatPreparation._take

    def take(self: Any) -> Any:
        taken = original(self)
        if (
            taken and isinstance(taken[0], list) and 200 in taken[0]
        ):  # one of those that surely teach; the other process goes on
            gate.wait()
        return taken

    monkeypatch.setattr(preparation.ChatPreparation, "_take", take)
    file = many(tmp_path / "chats.jsonl", 300, long_prompts=20)
    spec = shop.make(data={"train_file": str(file)}).spec
    preparing, samples = prepare(spec, report)
    assert len(samples) == 280
    assert not preparing._is_complete
    waiting = threading.Thread(target=all_of, args=(samples,))
    waiting.start()
    gate.set()
    waiting.join(30)
    assert not waiting.is_alive()
    assert len(all_of(samples)) == 280


def test_other_data_templates_and_numbers_of_samples_are_not_taken_for_the_same(
    shop, tmp_path, report
):
    """The cache goes by content: any change makes another key."""
    from finetuned_runner.token_store import TokenCache

    file = many(tmp_path / "chats.jsonl", 4)
    model = shop.model()
    cache = TokenCache(tmp_path / "cache")
    options: dict[str, Any] = {"kind": "chats", "max_samples": 0}

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    key = cache.key(sha256(file), model, **options)
    others = {
        cache.key(sha256(many(tmp_path / "other.jsonl", 5)), model, **options),
        cache.key(sha256(file), shop.model("llama3"), **options),
        cache.key(sha256(file), model, kind="chats", max_samples=2),
        cache.key(sha256(file), model, kind="documents", max_samples=0),
    }
    assert len(others | {key}) == 5


def test_a_damaged_entry_is_made_anew_and_the_cache_keeps_its_size(
    shop, tmp_path, report, monkeypatch
):
    """Nothing in the cache can break a run, and what was not used for longest goes first."""
    from finetuned_runner import token_store

    file = many(tmp_path / "chats.jsonl", 8)
    spec = shop.make(data={"train_file": str(file)}).spec
    spec = spec.model_copy(update={"cache_dir": str(tmp_path / "cache")})
    expected = all_of(prepare(spec, report)[1])
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "index.npz").write_bytes(b"PK\x03\x04 no more")
    assert all_of(prepare(spec, report)[1]) == expected
    with (entry / "tokens").open("r+b") as tokens:
        tokens.truncate(8)
    assert all_of(prepare(spec, report)[1]) == expected
    damaged = bytearray((entry / "tokens").read_bytes())
    damaged[40] ^= 1  # of the same length
    (entry / "tokens").write_bytes(damaged)
    assert all_of(prepare(spec, report)[1]) == expected
    os.utime(entry, (1, 1))
    monkeypatch.setattr(token_store, "CACHE_BYTES", 1)
    other = many(tmp_path / "other.jsonl", 9)
    prepare(
        spec.model_copy(
            update={
                "parameters": spec.parameters.model_copy(
                    update={
                        "data": spec.parameters.data.model_copy(update={"train_file": str(other)})
                    }
                )
            }
        ),
        report,
    )
    assert not entry.exists()


def test_what_dead_runs_left_in_the_cache_goes_and_a_cache_that_is_none_does_no_harm(
    shop, tmp_path, report
):
    """Tokens of a killed run are removed by the next; without a cache a run goes on."""
    cache = tmp_path / "cache"
    dead, alive = cache / ".new-999999999-x", cache / f".new-{os.getpid()}-y"
    for folder in (dead, alive):
        folder.mkdir(parents=True)
    spec = shop.make(data={"train_file": str(many(tmp_path / "chats.jsonl", 8))}).spec
    preparing, samples = prepare(spec.model_copy(update={"cache_dir": str(cache)}), report)
    expected = all_of(samples)
    assert (dead.exists(), alive.exists()) == (False, True)
    preparing.close()
    assert all_of(samples) == expected
    (tmp_path / "file").touch()
    for unusable in (tmp_path / "file", Path("/proc/none/cache")):
        spec = spec.model_copy(update={"cache_dir": str(unusable)})
        assert all_of(prepare(spec, report)[1]) == expected


def test_a_doubtful_chat_ends_the_run_before_its_first_step(shop, tmp_path, processes):
    """One chat of each kind is looked at before all others, wherever in the file it stands."""
    good = chats(200)
    odd = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    }
    file = write_jsonl(tmp_path / "chats.jsonl", [*good, odd])
    run = shop.here(shop.make(template="endless", data={"train_file": str(file)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID, run.result
    assert run.result.step == 0
    assert run.result.field == "data.tokenizer_path", "the data is in order"
    assert run.result.detail == "", "the sentence says it all"


def test_a_run_that_makes_its_tokens_on_the_way_is_the_same_run(shop, tmp_path):
    """A real process with processes of its own trains to the bit as one that made all before."""
    file = many(tmp_path / "chats.jsonl", 5000, long_prompts=40)
    assert file.stat().st_size > 256 << 10
    settings: dict[str, Any] = {
        "data": {"train_file": str(file), "dataloader_num_workers": 1, "eval_ratio": 0.01},
        "training": {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 3},
    }
    run = shop.start(shop.make("first", **settings))
    run.wait()
    again = shop.here(shop.make("again", **settings))
    assert run.result.end_reason is EndReason.STEP_LIMIT, run.result
    assert run.losses() == again.losses()
    dropped = [n for n in run.events(Notice) if n.reason == "SAMPLES_DROPPED"]
    whole = json.loads((run.folder / "spec.json").read_text())
    assert whole["cache_dir"] == ""
    assert all("40 of 5000" in notice.message for notice in dropped)


@pytest.mark.parametrize("kind", TrainingType)
def test_bad_lines_at_the_end_of_a_large_file_are_named_before_the_first_step(
    shop, tmp_path, report, processes, monkeypatch, kind
):
    """The first of them, by their numbers in the whole file, however many processes look."""
    from finetuned_runner import document_preparation, preparation
    from finetuned_runner.failures import RunFailed

    monkeypatch.setattr(preparation, "STRETCH", 1000)
    monkeypatch.setattr(document_preparation, "STRETCH", 1000)
    if kind is TrainingType.SFT:
        file = many(tmp_path / "data.jsonl", 200)
    else:
        file = write_jsonl(tmp_path / "data.jsonl", documents(200))
    with file.open("a") as data:
        data.write("\n" + "not JSON\n" * 7)
    spec = shop.make(kind=kind, data={"train_file": str(file)}).spec
    with pytest.raises(RunFailed) as failed:
        prepare(spec, report)
    assert failed.value.reason is EndReason.DATASET_INVALID
    assert list(failed.value.samples) == [202, 203, 204, 205, 206]
    assert "and 2 more" in str(failed.value)


@pytest.mark.parametrize("kind", TrainingType)
def test_a_file_in_stretches_gives_the_tokens_of_the_whole(
    shop, tmp_path, report, monkeypatch, kind
):
    """Wherever a stretch ends: in a line, a blank line, or behind a byte order mark."""
    from finetuned_runner import document_preparation, preparation

    file = tmp_path / "data.jsonl"
    if kind is TrainingType.SFT:
        many(file, 60, long_prompts=3)
    else:
        write_jsonl(file, documents(60))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n"))
    spec = shop.make(kind=kind, data={"train_file": str(file)}).spec
    expected = all_of(prepare(spec, report)[1])
    monkeypatch.setattr(preparation, "_SMALL_FILE", 0)
    monkeypatch.setattr(preparation, "_LARGE_FILE", 0)
    for module in (preparation, document_preparation):
        monkeypatch.setattr(module, "STRETCH", 97)
    assert all_of(prepare(spec, report)[1]) == expected


def test_what_is_added_to_a_file_while_its_tokens_are_made_does_no_harm_and_a_change_is_seen(
    shop, tmp_path, report, processes, monkeypatch
):
    """Chats are read again when their turn comes: only as they were when they were counted."""
    from finetuned_runner import preparation
    from finetuned_runner.failures import RunFailed

    monkeypatch.setattr(preparation, "_BATCH", 1)
    original = preparation.ChatPreparation._take

    def hold_back(change: Any) -> None:
        """Changes the file when the first chat behind those of each kind is asked for."""
        lock, changed = threading.Lock(), [False]

        def take(self: Any) -> Any:
            taken = original(self)
            with lock:
                if taken and isinstance(taken[0], list) and not changed[0]:
                    changed[0] = True
                    change()
            return taken

        monkeypatch.setattr(preparation.ChatPreparation, "_take", take)

    def add(file: Path) -> None:
        with file.open("a") as data:
            data.write("more\n")

    def spoil(file: Path) -> None:
        whole = file.read_bytes()
        file.write_bytes(whole.replace(b"Number", b"Anders"))

    file = many(tmp_path / "added.jsonl", 100)
    hold_back(lambda: add(file))
    spec = shop.make("added", data={"train_file": str(file)}).spec
    assert len(all_of(prepare(spec, report)[1])) == 100
    other = many(tmp_path / "spoilt.jsonl", 90)
    hold_back(lambda: spoil(other))
    spec = shop.make("spoilt", data={"train_file": str(other)}).spec
    with pytest.raises(RunFailed, match="written to while it was read"):
        all_of(prepare(spec, report)[1])


def test_processes_that_were_forked_ahead_are_taken_first_and_end_where_none_needs_them(
    shop, tmp_path
):
    """A process without threads forks them; tokens are the same, and none is left afterwards."""
    file = many(tmp_path / "chats.jsonl", 50)
    spec = shop.make(data={"train_file": str(file)}).spec
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    script = """
import multiprocessing, sys
from pathlib import Path
from finetuned_runner.environment import prepare_without_torch
prepare_without_torch()  # the half of the imports that is of use here
from finetuned_runner import data, encode_process, preparation
from finetuned_runner.encoding import open_tokenizer
from finetuned_runner.report import Report
from finetuned_daemon.runs.contract import Spec

folder = Path(sys.argv[1])
spec = Spec.model_validate_json((folder / "spec.json").read_bytes())
tokenizer = open_tokenizer(spec.parameters.data.model_path)
found = []
for ahead in (False, True):
    if ahead:
        encode_process.fork_ahead()
        encode_process._spawn, preparation._SMALL_FILE = None, 0
        assert len(multiprocessing.active_children()) == encode_process.most_processes()
    report = Report(folder)
    prepared = data.begin(spec, report)
    train, _ = data.samples(prepared, spec.parameters, report, tokenizer, 128, lambda largest: None)
    found.append([train[index]["input_ids"].tolist() for index in range(len(train))])
    for child in multiprocessing.active_children():
        child.join(60)
    assert not multiprocessing.active_children()
assert found[0] == found[1] and len(found[0]) == 50
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_sigterm_to_the_group_saves_while_tokens_are_made(shop, large_file):
    """It ends neither a process that makes them nor the run, which stops with a checkpoint."""
    run = shop.start(shop.make(data={"train_file": str(large_file)}))
    assert makers(run), "all tokens are made"
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 0
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    assert "SIGTERM" in run.result.message
    assert [saved.cause for saved in run.checkpoints()] == ["signal"]


def test_a_file_that_is_rewritten_while_the_run_trains_costs_no_step(shop, tmp_path, large_file):
    """The run ends, as its data is gone, and leaves a checkpoint of what it has learned."""
    file = tmp_path / "chats.jsonl"
    file.write_bytes(large_file.read_bytes())
    run = shop.start(shop.make(data={"train_file": str(file)}))
    assert makers(run), "all tokens are made"
    with file.open("r+b") as data:
        data.write(b" " * file.stat().st_size)
    assert run.wait() == 1
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert "written to while it was read" in run.result.message
    assert [saved.step for saved in run.checkpoints()] == [run.result.step]


def test_the_end_of_a_process_that_makes_tokens_is_not_blamed_on_the_model(shop, large_file):
    """The run crashed then, says what ended, and leaves a checkpoint."""
    run = shop.start(shop.make(data={"train_file": str(large_file)}))
    for maker in makers(run):
        maker.kill()
    assert run.wait() == 1
    assert run.result.end_reason is EndReason.RUNNER_CRASHED, run.result
    assert "process that makes tokens" in run.result.message
    assert [saved.step for saved in run.checkpoints()] == [run.result.step]


def makers(run: Any) -> list[psutil.Process]:
    """The processes that still make tokens of a run's data, once it trains."""
    run.wait_for(lambda run: any(event.step for event in run.events(Progress)))
    children = psutil.Process(run.process.pid).children()
    return [child for child in children if "--multiprocessing-fork" in child.cmdline()]
