"""Every rule across fields fires alone, in both languages, and is silent where nothing is wrong."""

from __future__ import annotations

import pytest

from finetuned_daemon.errors import Severity
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.validation.surroundings import Surroundings
from rules import (
    BARE_AMPERE,
    ON_AMPERE,
    ON_TURING,
    PRETRAIN,
    SFT,
    Values,
    alone,
    judge,
)

# --- fields among themselves, and the device

E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTICE
ACROSS: list[tuple[Values, TrainingType, Surroundings, tuple[str, str, Severity]]] = [
    ({"optimization.bf16": True}, SFT, ON_AMPERE, ("optimization.bf16", "FP16_WITH_BF16", E)),
    (
        {"optimization.use_qlora": True, "lora.use_lora": False},
        SFT,
        ON_AMPERE,
        ("optimization.use_qlora", "QLORA_WITHOUT_LORA", E),
    ),
    (
        {"optimization.use_qlora": True},
        PRETRAIN,
        ON_AMPERE,
        ("optimization.use_qlora", "QLORA_WITHOUT_LORA", E),
    ),
    (
        {"optimization.use_8bit_optimizer": True, "training.optimizer": "adafactor"},
        SFT,
        ON_AMPERE,
        ("optimization.use_8bit_optimizer", "NO_8BIT_OPTIMIZER", E),
    ),
    (
        {"training.early_stopping_patience": 2},
        SFT,
        ON_AMPERE,
        ("training.early_stopping_patience", "EARLY_STOPPING_WITHOUT_EVALUATION", E),
    ),
    (
        {"training.eval_strategy": "steps"},
        SFT,
        ON_AMPERE,
        ("training.eval_strategy", "EVALUATION_DATA_MISSING", E),
    ),
    (
        {"data.eval_ratio": 1.0, "training.eval_strategy": "epoch"},
        SFT,
        ON_AMPERE,
        ("data.eval_ratio", "SPLIT_LEAVES_NONE", E),
    ),
    ({"data.eval_ratio": 0.1}, SFT, ON_AMPERE, ("data.eval_ratio", "EVALUATION_OFF", N)),
    ({"training.max_steps": 0}, SFT, ON_AMPERE, ("training.max_steps", "OUT_OF_RANGE", E)),
    (
        {"training.max_steps": 10, "training.warmup_steps": 10},
        SFT,
        ON_AMPERE,
        ("training.warmup_steps", "WARMUP_LONGER_THAN_RUN", W),
    ),
    (
        {"lora.merge_lora": True, "lora.use_lora": False},
        SFT,
        ON_AMPERE,
        ("lora.merge_lora", "LORA_OFF", N),
    ),
    (
        {"lora.peft_config_path": "/absent", "data.attach_lora": True},
        SFT,
        ON_AMPERE,
        ("lora.peft_config_path", "ATTACHED_LORA_WINS", N),
    ),
    (
        {"data.attach_lora": True},
        PRETRAIN,
        ON_AMPERE,
        ("data.attach_lora", "NOT_FOR_PRETRAINING", N),
    ),
    (
        {"optimization.bf16": True, "optimization.fp16": False},
        SFT,
        ON_TURING,
        ("optimization.bf16", "DEVICE_LACKS_IT", E),
    ),
    ({"optimization.tf32": True}, SFT, ON_TURING, ("optimization.tf32", "DEVICE_LACKS_IT", E)),
    (
        {"optimization.use_qlora": True},
        SFT,
        ON_TURING,
        ("optimization.use_qlora", "DEVICE_LACKS_IT", E),
    ),
    (
        {"optimization.use_8bit_optimizer": True},
        SFT,
        ON_TURING,
        ("optimization.use_8bit_optimizer", "DEVICE_LACKS_IT", E),
    ),
    (
        {"training.optimizer": "paged_adamw_8bit"},
        SFT,
        ON_TURING,
        ("training.optimizer", "DEVICE_LACKS_IT", E),
    ),
    (
        {"optimization.tf32": True, "optimization.fp16": False},
        SFT,
        Surroundings(),
        ("optimization.tf32", "DEVICE_LACKS_IT", E),
    ),
    (
        {"optimization.use_qlora": True},
        SFT,
        BARE_AMPERE,
        ("optimization.use_qlora", "BITSANDBYTES_MISSING", W),
    ),
    (
        {"optimization.use_8bit_optimizer": True},
        PRETRAIN,
        BARE_AMPERE,
        ("optimization.use_8bit_optimizer", "BITSANDBYTES_MISSING", W),
    ),
    (
        {"training.optimizer": "adamw_8bit"},
        SFT,
        BARE_AMPERE,
        ("training.optimizer", "BITSANDBYTES_MISSING", W),
    ),
    (
        {"training.optimizer": "paged_adamw_8bit", "optimization.fp16": False},
        SFT,
        Surroundings(),
        ("training.optimizer", "PAGED_OPTIMIZER_WITHOUT_GPU", N),
    ),
    ({"lora.lora_dropout": 1.0}, SFT, ON_AMPERE, ("lora.lora_dropout", "NOTHING_TO_LEARN", W)),
    ({}, SFT, Surroundings(), ("optimization.fp16", "FP16_UNAVAILABLE_ON_CPU", N)),
    (
        {"data.dataloader_pin_memory": True, "optimization.fp16": False},
        SFT,
        Surroundings(),
        ("data.dataloader_pin_memory", "PIN_MEMORY_WITHOUT_GPU", N),
    ),
]


@pytest.mark.parametrize(("values", "training_type", "surroundings", "expected"), ACROSS)
def test_a_rule_across_fields_fires_alone(
    values: Values,
    training_type: TrainingType,
    surroundings: Surroundings,
    expected: tuple[str, str, Severity],
) -> None:
    assert alone(judge(values, training_type, surroundings)) == expected


def test_a_constant_schedule_has_no_warm_up_to_be_too_long() -> None:
    values = {"training.max_steps": 10, "training.warmup_steps": 10}
    assert judge({**values, "training.lr_scheduler_type": "constant"}) == []
    assert judge({**values, "training.lr_scheduler_type": "constant_with_warmup"}) != []


def test_four_and_eight_bits_are_in_order_on_the_cpu() -> None:
    values = {"optimization.use_qlora": True, "optimization.fp16": False}
    for more in ({"optimization.use_8bit_optimizer": True}, {"training.optimizer": "adamw_8bit"}):
        assert judge({**values, **more}, SFT, Surroundings()) == []


def test_everything_that_the_device_lacks_is_named_at_once() -> None:
    values = {
        "optimization.use_qlora": True,
        "optimization.use_8bit_optimizer": True,
        "training.optimizer": "adamw_8bit",
        "optimization.fp16": False,
        "optimization.bf16": True,
        "optimization.tf32": True,
    }
    found = judge(values, SFT, ON_TURING)
    assert {v.field for v in found} == values.keys() - {"optimization.fp16"}
    assert {v.reason for v in found} == {"DEVICE_LACKS_IT"}
    # What is suggested for each leaves nothing to refuse.
    values |= {v.field: v.suggested for v in found}
    assert judge(values, SFT, ON_TURING) == []


def test_defaults_on_a_gpu_are_in_order() -> None:
    assert judge({}) == judge({}, PRETRAIN) == []


def test_a_suggestion_mends_what_it_is_for() -> None:
    """Applied one by one, suggestions lead to parameters without an error."""
    values: Values = {
        "optimization.bf16": True,
        "training.eval_strategy": "steps",
        "training.max_steps": 0,
        "training.batch_size": 1000,
        "training.max_seq_length": 513,
        "lora.use_lora": False,
        "optimization.use_qlora": True,
    }
    for _ in range(len(values) + 1):
        errors = [v for v in judge(values) if v.severity is Severity.ERROR]
        if not errors:
            return
        violation = errors[0]
        assert violation.suggested is not None, violation
        values[violation.suggested_field or violation.field] = violation.suggested
    raise AssertionError(f"still wrong: {errors}")
