"""Estimates beside real runs: steps and checkpoints are equal, disk and memory near."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetuned._paths import Paths
from finetuned_daemon.config import Config
from finetuned_daemon.dataset.report import Measured, MeasuredFile, MeasureRequest
from finetuned_daemon.dataset.worker import Worker
from finetuned_daemon.devices import CPU, Device, DeviceType
from finetuned_daemon.environment.probe import Probe
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import read_model
from finetuned_daemon.planning.plan import Plan, make_plan
from finetuned_daemon.runs.contract import (
    EVENTS,
    RESULT,
    SPEC,
    CheckpointSaved,
    EndReason,
    EventLine,
    Payload,
    Progress,
    Result,
    Spec,
    TrainingType,
    write_record,
)
from tiny import chats, documents, make_model, write_jsonl

DEVICE = Device(
    id=CPU,
    type=DeviceType.CPU,
    product_name="",
    memory_total_bytes=8 << 30,
    memory_free_bytes=4 << 30,
)
DEADLINE = 120.0
# Several runs in one process, so that torch is imported once.
SEVERAL = """
import sys
from finetuned_runner.__main__ import main
sys.exit(sum(main([folder]) for folder in sys.argv[1:]))
"""


@dataclass
class Run:
    """A run folder, and what was planned for it."""

    folder: Path
    spec: Spec
    plan: Plan

    @property
    def output(self) -> Path:
        return Path(self.spec.output_dir)

    @property
    def result(self) -> Result:
        return Result.model_validate_json((self.folder / RESULT).read_bytes())

    def events(self) -> list[Payload]:
        lines = (self.folder / EVENTS).read_text().splitlines()
        return [e for e in (EventLine.model_validate_json(line).parse() for line in lines) if e]

    def size(self, below: str = "") -> int:
        files = (self.output / below).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())


def make_run(
    root: Path,
    kind: TrainingType,
    measured: Measured,
    *,
    resume_step: int = 0,
    threads: int = 1,
    runtime_bytes: int = 0,
    **sections: dict[str, Any],
) -> Run:
    """A run folder with its spec and its plan."""
    root.mkdir()
    output = root / "out"
    parameters = Parameters.model_validate(
        {
            **sections,
            "data": {"dataloader_num_workers": 0, "output_dir": str(output), **sections["data"]},
            "optimization": {"fp16": False, **sections.get("optimization", {})},
        }
    )
    spec = Spec(
        task="tasks/test",
        run=1,
        training_type=kind,
        device=CPU,
        num_threads=threads,
        output_dir=str(output),
        parameters=parameters,
    )
    write_record(root / SPEC, spec)
    plan = make_plan(
        parameters,
        kind,
        DEVICE,
        read_model(Path(parameters.data.model_path or "")),
        measured,
        resume_step=resume_step,
        runtime_bytes=runtime_bytes,
    )
    return Run(root, spec, plan)


# --- steps, checkpoints and disk


async def measure(requests: list[MeasureRequest], root: Path) -> list[Measured]:
    worker = Worker(Config(paths=Paths(root, root)))
    return [await worker.measure(request) for request in requests]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs of a tiny model, by name; those that resume come after those that they resume."""
    root = tmp_path_factory.mktemp("estimates")
    model = make_model(root / "model", hidden=96)
    # A question of more than 128 tokens leaves nothing of the answer.
    long = [
        {"messages": [{"role": "user", "content": "word " * 200}, *chat["messages"][1:]]}
        for chat in chats(7)
    ]
    samples, texts = [*chats(40, turns=2), *long], documents(60)
    data = {
        "model_path": str(model),
        "train_file": str(write_jsonl(root / "chats.jsonl", samples)),
    }
    text_data = {**data, "train_file": str(write_jsonl(root / "documents.jsonl", texts))}
    short_data = {**data, "train_file": str(write_jsonl(root / "short.jsonl", chats(40)))}
    eval_file = str(write_jsonl(root / "eval.jsonl", chats(9)))
    requests = [
        MeasureRequest(
            training_type=kind,
            train_file=file,
            eval_file=evaluation,
            tokenizer_path=str(model),
            max_seq_length=128,
        )
        for kind, file, evaluation in (
            (TrainingType.SFT, data["train_file"], eval_file),
            (TrainingType.PRETRAIN, text_data["train_file"], None),
            (TrainingType.SFT, short_data["train_file"], None),
        )
    ]
    measured, blocks, short = asyncio.run(measure(requests, root))
    assert (measured.train.samples, measured.train.dropped) == (40, 7)
    base = {"max_seq_length": 128, "batch_size": 2, "gradient_accumulation_steps": 3}
    sft, pretrain = TrainingType.SFT, TrainingType.PRETRAIN
    runs = {
        "epochs": make_run(
            root / "epochs",
            sft,
            measured,
            data={**data, "eval_ratio": 0.1},
            training={**base, "save_steps": 5, "eval_strategy": "steps", "eval_steps": 4},
        ),
        "limit": make_run(
            root / "limit",
            sft,
            measured,
            data={**data, "eval_file": eval_file, "max_samples": 0},
            lora={"merge_lora": True, "lora_target_modules": ["q_proj", "embed_tokens"]},
            training={**base, "save_steps": 2, "save_total_limit": 3, "eval_strategy": "epoch"},
        ),
        "blocks": make_run(
            root / "blocks",
            pretrain,
            blocks,
            data=text_data,
            training={**base, "save_strategy": "epoch", "num_train_epochs": 3},
        ),
        "cut epoch": make_run(
            root / "cut",
            sft,
            measured,
            data=data,
            lora={"use_lora": False},
            training={**base, "save_strategy": "epoch", "max_steps": 10, "optimizer": "adafactor"},
        ),
        "packed": make_run(
            root / "packed",
            sft,
            short,
            data=short_data,
            training={**base, "save_steps": 2, "num_train_epochs": 2},
            extensions={"packing": True},
        ),
        "never": make_run(
            root / "never",
            sft,
            measured,
            data=data,
            training={**base, "save_strategy": "no", "max_steps": 2},
        ),
    }
    steps = runs["limit"].plan.schedule.total_steps
    runs["resumed"] = make_run(
        root / "resumed",
        sft,
        measured,
        resume_step=steps - 4 + steps % 2,
        data={
            **data,
            "eval_file": eval_file,
            "resume_from_checkpoint": str(
                runs["limit"].output / f"checkpoint-{steps - 4 + steps % 2}"
            ),
        },
        lora={"lora_target_modules": ["q_proj", "embed_tokens"]},
        training={**base, "save_steps": 2, "eval_strategy": "epoch"},
    )
    folders = [str(run.folder) for run in runs.values()]
    ended = subprocess.run(
        [sys.executable, "-c", SEVERAL, *folders],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return runs


NAMES = ["epochs", "limit", "blocks", "cut epoch", "packed", "never", "resumed"]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_takes_the_steps_and_saves_the_checkpoints_of_its_plan(
    done: dict[str, Run], name: str
) -> None:
    run = done[name]
    schedule, events = run.plan.schedule, run.events()
    progress = [event for event in events if isinstance(event, Progress)]
    saved = [event for event in events if isinstance(event, CheckpointSaved)]
    assert run.result.end_reason in (EndReason.FINISHED, EndReason.STEP_LIMIT)
    assert progress[-1].total_steps == schedule.total_steps == run.result.step
    assert schedule.run_steps == run.result.step - progress[0].step
    assert len(saved) == schedule.checkpoints
    kept = list(run.output.glob("checkpoint-*"))
    assert len(kept) == schedule.kept_checkpoints
    assert sum(event.kind == "evaluation" for event in lines(run)) == schedule.evaluations


@pytest.mark.parametrize("name", NAMES)
def test_a_run_leaves_the_bytes_of_its_plan_within_a_tenth(done: dict[str, Run], name: str) -> None:
    run = done[name]
    assert run.plan.disk_bytes == pytest.approx(run.size(), rel=0.1)
    for folder in run.output.glob("checkpoint-*"):
        assert run.plan.disk.checkpoint_bytes == pytest.approx(run.size(folder.name), rel=0.1)
    assert run.plan.disk.final_bytes == pytest.approx(run.size("final"), rel=0.1)
    if run.plan.disk.merged_bytes:
        assert run.plan.disk.merged_bytes == pytest.approx(run.size("merged"), rel=0.1)
    assert (run.output / "merged").exists() == (run.plan.disk.merged_bytes > 0)


def test_a_packed_run_is_planned_in_rows_and_told_in_samples(done: dict[str, Run]) -> None:
    plan = done["packed"].plan
    assert (plan.train_samples, plan.exact) == (40, True)
    # Samples would make 7 steps of 6.
    assert plan.schedule.steps_per_epoch < 7


def test_what_is_trained_is_what_is_saved(done: dict[str, Run]) -> None:
    from safetensors.numpy import load_file

    adapter = load_file(done["limit"].output / "final/adapter_model.safetensors")
    trained = sum(array.size for name, array in adapter.items() if "lora_" in name)
    assert done["limit"].plan.trainable_parameters == trained
    whole = load_file(done["blocks"].output / "final/model.safetensors")
    assert done["blocks"].plan.trainable_parameters == sum(a.size for a in whole.values())


def lines(run: Run) -> Iterator[EventLine]:
    for line in (run.folder / EVENTS).read_text().splitlines():
        yield EventLine.model_validate_json(line)


# --- memory


@dataclass(frozen=True)
class Shape:
    """A Llama of some 30 million parameters."""

    hidden: int
    layers: int
    inner: int
    words: int
    tied: bool = False


SHAPES = {
    "small": Shape(hidden=256, layers=16, inner=704, words=24_000, tied=True),
    "wide": Shape(hidden=512, layers=1, inner=1536, words=40_000),
    "deep": Shape(hidden=192, layers=48, inner=512, words=4_000),
    "wordy": Shape(hidden=256, layers=4, inner=704, words=100_000, tied=True),
}


def make_shape(folder: Path, tokenizer: Path, shape: Shape) -> Path:
    """A model of repeated random numbers, which are made faster than as many of their own."""
    import numpy as np
    from safetensors.numpy import save_file

    shutil.copytree(tokenizer, folder)
    config = json.loads((folder / "config.json").read_bytes())
    config |= {
        "vocab_size": shape.words,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": shape.hidden // 64,
        "head_dim": 64,
        "tie_word_embeddings": shape.tied,
    }
    (folder / "config.json").write_text(json.dumps(config))
    noise = (np.random.default_rng(0).standard_normal(100_003) * 0.02).astype(np.float32)
    wide, narrow = (shape.inner, shape.hidden), (shape.hidden, shape.inner)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (shape.words, shape.hidden)}
    if not shape.tied:
        shapes["lm_head"] = (shape.words, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{prefix}.self_attn.{name}_proj"] = (shape.hidden, shape.hidden)
        shapes |= {f"{prefix}.mlp.{n}_proj": wide for n in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj"] = narrow
    tensors = {f"{n}.weight": np.resize(noise, s) for n, s in shapes.items()}
    norms = ["model.norm.weight"]
    for layer in range(shape.layers):
        norms += [
            f"model.layers.{layer}.{name}.weight"
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
    tensors |= {name: np.ones(shape.hidden, np.float32) for name in norms}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def peak_bytes(run: Run) -> int:
    """Largest resident memory of the runner (VmHWM) over its whole life."""
    with (run.folder / "console.log").open("wb") as console:
        process = subprocess.Popen(
            [sys.executable, "-m", "finetuned_runner", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
    peak, end = 0, time.monotonic() + DEADLINE
    while process.poll() is None:
        assert time.monotonic() < end
        # It never falls; what is missed is what the last milliseconds add.
        status = Path(f"/proc/{process.pid}/status").read_text()
        _, found, rest = status.partition("VmHWM:")
        if found:
            peak = max(peak, int(rest.split()[0]) * 1024)
        time.sleep(0.003)
    assert process.returncode == 0, (run.folder / "console.log").read_text()[-2000:]
    return peak


@pytest.fixture(scope="module")
def runtime_bytes() -> int:
    """What the training environment says of its imports, as the daemon asks it."""
    command = [sys.executable, "-P", "-m", "finetuned_runner", "--probe"]
    answer = subprocess.run(command, capture_output=True, check=True)
    return Probe.model_validate_json(answer.stdout).runtime_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("shape", "uses_lora", "checkpointing", "batch", "length", "more"),
    [
        ("small", True, True, 4, 256, ""),
        ("small", False, False, 2, 256, ""),
        ("small", True, False, 2, 256, "lora_dropout"),
        ("wide", False, True, 4, 128, ""),
        ("wide", True, False, 4, 256, ""),
        ("deep", True, False, 1, 512, ""),
        ("deep", False, True, 4, 128, ""),
        ("wordy", True, False, 2, 256, ""),
        ("deep", True, True, 2, 128, "use_qlora"),
        ("wide", False, True, 1, 128, "use_8bit_optimizer"),
    ],
)
def test_peak_memory_is_that_of_the_plan_within_a_quarter(
    tmp_path: Path,
    runtime_bytes: int,
    shape: str,
    *,
    uses_lora: bool,
    checkpointing: bool,
    batch: int,
    length: int,
    more: str,
) -> None:
    tokenizer = make_model(tmp_path / "tokenizer", positions=1024)
    model = make_shape(tmp_path / "model", tokenizer, SHAPES[shape])
    answer = "Use `ls -l files` to list the folders of a project. " * 80
    samples = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}
    ]
    run = make_run(
        tmp_path / "run",
        TrainingType.SFT,
        Measured(exact=True, train=MeasuredFile(samples=8, longest=((length, length),))),
        threads=2,
        runtime_bytes=runtime_bytes,
        data={
            "model_path": str(model),
            "train_file": str(write_jsonl(tmp_path / "chats.jsonl", samples * 8)),
        },
        training={
            "batch_size": batch,
            "gradient_accumulation_steps": 1,
            "max_seq_length": length,
            "max_steps": 2,
        },
        lora={"use_lora": uses_lora, "lora_dropout": 0.1 if more == "lora_dropout" else 0.0},
        optimization={
            "gradient_checkpointing": checkpointing,
            "use_qlora": more == "use_qlora",
            "use_8bit_optimizer": more == "use_8bit_optimizer",
        },
    )
    peak, planned = peak_bytes(run), run.plan
    print(f"peak {peak / 1e6:.0f} MB, planned {planned.peak_memory_bytes / 1e6:.0f} MB")
    assert planned.peak_memory_bytes == pytest.approx(peak, rel=0.25)
    # So near that the runtime alone could not have been it.
    own = planned.peak_memory_bytes - planned.memory.parts["runtime"]
    assert own == pytest.approx(peak - planned.memory.parts["runtime"], rel=0.35)
    assert math.isclose(sum(planned.memory.parts.values()), planned.peak_memory_bytes)
