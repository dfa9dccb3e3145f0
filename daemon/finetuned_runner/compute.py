"""How a micro-batch becomes a loss: in one row without padding where the model can, else padded.

Both give the sum of the cross entropies of the learned tokens over their number in the whole
optimizer step, as the plain Trainer does.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import PreTrainedModel

from finetuned_daemon.parameters.models import Parameters
from finetuned_runner.documents import documents_of, packs, positions_of
from finetuned_runner.head import head_loss
from finetuned_runner.lora_layers import fuse
from finetuned_runner.samples import IGNORED, Sample

_PAD_MULTIPLE = 8

_logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Computation:
    """How the samples of a run are computed."""

    in_rows: bool
    """In one row of documents, without padding."""
    head: torch.nn.Linear | None
    """What makes logits of hidden states, where it does nothing else; None: the model does it."""


def choose(model: Model, parameters: Parameters) -> Computation:
    """The fastest way to compute a model's loss that gives what the model itself gives.

    Puts the model into the state that the way needs.
    """
    extensions = parameters.extensions
    # They work on the model's own forward pass, or on its padded embeddings.
    if extensions.use_liger_kernel or extensions.torch_compile or extensions.neftune_noise_alpha:
        return Computation(in_rows=False, head=None)
    base = base_of(model)
    if isinstance(model, PeftModel):
        fuse(model)
    if getattr(base.config, "output_router_logits", False) or not packs(base, model):
        return Computation(in_rows=False, head=None)
    # In fp16 a gradient that is computed before it is scaled may vanish.
    is_fp16 = parameters.optimization.fp16 and base.device.type != "cpu"
    return Computation(in_rows=True, head=None if is_fp16 else _plain_head(base, model))


def base_of(model: Model) -> PreTrainedModel:
    """The model without what PEFT has put around it; its layers are PEFT's all the same."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    result: PreTrainedModel = base
    return result


def _plain_head(base: PreTrainedModel, model: Model) -> torch.nn.Linear | None:
    """The layer that makes the logits, if they are that layer's and nothing comes after it."""
    head: Any = cast("Any", base).get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return None
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tokens = torch.tensor([[1, 0, 1]], device=base.device)
            with documents_of([3]):
                options: Any = {"position_ids": positions_of([3]).to(base.device)}
                logits = model(input_ids=tokens, use_cache=False, **options).logits
                hidden = hidden_states(base, tokens, options["position_ids"])
                own = functional.linear(hidden, head.weight, head.bias)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        _logger.debug("the head is the model's own: %s", error)
        return None
    finally:
        model.train(was_training)
    return head if own.shape == logits.shape and torch.equal(own, logits) else None


def hidden_states(
    base: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """What the head makes logits of: (1, tokens, hidden size)."""
    decoder: Any = base.base_model
    states: torch.Tensor = decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return states


def row_loss(
    computation: Computation, model: torch.nn.Module, base: PreTrainedModel, inputs: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """Sum of the cross entropies of a row's learned tokens, and their number.

    Args:
        computation: From `choose`.
        model: As the Trainer has it.
        base: The model itself.
        inputs: From `RowCollator`.
    """
    places = inputs["places"]
    targets = inputs["labels"][0].index_select(0, places + 1)
    with documents_of(inputs["lengths"]):
        if computation.head is not None:
            hidden = hidden_states(base, inputs["input_ids"], inputs["position_ids"])[0]
            head = computation.head
            loss = head_loss(hidden.index_select(0, places), head.weight, head.bias, targets)
        else:
            logits = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                use_cache=False,
                logits_to_keep=places,
            ).logits[0]
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
    return loss, len(targets)


# --- micro-batches


@dataclass(frozen=True)
class RowCollator:
    """Puts the samples of a micro-batch end to end.

    Gives `input_ids`, `position_ids` and `labels`, int64 of shape (1, tokens); `places`, those at
    which a learned token is predicted, int64 of shape (learned tokens); and `lengths`, the tokens
    of each document. The first token of a document has no label: nothing predicts it.
    """

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        """Makes a row."""
        lengths = [
            int(length)
            for sample in samples
            for length in sample.get("lengths", [len(sample["input_ids"])])
        ]
        labels = torch.cat([torch.as_tensor(sample["labels"]) for sample in samples])
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        labels[starts] = IGNORED
        tokens = torch.cat([torch.as_tensor(sample["input_ids"]) for sample in samples])
        return {
            "input_ids": tokens.unsqueeze(0),
            "position_ids": positions_of(lengths),
            "labels": labels.unsqueeze(0),
            # Found here: on the device it would have to be waited for.
            "places": (labels[1:] != IGNORED).nonzero().squeeze(1),
            "lengths": lengths,
        }


@dataclass(frozen=True)
class PaddingCollator:
    """Pads the samples of a batch to the longest, rounded up to a multiple of 8.

    Gives `input_ids`, `attention_mask` and `labels`, int64 of shape (samples, length), padded on
    the right.
    """

    pad_id: int

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Pads a batch."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE
        shape = (len(samples), length)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            input_ids[row, :size] = torch.as_tensor(sample["input_ids"])
            attention_mask[row, :size] = 1
            labels[row, :size] = torch.as_tensor(sample["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
