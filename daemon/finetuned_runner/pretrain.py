"""Continued pretraining: documents in blocks of equal length; all tokens, all weights."""

from __future__ import annotations

from pathlib import Path

from transformers import set_seed

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import Result, RunPhase, Spec
from finetuned_runner.arguments import plan_precision
from finetuned_runner.control import Watch
from finetuned_runner.data import (
    Samples,
    encode_documents,
    evaluates,
    load_documents,
    split,
)
from finetuned_runner.finish import completed, stopped
from finetuned_runner.model import (
    check_vocabulary,
    fit_length,
    load_model,
    load_tokenizer,
    save_model,
)
from finetuned_runner.report import Report
from finetuned_runner.trainer import make_trainer


def run(spec: Spec, report: Report, watch: Watch) -> Result:
    """Trains as `spec` says, without its LoRA section; returns how it ended.

    Raises:
        RunFailed: It can't go on, for a reason that is known.
    """
    parameters = _without_lora(spec.parameters, report)
    data = parameters.data
    output_dir = Path(spec.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    report.phase(RunPhase.LOADING_MODEL, data.model_path or "")
    set_seed(parameters.general.seed)
    precision = plan_precision(parameters, spec.device, report)
    tokenizer = load_tokenizer(parameters)
    model = load_model(parameters, spec.device, precision, report)
    use_cache = model.config.use_cache
    max_length = fit_length(model, parameters.training.max_seq_length, report)

    report.phase(RunPhase.PREPARING_DATA, data.train_file or "")
    documents = load_documents(Path(data.train_file or ""), data.max_samples)
    samples = encode_documents(documents, tokenizer, max_length, report)
    check_vocabulary(model, samples.largest_token)
    train_set: Samples = samples
    eval_set: Samples | None = None
    if evaluates(parameters, report):
        if data.eval_file:
            eval_set = encode_documents(
                load_documents(Path(data.eval_file)), tokenizer, max_length, report
            )
            check_vocabulary(model, eval_set.largest_token)
        else:
            train_set, eval_set = split(samples, data.eval_ratio, parameters.general.seed)

    trainer = make_trainer(
        spec, parameters, report, watch, model, tokenizer, precision, train_set, eval_set
    )
    watch.begin_training()
    trainer.run(Path(data.resume_from_checkpoint) if data.resume_from_checkpoint else None)
    if trainer.is_stopped:
        return stopped(trainer, watch)

    watch.begin_finishing()
    final = output_dir / "final"
    report.phase(RunPhase.SAVING, final.name)
    save_model(model, tokenizer, final, report, use_cache=use_cache)
    return completed(trainer, final)


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
