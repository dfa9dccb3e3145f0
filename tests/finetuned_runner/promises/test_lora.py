"""What the parameters of the section `lora` do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetuned_daemon.runs.contract import Evaluation, Metrics
from tiny import weights

# SGD's first step: each weight moves by the rate times its gradient, none of which is cut.
ONE_STEP = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 10.0,
    "batch_size": 6,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
}
LEARNING = {"learning_rate": 1e-2, "num_train_epochs": 2}


def adapter(run: Any) -> dict[str, Any]:
    """The LoRA weights by module and matrix: `self_attn.q_proj.lora_B`."""
    return {
        name.partition("layers.0.")[2].removesuffix(".weight") or name: weight
        for name, weight in weights(run.output / "final").items()
    }


def logits(model: Path, adapter: Path | None = None) -> Any:
    """What a model says to a question, with or without an adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(model)("How do I list files?", return_tensors="pt")
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        return loaded.eval()(**tokens).logits


@pytest.mark.proves("lora.use_lora")
def test_small_matrices_are_trained_or_all_weights(train: Any, shop: Any) -> None:
    """On, the result is an adapter of two matrices a module; off, a model of which all changed."""
    on = train(training=LEARNING)
    assert not (on.output / "final" / "model.safetensors").exists()
    matrices = adapter(on)
    assert len(matrices) == 14
    assert all(name.endswith((".lora_A", ".lora_B")) for name in matrices)
    off = train(training=LEARNING, lora={"use_lora": False})
    assert not (off.output / "final" / "adapter_config.json").exists()
    before, after = weights(shop.model(layers=1)), weights(off.output / "final")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.proves("lora.lora_r")
def test_the_matrices_have_this_rank(train: Any) -> None:
    """With r = 3 what is added to a weight has rank 3, and with r = 1 rank 1."""
    for rank in (1, 3):
        matrices = adapter(train(training=LEARNING, lora={"lora_r": rank}))
        down, up = matrices["mlp.up_proj.lora_A"], matrices["mlp.up_proj.lora_B"]
        assert (down.shape, up.shape) == ((rank, 32), (64, rank))
        assert np.linalg.matrix_rank(up @ down) == rank


@pytest.mark.proves("lora.lora_alpha")
def test_what_lora_adds_is_scaled_by_alpha_over_r(train: Any, shop: Any) -> None:
    """Twice the alpha is twice the gradient, and the saved adapter adds B times A times alpha / r.

    So that alpha and r, both doubled, leave the scale of what is added as it was.
    """
    one, two = (train(training=ONE_STEP, lora={"lora_r": 4, "lora_alpha": a}) for a in (4, 8))
    norms = [run.events(Metrics)[0].values["grad_norm"] for run in (one, two)]
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    first, second = adapter(one), adapter(two)
    for name in first:
        np.testing.assert_allclose(
            second[name], first[name] * (2 if name.endswith("_B") else 1), rtol=1e-3, atol=1e-7
        )
    merged = train(training=LEARNING, lora={"lora_r": 4, "lora_alpha": 12, "merge_lora": True})
    matrices = adapter(merged)
    name = "mlp.up_proj"
    before, after = (
        weights(folder)[f"model.layers.0.{name}.weight"]
        for folder in (shop.model(layers=1), merged.output / "merged")
    )
    added = matrices[f"{name}.lora_B"] @ matrices[f"{name}.lora_A"] * 12 / 4
    assert abs(added).max() > 1e-3
    np.testing.assert_allclose(after, before + added, rtol=0, atol=1e-6)


@pytest.mark.proves("lora.lora_dropout")
def test_this_share_of_the_inputs_is_left_out_in_training_alone(train: Any, oracle: Any) -> None:
    """Without any input nothing is learned; a half left out changes the steps, not the scoring."""
    runs = {
        share: train(
            data={"eval_ratio": 0.25},
            training={**LEARNING, "eval_strategy": "epoch"},
            lora={"lora_dropout": share},
        )
        for share in (0.0, 0.5, 1.0)
    }
    kept, half, none = runs.values()
    assert not any(w.any() for name, w in adapter(none).items() if name.endswith("_B"))
    assert {event.values["grad_norm"] for event in none.events(Metrics)} == {0.0}
    scores = [event.values["eval_loss"] for event in none.events(Evaluation)]
    assert len(set(scores)) == 1
    for run in (kept, half):
        assert run.events(Evaluation)[-1].values["eval_loss"] < scores[0] - 0.05
    # B begins at 0, so that the first loss has nothing of LoRA yet; the first gradient has.
    assert half.losses()[1] == kept.losses()[1]
    assert (
        half.events(Metrics)[0].values["grad_norm"] != kept.events(Metrics)[0].values["grad_norm"]
    )
    assert half.losses()[12 - 2] != kept.losses()[12 - 2]


@pytest.mark.proves("lora.lora_target_modules")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_these_modules_get_matrices_and_no_others(train: Any) -> None:
    """Layers are named as in the model, also the embeddings and the output layer."""
    for modules, expected in (
        (["q_proj", "v_proj"], {"self_attn.q_proj", "self_attn.v_proj"}),
        (["down_proj"], {"mlp.down_proj"}),
    ):
        matrices = adapter(train(training=ONE_STEP, lora={"lora_target_modules": modules}))
        assert {name.rpartition(".")[0] for name in matrices} == expected
    run = train(training=ONE_STEP, lora={"lora_target_modules": ["embed_tokens", "lm_head"]})
    names = {name for name in weights(run.output / "final") if "lora_" in name}
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {
        "embed_tokens",
        "lm_head",
    }


@pytest.mark.proves("lora.merge_lora")
def test_the_merged_model_is_whole_and_answers_as_base_and_adapter_do(
    train: Any, shop: Any
) -> None:
    """`merged` has config, tokenizer and safetensors of every weight; the adapter stays beside."""
    run = train(training=LEARNING, lora={"merge_lora": True})
    merged, final = run.output / "merged", run.output / "final"
    base = shop.model(layers=1)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged / name).is_file(), name
    assert not (merged / "adapter_config.json").exists()
    shapes = [{n: w.shape for n, w in weights(folder).items()} for folder in (base, merged)]
    assert shapes[0] == shapes[1]
    alone, adapted, whole = logits(base), logits(base, final), logits(merged)
    assert (adapted - alone).abs().max() > 1e-2
    assert (adapted - whole).abs().max() < 1e-5
    assert not (train(training=ONE_STEP).output / "merged").exists()


@pytest.mark.proves("lora.merge_lora")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_model_that_shares_embeddings_and_head_is_merged_as_well(
    train: Any, shop: Any, module: str
) -> None:
    """What LoRA adds to the one must not reach the other: in the merged model they part."""
    tied = shop.root / "tied"
    shutil.copytree(shop.model(layers=1), tied)
    arrays = weights(tied)
    del arrays["lm_head.weight"]
    save_file(arrays, str(tied / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((tied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tied / "config.json").write_text(json.dumps(config))
    run = train(
        data={"model_path": str(tied)},
        training=LEARNING,
        lora={"merge_lora": True, "lora_target_modules": [module]},
    )
    adapted = logits(tied, run.output / "final")
    assert (adapted - logits(tied)).abs().max() > 0.1
    assert (adapted - logits(run.output / "merged")).abs().max() < 1e-5


@pytest.mark.proves("lora.peft_config_path")
def test_a_peft_file_wins_over_the_form(train: Any, shop: Any) -> None:
    """Rank, alpha and modules are the file's, which a notice says; so is what the form lacks."""
    file = shop.root / "peft.json"
    file.write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "r": 3,
                "lora_alpha": 6,
                "target_modules": ["v_proj", "o_proj"],
                "rank_pattern": {"o_proj": 5},
                "bias": "none",
            }
        )
    )
    form = {"lora_r": 8, "lora_alpha": 64, "lora_target_modules": ["q_proj"]}
    run = train(training=ONE_STEP, lora={**form, "peft_config_path": str(file)})
    assert run.notices()["PEFT_CONFIG_WINS"].field == "lora.peft_config_path"
    assert {name: weight.shape for name, weight in adapter(run).items()} == {
        "self_attn.v_proj.lora_A": (3, 32),
        "self_attn.v_proj.lora_B": (32, 3),
        "self_attn.o_proj.lora_A": (5, 32),
        "self_attn.o_proj.lora_B": (32, 5),
    }
    # An adapter's own file is one: its training again is the same training.
    again = train(
        training=ONE_STEP,
        lora={"peft_config_path": str(run.output / "final" / "adapter_config.json")},
    )
    assert again.losses() == run.losses()
    assert all((adapter(again)[name] == weight).all() for name, weight in adapter(run).items())
