"""What the parameters of the section `extensions` do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuned_daemon.planning.adapter import plan_adapter
from finetuned_daemon.planning.model_files import read_model
from finetuned_daemon.runs.contract import EndReason, Evaluation, TrainingType
from tiny import weights

Weights = dict[str, Any]

LEARNING = {"learning_rate": 1e-2, "max_steps": 4}
# One step at this rate, after which nothing is rescaled.
ONE_STEP = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_steps": 1}
LORA = {"lora_r": 4, "lora_alpha": 8}


def deltas(run: Any) -> Weights:
    """What `merged` has more than the original model, by weight."""
    before, after = (
        weights(Path(run.spec.parameters.data.model_path)),
        weights(run.output / "merged"),
    )
    return {name: after[name] - before[name] for name in before if "_proj" in name}


def pairs(run: Any) -> Iterator[tuple[str, Any, Any]]:
    """The matrices A and B of the final adapter, by the weight that they are for."""
    adapter = weights(run.output / "final")
    for name, down in adapter.items():
        head, mark, _ = name.partition(".lora_A.")
        if mark:
            module = head.removeprefix("base_model.model.")
            yield f"{module}.weight", down, adapter[f"{head}.lora_B.weight"]


def logits(model: Path, adapter: Path | None = None) -> Any:
    """What a model says to a question, by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        loaded = PeftModel.from_pretrained(loaded, adapter)
    with torch.no_grad():
        return loaded.eval()(torch.arange(3, 60)[None]).logits


def assert_resumes_to_the_bit(train: Any, run: Any, **sections: Any) -> None:
    """From its first checkpoint on, the same losses and the same result."""
    data = {"resume_from_checkpoint": run.checkpoints()[0].path}
    resumed = train(data=data, **sections)
    losses = resumed.losses()
    assert len(losses) == 2
    assert losses == {step: run.losses()[step] for step in losses}
    there, here = weights(run.output / "final"), weights(resumed.output / "final")
    assert there.keys() == here.keys()
    assert all((there[name] == here[name]).all() for name in there)


RESUMABLE = {**LEARNING, "save_strategy": "steps", "save_steps": 2}


@contextmanager
def watching_embeddings() -> Iterator[list[tuple[bool, float, float]]]:
    """Whether it trains, the largest noise on the embeddings, and the number of values in a row."""
    import torch
    from torch.nn.modules import module as hooks

    found: list[tuple[bool, float, float]] = []
    clean: list[torch.Tensor] = []

    def after_embedding(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Embedding):
            clean[:] = [output.detach().clone()]

    def before_layer(module: Any, arguments: Any) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            hidden = arguments[0]
            noise = float((hidden.detach() - clean[0]).abs().max())
            found.append((module.training, noise, hidden[0].numel()))

    handles = [
        hooks.register_module_forward_hook(after_embedding),
        hooks.register_module_forward_pre_hook(before_layer),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.proves("extensions.neftune_noise_alpha")
def test_noise_of_this_strength_is_added_in_training_alone(train: Any) -> None:
    """Uniform up to alpha / sqrt(values of a row) in training, none in evaluation or the result."""
    sections: dict[str, Any] = {
        "training": {**RESUMABLE, "eval_strategy": "steps", "eval_steps": 2},
        "extensions": {"neftune_noise_alpha": 5.0},
    }
    with watching_embeddings() as seen:
        run = train(data={"eval_ratio": 0.25}, **sections)
    trained = [(noise, size) for training, noise, size in seen if training]
    evaluated = [noise for training, noise, _ in seen if not training]
    assert len(trained) >= 8
    for noise, size in trained:
        assert 0.99 < noise / (5 / math.sqrt(size)) <= 1.001
    assert evaluated
    assert max(evaluated) == 0
    assert_resumes_to_the_bit(
        lambda data, **more: train(data={"eval_ratio": 0.25, **data}, **more), run, **sections
    )
    # Nothing of it is left: without weights that move, it evaluates as the plain model.
    still = {"learning_rate": 1e-6, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    losses = [
        train(
            data={"eval_ratio": 0.25},
            training=still,
            extensions={"neftune_noise_alpha": alpha},
        )
        .events(Evaluation)[-1]
        .values["eval_loss"]
        for alpha in (0.0, 50.0)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.proves("extensions.use_rslora")
def test_what_lora_adds_is_scaled_by_alpha_over_the_root_of_r(train: Any) -> None:
    """With r 4 and alpha 8 the merged weights hold 4 B A, without it 2 B A."""
    for on, scale in ((False, 2.0), (True, 4.0)):
        run = train(
            training=LEARNING, lora={**LORA, "merge_lora": True}, extensions={"use_rslora": on}
        )
        added = deltas(run)
        for name, down, up in pairs(run):
            np.testing.assert_allclose(added[name], scale * up @ down, atol=1e-6)
        assert max(abs(values).max() for values in added.values()) > 1e-3


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.proves("extensions.use_dora")
def test_magnitudes_are_trained_apart_from_directions(train: Any) -> None:
    """Each row of a merged weight has the direction of W + s B A and the length that was trained.

    What is planned of trained values is what there is; a resume goes on to the bit.
    """
    targets = ["q_proj", "up_proj", "embed_tokens", "lm_head"]
    sections: dict[str, Any] = {
        "training": RESUMABLE,
        "lora": {**LORA, "merge_lora": True, "lora_target_modules": targets},
        "extensions": {"use_dora": True},
    }
    run = train(**sections)
    before, after = (
        weights(Path(run.spec.parameters.data.model_path)),
        weights(run.output / "merged"),
    )
    adapter = weights(run.output / "final")
    for name, down, up in pairs(run):
        head = name.removesuffix(".weight")
        length = adapter[f"base_model.model.{head}.lora_magnitude_vector"]
        rows = before[name] + 2 * up @ down
        direction = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(after[name], length[:, None] * direction, atol=1e-5)
        first = np.linalg.norm(before[name], axis=1)
        assert abs(length - first).max() > 1e-3, "the length was trained"
    assert_planned(run)
    assert_resumes_to_the_bit(train, run, **sections)


def assert_planned(run: Any) -> None:
    """The daemon foresees the tensors of the adapter, by name and shape."""
    parameters = run.spec.parameters
    planned = plan_adapter(parameters, read_model(Path(parameters.data.model_path)))
    saved = {name: values.shape for name, values in weights(run.output / "final").items()}
    assert {**planned.saved, **planned.base} == saved


@pytest.mark.proves("extensions.use_dora")
def test_dora_trains_on_weights_in_4_bits(train: Any) -> None:
    """The two can be combined: losses fall, and the adapter has its magnitudes."""
    run = train(
        training={**LEARNING, "max_steps": 6},
        lora=LORA,
        optimization={"use_qlora": True},
        extensions={"use_dora": True},
    )
    losses = run.losses()
    assert losses[6] < losses[1]
    assert any("magnitude" in name for name in weights(run.output / "final"))


@pytest.mark.proves("extensions.lora_init")
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_begins_with_the_principal_components_and_leaves_a_plain_adapter(
    train: Any, use_rslora: bool
) -> None:
    """They move from the weights into A and B, so that the model is at first what it was.

    The final adapter, and that of every checkpoint, is for the original model and gives with it
    what the trained one says; so does `merged`; and a resume goes on to the bit.
    """
    sections: dict[str, Any] = {
        "training": RESUMABLE,
        "lora": {**LORA, "merge_lora": True},
        "extensions": {"lora_init": "pissa", "use_rslora": use_rslora},
    }
    run, scale = train(**sections), 4.0 if use_rslora else 2.0
    model = Path(run.spec.parameters.data.model_path)
    plain = train(training={**LEARNING, "max_steps": 1}, lora=LORA)
    assert run.losses()[1] == pytest.approx(plain.losses()[1], abs=1e-5)
    before = weights(model)
    for name, down, up in pairs(run):
        left, values, right = np.linalg.svd(before[name], full_matrices=False)
        largest = (left[:, :4] * values[:4]) @ right[:4]
        np.testing.assert_allclose(-scale * up[:, 4:] @ down[4:], largest, atol=1e-5)
        assert abs(down[:4] - down[4:]).max() > 1e-3, "A was trained"
    config = json.loads((run.output / "final" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    said = logits(model, run.output / "final")
    assert float((said - logits(run.output / "merged")).abs().max()) < 1e-4
    assert float((said - logits(model)).abs().max()) > 1e-2
    last = run.output / "checkpoint-4"
    assert float((said - logits(model, last)).abs().max()) == 0
    assert_planned(run)
    assert_resumes_to_the_bit(train, run, **sections)


@pytest.mark.proves("extensions.lora_init")
def test_a_pissa_adapter_can_be_attached_as_any_other(train: Any) -> None:
    """A run that attaches it begins where the first ended."""
    first = train(
        training={**RESUMABLE, "max_steps": 2}, lora=LORA, extensions={"lora_init": "pissa"}
    )
    still = {"learning_rate": 1e-6, "max_steps": 1}
    second = train(
        data={"attach_lora": True, "resume_from_checkpoint": first.checkpoints()[-1].path},
        training=still,
        extensions={"lora_init": "pissa"},
    )
    model = Path(first.spec.parameters.data.model_path)
    said = logits(model, first.output / "final")
    assert float((said - logits(model, second.output / "final")).abs().max()) < 1e-3


@pytest.mark.proves("extensions.lora_init")
def test_pissa_refuses_what_it_can_not_take(train: Any) -> None:
    """A checkpoint that began otherwise, and layers that are no plain linear ones."""
    plain = train(training={**RESUMABLE, "max_steps": 2}, lora=LORA)
    for sections, said in (
        ({"data": {"resume_from_checkpoint": plain.checkpoints()[0].path}}, "without PiSSA"),
        ({"optimization": {"use_qlora": True}}, "not quantized"),
    ):
        run = train(training=LEARNING, lora=LORA, extensions={"lora_init": "pissa"}, **sections)
        assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
        assert said in run.result.message


@pytest.mark.proves("extensions.loraplus_lr_ratio")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit", "adafactor", "sgd"])
def test_b_moves_so_many_times_as_far(train: Any, optimizer: str) -> None:
    """In a first step, with every optimizer; A moves as before, and its rate is what is told."""
    runs = [
        train(
            training={**ONE_STEP, "optimizer": optimizer},
            lora=LORA,
            extensions={"loraplus_lr_ratio": ratio},
        )
        for ratio in (0.0, 8.0)
    ]
    for (_, down, up), (_, fast_down, fast_up) in zip(*map(pairs, runs), strict=True):
        assert (down == fast_down).all()
        assert abs(up).max() > 0
        np.testing.assert_allclose(fast_up, 8 * up, rtol=1e-4, atol=1e-9)
    assert runs[1].rates() == {1: 1e-3}


@pytest.mark.proves("extensions.loraplus_lr_ratio")
def test_a_resume_keeps_both_rates(train: Any) -> None:
    """To the bit, in the middle of a schedule."""
    sections: dict[str, Any] = {"training": RESUMABLE, "extensions": {"loraplus_lr_ratio": 16.0}}
    assert_resumes_to_the_bit(train, train(**sections), **sections)


@pytest.mark.proves("extensions.attn_implementation")
def test_attention_is_computed_by_this_code(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's SDPA is called with sdpa, and not at all with eager, whose losses are the same."""
    from torch.nn import functional

    calls = 0
    sdpa: Callable[..., Any] = functional.scaled_dot_product_attention

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return sdpa(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    losses = {}
    for name in ("sdpa", "eager"):
        calls = 0
        run = train(training=LEARNING, extensions={"attn_implementation": name})
        losses[name] = run.losses()
        assert (calls > 0) is (name == "sdpa")
    assert losses["eager"] == pytest.approx(losses["sdpa"], abs=1e-4)


@pytest.mark.proves("extensions.torch_compile")
def test_the_model_is_compiled(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes through what torch has captured, with the same losses.

    Captured and not translated: the translation takes a minute.
    """
    import torch
    from torch._inductor import compile_fx

    captured = 0

    def kept(graph: Any, *_: Any, **__: Any) -> Any:
        nonlocal captured
        captured += 1
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", kept)
    sections: dict[str, Any] = {"training": {**LEARNING, "max_steps": 2}, "lora": {"lora_r": 1}}
    sections["lora"]["lora_target_modules"] = ["q_proj"]
    plain = train(**sections)
    assert captured == 0
    compiled = train(**sections, extensions={"torch_compile": True})
    torch._dynamo.reset()
    assert captured > 0
    assert compiled.losses() == pytest.approx(plain.losses(), abs=1e-4)
    assert weights(compiled.output / "final").keys() == weights(plain.output / "final").keys()


@pytest.mark.proves("extensions.use_liger_kernel")
@pytest.mark.parametrize(
    ("extensions", "package"),
    [
        ({"use_liger_kernel": True}, "liger-kernel"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
    ],
)
def test_a_missing_package_is_named_before_the_work(
    shop: Any, extensions: dict[str, Any], package: str
) -> None:
    """Where the daemon could not know, the runner says it before it reads model or data."""
    run = shop.here(shop.make(extensions=extensions))
    assert run.result.end_reason is EndReason.RUNNER_CRASHED
    (field,) = extensions
    assert run.result.message.startswith(f"extensions.{field} needs {package}, which is not inst")
    assert run.phases() == ["LOADING_MODEL"]


def test_pretraining_passes_over_what_is_for_fine_tuning(train: Any) -> None:
    """Losses are the same with all of it."""
    for_lora = {
        "packing": True,
        "use_rslora": True,
        "use_dora": True,
        "lora_init": "pissa",
        "loraplus_lr_ratio": 16.0,
    }
    plain, asked = (
        train(TrainingType.PRETRAIN, training=LEARNING, extensions=extensions)
        for extensions in ({}, for_lora)
    )
    assert len(plain.losses()) == 4
    assert asked.losses() == plain.losses()
