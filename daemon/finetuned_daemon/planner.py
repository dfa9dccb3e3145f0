"""Plans runs: what one will do and take, and whether the training quota has that much left."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from pathlib import Path

from finetuned_daemon.dataset.report import Measured, MeasureRequest
from finetuned_daemon.dataset.scan import scan
from finetuned_daemon.dataset.worker import Worker
from finetuned_daemon.devices import Device
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.errors import DaemonError, InvalidRequest, LimitReached, Severity, Violation
from finetuned_daemon.measurements import device_key, model_key
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.model_files import (
    ModelUnreadable,
    base_folder,
    read_model,
)
from finetuned_daemon.planning.plan import Plan, make_plan
from finetuned_daemon.planning.schedule import Schedule, plan_schedule, split_sizes
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.store.measurement_rows import MeasurementRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.check import by_severity
from finetuned_daemon.validation.checkpoint import (
    nothing_left,
    read_manifest,
    resumed_folder,
)
from finetuned_daemon.validation.judge import Judgement
from finetuned_daemon.validation.resume import ResumePlan, plan_resume
from finetuned_daemon.validation.rules import (
    check_evaluations,
    check_warmup,
    split_leaves_none,
)

_MODEL = "data.model_path"


@dataclass(frozen=True)
class Estimate:
    """A plan, and what is to be said of it."""

    plan: Plan
    quota_left: int | None
    """Checkpoints that the quota has left; None: no quota."""
    device: Device
    violations: list[Violation]
    resume: ResumePlan | None = None
    """What it means to go on from a checkpoint; None: the run begins anew."""


class Planner:
    """Estimates, and the quota that a plan takes."""

    def __init__(
        self,
        worker: Worker,
        environment: Environment,
        records: Records,
        quota: Quota,
        measurements: MeasurementRows,
    ) -> None:
        self._worker = worker
        self._environment = environment
        self._records = records
        self._quota = quota
        self._measurements = measurements

    async def estimate(self, judgement: Judgement, training_type: TrainingType) -> Estimate:
        """What a run with parameters that are in order will do and take.

        Raises:
            InvalidRequest: The tokenizer can't read the data.
            WrongState: The training environment can't run.
        """
        parameters = judgement.resolved
        try:
            model = await asyncio.to_thread(
                read_model, base_folder(Path(parameters.data.model_path or ""))
            )
            length = model.fitting_length(parameters.training.max_seq_length)
            measured, probe = await asyncio.gather(
                self._worker.measure(_request(parameters, training_type, length)),
                self._environment.probe(),
            )
            _check_samples(parameters, measured)
            plan = await asyncio.to_thread(
                make_plan,
                parameters,
                training_type,
                judgement.device,
                model,
                measured,
                resume_step=resume_step(parameters, training_type),
                tokens_per_second=self._speed(parameters, training_type, judgement.device),
                runtime_bytes=probe.runtime_bytes if probe else 0,
                measurements=self._measurements.of(
                    await asyncio.to_thread(model_key, model.path),
                    device_key(judgement.device),
                    training_type,
                ),
            )
        except ModelUnreadable as error:  # its files, or a PEFT configuration that asks too much
            field = "lora.peft_config_path" if parameters.lora.peft_config_path else _MODEL
            raise InvalidRequest([Violation(field, error.text, "MODEL_UNREADABLE")]) from error
        known = {violation.reason for violation in judgement.violations}
        more = [
            *self._check_plan(plan, parameters),
            *_check_lengths(plan, parameters, resume_step(parameters, training_type)),
            *_check_room(plan),
        ]
        violations = judgement.violations + [v for v in more if v.reason not in known]
        resume = await asyncio.to_thread(_plan_resume, parameters, training_type, plan)
        return Estimate(plan, self._quota.left(), judgement.device, by_severity(violations), resume)

    async def with_plan(self, judgement: Judgement, training_type: TrainingType) -> list[Violation]:
        """The violations of parameters that are in order so far, and those of their plan."""
        data = judgement.resolved.data
        if not (data.train_file and data.model_path):
            return judgement.violations
        refused = await self.refused(judgement.resolved, training_type)
        if refused:  # there is nothing to plan
            return by_severity([*judgement.violations, *refused])
        if self._quota.limit is None or training_type is not TrainingType.SFT:
            return judgement.violations
        # Asked at every keystroke: chats are counted without the tokenizer, a start counts again.
        samples = await self._chats(judgement.resolved)
        planned = max(1, _schedule(judgement.resolved, training_type, samples).checkpoints)
        return by_severity([*judgement.violations, *self.beyond_quota(judgement.resolved, planned)])

    async def refused(self, parameters: Parameters, training_type: TrainingType) -> list[Violation]:
        """What an earlier look at the same data found with the same tokenizer, without a new one.

        A start does not wait for one: the run makes the tokens while its model loads.
        """
        length = parameters.training.max_seq_length
        return await self._worker.refused(_request(parameters, training_type, length))

    async def check_quota(
        self, parameters: Parameters, training_type: TrainingType
    ) -> tuple[int, list[Violation]]:
        """Checkpoints to reserve for a run, and what the quota says to them.

        At least one, for a stop always saves. Without a quota nobody asks, and a start does not
        wait for the data to be read.
        """
        if self._quota.limit is None:
            return 0, []
        samples = await self._train_samples(parameters, training_type)
        planned = 1
        if samples:
            planned = max(1, _schedule(parameters, training_type, samples).checkpoints)
        return planned, self.beyond_quota(parameters, planned)

    def beyond_quota(self, parameters: Parameters, planned: int) -> list[Violation]:
        """What the quota says, at this moment, to so many checkpoints."""
        left = self._quota.left()
        return [] if left is None else _check_quota(parameters, planned, left)

    def _check_plan(self, plan: Plan, parameters: Parameters) -> list[Violation]:
        return self.beyond_quota(parameters, max(1, plan.schedule.checkpoints))

    async def _train_samples(self, parameters: Parameters, training_type: TrainingType) -> int:
        """Samples of the training data; 0 where they can't be counted before the run."""
        try:
            model = await asyncio.to_thread(
                read_model, base_folder(Path(parameters.data.model_path or ""))
            )
            length = model.fitting_length(parameters.training.max_seq_length)
            measured = await self._worker.measure(_request(parameters, training_type, length))
        except LimitReached:
            raise
        except (DaemonError, ModelUnreadable):
            # The run will say what is wrong. Chats can be counted without a tokenizer; without a
            # plan the run is still held to what is left, checkpoint by checkpoint.
            if training_type is not TrainingType.SFT:
                return 0
            return await self._chats(parameters)
        return measured.train_samples

    async def _chats(self, parameters: Parameters) -> int:
        """Chats of the training file."""
        data = parameters.data
        path = Path(data.train_file or "")
        return (await asyncio.to_thread(scan, path, TrainingType.SFT, data.max_samples)).samples

    def _speed(
        self, parameters: Parameters, training_type: TrainingType, device: Device
    ) -> float | None:
        """Tokens a second of the latest run of this kind on this machine; None: there is none."""
        runs = self._records.speed(
            model_path=parameters.data.model_path or "",
            training_type=training_type,
            device=device.id,
        )
        for run in runs:
            there, here = run.parameters, parameters
            if (
                there.lora.use_lora == here.lora.use_lora
                and there.optimization.gradient_checkpointing
                == here.optimization.gradient_checkpointing
            ):
                return run.progress.tokens_per_second
        return None


def _request(
    parameters: Parameters, training_type: TrainingType, max_seq_length: int
) -> MeasureRequest:
    data, training = parameters.data, parameters.training
    return MeasureRequest(
        training_type=training_type,
        train_file=data.train_file or "",
        eval_file=data.eval_file if training.eval_strategy != "no" else None,
        tokenizer_path=data.tokenizer_path or data.model_path or "",
        max_seq_length=max_seq_length,
        max_samples=data.max_samples,
    )


def _schedule(parameters: Parameters, training_type: TrainingType, samples: int) -> Schedule:
    data, training = parameters.data, parameters.training
    evaluates = training.eval_strategy != "no" and bool(data.eval_file or data.eval_ratio)
    if evaluates and not data.eval_file:
        samples, _ = split_sizes(samples, data.eval_ratio)
    return plan_schedule(
        training, samples, evaluates=evaluates, resume_step=resume_step(parameters, training_type)
    )


def resume_step(parameters: Parameters, training_type: TrainingType) -> int:
    """Step of the checkpoint that a run goes on from; 0 where it begins anew."""
    folder = resumed_folder(parameters, training_type)
    return read_manifest(folder).step if folder else 0


def _plan_resume(
    parameters: Parameters, training_type: TrainingType, plan: Plan
) -> ResumePlan | None:
    folder = resumed_folder(parameters, training_type)
    if folder is None:
        return None
    return plan_resume(
        folder,
        read_manifest(folder),
        parameters,
        training_type,
        total_steps=plan.schedule.total_steps,
        samples=plan.train_samples if plan.exact else 0,
    )


def _check_quota(parameters: Parameters, planned: int, left: int) -> list[Violation]:
    if planned <= left:
        return []
    training = parameters.training
    field = "training.save_steps" if training.save_strategy == "steps" else "training.save_strategy"
    text = Text(
        f"the run needs {planned} checkpoints (one at least, for a stop), and of the training "
        f"quota {left} {'is' if left == 1 else 'are'} left; save less often, or ask the operator "
        "for more",
        f"本次训练需要 {planned} 个检查点（至少一个，用于停止时保存），而训练配额只剩 {left} 个；"
        "请降低保存频率，或向管理员申请更多配额",
    )
    # With none left nothing helps.
    suggested: int | str | None = "no" if left else None
    if left and training.save_strategy == "steps":
        suggested = math.ceil(training.save_steps * planned / left)
    return [
        Violation(
            field,
            text,
            "QUOTA_EXCEEDED",
            suggested=suggested,
            suggested_field="training.save_strategy" if suggested == "no" else "",
        )
    ]


def _check_samples(parameters: Parameters, measured: Measured) -> None:
    """Raises InvalidRequest where nothing would be left to train on."""
    data, training = parameters.data, parameters.training
    samples = measured.train_samples
    if not samples:
        length = training.max_seq_length
        text = Text(
            f"no sample has anything to learn within {length} tokens",
            f"没有任何样本在 {length} 个 token 之内含有可学习的内容",
        )
        raise InvalidRequest([Violation("data.train_file", text, "NOTHING_TO_LEARN")])
    splits = training.eval_strategy != "no" and data.eval_ratio and not data.eval_file
    if splits and not split_sizes(samples, data.eval_ratio)[0]:
        raise InvalidRequest([split_leaves_none(samples)])


def _check_lengths(plan: Plan, parameters: Parameters, resumed: int) -> list[Violation]:
    """What only the tokenizer tells: samples that are cut or left out, a warm-up too long."""
    found = list[Violation]()
    field, length = "training.max_seq_length", parameters.training.max_seq_length
    if plan.dropped_samples:
        text = Text(
            f"{plan.dropped_samples} samples have nothing to learn within {length} tokens and are "
            "left out",
            f"有 {plan.dropped_samples} 个样本在 {length} 个 token 之内没有可学习的内容，将被剔除",
        )
        found.append(Violation(field, text, "SAMPLES_DROPPED", Severity.WARNING))
    elif plan.cut_samples:
        text = Text(
            f"{plan.cut_samples} samples are longer than {length} tokens and are cut",
            f"有 {plan.cut_samples} 个样本超过 {length} 个 token，将被截断",
        )
        found.append(Violation(field, text, "SAMPLES_CUT", Severity.NOTICE))
    total = plan.schedule.total_steps
    if parameters.training.max_steps <= 0:
        found += check_warmup(parameters.training, total)
    if plan.eval_samples:
        found += check_evaluations(parameters.training, total)
    if not plan.schedule.run_steps:
        found.append(nothing_left(resumed, total))
    return found


def _check_room(plan: Plan) -> list[Violation]:
    """Whether disk and memory have room for the plan. Estimates, so that they forbid nothing."""
    found = list[Violation]()
    if plan.disk_bytes > plan.disk_free_bytes:
        text = Text(
            f"about {_size(plan.disk_bytes)} will be written, and {_size(plan.disk_free_bytes)} "
            "are free; keep fewer checkpoints",
            f"预计写入约 {_size(plan.disk_bytes)}，而可用空间为 {_size(plan.disk_free_bytes)}；"
            "请减少保留的检查点",
        )
        found.append(
            Violation(
                "training.save_total_limit",
                text,
                "DISK_TOO_SMALL",
                Severity.WARNING,
                suggested=_checkpoints_that_fit(plan),
            )
        )
    if plan.peak_memory_bytes > plan.memory_total_bytes > 0:
        text = Text(
            f"about {_size(plan.peak_memory_bytes)} of memory will be needed, and the device has "
            f"{_size(plan.memory_total_bytes)}; a smaller batch or a shorter sequence needs less",
            f"预计需要约 {_size(plan.peak_memory_bytes)} 内存，而设备只有 "
            f"{_size(plan.memory_total_bytes)}；可减小批次或序列长度",
        )
        found.append(Violation("training.batch_size", text, "MEMORY_TOO_SMALL", Severity.WARNING))
    return found


def _checkpoints_that_fit(plan: Plan) -> int | None:
    room = plan.disk_free_bytes - plan.disk.final_bytes - plan.disk.merged_bytes
    # One more than is kept is there while it is written.
    fitting = room // max(1, plan.disk.checkpoint_bytes) - 1
    return fitting if fitting > 0 else None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
