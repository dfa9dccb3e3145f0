"""The samples of a run: to train on, and to evaluate. Begun before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import Spec, TrainingType
from finetuned_runner.document_preparation import DocumentPreparation
from finetuned_runner.encode_process import let_go
from finetuned_runner.preparation import ChatPreparation, Check, Preparation
from finetuned_runner.report import Report
from finetuned_runner.samples import Samples, split


@dataclass(frozen=True)
class Prepared:
    """Data files of a run, in the making."""

    train: Preparation
    evaluation: Preparation | None

    def ended_by(self, error: BaseException) -> bool:
        """Whether it is the data that ends the run, and nothing in the training."""
        evaluation = self.evaluation.failure if self.evaluation is not None else None
        return error in (self.train.failure, evaluation)

    def close(self) -> None:
        """The run is over."""
        self.train.close()
        if self.evaluation is not None:
            self.evaluation.close()


def begin(spec: Spec, report: Report) -> Prepared:
    """Begins to read the data of a run and to make tokens of it, in threads and processes."""
    data, training = spec.parameters.data, spec.parameters.training
    kind = ChatPreparation if spec.training_type is TrainingType.SFT else DocumentPreparation
    train = kind(spec, report, Path(data.train_file or ""), data.max_samples)
    has_file = bool(data.eval_file) and training.eval_strategy != "no"
    evaluation = kind(spec, report, Path(data.eval_file or ""), 0) if has_file else None
    return Prepared(train, evaluation)


def samples(
    prepared: Prepared,
    parameters: Parameters,
    report: Report,
    tokenizer: Any,
    max_length: int,
    check: Check,
) -> tuple[Samples, Samples | None]:
    """The samples to train on, and those to evaluate, if any.

    Args:
        prepared: From `begin`.
        parameters: Of the run.
        report: Is told of what has no effect.
        tokenizer: The run's.
        max_length: Tokens of the longest sample.
        check: Raises RunFailed where a token id is more than the model knows.

    Raises:
        RunFailed: The data can't be used.
    """
    train: Samples = prepared.train.samples(tokenizer, max_length, check)
    wanted = evaluates(parameters, report)
    evaluation: Samples | None = None
    if wanted and prepared.evaluation is not None:
        evaluation = prepared.evaluation.samples(tokenizer, max_length, check)
    let_go()
    if wanted and evaluation is None:
        return split(train, parameters.data.eval_ratio, parameters.general.seed)
    return train, evaluation


def evaluates(parameters: Parameters, report: Report) -> bool:
    """Whether the run evaluates; says so where data and strategy don't match."""
    data, training = parameters.data, parameters.training
    has_data = bool(data.eval_file) or data.eval_ratio > 0
    wanted = training.eval_strategy != "no"
    if wanted and not has_data:
        report.notice(
            "training.eval_strategy",
            "NO_EVALUATION_DATA",
            "There is no evaluation: neither data.eval_file nor data.eval_ratio is set.",
        )
    if has_data and not wanted:
        report.notice(
            "data.eval_file" if data.eval_file else "data.eval_ratio",
            "EVALUATION_OFF",
            'The evaluation data is not used: training.eval_strategy is "no".',
        )
    if training.early_stopping_patience > 0 and not (wanted and has_data):
        report.notice(
            "training.early_stopping_patience",
            "EARLY_STOPPING_WITHOUT_EVALUATION",
            "The run does not stop early: early stopping needs evaluations.",
        )
    if wanted and data.eval_file and data.eval_ratio > 0:
        report.notice(
            "data.eval_ratio",
            "EVALUATION_FILE_WINS",
            "No samples are taken from the training data: data.eval_file is set.",
        )
    return wanted and has_data
