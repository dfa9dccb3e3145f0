"""What a run trains on, without the run."""

from __future__ import annotations

from typing import Any

from finetuned_daemon.runs.contract import Spec


def samples_of(spec: Spec, report: Any) -> Any:
    """The samples that a run with this spec trains on."""
    from finetuned_runner import data
    from finetuned_runner.encoding import open_tokenizer

    parameters = spec.parameters
    tokenizer = open_tokenizer(parameters.data.tokenizer_path or parameters.data.model_path or "")
    prepared = data.begin(spec, report)
    return data.samples(
        prepared,
        parameters,
        report,
        tokenizer,
        parameters.training.max_seq_length,
        lambda largest: None,
    )[0]
