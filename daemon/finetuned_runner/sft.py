"""Supervised fine-tuning on the assistant's turns of chats; LoRA, QLoRA or all weights."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import set_seed

from finetuned_daemon.runs.contract import EndReason, Result, RunPhase, Spec
from finetuned_runner import trial
from finetuned_runner.arguments import plan_precision
from finetuned_runner.control import Watch
from finetuned_runner.data import Prepared, begin, samples
from finetuned_runner.failures import RunFailed
from finetuned_runner.finish import abandoned, completed, stopped
from finetuned_runner.model import (
    Model,
    add_lora,
    check_vocabulary,
    fit_length,
    load_model,
    load_tokenizer,
    merged,
    save_model,
)
from finetuned_runner.notes import Notes
from finetuned_runner.report import Report
from finetuned_runner.room import GivenUp, size_of
from finetuned_runner.trainer import make_trainer


def run(spec: Spec, report: Report, watch: Watch, prepared: Prepared | None = None) -> Result:
    """Fine-tunes as `spec` says; returns how it ended.

    Raises:
        RunFailed: It can't go on, for a reason that is known.
    """
    parameters = spec.parameters
    data, lora = parameters.data, parameters.lora
    output_dir = Path(spec.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    notes = None if spec.probe else Notes(spec)
    prepared = prepared or begin(spec, report)
    if spec.probe:
        parameters = trial.shortened(parameters)

    report.phase(RunPhase.LOADING_MODEL, data.model_path or "")
    set_seed(parameters.general.seed)
    precision = plan_precision(parameters, spec.device, report)
    tokenizer = load_tokenizer(parameters)
    base = load_model(parameters, spec.device, precision, report)
    use_cache = base.config.use_cache
    max_length = fit_length(base, parameters.training.max_seq_length, report)
    model: Model = add_lora(base, parameters, report) if lora.use_lora else base
    for name, is_set in (
        ("lora.merge_lora", lora.merge_lora),
        ("lora.peft_config_path", lora.peft_config_path),
        ("data.attach_lora", data.attach_lora),
    ):
        if is_set and not lora.use_lora:
            report.notice(name, "LORA_OFF", f"{name} has no effect: lora.use_lora is off.")

    report.phase(RunPhase.PREPARING_DATA, data.train_file or "")
    train_set, eval_set = samples(
        prepared,
        parameters,
        report,
        tokenizer,
        max_length,
        lambda largest: check_vocabulary(base, largest),
    )

    trainer = make_trainer(
        spec, parameters, report, watch, model, tokenizer, precision, train_set, eval_set
    )
    if notes is None:  # a probe
        return trial.run(spec, spec.parameters, report, watch, trainer, eval_set)
    resume = data.resume_from_checkpoint
    if data.attach_lora and lora.use_lora:  # it gave the weights; nothing else of it counts
        resume = None
    watch.begin_training()
    try:
        trainer.run(Path(resume) if resume else None)
    except RunFailed as error:
        if prepared.ended_by(error):  # the training was in order so far
            trainer.save_at_stop()
        raise
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
    if lora.merge_lora and isinstance(model, PeftModel):
        if watch.wish is not None:
            return result.model_copy(
                update={
                    "end_reason": EndReason.STOPPED_BY_USER,
                    "message": f"Stopped before merging; the trained weights are in {final}.",
                }
            )
        report.phase(RunPhase.MERGING)
        whole = merged(model, parameters, final)
        target = output_dir / "merged"

        def save_merged() -> None:
            report.phase(RunPhase.MERGING)
            save_model(whole, tokenizer, target, report, use_cache=use_cache, add=leave)

        try:
            trainer.room.write(target, lambda: size_of(whole), save_merged)
        except GivenUp:
            return abandoned(trainer, target)
    return result
