"""Weights in 4 bits, optimizers in 8, numbers in 16: what they do to a run, all on the CPU."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from finetuned_daemon.runs.contract import EndReason, Evaluation, StopWish
from finetuned_runner.arguments import Precision
from finetuned_runner.checkpoint import verify_checkpoint
from finetuned_runner.model import add_lora, load_model
from finetuned_runner.report import Report
from tiny import weights

STEPS = {"max_steps": 8, "learning_rate": 1e-2, "save_steps": 4}
QLORA = {"use_qlora": True}
FULL = {"use_lora": False}
FLOAT32 = Precision(fp16=False, bf16=False, tf32=False)


@pytest.fixture(scope="module")
def model(module_shop: Any) -> Path:
    """Wide enough for weights of 4,096 values and more."""
    folder: Path = module_shop.model(hidden=64)
    return folder


@pytest.fixture(scope="module")
def train(module_shop: Any, model: Path) -> Any:
    """Trains the model in this process; the same run is done once."""
    done: dict[str, Any] = {}

    def train(name: str, **sections: dict[str, Any]) -> Any:
        if name not in done:
            data = {"model_path": str(model), **sections.pop("data", {})}
            training = STEPS | sections.pop("training", {})
            run = module_shop.make(name, data=data, training=training, **sections)
            done[name] = module_shop.here(run)
        assert done[name].result.end_reason is EndReason.STEP_LIMIT, done[name].result
        return done[name]

    return train


def from_step(run: Any, step: int) -> dict[int, float]:
    return {number: loss for number, loss in run.losses().items() if number > step}


def assert_goes_on_as(resumed: Any, whole: Any, step: int) -> None:
    assert resumed.losses() == from_step(whole, step)
    there, here = weights(whole.output / "final"), weights(resumed.output / "final")
    assert there.keys() == here.keys()
    assert all((there[name] == here[name]).all() for name in there)


# --- 4 bits


@pytest.mark.proves("optimization.use_qlora")
def test_qlora_holds_all_linear_layers_but_the_head_in_nf4_with_double_quantization(
    shop: Any, tmp_path: Path
) -> None:
    from bitsandbytes.nn import Linear4bit

    def load(name: str, **optimization: bool) -> Any:
        run = shop.make(
            name,
            data={"model_path": str(shop.model(hidden=64))},
            optimization=optimization,
        )
        report = Report(run.folder)
        base = load_model(run.spec.parameters, "cpu", FLOAT32, report)
        return base.get_memory_footprint(), add_lora(base, run.spec.parameters, report)

    plain_bytes, _ = load("plain")
    four_bit_bytes, model = load("qlora", use_qlora=True)
    held = {n: m for n, m in model.named_modules() if n.endswith(("base_layer", "lm_head"))}
    head = held.pop("base_model.model.lm_head")
    assert type(head) is torch.nn.Linear
    assert head.weight.dtype is torch.float32
    assert len(held) == 14
    for module in held.values():
        assert isinstance(module, Linear4bit)
        assert module.weight.dtype is torch.uint8
        assert module.weight.quant_type == "nf4"
        assert module.weight.quant_state.nested
        assert module.compute_dtype is torch.float32
    assert model.get_input_embeddings().weight.dtype is torch.float32
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28
    assert all("lora_" in name and p.dtype is torch.float32 for name, p in trained.items())
    # 82,000 values in 4 bits in place of 32, and 54,000 of embeddings and head as they were.
    assert four_bit_bytes < 0.5 * plain_bytes
    # Nothing is left in the mapped file, which would stay in memory with it.
    assert not [n for n, p in model.named_parameters() if not p.untyped_storage().resizable()]


@pytest.mark.proves("optimization.use_qlora")
def test_qlora_learns_as_lora_does_and_its_checkpoints_hold_the_adapter_alone(train: Any) -> None:
    run, plain = train("qlora", optimization=QLORA), train("plain")
    losses = run.losses()
    assert losses[8] < losses[1] - 0.5
    assert losses != plain.losses(), "4 bits are not the same numbers"
    assert losses == pytest.approx(plain.losses(), rel=0.05)
    checkpoint = run.output / "checkpoint-4"
    assert [f.name for f in checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert all("lora_" in name for name in weights(checkpoint))
    there = weights(plain.output / "checkpoint-4")
    assert {n: a.shape for n, a in weights(checkpoint).items()} == {
        n: a.shape for n, a in there.items()
    }
    assert verify_checkpoint(checkpoint).step == 4


def test_a_resumed_qlora_run_ends_as_one_that_was_never_interrupted(train: Any) -> None:
    whole = train("qlora", optimization=QLORA)
    resume = {"resume_from_checkpoint": str(whole.output / "checkpoint-4")}
    assert_goes_on_as(train("qlora-resumed", optimization=QLORA, data=resume), whole, 4)


def test_gradient_checkpointing_changes_no_loss_of_qlora(train: Any) -> None:
    run = train("qlora-checkpointing", optimization={**QLORA, "gradient_checkpointing": True})
    assert run.losses() == train("qlora", optimization=QLORA).losses()


def test_an_evaluation_in_between_changes_nothing_of_qlora(train: Any, module_shop: Any) -> None:
    """bitsandbytes brings weights in another order to evaluate them, where the CPU gains by it."""
    lora = {"lora_dropout": 0.0}
    plain = train("qlora-exact", optimization=QLORA, lora=lora)
    run = train(
        "qlora-evaluated",
        optimization=QLORA,
        lora=lora,
        data={"eval_file": str(module_shop.chats(6, name="eval.jsonl"))},
        training={"eval_strategy": "steps", "eval_steps": 2},
    )
    scores = [event.values["eval_loss"] for event in run.events(Evaluation)]
    assert len(scores) == 4
    assert scores == sorted(scores, reverse=True)
    assert run.losses() == plain.losses()


def test_bin_files_are_made_4_bits_as_well(train: Any, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bin-model"
    shutil.copytree(model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    run = train("qlora-bin", optimization=QLORA, data={"model_path": str(folder)})
    assert run.losses() == train("qlora", optimization=QLORA).losses()


@pytest.mark.proves("lora.merge_lora")
def test_merging_gives_the_unquantized_model_with_the_adapter_worked_in(
    train: Any, model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train("qlora-merged", optimization=QLORA, lora={"merge_lora": True})
    folder = run.output / "merged"
    shapes = {name: array.shape for name, array in weights(model).items()}
    assert {name: array.shape for name, array in weights(folder).items()} == shapes
    assert (folder / "tokenizer.json").is_file()
    tokens = torch.arange(60).reshape(2, 30)

    def logits(of: Any) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = of.eval()(input_ids=tokens).logits
        return result

    base = AutoModelForCausalLM.from_pretrained(model)
    plain = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, str(run.output / "final")))
    found = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (plain - adapted).abs().max() > 0.1
    torch.testing.assert_close(found, adapted, atol=1e-5, rtol=1e-5)


# --- optimizers in 8 bits

EIGHT_BIT = {"training": {"optimizer": "adamw_8bit"}}


@pytest.mark.proves("training.optimizer")
def test_the_state_of_an_8_bit_optimizer_is_in_8_bits_and_goes_on_where_it_was(train: Any) -> None:
    run, plain = train("8-bit", lora=FULL, **EIGHT_BIT), train("full", lora=FULL)
    checkpoint = run.output / "checkpoint-4"
    assert verify_checkpoint(checkpoint).step == 4
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    first = [moments["__bnb_optimizer_quant_state__"]["state1"] for moments in state.values()]
    small = {moment.dtype for moment in first if moment.numel() < 4096}
    large = Counter(moment.dtype for moment in first if moment.numel() >= 4096)
    assert small == {torch.float32}
    # The one is that of the input embeddings, which transformers keeps whole.
    assert large == {torch.uint8: 15, torch.float32: 1}
    size, of_plain = (
        (run_.output / "checkpoint-4/optimizer.pt").stat().st_size for run_ in (run, plain)
    )
    assert size < 0.5 * of_plain
    losses = run.losses()
    assert losses[8] < losses[1] - 2
    assert losses == pytest.approx(plain.losses(), rel=0.05)
    resume = {"resume_from_checkpoint": str(checkpoint)}
    resumed = train("8-bit-resumed", lora=FULL, data=resume, **EIGHT_BIT)
    assert_goes_on_as(resumed, run, 4)


@pytest.mark.proves("training.optimizer", "optimization.use_8bit_optimizer")
@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"optimizer": "paged_adamw_8bit"}},
        {"optimization": {"use_8bit_optimizer": True}},
    ],
    ids=["paged_adamw_8bit", "use_8bit_optimizer"],
)
def test_other_ways_to_ask_for_8_bits_are_the_same_on_the_cpu(
    train: Any, sections: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    run = train(request.node.name, lora=FULL, **sections)
    is_paged = "training" in sections
    assert ("PAGED_OPTIMIZER_WITHOUT_GPU" in run.notices()) is is_paged
    assert run.losses() == train("8-bit", lora=FULL, **EIGHT_BIT).losses()


def test_a_process_trains_in_4_and_8_bits_and_goes_on_after_a_stop_without_a_word_of_kernels(
    shop: Any, model: Path
) -> None:
    training = STEPS | {"max_steps": 1000, "save_strategy": "no"}
    sections: dict[str, Any] = {
        "data": {"model_path": str(model)},
        "training": training | {"lr_scheduler_type": "constant"},
        "optimization": {**QLORA, "use_8bit_optimizer": True},
    }
    run = shop.start(shop.make("stopped", **sections))
    run.wait_for(lambda run: len(run.losses()) > 2)
    run.wish(StopWish.SAVE)
    assert run.wait() == 0, (run.folder / "console.log").read_text()
    step = run.result.step
    assert "kernels" not in (run.folder / "console.log").read_text()
    sections["data"]["resume_from_checkpoint"] = str(run.output / f"checkpoint-{step}")
    sections["training"] |= {"max_steps": step + 3}
    resumed = shop.here(shop.make("resumed", **sections))
    del sections["data"]["resume_from_checkpoint"]
    whole = shop.here(shop.make("whole", **sections))
    assert whole.result.step == step + 3
    assert whole.losses() == run.losses() | resumed.losses()
    assert_goes_on_as(resumed, whole, step)


# --- 16 bits


class Products(TorchDispatchMode):
    """Counts matrix products by their number format."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[torch.dtype]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
            self.seen[result.dtype] += 1
        return result

    def share(self, dtype: torch.dtype) -> float:
        return self.seen[dtype] / self.seen.total()


@pytest.mark.proves("optimization.bf16")
@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_bf16_computes_in_bfloat16_and_keeps_what_it_trains_in_float32(
    train: Any, *, four_bit: bool
) -> None:
    kind = "qlora" if four_bit else "plain"
    with Products() as products:
        run = train(f"{kind}-bf16", optimization={"use_qlora": four_bit, "bf16": True})
    # All but those by which the runner, before the first step, sees how to compute the model.
    assert products.share(torch.bfloat16) > 0.85
    plain = train(kind, optimization={"use_qlora": four_bit}).losses()
    assert run.losses() != plain
    assert run.losses() == pytest.approx(plain, rel=0.02)
    assert {str(array.dtype) for array in weights(run.output / "final").values()} == {"float32"}


@pytest.mark.proves("optimization.fp16", "optimization.tf32")
def test_fp16_and_tf32_are_float32_on_the_cpu_with_notices(train: Any) -> None:
    with Products() as products:
        run = train("fp16", optimization={"fp16": True, "tf32": True})
    assert products.share(torch.float32) == 1
    assert run.losses() == train("plain", optimization={"use_qlora": False}).losses()
    assert {"FP16_UNAVAILABLE_ON_CPU", "TF32_UNAVAILABLE"} <= set(run.notices())


# --- gradient checkpointing


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes of what is kept for the way back, by tensor; weights apart."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.proves("optimization.gradient_checkpointing")
@pytest.mark.parametrize("lora", [{}, FULL], ids=["lora", "full"])
def test_gradient_checkpointing_keeps_less_for_the_way_back_and_changes_no_loss(
    train: Any, lora: dict[str, Any]
) -> None:
    def measure(*, on: bool) -> tuple[int, dict[int, float]]:
        with saved_bytes() as sizes:
            run = train(
                f"checkpointing-{on}-{bool(lora)}",
                lora=lora,
                optimization={"gradient_checkpointing": on},
                training={"max_steps": 4},
            )
        return sum(sizes), run.losses()

    kept, losses = measure(on=True)
    all_of_it, plain = measure(on=False)
    assert losses == plain
    # What is left is of the head and the loss; of each layer its input alone is kept.
    assert kept < 0.5 * all_of_it
