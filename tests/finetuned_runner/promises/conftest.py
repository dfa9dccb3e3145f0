"""Short runs within the test's own process, and arithmetic that knows nothing of the runner."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import EndReason, Progress, TrainingType

Train = Callable[..., Any]
Chat = dict[str, Any]


class Oracle:
    """What tokens chats have, and what loss a model has on them, by transformers alone."""

    def encode(self, model: Path, chat: Chat) -> tuple[list[int], list[int]]:
        """Tokens and labels of a chat of one turn, put together by hand as ChatML."""
        tokenizer = _tokenizer(model)
        question, answer = (message["content"] for message in chat["messages"])
        prompt = tokenizer.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        learned = tokenizer.encode(f"{answer}<|im_end|>")
        rest = tokenizer.encode("\n")
        ids = prompt + learned + rest
        return ids, [-100] * len(prompt) + learned + [-100] * len(rest)

    def num_tokens(self, model: Path, chats: list[Chat]) -> int:
        """Tokens of chats, those that are not learned included."""
        return sum(len(self.encode(model, chat)[0]) for chat in chats)

    def loss(self, model: Path, chats: list[Chat], *, adapter: Path | None = None) -> float:
        """Mean loss of all learned tokens of all chats."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        scored: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            scored = PeftModel.from_pretrained(scored, adapter)
        total, count = 0.0, 0
        for chat in chats:
            ids, labels = self.encode(model, chat)
            with torch.no_grad():
                logits = scored(torch.tensor([ids])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[1:]), reduction="sum"
            )
            total += float(losses)
            count += sum(label >= 0 for label in labels)
        return total / count


@cache
def _tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="session")
def imported() -> None:
    """The libraries are there, and the collector passes over what their imports made.

    The Trainer collects garbage whenever a training begins; going through all that took longer than
    the training.
    """
    import finetuned_runner.pretrain
    import finetuned_runner.sft  # noqa: F401

    gc.freeze()


@pytest.fixture
def oracle() -> Oracle:
    """Losses by transformers alone."""
    return Oracle()


@pytest.fixture
def train(shop: Any, imported: None) -> Train:
    """Makes a run and lets it come to its end, with a model of one layer and no checkpoints.

    Takes the sections of the parameters, and `kind`.
    """
    count = 0

    def train(kind: TrainingType = TrainingType.SFT, **sections: Any) -> Any:
        nonlocal count
        count += 1
        data = {"model_path": str(shop.model(layers=1)), **sections.pop("data", {})}
        training = {"save_strategy": "no", **sections.pop("training", {})}
        name = f"run-{count}"
        run = shop.here(shop.make(name, kind=kind, data=data, training=training, **sections))
        assert run.result.end_reason is not EndReason.RUNNER_CRASHED, run.result.detail
        return run

    return train


@pytest.fixture
def tokens_of_steps() -> Callable[[Any], list[int]]:
    """How many tokens each step of a run had: they tell the samples from one another."""

    def tokens_of_steps(run: Any) -> list[int]:
        after = {event.step: event.num_tokens for event in run.events(Progress)}
        return [after[step] - after[step - 1] for step in sorted(after)[1:]]

    return tokens_of_steps
