"""A probe: three real steps on the longest samples, one evaluation batch, one checkpoint.

It measures what the run would take, and leaves nothing. Each of the steps has the longest samples
there are: from the second on the optimizer's state is there beside them, which is the most that the
run can need. What the three have learned is thrown away.
"""

from __future__ import annotations

import heapq
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from finetuned_daemon.dataset.report import LONGEST
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.schedule import plan_schedule
from finetuned_daemon.planning.timing import Rates, run_seconds
from finetuned_daemon.runs.contract import (
    EndReason,
    ProbeReport,
    Result,
    Spec,
)
from finetuned_daemon.runs.manifest import MANIFEST, STATE_FILES, Manifest
from finetuned_runner import BEGAN
from finetuned_runner.control import Watch
from finetuned_runner.model import Model
from finetuned_runner.report import Report
from finetuned_runner.resident import peak_resident_bytes
from finetuned_runner.samples import IGNORED, Part, Samples
from finetuned_runner.trainer import RunTrainer

STEPS = 3


def shortened(parameters: Parameters) -> Parameters:
    """The parameters of a probe's training: it saves, evaluates and reports nothing by itself."""
    training = {"max_steps": STEPS, "save_strategy": "no", "early_stopping_patience": 0}
    return parameters.model_copy(
        update={
            "training": parameters.training.model_copy(update=training),
            "extensions": parameters.extensions.model_copy(update={"report_to": "none"}),
        }
    )


def run(
    spec: Spec,
    parameters: Parameters,
    report: Report,
    watch: Watch,
    trainer: RunTrainer,
    eval_set: Samples | None,
) -> Result:
    """Measures what the run would take, and reports it.

    Args:
        spec: Of the run.
        parameters: That take effect in the run, not in the probe.
        report: Is told.
        watch: Of the run.
        trainer: Made with `shortened` parameters and all training samples.
        eval_set: Samples of an evaluation; None: the run has none.

    Raises:
        RunFailed: The run would fail like this, too.
    """
    waiting = time.monotonic()
    step_size = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
    samples = _Longest.of(cast("Samples", trainer.train_dataset), step_size)
    scored = _Longest.of(eval_set, trainer.args.eval_batch_size) if eval_set is not None else None
    waited = time.monotonic() - waiting

    clock = _Clock(trainer)
    trainer.add_callback(clock)
    trainer.train_dataset = cast("Any", samples.part)
    watch.begin_training()
    start_seconds = time.monotonic() - BEGAN - waited
    trainer.train()
    if trainer.is_stopped:
        return _stopped(trainer)
    scoring_seconds = 0.0
    if scored is not None:
        scoring = time.monotonic()
        trainer.evaluate(cast("Any", scored.part))
        scoring_seconds = time.monotonic() - scoring
    saving = time.monotonic()
    folder, manifest = trainer.write_checkpoint()
    saving_seconds = time.monotonic() - saving
    memory = _Memory.now(spec.device)
    shutil.rmtree(folder)

    watch.begin_finishing()
    schedule = plan_schedule(
        parameters.training,
        samples.count,
        evaluates=scored is not None,
        resume_step=_resume_step(parameters),
    )
    final = _result_bytes(manifest)
    merged = _merged_bytes(parameters, cast("Model", trainer.model))
    step_seconds, tokens_per_second = clock.steady()
    rates = Rates(
        start_seconds=start_seconds + clock.first() - step_seconds,
        tokens_per_second=tokens_per_second,
        scored_tokens_per_second=scored.part_tokens / scoring_seconds if scored else 1.0,
        written_bytes_per_second=manifest.size_bytes / saving_seconds,
    )
    scored_tokens = scored.tokens if scored else 0
    report.emit(
        ProbeReport(
            peak_memory_bytes=memory.peak,
            memory_total_bytes=memory.total,
            memory_available_bytes=memory.available,
            tokens_per_second=tokens_per_second,
            seconds_per_step=step_seconds,
            start_seconds=rates.start_seconds,
            evaluation_tokens_per_second=rates.scored_tokens_per_second if scored else 0.0,
            seconds_per_evaluation=scored_tokens / rates.scored_tokens_per_second,
            seconds_per_checkpoint=saving_seconds,
            checkpoint_bytes=manifest.size_bytes,
            disk_bytes=schedule.kept_checkpoints * manifest.size_bytes + final + merged,
            duration_seconds=run_seconds(
                rates,
                trained=samples.tokens * schedule.run_steps / schedule.steps_per_epoch,
                scored=schedule.evaluations * scored_tokens,
                written=schedule.checkpoints * manifest.size_bytes + final + merged,
            ),
            run_steps=schedule.run_steps,
            train_samples=samples.count,
            train_tokens=samples.tokens,
            longest_tokens=samples.longest,
            longest_lengths=samples.longest_lengths,
            learned_share=samples.learned_share(),
        )
    )
    return Result(
        end_reason=EndReason.PROBED,
        message="What a run takes was measured; nothing was trained.",
        step=STEPS,
    )


@dataclass(frozen=True)
class _Longest:
    """The longest of many samples."""

    part: Part
    part_tokens: int
    count: int
    """Of all samples."""
    tokens: int
    """Of all samples."""
    longest_lengths: tuple[int, ...]
    """Of all samples, longest first; at most `LONGEST`."""

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return self.longest_lengths[0]

    def learned_share(self) -> float:
        """Of the tokens of the part, those that are learned."""
        learned = sum(
            int(np.count_nonzero(self.part[index]["labels"] != IGNORED))
            for index in range(len(self.part))
        )
        return learned / self.part_tokens

    @classmethod
    def of(cls, samples: Samples, most: int) -> _Longest:
        """Waits until all samples are there: what is longest is not known before."""
        samples.prefer(range(len(samples)))
        lengths = [samples.place(index).length for index in range(len(samples))]
        indices = heapq.nlargest(most, range(len(lengths)), key=lengths.__getitem__)
        return cls(
            part=Part(samples, indices),
            part_tokens=sum(lengths[index] for index in indices),
            count=len(lengths),
            tokens=sum(lengths),
            longest_lengths=tuple(heapq.nlargest(LONGEST, lengths)),
        )


class _Clock(TrainerCallback):
    """When each step ended, and how many tokens were trained on by then."""

    def __init__(self, trainer: RunTrainer) -> None:
        self._trainer = trainer
        self._marks: list[tuple[float, int]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark()

    def first(self) -> float:
        """Seconds of the first step, with what is done once only."""
        return self._marks[1][0] - self._marks[0][0]

    def steady(self) -> tuple[float, float]:
        """Seconds of a step, and tokens a second, without the first step."""
        (began, before), (ended, after) = self._marks[1], self._marks[-1]
        seconds = ended - began
        return seconds / (len(self._marks) - 2), (after - before) / seconds

    def _mark(self) -> None:
        if self._trainer.args.device.type == "cuda":  # it is given work, and not waited for
            torch.cuda.synchronize()
        self._marks.append((time.monotonic(), self._trainer.num_tokens))


@dataclass(frozen=True)
class _Memory:
    """Of the device, in bytes."""

    peak: int
    total: int
    available: int

    @classmethod
    def now(cls, device: str) -> _Memory:
        if device == "cpu":
            memory = psutil.virtual_memory()
            rss = psutil.Process().memory_info().rss
            return cls(
                peak_resident_bytes(), memory.total, min(memory.total, memory.available + rss)
            )
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        # CUDA's own share, and on a GPU that others use theirs, which the run has to do without.
        besides = max(0, total - free - reserved)
        return cls(besides + torch.cuda.max_memory_reserved(), total, free + reserved)


def _resume_step(parameters: Parameters) -> int:
    """Step of the checkpoint that the run goes on from; a probe itself begins anew."""
    folder, data = parameters.data.resume_from_checkpoint, parameters.data
    if not folder or (data.attach_lora and parameters.lora.use_lora):
        return 0
    return Manifest.model_validate_json((Path(folder) / MANIFEST).read_bytes()).step


def _result_bytes(manifest: Manifest) -> int:
    """Of the final model or adapter: what of a checkpoint is no state of the training."""
    state = {*STATE_FILES, MANIFEST}
    return sum(entry.size for name, entry in manifest.files.items() if name not in state)


def _merged_bytes(parameters: Parameters, model: Model) -> int:
    if not (parameters.lora.use_lora and parameters.lora.merge_lora):
        return 0
    if parameters.optimization.use_qlora:  # merged are the weights of the files
        folder = Path(parameters.data.model_path or "")
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)


def _stopped(trainer: RunTrainer) -> Result:
    return Result(
        end_reason=EndReason.STOPPED_BY_USER,
        message="The probe was stopped; nothing of it is left.",
        step=trainer.state.global_step,
    )
