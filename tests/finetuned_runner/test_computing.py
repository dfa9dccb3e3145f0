"""Losses and gradients are the model's own, however few passes and how little memory they take."""

from __future__ import annotations

import copy
from typing import Any

import pytest

VOCABULARY = 96
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
FAMILIES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    # settings beside the usual ones, in rows, with a plain head
    "llama": ({}, True, True),
    "mistral": (WINDOW, True, True),
    "qwen2": ({}, True, True),
    "qwen3": ({}, True, True),
    "phi3": ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, True, True),
    "olmo2": ({}, True, True),
    "smollm3": ({}, True, True),
    "gemma3_text": (WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}, True, True),
    "granite": ({"logits_scaling": 3.0}, True, False),
    "cohere": ({"logit_scale": 0.5}, True, False),
    "gpt_neox": ({}, True, True),
    "gpt2": ({"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}, True, True),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        True,
        True,
    ),
    # caps its attention's logits; a convolution, a recurrence and biases by distance see on
    "gemma2": (WINDOW, False, False),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, False, False),
    "mamba": ({"state_size": 4}, False, False),
    "bloom": ({"n_head": 4, "n_layer": 2}, False, False),
}


def make(family: str, **more: Any) -> Any:
    """A tiny model of random weights, large enough that attention matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | FAMILIES[family][0] | more)
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.eval()


def samples(lengths: tuple[int, ...] = (13, 5, 19)) -> list[dict[str, Any]]:
    import numpy as np

    random = np.random.default_rng(0)
    made = []
    for length in lengths:
        tokens = random.integers(3, VOCABULARY, length)
        learned = random.random(length) < 0.6
        made.append({"input_ids": tokens, "labels": np.where(learned, tokens, -100)})
    return made


def own_loss(model: Any, batch: list[dict[str, Any]]) -> Any:
    """Sum of the losses as transformers computes it, of padded rows."""
    from torch.nn import functional

    from finetuned_runner.compute import PaddingCollator

    inputs = PaddingCollator(0)(batch)
    options = {} if "mamba" in type(model).__name__.lower() else {"use_cache": False}
    logits = model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options
    ).logits
    labels = inputs["labels"][:, 1:]
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model: Any) -> dict[str, Any]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_own_loss_and_gradients_in_rows_or_is_padded(family):
    """In rows or not: never another loss; and a family that can be in rows is."""
    import torch

    from finetuned_daemon.parameters.models import Parameters
    from finetuned_runner.compute import RowCollator, choose, row_loss

    model = make(family)
    expected = own_loss(model, samples())
    expected.backward()
    wanted = gradients(model)
    computation = choose(model, Parameters())
    _, in_rows, plain_head = FAMILIES[family]
    assert (computation.in_rows, computation.head is not None) == (in_rows, plain_head)
    if not in_rows:
        again = own_loss(model, samples())
        assert torch.equal(again, expected), "a model that stays padded is left as it was"
        return
    loss, count = row_loss(computation, model, model, RowCollator()(samples()))
    loss.backward()
    assert count == sum((s["labels"][1:] != -100).sum() for s in samples())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-4, msg=name)


def test_documents_of_a_row_do_not_see_each_other():
    """What stands before a document in its row changes nothing of its logits."""
    import torch

    from finetuned_runner.documents import documents_of, packs, positions_of

    model = make("qwen3")
    one, other, last = (torch.tensor([list(s["input_ids"])]) for s in samples())
    alone = model(input_ids=last, use_cache=False).logits
    assert packs(model, model)
    for before in ((one, other), (other, one), (one,)):
        lengths = [part.shape[1] for part in (*before, last)]
        with torch.no_grad(), documents_of(lengths):
            row = model(
                input_ids=torch.cat((*before, last), dim=1),
                position_ids=positions_of(lengths),
                use_cache=False,
            ).logits
        torch.testing.assert_close(row[:, -lengths[-1] :], alone, rtol=0, atol=1e-5)


def test_a_wrong_attention_is_not_taken(monkeypatch):
    """Where rows give other logits, by whatever mistake, samples are padded."""
    import torch

    from finetuned_runner import documents

    model = make("qwen3")
    right = documents.attend

    def leaky(*arguments: Any, **options: Any) -> Any:
        documents._lengths[:] = [sum(documents._lengths)]
        return right(*arguments, **options)

    monkeypatch.setitem(
        __import__("transformers").modeling_utils.ALL_ATTENTION_FUNCTIONS._global_mapping,
        documents.ATTENTION,
        leaky,
    )
    assert not documents.packs(model, model)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("rows", [1 << 24, 64 * VOCABULARY, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_head_in_pieces_is_the_head(monkeypatch, rows, with_bias):
    """Loss and all gradients of `head_loss` are those of linear and cross entropy."""
    import torch
    from torch.nn import functional

    from finetuned_runner import head

    monkeypatch.setattr(head, "_LOGITS", rows)
    torch.manual_seed(0)
    hidden = torch.randn(150, 32, requires_grad=True)
    weight = torch.randn(VOCABULARY, 32, requires_grad=True)
    bias = torch.randn(VOCABULARY, requires_grad=True) if with_bias else None
    targets = torch.randint(0, VOCABULARY, (150,))
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    logits = functional.linear(hidden, weight, bias)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(expected * 0.3, tensors)
    loss = head.head_loss(hidden, weight, bias, targets)
    found = torch.autograd.grad(loss * 0.3, tensors)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(
            head.head_loss(hidden, weight, bias, targets), expected, rtol=1e-5, atol=0
        )


def test_a_row_in_which_nothing_is_learned_has_no_loss_and_no_gradient():
    """A micro-batch without a learned token takes nothing to a step, and isn't NaN."""
    import torch

    from finetuned_daemon.parameters.models import Parameters
    from finetuned_runner.compute import RowCollator, choose, row_loss

    model = make("llama")
    computation = choose(model, Parameters())
    silent = [{key: value.copy() for key, value in sample.items()} for sample in samples()]
    for sample in silent:
        sample["labels"][:] = -100
    loss, count = row_loss(computation, model, model, RowCollator()(silent))
    loss.backward()
    assert (loss.item(), count) == (0.0, 0)
    assert all(not g.any() for g in gradients(model).values())
    assert torch.isfinite(loss)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"bias": True}])
def test_fused_lora_layers_are_pefts(options):
    """Outputs and gradients of a fused LoRA layer are those of PEFT's, merged ones included."""
    import torch
    from peft import LoraConfig, get_peft_model

    from finetuned_runner.lora_layers import fuse

    bias = options.pop("bias", False)
    base = make("qwen2" if bias else "llama")
    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=targets, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    fused = copy.deepcopy(model)
    assert fuse(fused) == 2 * len(targets)
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    outs = []
    for one in (model, fused):
        logits = one(input_ids=tokens, use_cache=False).logits
        (logits * torch.linspace(-1, 1, VOCABULARY)).sum().backward()
        outs.append((logits.detach(), gradients(one)))
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=1e-5, atol=1e-5)
    assert outs[0][1].keys() == outs[1][1].keys()
    for name, gradient in outs[0][1].items():
        torch.testing.assert_close(outs[1][1][name], gradient, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), fused.disable_adapter():
        without = fused(input_ids=tokens, use_cache=False).logits
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(without, model(input_ids=tokens, use_cache=False).logits)
    merged = fused.merge_and_unload()
    with torch.no_grad():
        logits = merged(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, outs[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dropout", "dora"])
def test_layers_that_do_more_stay_pefts(kind):
    """Dropout and DoRA are not passed over."""
    from peft import LoraConfig, get_peft_model

    from finetuned_runner.lora_layers import fuse

    options: dict[str, Any] = {"lora_dropout": 0.1} if kind == "dropout" else {"use_dora": True}
    model: Any = get_peft_model(
        make("llama"), LoraConfig(r=4, target_modules=["q_proj"], **options)
    )
    assert fuse(model) == 0


# --- orders


class _Fixed:
    """Samples with certain lengths."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, index: int) -> Any:
        from finetuned_runner.samples import Place

        return Place(index, self.lengths[index])

    def prefer(self, indices: Any) -> None:
        pass

    def line(self, index: int) -> int:
        return index + 1


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_step_has_the_samples_that_the_plain_trainer_draws(is_padded):
    """Only within an optimizer step are samples put in another order."""
    import torch

    from finetuned_runner.order import Order

    lengths = [(7 * number) % 31 + 1 for number in range(45)]
    order: Any = Order(
        _Fixed(lengths),  # type: ignore[arg-type]
        3,
        batch_size=2,
        step_size=8,
        reshuffle=True,
        is_padded=is_padded,
    )
    for epoch in (0, 1):
        order.set_epoch(epoch)
        generator = torch.Generator().manual_seed(3 + epoch)
        drawn = torch.randperm(45, generator=generator).tolist()
        seen = [place.start for place in order]
        assert sorted(seen) == list(range(45))
        for start in range(0, 45, 8):
            assert sorted(seen[start : start + 8]) == sorted(drawn[start : start + 8])
            number = epoch * 6 + start // 8 + 1
            assert order.lines(number) == sorted(s + 1 for s in drawn[start : start + 8])


def test_padded_batches_are_of_like_length_and_rows_of_equal_size():
    """Little padding where there is padding; where there is none, no row is much the largest."""
    from finetuned_runner.order import balanced, by_length

    lengths = [100, 5, 90, 10, 80, 20, 70, 30]
    assert [lengths[place] for place in by_length(lengths)] == sorted(lengths, reverse=True)
    places = balanced(lengths, 2)
    rows = [sum(lengths[place] for place in places[at : at + 2]) for at in range(0, 8, 2)]
    assert sorted(places) == list(range(8))
    assert rows == [105, 100, 100, 100]
    places = balanced([9, 8, 7, 6, 5], 2)
    assert sorted(places) == [0, 1, 2, 3, 4]


def test_packed_rows_hold_all_samples_once_and_none_is_too_long():
    """Packing loses nothing, and fills rows."""
    from finetuned_runner.samples import Packed

    lengths = [(13 * number) % 61 + 3 for number in range(200)]
    fixed: Any = _Fixed(lengths)
    fixed.store = None
    rows = Packed(fixed, 64)
    found = [place.start for index in range(len(rows)) for place in rows.place(index).places]
    assert sorted(found) == list(range(200))
    sizes = [rows.place(index).length for index in range(len(rows))]
    assert max(sizes) <= 64
    assert len(rows) <= -(-sum(lengths) // 64) + 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox", "llama", "mamba"])
def test_all_weights_of_a_checkpoint_come_back(tmp_path, family):
    """Also where files name weights otherwise than modules do: experts, an older head."""
    import torch

    from finetuned_runner.model import restore

    trained, model = make(family), make(family)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(str(tmp_path))
    restore(model, tmp_path)
    wanted = trained.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name]), name
