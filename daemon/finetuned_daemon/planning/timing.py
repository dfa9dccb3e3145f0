"""How long a run takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a run goes, on one device with one model."""

    start_seconds: float
    """Until the first step, and what is done once in it."""
    tokens_per_second: float
    """Trained on; real tokens, without padding."""
    scored_tokens_per_second: float
    """The same in an evaluation."""
    written_bytes_per_second: float
    """Of checkpoints, until they are durable."""


def run_seconds(rates: Rates, *, trained: float, scored: float, written: float) -> float:
    """Seconds from start to end.

    Args:
        rates: How fast it goes.
        trained: Tokens of all its steps.
        scored: Tokens of all its evaluations.
        written: Bytes of all its checkpoints and of its result.
    """
    return (
        rates.start_seconds
        + trained / rates.tokens_per_second
        + scored / rates.scored_tokens_per_second
        + written / rates.written_bytes_per_second
    )
