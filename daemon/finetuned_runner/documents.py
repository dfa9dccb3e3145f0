"""Samples end to end in one row, without padding: attention within each document alone.

A batch of padded rows computes for tokens that nobody learns, and materializes a mask. Here the
samples of a micro-batch stand in one row of shape (1, tokens), and attention is computed document
by document, causal and without a mask, so that the kernels for that case do it. What comes out is
what each document alone would give; `packs` holds every model against that before it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

ATTENTION = "documents"
"""Name of the attention in transformers' registry."""

# A wrong mask shows as a difference as large as the logits themselves; these are rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
_CHECKED_LENGTHS = (11, 7, 9)
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")

_logger = logging.getLogger(__name__)

_lengths: list[int] = []
"""Tokens of each document of the row at hand; also while its backward pass recomputes layers."""


@contextmanager
def documents_of(lengths: Sequence[int]) -> Generator[None]:
    """Within, rows are made of documents with so many tokens each.

    It holds beyond the block, for the backward pass, until the next one begins.
    """
    _lengths[:] = lengths
    yield


def positions_of(lengths: Sequence[int]) -> torch.Tensor:
    """Position of each token within its document: int64 of shape (1, tokens)."""
    return torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot product attention within each document of a row.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, size of a head).
        key: (1, key heads, tokens, size of a head); each serves a group of heads.
        value: As `key`.
        attention_mask: None; the documents take its place.
        dropout: Share of the attention weights that is dropped.
        scaling: Factor of the products; None: one by the root of the size of a head.
        is_causal: Whether a token sees only itself and earlier ones; it must.
        options: `sliding_window`: tokens that a token sees at most.

    Returns:
        (1, tokens, heads, size of a head), and no weights.

    Raises:
        ValueError: The layer asks for what this attention doesn't do.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    asked = [name for name in _UNSUPPORTED if options.get(name) is not None]
    if asked or not causal or attention_mask is not None or sum(_lengths) != query.shape[2]:
        raise ValueError(f"no attention by documents with {', '.join(asked) or 'such a row'}")
    window: int | None = options.get("sliding_window")
    grouped = query.shape[1] != key.shape[1]
    parts = [torch.split(tensor, _lengths, dim=2) for tensor in (query, key, value)]
    rows = []
    for q, k, v in zip(*parts, strict=True):
        mask = _window_mask(q.shape[2], window, q.device)
        row = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        rows.append(row.transpose(1, 2))
    return torch.cat(rows, dim=1), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which tokens a token sees, where the document is longer than what it sees at most."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(ATTENTION, attend)


# --- whether a model can


def packs(base: PreTrainedModel, model: torch.nn.Module) -> bool:
    """Turns a model over to rows of documents, if it gives the same results with them.

    Three short samples are computed each alone, as transformers does it, and in one row. Layers
    that see across documents (convolutions, recurrences, masks of their own) show at once; then
    the model stays as it is.

    Args:
        base: The model itself.
        model: The same, or what PEFT has made of it.
    """
    config: Any = base.config
    before: str = config._attn_implementation  # noqa: SLF001 - it has no public name
    if before not in ("sdpa", "flash_attention_2"):
        return False
    if any(isinstance(module, torch.nn.Conv1d) for module in base.modules()):
        return False
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            samples = _samples(base)
            alone = [_logits(model, sample) for sample in samples]
            if before == "sdpa":
                base.set_attn_implementation(ATTENTION)
            lengths = [sample.shape[1] for sample in samples]
            with documents_of(lengths):
                row = _logits(
                    model,
                    torch.cat(samples, dim=1),
                    position_ids=positions_of(lengths).to(base.device),
                )
    except (ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        _logger.debug("no rows of documents: %s", error)
        agrees = False
    else:
        agrees = _agree(torch.cat(alone, dim=1), row)
    finally:
        model.train(was_training)
    if not agrees:
        base.set_attn_implementation(before)
        _logger.info("samples are padded: this model computes rows of documents differently")
    return agrees


def _samples(base: PreTrainedModel) -> list[torch.Tensor]:
    embeddings: Any = base.get_input_embeddings()
    size = embeddings.weight.shape[0]
    return [
        torch.tensor([[(31 * index + 17 * number + 5) % size for index in range(length)]]).to(
            base.device
        )
        for number, length in enumerate(_CHECKED_LENGTHS)
    ]


def _logits(model: torch.nn.Module, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=tokens, use_cache=False, **options).logits
    return result


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    # The logits' spread, not their size: some models add the same to all of them.
    spread = (one.float() - one.float().mean(dim=-1, keepdim=True)).abs().amax()
    difference = (one.float() - other.float()).abs().amax()
    return bool(difference <= _TOLERANCE.get(one.dtype, 1e-3) * spread)
