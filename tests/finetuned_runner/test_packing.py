"""Packed chats are learned as each alone is: no more and no less, in fewer rows."""

from __future__ import annotations

import pytest

from finetuned_daemon.runs.contract import EndReason, Metrics, Progress


def test_a_step_over_packed_chats_has_the_loss_of_the_same_chats_unpacked(shop):
    """Chats in one row don't see each other: a step over all has the same loss and gradient."""
    runs = [
        shop.here(
            shop.make(
                f"packing-{packing}",
                data={"reshuffle": True},
                training={"batch_size": 32, "gradient_accumulation_steps": 1, "max_steps": 1},
                extensions={"packing": packing},
            )
        )
        for packing in (False, True)
    ]
    plain, packed = ([event.values for event in run.events(Metrics)] for run in runs)
    for key in ("loss", "grad_norm"):
        assert packed[0][key] == pytest.approx(plain[0][key], rel=1e-5)


def test_an_epoch_of_packed_chats_has_fewer_steps_and_all_tokens(shop):
    """Rows are filled up to the length; nothing is lost."""
    tokens, steps = [], []
    for packing in (False, True):
        run = shop.here(shop.make(f"epoch-{packing}", extensions={"packing": packing}))
        assert run.result.end_reason is EndReason.FINISHED, run.result
        tokens.append(run.events(Progress)[-1].num_tokens)
        steps.append(run.result.step)
    assert tokens[0] == tokens[1]
    assert steps[1] < steps[0]


def test_where_chats_would_see_each_other_they_are_not_packed(shop):
    """Eager attention has a mask of its own: the run goes on unpacked, and says so."""
    run = shop.here(
        shop.make(
            training={"max_steps": 1},
            extensions={"packing": True, "attn_implementation": "eager"},
        )
    )
    assert run.result.end_reason is EndReason.STEP_LIMIT, run.result
    assert run.notices()["PACKING_UNAVAILABLE"].field == "extensions.packing"
