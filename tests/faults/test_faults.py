"""A few rounds of every fault; `make soak` plays a hundred of each."""

from __future__ import annotations

import secrets

import pytest

from faults import registry

SEED = secrets.token_hex(4)

_FAULTS = registry.load()


# By name and number alone: workers that run in parallel must agree on what there is.
@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(fault.name, number, id=f"{fault.name}-{number}")
        for fault in _FAULTS.values()
        for number in range(fault.short_rounds)
    ],
)
def test_nothing_acknowledged_is_lost_and_no_state_is_wrong(name: str, number: int) -> None:
    fault = _FAULTS[name]
    one = registry.play(fault, SEED, number)
    if one.skipped:
        pytest.skip(one.skipped)
    assert one.is_good, str(one)
