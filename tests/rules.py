"""How a rule on parameters is tried: values by path in, violations out."""

from __future__ import annotations

import re
from typing import Any

from finetuned_daemon.environment.model import Capability
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.validation.check import check
from finetuned_daemon.validation.surroundings import Surroundings

SFT, PRETRAIN = TrainingType.SFT, TrainingType.PRETRAIN
HAN = re.compile("[\u4e00-\u9fff]")
AMPERE = Capability(bf16=True, fp16=True, tf32=True, four_bit=True, eight_bit_optimizer=True)
TURING = Capability(bf16=False, fp16=True, tf32=False, four_bit=False, eight_bit_optimizer=False)
ON_AMPERE = Surroundings(device="cuda:0", capability=AMPERE)
ON_TURING = Surroundings(device="cuda:0", capability=TURING)
BARE_AMPERE = Surroundings(device="cuda:0", capability=AMPERE, has_bitsandbytes=False)

Values = dict[str, Any]


def judge(
    values: Values,
    training_type: TrainingType = SFT,
    surroundings: Surroundings = ON_AMPERE,
    *,
    complete: bool = False,
) -> list[Violation]:
    """The violations of values by path."""
    given = dict[str, dict[str, Any]]()
    for path, value in values.items():
        section, name = path.split(".")
        given.setdefault(section, {})[name] = value
    return check(given, training_type, surroundings, complete=complete)[1]


def alone(found: list[Violation]) -> tuple[str, str, Severity]:
    """The one violation there is; it speaks both languages."""
    (violation,) = found
    assert violation.message.en.isascii() or not HAN.search(violation.message.en)
    assert HAN.search(violation.message.zh), violation.message.zh
    return violation.field, violation.reason, violation.severity
