"""What a run says of its own failure: reason, samples, excerpt, and what would fit."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.retries import newest_checkpoint
from finetuned_daemon.runs.contract import EndReason, TrainingType
from finetuned_daemon.tasks import Run
from finetuned_runner.checkpoint import verify_checkpoint
from finetuned_runner.failures import RunFailed, judge
from tiny import chats, write_jsonl


def of_file(path: Path) -> Parameters:
    return Parameters.model_validate({"data": {"train_file": str(path)}})


def test_samples_come_with_the_first_of_them(tmp_path):
    """The line as it stands in the file, bounded; what the run has said itself comes first."""
    data = tmp_path / "chats.jsonl"
    data.write_text("one\ntwo " + "x" * 9000 + "\nthree")
    failed = RunFailed(EndReason.LOSS_NOT_FINITE, "Not finite.", samples=(2, 3))
    result = judge(failed, of_file(data), 7)
    assert (result.samples, result.sample_file) == ((2, 3), str(data))
    assert result.excerpt.startswith("two x")
    assert len(result.excerpt) == 500
    assert judge(failed, of_file(tmp_path / "gone"), 7).excerpt == ""
    failed = RunFailed(EndReason.DATASET_INVALID, "Bad.", samples=(9,), file="/e", excerpt="{oops")
    result = judge(failed, of_file(data), 0)
    assert (result.sample_file, result.excerpt) == ("/e", "{oops")


def test_what_lies_beneath_has_no_evidence_of_what_it_broke():
    """A full disk is none of the samples' fault, whatever failed because of it."""
    failed = RunFailed(
        EndReason.MODEL_UNLOADABLE,
        "Not loadable.",
        samples=(1,),
        fix={"lora.lora_target_modules": ("c_attn",)},
    )
    assert judge(failed, Parameters(), 0).fix == {"lora.lora_target_modules": ("c_attn",)}
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    result = judge(failed, Parameters(), 0)
    assert result.end_reason is EndReason.DISK_FULL
    assert (result.samples, result.fix) == ((), {})


def test_a_sentence_of_ours_has_no_traceback_beside_it():
    """Where in the code says nothing, unless something else broke beneath, or the runner itself."""
    failed = RunFailed(EndReason.DATASET_INVALID, "Bad.", field="data.tokenizer_path")
    result = judge(failed, Parameters(), 0)
    assert (result.detail, result.field) == ("", "data.tokenizer_path")
    failed.__cause__ = ValueError("beneath")
    assert "ValueError: beneath" in judge(failed, Parameters(), 0).detail
    crashed = RunFailed(EndReason.RUNNER_CRASHED, "Odd.")
    assert "Odd." in judge(crashed, Parameters(), 0).detail


def test_a_run_out_of_memory_says_what_was_asked_for():
    """The allocator's figures without its advice, which is about torch's own settings."""
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 1.11 GiB is free. If reserved but unallocated memory is large try setting ..."
    )
    result = judge(torch.OutOfMemoryError(text), Parameters(), 3)
    assert result.end_reason is EndReason.DEVICE_OUT_OF_MEMORY
    assert "Tried to allocate 2.00 GiB" in result.message
    assert result.message.endswith("1.11 GiB is free.")
    assert judge(MemoryError(), Parameters(), 3).message == "The machine ran out of memory."


def test_weights_that_are_no_numbers_end_the_run_with_its_step(shop):
    """The loss of the first step is not finite; no step was done, so that no rate is to blame."""
    model = shop.root / "broken"
    shutil.copytree(shop.model(), model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = shop.here(shop.make(data={"model_path": str(model)}))
    assert run.result.end_reason is EndReason.LOSS_NOT_FINITE
    assert "step 1" in run.result.message
    assert run.result.step == 0
    assert len(set(run.result.samples)) == 4, "two batches of two"
    lines = Path(run.result.sample_file).read_text().splitlines()
    assert run.result.excerpt == lines[run.result.samples[0] - 1][:500]


def test_a_bad_line_is_named_and_shown(shop):
    """By its number in the file, with how it begins."""
    data = shop.chats(4)
    data.write_text(data.read_text() + '{"messages": oops}\n')
    run = shop.here(shop.make(data={"train_file": str(data)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert (run.result.samples, run.result.excerpt) == ((5,), '{"messages": oops}')
    assert "line 5" in run.result.message


def test_data_of_which_nothing_is_learned_is_refused(shop):
    """A question alone, say, or an answer beyond the cut."""
    data = shop.root / "long.jsonl"
    question = {"role": "user", "content": "why? " * 400}
    chat = {"messages": [question, {"role": "assistant", "content": "Because."}]}
    data.write_text(json.dumps(chat) + "\n")
    run = shop.here(shop.make(data={"train_file": str(data)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert "nothing to learn" in run.result.message


def test_a_model_without_the_modules_is_not_loadable(shop):
    """The sentence names those that it has."""
    run = shop.here(shop.make(lora={"lora_target_modules": ["c_attn"]}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "has no module c_attn" in run.result.message
    assert "q_proj" in run.result.message


def test_one_sample_that_breaks_the_loss_is_among_those_that_are_named(shop):
    """The step's samples are named by their lines, and the steps before it were done."""
    model = shop.root / "broken"
    shutil.copytree(shop.model(), model)
    odd = Tokenizer.from_file(str(model / "tokenizer.json")).encode("\u03a9").ids
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][odd] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    samples = chats(24)
    samples[16]["messages"][0]["content"] += " \u03a9"
    data = write_jsonl(shop.root / "odd.jsonl", samples)
    run = shop.here(shop.make(data={"model_path": str(model), "train_file": str(data)}))
    assert run.result.end_reason is EndReason.LOSS_NOT_FINITE
    assert 17 in run.result.samples
    assert len(run.result.samples) == 4
    assert 1 <= run.result.step < 6
    assert run.result.sample_file == str(data)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_whole_checkpoints_and_a_fix(shop, small_disk):
    """The run ends with the reason, and the newest checkpoint is one to go on from."""
    run = shop.make(training={"save_steps": 1, "num_train_epochs": 4})
    output = small_disk / "run-1"
    run.spec = run.spec.model_copy(update={"output_dir": str(output)})
    shop.here(run)
    assert run.result.end_reason is EndReason.DISK_FULL
    saved = [Path(event.path) for event in run.checkpoints()]
    assert 1 < len(saved) == run.result.step - 1
    assert sorted(output.iterdir()) == sorted(saved), "nothing half written is left"
    verify_checkpoint(saved[-1])
    ended = Run(
        task_key=1,
        number=1,
        device="cpu",
        parameters=run.spec.parameters,
        output_dir=str(output),
        saved_checkpoints=len(saved),
    )
    assert newest_checkpoint(ended, ended.parameters, TrainingType.SFT) == str(saved[-1])


def test_half_the_batch_and_twice_the_accumulation_go_on_as_if_nothing_had_changed(shop):
    """A retry leaves steps, rates and losses where they were; a lower rate takes effect."""
    training = {"batch_size": 4, "gradient_accumulation_steps": 1, "save_steps": 2}
    whole = shop.here(shop.make("whole", training=training))
    half = {"batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    begins = str(whole.output / "checkpoint-2")
    rest = shop.here(shop.make("rest", training=half, data={"resume_from_checkpoint": begins}))
    assert rest.result.end_reason is EndReason.FINISHED, rest.result
    losses = whole.losses()
    assert len(losses) > 4
    assert rest.rates() == {step: rate for step, rate in whole.rates().items() if step > 2}
    assert rest.losses() == pytest.approx(
        {step: loss for step, loss in losses.items() if step > 2}, rel=1e-4
    )
    lower = shop.here(
        shop.make(
            "lower",
            training={**half, "learning_rate": 1e-4},
            data={"resume_from_checkpoint": begins},
        )
    )
    assert lower.rates() == pytest.approx({step: rate / 2 for step, rate in rest.rates().items()})


def test_a_merge_without_room_leaves_the_adapter_whole_and_says_what_it_takes(shop, monkeypatch):
    """The memory of a merge is looked at before: better than being killed in its middle."""
    import psutil

    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(available=1))
    run = shop.here(shop.make(training={"max_steps": 1}, lora={"merge_lora": True}))
    assert run.result.end_reason is EndReason.HOST_OUT_OF_MEMORY, run.result
    assert "Merging takes" in run.result.message
    assert (run.output / "final" / "adapter_model.safetensors").is_file()
    assert not (run.output / "merged").exists()
