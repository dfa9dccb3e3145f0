"""transformers' Trainer with our arithmetic: which samples, in which order, and their loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch.utils.data import Dataset
from transformers import Trainer

from finetuned_daemon.parameters.models import Parameters
from finetuned_runner.compute import RowCollator, base_of, choose, row_loss
from finetuned_runner.loraplus import speed_up_b
from finetuned_runner.model import Model
from finetuned_runner.order import InOrder, Order
from finetuned_runner.random_state import RandomState
from finetuned_runner.rates import Rates
from finetuned_runner.report import Report
from finetuned_runner.samples import IGNORED, Packed, Samples


@dataclass
class _Scored:
    """Losses of the batches of an evaluation."""

    total: float = 0.0
    tokens: int = 0

    def add(self, mean: float, tokens: int) -> None:
        """Counts a batch with the mean loss of its learned tokens."""
        self.total += mean * tokens if tokens else 0.0
        self.tokens += tokens

    def mean(self) -> float:
        """Mean loss of a learned token."""
        return self.total / max(1, self.tokens)


class ComputingTrainer(Trainer):
    """A Trainer whose losses are the plain Trainer's, made in less time and memory."""

    def __init__(self, parameters: Parameters, report: Report, **trainer: Any) -> None:
        super().__init__(**trainer)
        self._parameters = parameters
        # Once the model is on its device.
        self._computation = choose(cast("Model", self.model), parameters)
        if self._computation.in_rows:
            self.data_collator = cast("Any", RowCollator())
            self.model_accepts_loss_kwargs = True  # makes the Trainer count a step's tokens
        if parameters.extensions.packing:
            self._pack(report)
        self._scored = _Scored()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, without padding."""
        return self._num_tokens

    # --- samples

    def _pack(self, report: Report) -> None:
        if not self._computation.in_rows:
            report.notice(
                "extensions.packing",
                "PACKING_UNAVAILABLE",
                "Samples are not packed: with this model or these settings they would see each "
                "other.",
            )
            return
        samples = cast("Samples", self.train_dataset)
        length = self._parameters.training.max_seq_length
        self.train_dataset = cast("Any", Packed(samples, length))

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        return self._order()

    def _get_eval_sampler(self, eval_dataset: Dataset[Any]) -> Any:
        return InOrder(cast("Samples", eval_dataset))

    def _order(self) -> Order:
        return Order(
            cast("Samples", self.train_dataset),
            self._parameters.general.seed,
            batch_size=self.args.train_batch_size,
            step_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
            reshuffle=self._parameters.data.reshuffle,
            is_padded=not self._computation.in_rows,
        )

    def training_step(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One micro-step; counts its tokens."""
        is_padded = "attention_mask" in inputs
        tokens = int(inputs["attention_mask"].sum()) if is_padded else inputs["input_ids"].numel()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._num_tokens += tokens
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Loss of a micro-batch: its share of the mean over the step's learned tokens."""
        if not self._computation.in_rows:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        base = base_of(self.accelerator.unwrap_model(model))
        # The base is called past the Trainer's wrapper, which would see to the precision.
        with self.accelerator.autocast():
            total, count = row_loss(self._computation, model, base, inputs)
        # Where a whole step has nothing to learn, it changes nothing.
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(items).clamp(min=1)
        return (loss, {}) if return_outputs else loss

    # --- evaluation

    def evaluation_loop(self, *arguments: Any, **options: Any) -> Any:
        """Scores the evaluation data; `eval_loss` is the mean over its learned tokens.

        transformers takes the mean of the batches' means, which depends on their size. The random
        numbers that are drawn here are given back: a run is the same with and without evaluations,
        and a checkpoint is, whether it was saved before one or after.
        """
        self._scored = _Scored()
        state = RandomState.now()
        try:
            output = super().evaluation_loop(*arguments, **options)
        finally:
            state.restore()
        cast("dict[str, float]", output.metrics)["eval_loss"] = self._scored.mean()
        return output

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        """Scores a batch."""
        count = int((inputs["labels"][..., 1:] != IGNORED).sum())
        loss, *rest = super().prediction_step(model, inputs, *arguments, **options)
        self._scored.add(float(cast("torch.Tensor", loss)), count)
        return (loss, *rest)

    # --- the optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer; with LoRA+ the B matrices have groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        ratio = self._parameters.extensions.loraplus_lr_ratio
        if is_new and ratio and isinstance(self.model, PeftModel):
            speed_up_b(optimizer, self.model, ratio)
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        rates = Rates.of(self.optimizer) if checkpoint is not None else None
        super()._load_optimizer_and_scheduler(checkpoint)
        if rates is not None:
            rates.restore(self.optimizer, self.lr_scheduler)
