"""Inspections say what runs do: the same reader, the same mask, the same cuts."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.dataset.formats import DataFormat
from finetuned_daemon.dataset.report import (
    ANSWER,
    BadLinePolicy,
    Failure,
    InspectRequest,
    Measured,
    MeasureRequest,
    Progress,
    Report,
)
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import Spec, TrainingType
from run_samples import samples_of
from tiny import chats, documents, make_model, write_jsonl

SFT, PRETRAIN = TrainingType.SFT, TrainingType.PRETRAIN


@pytest.fixture(scope="session")
def model(models: Path) -> Path:
    return make_model(models / "chatml")


def look(path: Path, model: Path | None = None, kind: TrainingType = SFT, **fields: Any) -> Report:
    """The report of a file, made in this process."""
    from finetuned_runner.inspection import inspect

    request = InspectRequest(
        training_type=kind,
        path=str(path),
        tokenizer_path=str(model) if model else "",
        **{"max_seq_length": 128, **fields},
    )
    return inspect(request, lambda answer: None)


def ask(path: Path, model: Path, kind: TrainingType = SFT, **fields: Any) -> Measured:
    from finetuned_runner.inspection import measure

    return measure(
        MeasureRequest(
            training_type=kind,
            train_file=str(path),
            tokenizer_path=str(model),
            **{"max_seq_length": 128, **fields},
        )
    )


def as_trained(
    path: Path, model: Path, report: Any, kind: TrainingType, length: int = 128
) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each sample of a real run."""
    parameters = Parameters.model_validate(
        {
            "data": {"train_file": str(path), "model_path": str(model)},
            "training": {"max_seq_length": length},
        }
    )
    spec = Spec(
        task="tasks/test",
        run=1,
        training_type=kind,
        device="cpu",
        output_dir="",
        parameters=parameters,
    )
    shutil.rmtree(report.run_dir / "tokens", ignore_errors=True)  # of an earlier call
    samples = samples_of(spec, report)
    found = [samples[index] for index in range(len(samples))]
    return [(s["input_ids"].tolist(), s["labels"].tolist()) for s in found]


@pytest.fixture
def report(tmp_path: Path) -> Any:
    from finetuned_runner.report import Report

    return Report(tmp_path)


def mixed_chats(path: Path) -> Path:
    """Chats of which some are cut and some have nothing to learn within 128 tokens."""
    records = chats(60, turns=2) + chats(20, turns=6)
    silent = {"messages": [{"role": "user", "content": "word " * 300}, records[0]["messages"][1]]}
    return write_jsonl(path, [*records[:30], silent, *records[30:], silent])


# --- what a run trains on


def test_the_figures_of_chats_are_those_of_a_run(tmp_path, model, report):
    path = mixed_chats(tmp_path / "chats.jsonl")
    samples = as_trained(path, model, report, SFT)
    tokens = sum(len(ids) for ids, _ in samples)
    seen = look(path, model)
    assert seen.train_samples == len(samples)
    assert seen.tokens == tokens
    assert seen.learned_tokens == sum(label != -100 for _, labels in samples for label in labels)
    assert (seen.samples, seen.empty_samples) == (82, 2)
    assert seen.cut_samples >= 20
    assert seen.problem.en == seen.tokenizer_problem.en == ""
    measured = ask(path, model)
    assert measured.exact
    assert measured.train_samples == len(samples)
    assert measured.train.dropped == 2
    assert measured.train.cut == seen.cut_samples
    assert measured.train.tokens == tokens
    assert measured.train.learned_tokens == seen.learned_tokens
    assert list(measured.train.longest) == sorted(
        ((len(ids), sum(label != -100 for label in labels)) for ids, labels in samples),
        reverse=True,
    )
    assert measured.train.mean_length == tokens / len(samples)


@pytest.mark.parametrize("name", ["texts.jsonl", "book.txt"])
def test_the_figures_of_documents_are_those_of_a_run(tmp_path, model, report, name, monkeypatch):
    from finetuned_runner import pieces

    monkeypatch.setattr(pieces, "_PIECE_CHARACTERS", 500)
    path = tmp_path / name
    if name.endswith("txt"):
        path.write_text("\n".join(document["text"] for document in documents(40)))
    else:
        write_jsonl(path, documents(40))
    blocks = as_trained(path, model, report, PRETRAIN)
    tokens = sum(len(ids) for ids, _ in blocks)
    seen = look(path, model, PRETRAIN)
    assert seen.train_samples == len(blocks)
    assert seen.tokens == seen.learned_tokens == tokens
    assert (seen.cut_samples, seen.empty_samples) == (0, 0)
    measured = ask(path, model, PRETRAIN)
    assert (measured.exact, measured.train_samples) == (True, len(blocks))
    assert measured.train.tokens == tokens
    assert [tokens for tokens, _ in measured.train.longest] == [len(ids) for ids, _ in blocks]


def test_a_long_document_in_pieces_gives_the_tokens_of_the_whole(
    tmp_path, model, report, monkeypatch
):
    from finetuned_runner import pieces

    path = tmp_path / "book.txt"
    path.write_text("\n".join(document["text"] for document in documents(40)))
    whole = as_trained(path, model, report, PRETRAIN)
    monkeypatch.setattr(pieces, "_PIECE_CHARACTERS", 300)
    assert as_trained(path, model, report, PRETRAIN) == whole
    path.write_text(path.read_text().replace("\n", " "))
    in_pieces = as_trained(path, model, report, PRETRAIN)
    monkeypatch.undo()
    assert as_trained(path, model, report, PRETRAIN) == in_pieces


def test_alpaca_and_sharegpt_files_train_as_the_same_chats_do(tmp_path, model, report):
    pairs = [chat["messages"] for chat in chats(12)]
    same = [
        write_jsonl(tmp_path / "messages.jsonl", [{"messages": pair} for pair in pairs]),
        write_jsonl(
            tmp_path / "alpaca.jsonl",
            [{"instruction": q["content"], "input": "", "output": a["content"]} for q, a in pairs],
        ),
        write_jsonl(
            tmp_path / "sharegpt.jsonl",
            [
                {
                    "conversations": [
                        {"from": "human", "value": q["content"]},
                        {"from": "gpt", "value": a["content"]},
                    ]
                }
                for q, a in pairs
            ],
        ),
        tmp_path / "array.json",
    ]
    same[3].write_text(json.dumps([{"messages": pair} for pair in pairs], indent=2))
    first, *others = [as_trained(path, model, report, SFT) for path in same]
    assert len(first) == 12
    assert all(other == first for other in others)


# --- the report


def test_formats_bad_lines_and_duplicates_are_counted(tmp_path):
    chat = chats(1)[0]
    question, answer = (message["content"] for message in chat["messages"])
    alpaca = {"instruction": question, "output": answer}
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join([json.dumps(chat), json.dumps(alpaca), "{", json.dumps(alpaca), '{"text": "a"}'])
    )
    seen = look(path)
    assert [(count.format, count.samples) for count in seen.formats] == [
        (DataFormat.ALPACA, 2),
        (DataFormat.MESSAGES, 1),
    ]
    assert seen.format is DataFormat.ALPACA
    assert seen.duplicates == 2, "in another format it is the same chat"
    assert seen.bad_line_count == 2
    assert [(bad.line, bad.reason) for bad in seen.bad_lines] == [
        (3, "NOT_JSON"),
        (5, "TEXT_FOR_SFT"),
    ]
    assert seen.problem.en.startswith("2 lines can't be used; the first is line 3: not JSON")
    assert seen.problem.zh.startswith("有 2 行无法使用；第一处是第 3 行")
    assert (seen.token_lengths, seen.train_samples, seen.rendered_samples) == (None, 0, ())
    assert look(path, bad_line_policy=BadLinePolicy.SKIP).problem.en == ""
    first = look(path, max_samples=2)
    assert (first.samples, first.bad_line_count, first.problem.en) == (2, 0, "")


def test_a_file_without_a_sample_is_no_use_under_either_policy(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n")
    for policy in BadLinePolicy:
        assert look(path, bad_line_policy=policy).problem.zh == "文件中没有样本"
    path.write_text("{}\n" * 120)
    seen = look(path, bad_line_policy=BadLinePolicy.SKIP)
    assert seen.problem.en == "The file holds no sample"
    assert (len(seen.bad_lines), seen.bad_line_count) == (100, 120)


def test_roles_and_turns_are_counted_and_long_chats_share_an_entry(tmp_path):
    path = tmp_path / "chats.jsonl"
    write_jsonl(path, [chats(1, turns=turns)[0] for turns in range(1, 61)])
    seen = look(path)
    pairs = sum(range(1, 61))
    assert {count.role: count.turns for count in seen.roles} == {
        "user": pairs,
        "assistant": pairs,
    }
    assert len(seen.turns) == 50
    assert [count.turns for count in seen.turns] == list(range(2, 102, 2))
    last = seen.turns[-1]
    assert (last.turns, last.samples, last.or_more) == (100, 11, True)
    assert sum(count.samples for count in seen.turns) == 60


def test_lengths_are_percentiles_by_nearest_rank_and_bins_that_hold_every_sample(tmp_path, model):
    from finetuned_runner.chat_mask import ChatMask
    from finetuned_runner.encoding import open_tokenizer

    path = mixed_chats(tmp_path / "chats.jsonl")
    tokenizer: Any = open_tokenizer(str(model))
    mask = ChatMask(tokenizer)
    lengths = sorted(
        len(tokenizer(mask.render(json.loads(line)["messages"]).text)["input_ids"])
        for line in path.read_text().splitlines()
    )
    found = look(path, model).token_lengths
    assert found is not None
    assert (found.minimum, found.maximum) == (lengths[0], lengths[-1])
    assert found.mean == pytest.approx(sum(lengths) / len(lengths))
    for percent in (50, 90, 95, 99):
        rank = math.ceil(percent / 100 * len(lengths))
        assert getattr(found, f"p{percent}") == lengths[rank - 1]
    bins = found.histogram
    assert len(bins) <= 20
    assert bins[0].start == 0
    assert bins[-1].start <= lengths[-1] < bins[-1].end
    assert len({b.end - b.start for b in bins}) == 1
    assert [b.end for b in bins[:-1]] == [b.start for b in bins[1:]]
    for b in bins:
        assert b.samples == sum(b.start <= length < b.end for length in lengths)


def test_what_is_rendered_as_learned_is_the_assistants_words_and_the_end_of_turn(tmp_path, model):
    record = chats(1, turns=2)[0]
    record["messages"][1]["content"] = "你好 😀 \\ `ls`"
    path = write_jsonl(tmp_path / "chats.jsonl", [record])
    [sample] = look(path, model, max_seq_length=512).rendered_samples
    learned = [piece.text for piece in sample.pieces if piece.learned]
    assert learned == [f"{record['messages'][i]['content']}<|im_end|>" for i in (1, 3)]
    assert "".join(piece.text for piece in sample.pieces).count("<|im_start|>") == 5
    assert not sample.cut
    [short] = look(path, model, max_seq_length=128).rendered_samples
    assert short == sample
    assert 0 < sample.learned_tokens < sample.tokens


def test_what_is_cut_off_is_not_rendered(tmp_path, model):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(1, turns=6))
    [whole] = look(path, model, max_seq_length=512).rendered_samples
    [sample] = look(path, model, max_seq_length=128).rendered_samples
    text = "".join(piece.text for piece in sample.pieces)
    everything = "".join(piece.text for piece in whole.pieces)
    assert sample.cut
    assert everything.startswith(text)
    assert len(text) < len(everything)
    assert sample.tokens == whole.tokens > 128
    assert sample.learned_tokens < whole.learned_tokens


def test_a_document_is_learned_whole_with_its_end(tmp_path, model):
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": "How do I list files?"}])
    [sample] = look(path, model, PRETRAIN).rendered_samples
    assert [(piece.text, piece.learned) for piece in sample.pieces] == [
        ("How do I list files?<|im_end|>", True)
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 20])
def test_rendered_samples_are_spread_over_the_file(tmp_path, model, count):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(200))
    lines = [s.line for s in look(path, model, max_rendered_samples=count).rendered_samples]
    assert len(lines) == count
    assert lines == sorted(set(lines))
    gaps = [after - before for before, after in zip(lines, [*lines, 201][1:], strict=True)]
    assert all(gap <= 400 / count for gap in gaps)


@pytest.mark.parametrize(
    ("template", "english", "chinese"),
    [
        (None, "no chat template", "没有对话模板"),
        ("shouting", "line 1: it is not certain which tokens are the assistant's", "第 1 行"),
    ],
)
def test_a_mask_that_is_not_certain_is_said_and_the_rest_still_reported(
    tmp_path, models, template, english, chinese
):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(300))
    seen = look(path, make_model(models / f"template-{template}", template))
    assert english in seen.tokenizer_problem.en
    assert chinese in seen.tokenizer_problem.zh
    assert seen.problem == seen.tokenizer_problem, "a run could not use it so"
    assert seen.samples == 300
    assert sum(count.turns for count in seen.roles) == 600
    assert (seen.token_lengths, seen.train_samples) == (None, 0)


def test_a_tokenizer_that_cant_be_loaded_is_said_and_the_rest_still_reported(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    seen = look(path, tmp_path)
    assert seen.tokenizer_problem.en.startswith(f"The tokenizer in {tmp_path} can't be loaded")
    assert seen.tokenizer_problem.zh.startswith(f"无法加载 {tmp_path} 中的分词器")
    assert seen.samples == 3


def test_samples_with_nothing_to_learn_alone_are_no_use(tmp_path, model):
    turns = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "no"}]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": turns}] * 3)
    seen = look(path, model)
    assert (seen.train_samples, seen.empty_samples, seen.cut_samples) == (0, 3, 3)
    assert seen.problem.en.startswith("No sample has an assistant's token within 128 tokens")
    assert ask(path, model).train_samples == 0


# --- measurements


def test_a_large_file_is_measured_by_its_beginning_and_counted_to_its_end(
    tmp_path, model, monkeypatch
):
    from finetuned_runner import token_figures

    path = write_jsonl(tmp_path / "chats.jsonl", chats(640) * 2)
    texts = write_jsonl(tmp_path / "texts.jsonl", documents(640))
    exact, exact_texts = ask(path, model), ask(texts, model, PRETRAIN)
    monkeypatch.setattr(token_figures, "_MEASURED_SAMPLES", 300)
    part, part_texts = ask(path, model), ask(texts, model, PRETRAIN)
    assert exact.exact
    assert exact_texts.exact
    assert not part.exact
    assert not part_texts.exact
    assert part.train_samples == exact.train_samples == 1280
    assert part.train.tokens == pytest.approx(exact.train.tokens, rel=0.02)
    assert part.train.learned_tokens == pytest.approx(exact.train.learned_tokens, rel=0.02)
    assert len(part.train.longest) == 256
    assert part_texts.train_samples == pytest.approx(exact_texts.train_samples, rel=0.02)


def test_an_evaluation_file_is_measured_whole(tmp_path, model):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(30))
    others = write_jsonl(tmp_path / "eval.jsonl", chats(20))
    measured = ask(path, model, eval_file=str(others), max_samples=10)
    assert (measured.train_samples, measured.eval_samples) == (10, 20)


@pytest.mark.parametrize(
    ("train", "evaluation", "field", "reason"),
    [
        ("{}\n", None, "data.train_file", "BAD_DATA_LINE"),
        ("", None, "data.train_file", "DATA_EMPTY"),
        (None, None, "data.train_file", "NOT_READABLE"),
        (json.dumps(chats(1)[0]), "{}\n", "data.eval_file", "BAD_DATA_LINE"),
    ],
)
def test_what_cant_be_measured_names_the_field(tmp_path, model, train, evaluation, field, reason):
    from finetuned_runner.inspection import answer

    for name, text in (("train.jsonl", train), ("eval.jsonl", evaluation)):
        if text is not None:
            (tmp_path / name).write_text(text)
    request = MeasureRequest(
        training_type=SFT,
        train_file=str(tmp_path / "train.jsonl"),
        eval_file=None if evaluation is None else str(tmp_path / "eval.jsonl"),
        tokenizer_path=str(model),
        max_seq_length=128,
    )
    failure = answer(request, lambda answer: None)
    assert isinstance(failure, Failure)
    assert (failure.field, failure.reason) == (field, reason)
    assert failure.message.zh


@pytest.mark.parametrize("missing", ["data.train_file", "data.eval_file"])
def test_a_file_that_is_gone_is_named_however_its_path_is_spelled(tmp_path, model, missing):
    from finetuned_runner.inspection import answer

    path = write_jsonl(tmp_path / "chats.jsonl", chats(6))
    gone = f"{tmp_path}//./gone.jsonl"
    train, evaluation = (gone, path) if missing == "data.train_file" else (path, gone)
    request = MeasureRequest(
        training_type=SFT,
        train_file=str(train),
        eval_file=str(evaluation),
        tokenizer_path=str(model),
        max_seq_length=128,
    )
    failure = answer(request, lambda answer: None)
    assert isinstance(failure, Failure)
    assert (failure.field, failure.reason) == (missing, "NOT_READABLE")
    assert gone in failure.message.en


# --- the process

PEAK = """
import re, sys
from finetuned_runner.__main__ import main
main(["--inspect"])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def peak_memory(request: InspectRequest) -> tuple[list[Any], int]:
    """Asks a process as the daemon does: its answers, and its peak memory in bytes."""
    with subprocess.Popen(
        [sys.executable, "-c", PEAK],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        answers = [ANSWER.validate_json(line) for line in process.stdout]
        return answers, int(process.stderr.read()) * 1024


def test_memory_does_not_grow_with_the_file(tmp_path):
    peaks = []
    text = "word " * 400
    turns = [{"role": role, "content": text} for role in ("user", "assistant")]
    line = json.dumps({"messages": turns}) + "\n"
    for megabytes in (8, 40):
        path = tmp_path / f"{megabytes}.jsonl"
        path.write_text(line * ((megabytes << 20) // len(line)))
        (*progress, report), peak = peak_memory(InspectRequest(training_type=SFT, path=str(path)))
        assert isinstance(report, Report)
        assert report.samples == (megabytes << 20) // len(line)
        assert all(isinstance(message, Progress) for message in progress)
        assert progress[-1].bytes_read == progress[-1].bytes_total == path.stat().st_size
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 4 << 20


def test_a_process_with_a_tokenizer_starts_without_torch(tmp_path, model):
    path = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    request = InspectRequest(training_type=SFT, path=str(path), tokenizer_path=str(model))
    (*_, report), peak = peak_memory(request)
    assert report.train_samples == 3
    assert peak < 150 << 20, "torch alone takes 200 MB"


def test_the_process_ends_when_the_daemon_is_gone(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text((json.dumps(chats(1)[0]) + "\n") * 200_000)
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "finetuned_runner", "--inspect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        request = InspectRequest(training_type=SFT, path=str(path))
        process.stdin.write(request.model_dump_json().encode() + b"\n")
        process.stdin.flush()
        assert process.stdout.readline().startswith(b'{"kind":"progress"')
        process.send_signal(signal.SIGSTOP)  # in the midst of the file
        process.stdin.close()
        process.send_signal(signal.SIGCONT)
        assert process.wait(20) == 1
