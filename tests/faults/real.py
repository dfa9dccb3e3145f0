"""A tiny run of the real runner, for faults that touch what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from faults.registry import World
from finetuned.v1 import parameters_pb2
from tiny import chats, make_model, write_jsonl


def parameters(world: World, output: Path, **training: Any) -> parameters_pb2.Parameters:
    """Parameters of a LoRA run of some seconds; makes its model and data."""
    model = make_model(world.root / "model", layers=1, hidden=16)
    data = write_jsonl(world.root / "chats.jsonl", chats(24))
    return parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(data),
            model_path=str(model),
            output_dir=str(output),
            dataloader_num_workers=0,
        ),
        training=parameters_pb2.TrainingParameters(
            batch_size=2, gradient_accumulation_steps=1, max_seq_length=128, **training
        ),
        lora=parameters_pb2.LoraParameters(lora_r=4),
        optimization=parameters_pb2.OptimizationParameters(gradient_checkpointing=False),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )
