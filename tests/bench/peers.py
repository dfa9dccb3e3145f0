"""The systems that training is held against, each as it is used, with the same settings.

Run as a program it is the plain transformers Trainer: `python peers.py SETTINGS.json`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Settings:
    """What all systems are asked to do."""

    model: str
    data: str
    output: str
    steps: int
    batch_size: int = 2
    accumulation: int = 4
    max_length: int = 512
    learning_rate: float = 2e-4
    warmup_steps: int = 10
    rank: int = 16
    checkpointing: bool = False
    seed: int = 42


def sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """The settings as our parameters."""
    return {
        "data": {
            "model_path": settings.model,
            "train_file": settings.data,
            "output_dir": settings.output,
            "reshuffle": True,
            "dataloader_num_workers": 0,
        },
        "training": {
            "batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "max_seq_length": settings.max_length,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": settings.warmup_steps,
            "max_steps": settings.steps,
            "weight_decay": 0.0,
            "save_strategy": "no",
        },
        "lora": {
            "lora_r": settings.rank,
            "lora_alpha": settings.rank,
            "lora_dropout": 0.0,
            "lora_target_modules": MODULES,
        },
        "optimization": {"fp16": False, "gradient_checkpointing": settings.checkpointing},
        "logging": {"logging_steps": 1},
        "general": {"seed": settings.seed},
    }


def ours(settings: Settings, run_dir: Path) -> list[str]:
    """Our runner, as the daemon starts it."""
    from finetuned_daemon.parameters.models import Parameters
    from finetuned_daemon.runs.contract import SPEC, Spec, TrainingType, write_record

    run_dir.mkdir(parents=True)
    spec = Spec(
        task="tasks/bench",
        run=1,
        training_type=TrainingType.SFT,
        device="cpu",
        output_dir=settings.output,
        parameters=Parameters.model_validate(sections(settings)),
    )
    write_record(run_dir / SPEC, spec)
    return [sys.executable, "-m", "finetuned_runner", str(run_dir)]


def plain(settings: Settings, run_dir: Path) -> list[str]:
    """A script over transformers' Trainer: this file."""
    run_dir.mkdir(parents=True)
    (run_dir / "settings.json").write_text(json.dumps(asdict(settings)))
    return [sys.executable, __file__, str(run_dir / "settings.json")]


def trl(settings: Settings, run_dir: Path) -> list[str]:
    """`trl sft`."""
    data = run_dir / "data"
    data.mkdir(parents=True)
    (data / "train.jsonl").symlink_to(settings.data)
    options = {
        "model_name_or_path": settings.model,
        "dataset_name": data,
        "output_dir": settings.output,
        "assistant_only_loss": True,
        "max_length": settings.max_length,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "gradient_checkpointing": settings.checkpointing,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup_steps,
        "use_peft": True,
        "lora_r": settings.rank,
        "lora_alpha": settings.rank,
        "lora_dropout": 0.0,
        "lora_target_modules": MODULES,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "dtype": "float32",
        "seed": settings.seed,
    }
    arguments: list[str] = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *map(str, values)]
    return [str(Path(sys.executable).parent / "trl"), "sft", *arguments]


def llama_factory(settings: Settings, run_dir: Path, program: str) -> list[str]:
    """`llamafactory-cli train`, where `program` is."""
    data = run_dir / "data"
    data.mkdir(parents=True)
    (data / "chats.json").write_text(
        json.dumps([json.loads(line) for line in Path(settings.data).read_text().splitlines()])
    )
    roles = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
    info = {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": roles | {"assistant_tag": "assistant", "system_tag": "system"},
    }
    (data / "dataset_info.json").write_text(json.dumps({"chats": info}))
    config = {
        "model_name_or_path": settings.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": settings.rank,
        "lora_alpha": settings.rank,
        "lora_dropout": 0.0,
        "lora_target": ",".join(MODULES),
        "dataset_dir": str(data),
        "dataset": "chats",
        "template": "chatml",
        "cutoff_len": settings.max_length,
        "preprocessing_num_workers": 1,
        "output_dir": settings.output,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation,
        "max_steps": settings.steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": settings.warmup_steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "disable_gradient_checkpointing": not settings.checkpointing,
        "seed": settings.seed,
        "plot_loss": False,
    }
    file = run_dir / "config.yaml"  # JSON is YAML, and it reads no .json
    file.write_text(json.dumps(config))
    return [program, "train", str(file)]


def _train_plainly(settings: Settings) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.nn.utils.rnn import pad_sequence
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    samples = []
    for line in Path(settings.data).read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = encoded["input_ids"][: settings.max_length]
        learned = encoded["assistant_masks"][: settings.max_length]
        labels = [t if m else -100 for t, m in zip(tokens, learned, strict=True)]
        samples.append({"input_ids": tokens, "labels": labels})

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        def rows(key: str, fill: int) -> torch.Tensor:
            values = [torch.tensor(sample[key]) for sample in batch]
            return pad_sequence(values, batch_first=True, padding_value=fill)

        for sample in batch:
            sample["attention_mask"] = [1] * len(sample["input_ids"])
        return {
            "input_ids": rows("input_ids", 0),
            "attention_mask": rows("attention_mask", 0),
            "labels": rows("labels", -100),
        }

    class Tell(TrainerCallback):  # type: ignore[misc]
        """Prints losses in full; the Trainer rounds them."""

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            print(json.dumps(logs), flush=True)

    set_seed(settings.seed)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    set_seed(settings.seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=0.0,
        target_modules=MODULES,
        task_type="CAUSAL_LM",
    )
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            output_dir=settings.output,
            use_cpu=True,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.warmup_steps,
            max_steps=settings.steps,
            seed=settings.seed,
            gradient_checkpointing=settings.checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        data_collator=pad,
        train_dataset=samples,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Tell())
    trainer.train()


if __name__ == "__main__":
    _train_plainly(Settings(**json.loads(Path(sys.argv[1]).read_text())))
