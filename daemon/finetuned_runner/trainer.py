"""transformers' Trainer as a run needs it: it reports, stops at a wish, saves whole checkpoints.

The arithmetic is untouched: losses equal those of the plain Trainer (a test compares step by step).
"""

from __future__ import annotations

import gc
import math
import shutil
import time
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    CheckpointDeleted,
    CheckpointSaved,
    EndReason,
    Evaluation,
    Metrics,
    Progress,
    RunPhase,
    Spec,
    StopWish,
)
from finetuned_daemon.runs.manifest import Manifest
from finetuned_runner import checkpoint, pissa
from finetuned_runner.arguments import Precision, training_arguments
from finetuned_runner.compute import PaddingCollator
from finetuned_runner.computing import ComputingTrainer
from finetuned_runner.control import Watch
from finetuned_runner.failures import RunFailed
from finetuned_runner.model import Model, check_resumable, pad_id, restore
from finetuned_runner.progress import Meter
from finetuned_runner.random_state import RandomState
from finetuned_runner.ranking import Ranking
from finetuned_runner.report import Report
from finetuned_runner.reporting import Tracking
from finetuned_runner.room import GivenUp, Room, size_of, size_of_state
from finetuned_runner.samples import Samples

_PROGRESS_SECONDS = 0.5

Cause = Literal["steps", "epoch", "interval", "stop", "signal", "suspend", "end"]


class _EvaluationStopped(Exception):
    """A wish to stop came while the evaluation data was scored."""


class RunTrainer(ComputingTrainer):
    """A Trainer that reports to `report` and looks at `watch` after every micro-step."""

    def __init__(
        self,
        parameters: Parameters,
        report: Report,
        watch: Watch,
        checkpoint_quota: int | None,
        made_with: Manifest,
        room: Room,
        tracking: Tracking,
        *,
        is_probe: bool = False,
        **trainer: Any,
    ):
        super().__init__(parameters, report, **trainer)
        self.room = room
        """Waits where the disk is full."""
        self._is_probe = is_probe
        self._save_wishes = 0
        self._checkpoint_quota = checkpoint_quota
        self._num_saved = 0
        self._report = report
        self._watch = watch
        self._tracking = tracking
        self._output_dir = Path(cast("str", self.args.output_dir))
        self._meter = Meter()
        self._staging: Path | None = None
        self._cause: Cause = "steps"
        self._tokens_at_step = 0
        self._is_between_steps = False
        self._state_at_step: RandomState | None = None
        self._first_step = 0
        self.resumed_from: Manifest | None = None
        """Of the checkpoint that the training went on from."""
        self._owes_evaluation = False
        """The checkpoint was saved before the evaluation that was due at its step."""
        self._last_save = time.monotonic()
        self._last_progress = 0.0
        self._best_loss: float | None = None
        self._without_gain = 0
        self._made_with = made_with
        self.ranking = Ranking(report, room)
        self.ends_early = False
        self.is_out_of_quota = False
        """The checkpoint just saved was the last that the training quota allowed."""
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(self))
        self.add_callback(tracking)

    # --- what the recipes call

    def run(self, resume: Path | None) -> None:
        """Trains to the end or to a wish; from a whole checkpoint on, if one is given.

        Raises:
            RunFailed: The checkpoint is not whole, or the loss is not finite.
        """
        # What was imported stays: without this each full collection goes through all of it again.
        gc.freeze()
        with self._tracking:
            if resume is None:
                self.train()
            else:
                manifest = self._restore(resume)
                if manifest.step < self._total_steps():
                    self.train(resume_from_checkpoint=str(resume))
                else:  # it broke off after its last step; the plain Trainer would train one more
                    self._load_from_checkpoint(str(resume))
                    self._skip_to(manifest.step)
            if self.is_stopped and self._watch.wish is StopWish.SAVE:
                self.save_at_stop()

    def _skip_to(self, step: int) -> None:
        self.state.global_step = self._report.step = step
        self._report.notice(
            "data.resume_from_checkpoint",
            "NOTHING_LEFT_TO_TRAIN",
            f"The checkpoint is of step {step} and the run ends at step {self._total_steps()}: "
            "nothing is left to train, and its weights are the result.",
        )
        self._report.emit(
            Progress(step=step, total_steps=self._total_steps(), num_tokens=self._num_tokens)
        )

    @property
    def is_stopped(self) -> bool:
        """Whether a wish, or the quota, ended the training before its end."""
        return (
            (self._watch.wish is not None or self.is_out_of_quota)
            and not self.is_done
            and not self.ends_early
        )

    @property
    def is_done(self) -> bool:
        """Whether all steps are done."""
        return self.state.global_step >= self._total_steps()

    def saved_here(self) -> Path | None:
        """The checkpoint of the last step, if one stands."""
        path = checkpoint.checkpoint_path(self._output_dir, self.state.global_step)
        return path if path.is_dir() else None

    def _total_steps(self) -> int:
        if self.args.max_steps > 0:
            return self.args.max_steps
        batches = math.ceil(len(cast("Samples", self.train_dataset)) / self.args.train_batch_size)
        steps = math.ceil(batches / self.args.gradient_accumulation_steps)
        return math.ceil(steps * self.args.num_train_epochs)

    def _restore(self, folder: Path) -> Manifest:
        try:
            manifest = checkpoint.verify_checkpoint(folder)
        except checkpoint.CheckpointBroken as error:
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"The run can't be resumed: {error}; choose another checkpoint.",
            ) from error
        check_resumable(folder, cast("Model", self.model))
        self._num_tokens = self._tokens_at_step = manifest.num_tokens
        self._best_loss, self._without_gain = (
            manifest.best_eval_loss,
            manifest.evaluations_without_gain,
        )
        self.ranking.restore(manifest)
        self.resumed_from = manifest
        self._first_step = manifest.step
        self._owes_evaluation = manifest.eval_loss is None and self._evaluates_at(manifest.step)
        return manifest

    def _evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due at the end of a step."""
        if self.args.eval_strategy == "steps":
            return step % int(self.args.eval_steps or 1) == 0
        batches = math.ceil(len(cast("Samples", self.train_dataset)) / self.args.train_batch_size)
        steps = math.ceil(batches / self.args.gradient_accumulation_steps)
        return self.args.eval_strategy == "epoch" and step % steps == 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if pissa.is_used(self.model):
            pissa.restore(cast("PeftModel", self.model), Path(resume_from_checkpoint))
            return
        try:
            if isinstance(self.model, PeftModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                restore(cast("PreTrainedModel", self.model), Path(resume_from_checkpoint))
        except (RuntimeError, ValueError) as error:
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"The run can't be resumed from {resume_from_checkpoint}: its weights are of "
                "another model; choose another checkpoint, or its own model.",
            ) from error

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-step."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._is_between_steps = True
        return loss

    # --- the end of a step

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: Any, *arguments: Any, **options: Any
    ) -> None:
        step = self.state.global_step
        if step > self._report.step:
            self._is_between_steps = False
            loss = float(tr_loss) / (step - self._globalstep_last_logged)
            self._check_finite(loss, grad_norm)
            self._report.step = step
            self._meter.step(self._num_tokens - self._tokens_at_step)
            self._tokens_at_step = self._num_tokens
            self._tell_progress(loss, options.get("learning_rate"))
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, *arguments, **options)
        if (
            not self._is_between_steps
        ):  # the loop comes here also when it is left in the middle of a step
            self._state_at_step = RandomState.now()

    def _check_finite(self, loss: float, grad_norm: Any) -> None:
        # With fp16 a gradient that overflows is left out by design, and the scale lowered.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        norm = None if grad_norm is None or scaled else float(grad_norm)
        if math.isfinite(loss) and (norm is None or math.isfinite(norm)):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        step = self.state.global_step
        advice = f"try a training.learning_rate below {self._parameters.training.learning_rate:g}"
        if step == 1:  # nothing was learned yet
            advice = "look at the model's weights, and at the samples of this step"
        raise RunFailed(
            EndReason.LOSS_NOT_FINITE,
            f"The {what} is not a finite number at step {step}; {advice}.",
            samples=self._order().lines(step),
        )

    def _tell_progress(self, loss: float, learning_rate: float | None) -> None:
        step, total = self.state.global_step, self.state.max_steps
        now = time.monotonic()
        due = now - self._last_progress >= _PROGRESS_SECONDS
        if not (due or self.control.should_log or step >= total or step == self._first_step + 1):
            return
        self._last_progress = now
        self._report.emit(
            Progress(
                step=step,
                total_steps=total,
                epoch=self.state.epoch or 0.0,
                tokens_per_second=self._meter.tokens_per_second,
                eta_seconds=self._meter.eta_seconds(max(0, total - step)),
                num_tokens=self._num_tokens,
                loss=loss,
                learning_rate=learning_rate,
            )
        )

    # --- evaluation

    def _evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        self._report.phase(RunPhase.EVALUATING)
        try:
            with self._meter.pause():
                return super()._evaluate(*arguments, **options)
        except _EvaluationStopped:
            self.control.should_training_stop = True
            return {}
        finally:
            self._report.phase(RunPhase.TRAINING)

    def judge_evaluation(self, loss: float) -> bool:
        """Whether the evaluations say that it is time to stop."""
        training = self._parameters.training
        if self._best_loss is None or self._best_loss - loss > training.early_stopping_threshold:
            self._best_loss, self._without_gain = loss, 0
        else:
            self._without_gain += 1
        self.ranking.evaluated(self.state.global_step, loss, self._manifest())
        return 0 < training.early_stopping_patience <= self._without_gain

    # --- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        pissa.convert(self.model, Path(cast("str", output_dir)))

    def _get_output_dir(self, trial: Any) -> str:
        # Where the Trainer makes its checkpoint-N: aside, while it is not whole.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self._meter.pause():
            target = checkpoint.checkpoint_path(self._output_dir, self.state.global_step)
            try:
                target, manifest = self.room.write(
                    target, self.checkpoint_bytes, self.write_checkpoint
                )
            except GivenUp:
                self.control.should_training_stop = True
                return
            self._report.emit(
                CheckpointSaved(
                    path=str(target),
                    step=manifest.step,
                    size_bytes=manifest.size_bytes,
                    cause=self._cause,
                )
            )
            self.ranking.saved(target, manifest)
            self._remove_oldest()
            self._report.sync()
        self._num_saved += 1
        self._last_save = time.monotonic()
        if not self.is_done:
            self._report.phase(RunPhase.TRAINING)

    def weight_bytes(self) -> int:
        """About how much the final adapter or model takes on disk."""
        model = cast("torch.nn.Module", self.model)
        return size_of(model, trained_only=isinstance(model, PeftModel))

    def checkpoint_bytes(self) -> int:
        """About how much a checkpoint takes on disk."""
        return self.weight_bytes() + size_of_state(self.optimizer)

    def write_checkpoint(self) -> tuple[Path, Manifest]:
        """Writes the checkpoint of this step, and tells nobody."""
        target = checkpoint.checkpoint_path(self._output_dir, self.state.global_step)
        self._report.phase(RunPhase.SAVING, target.name)
        self._staging = checkpoint.staging_folder(target)
        try:
            super()._save_checkpoint(cast("Model", self.model), None)
            folder = self._staging / target.name
            # A pickle that nothing reads: resuming takes the arguments from the task.
            (folder / "training_args.bin").unlink(missing_ok=True)
            manifest = checkpoint.seal(folder, self.ranking.rank(self._manifest(), target))
            checkpoint.commit(folder, target, self._report)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        return target, manifest

    def _manifest(self) -> Manifest:
        """What a checkpoint of this moment is; its files are still to be listed."""
        return self._made_with.model_copy(
            update={
                "step": self.state.global_step,
                "total_steps": self._total_steps(),
                "epoch": self.state.epoch or 0.0,
                "num_tokens": self._tokens_at_step,
                "best_eval_loss": self._best_loss,
                "evaluations_without_gain": self._without_gain,
            }
        )

    def _remove_oldest(self) -> None:
        # One of a later step was passed over, not being whole, when a paused run went on.
        now = self.state.global_step
        found = [c for c in checkpoint.list_checkpoints(self._output_dir) if c[0] <= now]
        for step, path in self.ranking.surplus(found, self._parameters.training.save_total_limit):
            checkpoint.remove_folder(path)
            self._report.emit(CheckpointDeleted(path=str(path), step=step))

    def save_at_stop(self) -> None:
        """Saves the last whole step, if this process did any and it isn't saved."""
        if self.state.global_step <= self._first_step or self.saved_here() is not None:
            return
        # The wish may have come between two optimizer steps: the random generators go back to where
        # the weights are.
        if self._state_at_step is not None:
            self._state_at_step.restore()
        self._cause = "signal" if self._watch.cause == "signal" else "stop"
        self._save_checkpoint(cast("Any", self.model), None)

    # --- for the flow below

    def uses_up_quota(self) -> bool:
        """Whether the run has to end with the checkpoint it has just saved."""
        quota = self._quota()
        self.is_out_of_quota = quota is not None and self._num_saved >= quota and not self.is_done
        return self.is_out_of_quota

    def _quota(self) -> int | None:
        quota = self._watch.checkpoint_quota
        return self._checkpoint_quota if quota is None else quota

    @property
    def wishes_stop(self) -> bool:
        """Whether a wish to stop was seen."""
        return self._watch.wish is not None

    def begin(self, state: TrainerState) -> None:
        """Training begins, at `state`."""
        # A checkpoint's state brings the steps of logging, evaluation and saving that it had.
        state.compute_steps(self.args, state.max_steps)  # type: ignore[no-untyped-call]
        self._first_step = self._report.step = state.global_step
        self._report.phase(RunPhase.TRAINING)
        self._report.emit(
            Progress(
                step=state.global_step,
                total_steps=state.max_steps,
                epoch=state.epoch or 0.0,
                num_tokens=self._num_tokens,
            )
        )
        self._last_save = time.monotonic()
        self._save_wishes = self._watch.save_wishes  # before there was anything to save
        if self._owes_evaluation:
            self._owes_evaluation = False
            self._evaluate(None, None)
        self._meter.start()

    def choose_save(self, control: TrainerControl, *, at_epoch_end: bool) -> None:
        """Adds saving by the clock to what is due, and remembers why something is saved."""
        training = self._parameters.training
        if control.should_save:
            self._cause = "epoch" if at_epoch_end else "steps"
            if not at_epoch_end and self.is_done and self.state.global_step % training.save_steps:
                self._cause = "end"
        elif (
            not at_epoch_end
            and training.save_strategy != "no"
            and not self.is_done
            and time.monotonic() - self._last_save >= training.save_interval_minutes * 60
        ):
            control.should_save = True
            self._cause = "interval"
        if not at_epoch_end and self._is_asked_to_save():
            control.should_save = True
            self._cause = "suspend"

    def _is_asked_to_save(self) -> bool:
        """Whether a checkpoint was newly wished for, and can be had without ending the run."""
        wishes = self._watch.save_wishes
        if wishes <= self._save_wishes:
            return False
        self._save_wishes = wishes
        if self.is_done or self._is_probe or self.saved_here() is not None:
            return False
        quota = self._quota()
        # The last one belongs to a stop.
        return quota is None or self._num_saved + 1 < quota

    def tell_metrics(self, logs: dict[str, float]) -> None:
        """Reports what the Trainer logs of a step."""
        if "loss" in logs:
            values = {
                key: value for key, value in logs.items() if key != "epoch" and math.isfinite(value)
            }
            self._report.emit(
                Metrics(step=self.state.global_step, epoch=self.state.epoch or 0.0, values=values)
            )

    def tell_evaluation(self, metrics: dict[str, float]) -> None:
        """Reports an evaluation."""
        values = {
            key: value for key, value in metrics.items() if key != "epoch" and math.isfinite(value)
        }
        self._report.emit(
            Evaluation(step=self.state.global_step, epoch=self.state.epoch or 0.0, values=values)
        )


def make_trainer(
    spec: Spec,
    parameters: Parameters,
    report: Report,
    watch: Watch,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    precision: Precision,
    train_set: Samples,
    eval_set: Samples | None,
) -> RunTrainer:
    """The trainer of a run; `parameters` are those of the spec that take effect."""
    return RunTrainer(
        parameters,
        report,
        watch,
        spec.checkpoint_quota,
        checkpoint.made_with(spec, len(train_set)),
        Room(report, watch, 0.0 if spec.probe else spec.disk_wait_seconds),
        Tracking(spec, parameters, report),
        is_probe=spec.probe,
        model=model,
        args=training_arguments(
            parameters,
            spec.output_dir,
            spec.device,
            precision,
            evaluates=eval_set is not None and not spec.probe,
            report=report,
        ),
        data_collator=PaddingCollator(pad_id(tokenizer)),
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=tokenizer,
    )


class _Flow(TrainerCallback):
    """Decides at each turn of the loop, after the Trainer's own callback has."""

    def __init__(self, trainer: RunTrainer):
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.begin(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # With many micro-steps to a step a stop must not wait for the last: what they added up is
        # dropped.
        if self._trainer.wishes_stop:
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._trainer.room.await_events()
        self._trainer.choose_save(control, at_epoch_end=False)
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self._trainer.wishes_stop:
            control.should_training_stop = control.should_log = True
            control.should_save = False  # saved when the loop is left, if it is to be saved
            control.should_evaluate = False  # made up for when the run goes on

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.uses_up_quota():
            control.should_training_stop = control.should_log = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.is_stopped or self._trainer.ends_early:
            control.should_save = False
        if self._trainer.is_stopped:
            control.should_evaluate = False
        elif self._trainer.ends_early:
            # The loop comes here also when it is left in mid-epoch.
            control.should_evaluate &= (state.epoch or 0.0).is_integer()
        self._trainer.choose_save(control, at_epoch_end=True)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trainer.wishes_stop and not self._trainer.is_done:
            raise _EvaluationStopped

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        metrics: dict[str, float] = context["metrics"]
        self._trainer.tell_evaluation(metrics)
        if self._trainer.judge_evaluation(metrics["eval_loss"]) and not self._trainer.is_done:
            self._trainer.ends_early = True
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        self._trainer.tell_metrics(context["logs"] or {})
