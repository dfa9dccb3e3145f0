"""The model card of an adapter or a model, as the Hugging Face Hub shows it.

It is written to be published: files go by their names, and no folder of the machine stands in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetuned_daemon.parameters.models import SECTIONS
from finetuned_daemon.parameters.needs import in_effect
from finetuned_runner.record import RECORD, ResumedFrom, TrainingRecord

_MOST_EVALUATIONS = 20

# Where files lie, what is saved and logged, how data is loaded: nothing that shapes the result.
_NO_HYPERPARAMETERS = (
    "data.",
    "training.save_",
    "training.eval_",
    "training.optimizer",
    "lora.merge_lora",
    "lora.peft_config_path",
    "optimization.",
    "logging.",
    "extensions.report_to",
    "extensions.retry_out_of_memory",
)
_BACK_AGAIN = (
    "data.attach_lora",
    "data.reshuffle",
    "optimization.use_qlora",
)


def model_card(record: TrainingRecord, *, is_adapter: bool, name: str) -> str:
    """The text of `README.md`.

    Args:
        record: What is told.
        is_adapter: It lies beside LoRA weights, else beside a whole model.
        name: Of the folder: `final` or `merged`.
    """
    base = base_name(record.parameters.data.model_path or "")
    parts = [
        _front_matter(record, base, is_adapter=is_adapter),
        _about(record, base, is_adapter=is_adapter, is_merged=name == "merged"),
        f"## Use\n\n```python\n{_snippet(record, base, is_adapter=is_adapter)}\n```",
    ]
    if is_adapter:
        parts.append(
            "`adapter_config.json` names the base model by its folder on the machine that trained: "
            "put its id on the Hub there before you publish."
        )
    parts += [
        _data(record),
        _results(record),
        _hyperparameters(record),
        _made(record),
        "## License\n\nThis card doesn't know it: look at the license of the base model and of the "
        "data, which both count, and add `license:` at the top.",
    ]
    return "\n\n".join(parts) + "\n"


def base_name(path: str) -> str:
    """What to call a model: its id on the Hub where its cache says so, else its folder's name."""
    for part in Path(path).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return part.removeprefix("models--").replace("--", "/")
    return Path(path).name


def _front_matter(record: TrainingRecord, base: str, *, is_adapter: bool) -> str:
    known = "" if "/" in base else "  # a folder's name: put the id on the Hub here"
    tags = [record.training_type, *(["lora"] if record.parameters.lora.use_lora else [])]
    if record.training_type == "pretrain":
        tags = ["pretraining"]
    return "\n".join(
        [
            "---",
            f"base_model: {_quoted(base)}{known}",
            f"base_model_relation: {'adapter' if is_adapter else 'finetune'}",
            f"library_name: {'peft' if is_adapter else 'transformers'}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "---",
        ]
    )


def _quoted(name: str) -> str:
    """In double quotes, as YAML and Python read it, in its own letters."""
    return json.dumps(name, ensure_ascii=False)


def _about(record: TrainingRecord, base: str, *, is_adapter: bool, is_merged: bool) -> str:
    share = f"{record.trained_parameters:,} of {record.total_parameters:,} parameters"
    if is_adapter:
        what = f"A LoRA adapter ({share}) for {base}"
    elif is_merged:
        what = f"{base} with a LoRA adapter ({share}) worked into its weights"
    else:
        what = f"{base}, all {record.total_parameters:,} parameters trained further"
    if record.training_type == "sft":
        title, how = "fine-tuned", "on the assistant's turns of chats"
    else:
        title, how = "pretrained further", "on plain text (continued pretraining)"
    return f"# {base}, {title}\n\n{what}, {how}."


def _snippet(record: TrainingRecord, base: str, *, is_adapter: bool) -> str:
    load = "model = AutoModelForCausalLM.from_pretrained(folder)"
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if is_adapter:
        imports = f"from peft import PeftModel\n{imports}"
        load = (
            f"base = AutoModelForCausalLM.from_pretrained({_quoted(base)})  # or its folder\n"
            "model = PeftModel.from_pretrained(base, folder)"
        )
    ask = (
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")"
        if record.training_type == "sft"
        else 'inputs = tokenizer("Once", return_tensors="pt")'
    )
    return "\n".join(
        [
            imports,
            "",
            'folder = "."  # where this card lies',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            load,
            ask,
            "output = model.generate(**inputs, max_new_tokens=100)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
        ]
    )


_DATA = (("data.train_file", "training"), ("data.eval_file", "evaluation"))


def _data(record: TrainingRecord) -> str:
    unit = "chats" if record.training_type == "sft" else "blocks of text"
    trained = (
        f"{record.num_samples:,} {unit} for training",
        f"{record.num_tokens:,} tokens were trained on in {record.epoch:.4g} epochs",
    )
    resumed = record.resumed_from
    is_idle = resumed is not None and record.step == resumed.step
    rows = []
    for parameter, use in _DATA:
        if is_idle:
            use = f"nothing: read for {use}"
        rows += [
            (use, f"`{file.name}`", f"{file.size:,}", f"`{file.sha256}`")
            for file in record.files.get(parameter, [])
        ]
    share = record.parameters.data.eval_ratio
    held_out = f", {record.num_eval_samples:,} for evaluation" if record.num_eval_samples else ""
    if held_out and not record.parameters.data.eval_file:
        held_out += f" ({share:.3g} of the training file, drawn by the seed)"
    parts = ["## Training data", _table(("used for", "file", "bytes", "SHA-256"), rows)]
    if resumed is None:
        parts.append(f"{trained[0]}{held_out}. {trained[1]}.")
    elif is_idle:
        parts.append(
            "This run did no step, and trained on nothing of it: the weights are those of the "
            f"checkpoint that it went on from. Up to there {trained[1]}."
        )
    else:
        parts.append(f"{trained[0]}{held_out}. {trained[1]}, those up to the checkpoint included.")
    if resumed is not None:
        parts.append(_resumed(resumed))
    return "\n\n".join(parts)


def _resumed(resumed: ResumedFrom) -> str:
    text = (
        f"The run went on from `{resumed.checkpoint}`, a checkpoint at step {resumed.step}: steps, "
        "tokens, epochs and losses up to there are those of the run that saved it."
    )
    for parameter, use in _DATA:
        if parameter in resumed.data_files:
            text += (
                f" That run had another file for {use}, or the same before it was changed: "
                f"`{resumed.data_files[parameter]}`."
            )
    return text


def _results(record: TrainingRecord) -> str:
    train, evaluated = record.train_losses, record.eval_losses
    rows = [(str(step), f"{train[step]:.4f}", "") for step in list(train)[:1]]
    if len(train) > 1 or evaluated:
        last = max(train, default=0)
        shown = _spread(sorted(evaluated))
        for step in sorted({*shown, last}):
            score = f"{evaluated[step]:.4f}" if step in evaluated else ""
            rows.append((str(step), f"{train[step]:.4f}" if step in train else "", score))
    # A first step that was evaluated too stands once.
    rows = list({row[0]: row for row in rows}.values())
    if not rows:
        return "## Results\n\nNothing was left to train: the weights are the checkpoint's."
    text = "## Results\n\n" + _table(("step", "training loss", "evaluation loss"), rows)
    if evaluated:
        best = min(evaluated, key=lambda step: evaluated[step])
        text += f"\n\nThe best evaluation loss is {evaluated[best]:.4f}, at step {best}"
        text += (
            "." if best == record.step else f"; the weights here are those of step {record.step}."
        )
    return text


def _spread(steps: list[int]) -> list[int]:
    """At most so many of them, evenly, the last included."""
    if len(steps) <= _MOST_EVALUATIONS:
        return steps
    last = len(steps) - 1
    return [steps[i * last // (_MOST_EVALUATIONS - 1)] for i in range(_MOST_EVALUATIONS)]


def _hyperparameters(record: TrainingRecord) -> str:
    rows = [
        (path, _value(value))
        for path, value in in_effect(record.parameters, record.training_type).items()
        if (path in _BACK_AGAIN or not path.startswith(_NO_HYPERPARAMETERS))
        and not _is_idle(record, path, value)
    ]
    rows += [("optimizer", record.optimizer), ("precision", record.precision)]
    rows += [("steps", str(record.step))]
    if record.parameters.lora.peft_config_path:
        name = Path(record.parameters.lora.peft_config_path).name
        rows.append(("LoRA configuration", f"`{name}`, as in `adapter_config.json`"))
    return "## Hyperparameters\n\n" + _table(("parameter", "value"), rows)


def _is_idle(record: TrainingRecord, path: str, value: Any) -> bool:
    training = record.parameters.training
    section, _, name = path.partition(".")
    if path in ("data.attach_lora", "optimization.use_qlora", "lora.use_lora"):
        return not value
    if section == "extensions":
        return bool(value == SECTIONS[section].model_fields[name].get_default())
    if path.startswith("training.early_stopping"):
        return training.early_stopping_patience == 0 or not record.eval_losses
    return (path == "training.max_steps" and value <= 0) or (
        path == "training.warmup_steps" and not value
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _made(record: TrainingRecord) -> str:
    machine = record.machine
    where = machine.gpu or f"{machine.cpu}, number of threads: {machine.num_threads}"
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    seconds = (record.end_time - record.start_time).total_seconds()
    return (
        f"## How it was made\n\n{versions}; {where}; {record.end_time:%Y-%m-%d}, "
        f"{_duration(seconds)}.\n\n"
        f"`{RECORD}` beside this card has all that it takes to repeat the run, with hashes of the "
        "base model, tokenizer and data. It names folders of the machine that trained: leave it "
        "out where they are nobody's business."
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
