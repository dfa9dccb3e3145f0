"""Continued pretraining: documents in blocks of equal length; all tokens, all weights."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import Result, RunPhase, Spec
from finetuned_runner import trial
from finetuned_runner.arguments import plan_precision
from finetuned_runner.control import Watch
from finetuned_runner.data import Prepared, begin, samples
from finetuned_runner.finish import abandoned, completed, stopped
from finetuned_runner.model import (
    check_vocabulary,
    fit_length,
    load_model,
    load_tokenizer,
    save_model,
)
from finetuned_runner.notes import Notes
from finetuned_runner.report import Report
from finetuned_runner.room import GivenUp
from finetuned_runner.trainer import make_trainer


def run(spec: Spec, report: Report, watch: Watch, prepared: Prepared | None = None) -> Result:
    """Trains as `spec` says, without its LoRA section; returns how it ended.

    Raises:
        RunFailed: It can't go on, for a reason that is known.
    """
    effective = _without_lora(spec.parameters, report)
    parameters = trial.shortened(effective) if spec.probe else effective
    data = parameters.data
    output_dir = Path(spec.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    notes = None if spec.probe else Notes(spec)
    prepared = prepared or begin(spec, report)

    report.phase(RunPhase.LOADING_MODEL, data.model_path or "")
    set_seed(parameters.general.seed)
    precision = plan_precision(parameters, spec.device, report)
    tokenizer = load_tokenizer(parameters)
    model = load_model(parameters, spec.device, precision, report)
    use_cache = model.config.use_cache
    max_length = fit_length(model, parameters.training.max_seq_length, report)

    report.phase(RunPhase.PREPARING_DATA, data.train_file or "")
    train_set, eval_set = samples(
        prepared,
        parameters,
        report,
        tokenizer,
        max_length,
        lambda largest: check_vocabulary(model, largest),
    )

    trainer = make_trainer(
        spec, parameters, report, watch, model, tokenizer, precision, train_set, eval_set
    )
    if notes is None:  # a probe
        return trial.run(spec, effective, report, watch, trainer, eval_set)
    watch.begin_training()
    trainer.run(Path(data.resume_from_checkpoint) if data.resume_from_checkpoint else None)
    if trainer.is_stopped:
        return stopped(trainer, watch)

    watch.begin_finishing()
    final = output_dir / "final"
    result = completed(trainer, final)
    leave = notes.leave(trainer, tokenizer, result, prepared)

    def save() -> None:
        report.phase(RunPhase.SAVING, final.name)
        save_model(model, tokenizer, final, report, use_cache=use_cache, add=leave)

    try:
        trainer.room.write(final, trainer.weight_bytes, save)
    except GivenUp:
        return abandoned(trainer, final)
    return result


def _without_lora(parameters: Parameters, report: Report) -> Parameters:
    for section, name in (("optimization", "use_qlora"), ("data", "attach_lora")):
        if getattr(getattr(parameters, section), name):
            report.notice(
                f"{section}.{name}",
                "NOT_FOR_PRETRAINING",
                f"{name} has no effect: pretraining trains all weights.",
            )
    return parameters.model_copy(
        update={
            "data": parameters.data.model_copy(update={"attach_lora": False}),
            "lora": parameters.lora.model_copy(update={"use_lora": False}),
            "optimization": parameters.optimization.model_copy(update={"use_qlora": False}),
        }
    )
