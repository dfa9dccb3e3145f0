"""Disk, memory and time of a plan, where no run is needed to see that they are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.dataset.report import Measured, MeasuredFile
from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.measurements import Measurement
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.disk import saved_tokenizer_bytes
from finetuned_daemon.planning.model_files import ModelFiles, ModelUnreadable, read_model
from finetuned_daemon.planning.plan import Plan, make_plan
from finetuned_daemon.planning.schedule import packed_rows
from finetuned_daemon.runs.contract import ProbeReport, TrainingType
from tiny import make_model


def device(kind: DeviceType = DeviceType.CPU, capability: str = "") -> Device:
    return Device(
        id="cpu" if kind is DeviceType.CPU else "cuda:0",
        type=kind,
        product_name="",
        memory_total_bytes=16 << 30,
        memory_free_bytes=8 << 30,
        compute_capability=capability,
    )


AMPERE = device(DeviceType.CUDA, "8.6")
TURING = device(DeviceType.CUDA, "7.5")
SAMPLES = MeasuredFile(samples=100, cut=3, dropped=2, tokens=20_000, longest=((400, 300), (9, 5)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", hidden=128, layers=4)


def plan(
    folder: Path,
    on: Device | None = None,
    measurements: Sequence[Measurement] = (),
    **sections: dict[str, Any],
) -> Plan:
    data = {"model_path": str(folder), "output_dir": str(folder.parent / "a/b/c")}
    parameters = Parameters.model_validate(
        {**sections, "data": {**data, **sections.get("data", {})}}
    )
    return make_plan(
        parameters,
        TrainingType.SFT,
        on or device(),
        read_model(folder),
        Measured(exact=True, train=SAMPLES, evaluation=MeasuredFile(samples=7)),
        tokens_per_second=1000.0,
        measurements=measurements,
    )


def test_the_data_is_as_it_was_measured(folder: Path) -> None:
    found = plan(folder)
    assert (found.train_samples, found.eval_samples, found.train_tokens) == (100, 0, 20_000)
    assert (found.cut_samples, found.dropped_samples, found.exact) == (3, 2, True)
    assert found.disk_free_bytes > 0
    assert (found.memory_total_bytes, found.memory_free_bytes) == (16 << 30, 8 << 30)


def test_a_share_for_evaluation_is_taken_from_the_samples_and_their_tokens(folder: Path) -> None:
    training = {"eval_strategy": "epoch"}
    found = plan(folder, data={"eval_ratio": 0.2}, training=training)
    assert (found.train_samples, found.eval_samples, found.train_tokens) == (80, 20, 16_000)
    found = plan(folder, data={"eval_ratio": 0.2, "eval_file": "/e"}, training=training)
    assert (found.train_samples, found.eval_samples) == (100, 7)
    assert plan(folder, data={"eval_ratio": 0.2}).train_samples == 100


def test_a_run_is_as_long_as_its_tokens_take(folder: Path) -> None:
    two, four = (plan(folder, training={"num_train_epochs": n}) for n in (2, 4))
    assert two.duration_seconds is not None
    assert four.duration_seconds is not None
    assert four.duration_seconds - two.duration_seconds == pytest.approx(40, abs=0.1)
    evaluated = plan(folder, data={"eval_file": "/e"}, training={"eval_strategy": "epoch"})
    assert evaluated.duration_seconds is not None
    assert two.duration_seconds < evaluated.duration_seconds < two.duration_seconds + 2


def peak(folder: Path, on: Device | None = None, **sections: dict[str, Any]) -> int:
    return plan(folder, on, **sections).peak_memory_bytes


def test_memory_is_the_sum_of_its_parts_and_grows_with_what_costs_it(folder: Path) -> None:
    found = plan(folder).memory
    names = ["weights", "gradients", "optimizer", "activations", "logits", "runtime"]
    assert list(found.parts) == names
    assert found.peak_bytes == sum(found.parts.values())
    small = {"training": {"batch_size": 1}, "optimization": {"gradient_checkpointing": True}}
    assert peak(folder, **small) < peak(folder, **{**small, "training": {"batch_size": 4}})
    assert peak(folder, **small) < peak(
        folder, **{**small, "optimization": {"gradient_checkpointing": False}}
    )


@pytest.mark.parametrize("knows_lengths", [True, False])
def test_a_probe_corrects_by_what_its_own_samples_were(folder: Path, knows_lengths: bool) -> None:
    """One that took what was planned for it changes no plan; an older one had the longest alone."""
    training = {"batch_size": 4}
    lengths = {"longest_lengths": (400, 9), "learned_share": 305 / 409}
    report = {
        "peak_memory_bytes": peak(folder, training=training),
        "train_samples": SAMPLES.samples,
        "longest_tokens": 400,
        **(lengths if knows_lengths else {}),
    }
    others = {name: 1 for name in ProbeReport.model_fields if name not in {*report, *lengths}}
    probe = Measurement(
        time=1,
        model="",
        device="",
        training_type=TrainingType.SFT,
        parameters=Parameters.model_validate(
            {"data": {"model_path": str(folder)}, "training": training}
        ),
        report=ProbeReport.model_validate(others | report),
    )
    found = plan(folder, measurements=[probe])
    assert found.calibration is not None
    assert not found.calibration.measured
    off = found.peak_memory_bytes - found.calibration.planned_peak_memory_bytes
    assert abs(off) <= 1 if knows_lengths else off < -10_000


def test_a_batch_is_never_larger_than_the_data(folder: Path) -> None:
    assert peak(folder, training={"batch_size": 100}) == peak(folder, training={"batch_size": 128})


def test_the_largest_batch_is_the_longest_sample_with_what_a_step_puts_beside_it(
    folder: Path,
) -> None:
    """Rows are balanced within a step; padded batches have the longest together."""

    def activations(lengths: list[int], **extensions: Any) -> int:
        parameters = Parameters.model_validate(
            {
                "data": {"model_path": str(folder)},
                "training": {"batch_size": 2, "gradient_accumulation_steps": 2},
                "extensions": extensions,
            }
        )
        longest = tuple((length, length) for length in lengths)
        measured = Measured(exact=True, train=MeasuredFile(samples=9, longest=longest))
        found = make_plan(parameters, TrainingType.SFT, device(), read_model(folder), measured)
        return found.memory.parts["activations"]

    assert activations([400, 300, 200, 100]) == activations([250] * 9)
    assert activations([400, 100, 100, 100]) == activations([400, 100, 100])
    padded = {"attn_implementation": "eager"}
    assert activations([400, 8, 8, 8], **padded) == activations([400] * 9, **padded)


def test_logits_are_of_a_few_tokens_unless_the_model_makes_them(folder: Path) -> None:
    def logits(on: Device | None = None, **sections: dict[str, Any]) -> int:
        longest = {"training": {"batch_size": 64}}
        return plan(folder, on, **{**longest, **sections}).memory.parts["logits"]

    words = read_model(folder).vocab_size
    rows = (1 << 24) // words
    assert logits(optimization={"fp16": False}) <= 3 * 4 * rows * words
    padded = logits(extensions={"attn_implementation": "eager"})
    assert padded == 3 * 4 * 64 * 400 * words
    # Of learned tokens alone, in both formats.
    tokens = 400 + 63 * 9
    learned = -(-tokens * 305 // 409)
    assert logits(AMPERE) == (2 + 3 * 4) * learned * words
    assert logits(AMPERE, optimization={"fp16": False, "bf16": True}) < logits(AMPERE)


def test_dropout_in_lora_layers_takes_memory_wherever_it_is_set(
    folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "peft.json"
    settings = {"r": 16, "target_modules": ["q_proj", "v_proj"]}

    def activations(**lora: Any) -> int:
        return plan(folder, lora=lora).memory.parts["activations"]

    targets = {"lora_target_modules": settings["target_modules"]}
    without, dropped = activations(**targets), activations(lora_dropout=0.1, **targets)
    assert without < dropped
    file.write_text(json.dumps(settings | {"lora_dropout": 0.1}))
    assert activations(peft_config_path=str(file)) == dropped
    file.write_text(json.dumps(settings))
    assert activations(peft_config_path=str(file), lora_dropout=0.1) == without


def test_packed_rows_are_those_of_the_runner_or_said_not_to_be_certain(
    folder: Path, tmp_path: Path
) -> None:
    """With all lengths known as many as the runner's best fit; else from the sum, and not exact."""
    from random import Random

    from finetuned_runner.samples import Packed, Place, Samples
    from finetuned_runner.token_store import TokenStore

    store = TokenStore(tmp_path / "tokens")

    class Given(Samples):
        """Samples of given lengths."""

        def __init__(self, lengths: list[int]) -> None:
            super().__init__(store)
            self.lengths = lengths

        def __len__(self) -> int:
            return len(self.lengths)

        def place(self, index: int) -> Place:
            return Place(0, self.lengths[index])

    random = Random(0)
    for _ in range(200):
        row = random.randint(8, 300)
        lengths = [random.randint(1, row) for _ in range(random.randint(1, 60))]
        longest, total = sorted(lengths, reverse=True), sum(lengths)
        rows, is_certain = packed_rows(longest, len(lengths), total, row)
        assert (rows, is_certain) == (len(Packed(Given(lengths), row)), True)
        rows, is_certain = packed_rows(longest[:-1], len(lengths), total, row)
        assert not is_certain
        assert rows * row >= total
    packed = plan(folder, extensions={"packing": True}, training={"batch_size": 1})
    assert (packed.exact, packed.train_samples) == (False, 100)
    assert packed.schedule.steps_per_epoch < 100
    eager = {"packing": True, "attn_implementation": "eager"}
    assert plan(folder, extensions=eager, training={"batch_size": 1}).exact


@pytest.mark.parametrize("on", [AMPERE, TURING], ids=["Ampere", "Turing"])
def test_a_gpu_holds_frozen_weights_in_the_format_that_it_computes_with(
    folder: Path, on: Device
) -> None:
    def weights(**sections: dict[str, Any]) -> int:
        return plan(folder, on, **sections).memory.parts["weights"]

    model = read_model(folder)
    adapter = 4 * plan(folder).trainable_parameters
    exact = {"optimization": {"fp16": False}}
    bf16 = {"optimization": {"fp16": False, "bf16": True}}
    full = {"lora": {"use_lora": False}, **exact}
    assert weights(**exact) == 4 * model.parameters + adapter
    assert weights() == 2 * model.parameters + adapter
    has_bf16 = on is AMPERE
    assert weights(**bf16) == (2 if has_bf16 else 4) * model.parameters + adapter
    assert weights(**full) == 4 * model.parameters
    # Mixed precision keeps both.
    assert weights(lora={"use_lora": False}) == 6 * model.parameters


def test_four_bits_hold_the_matrices_alone(folder: Path) -> None:
    model = read_model(folder)
    embeddings = 2 * 128 * model.vocab_size + (2 * 4 + 1) * 128
    found = plan(folder, AMPERE, optimization={"use_qlora": True})
    matrices = model.parameters - embeddings
    expected = 0.516 * matrices + 4 * embeddings + 4 * found.trainable_parameters
    assert found.memory.parts["weights"] == pytest.approx(expected, abs=2)


def test_in_4_bits_on_the_cpu_the_peak_is_where_files_are_read_or_the_model_is_merged(
    tmp_path: Path,
) -> None:
    model = read_model(make_model(tmp_path / "model", hidden=512))

    def weights(on: Device | None = None, tokens: int = 8, **lora: bool) -> int:
        parameters = Parameters.model_validate(
            {
                "data": {"model_path": str(model.path)},
                "lora": lora,
                "optimization": {"use_qlora": True, "fp16": False},
            }
        )
        measured = Measured(exact=True, train=MeasuredFile(samples=1, longest=((tokens, 1),)))
        found = make_plan(parameters, TrainingType.SFT, on or device(), model, measured)
        return found.memory.parts["weights"]

    held, largest = weights(AMPERE), 4 * 512 * 1024
    assert weights() == held + model.size_bytes + 4 * largest
    # What longer samples left behind is still there when the model is loaded once more.
    assert weights(tokens=128, merge_lora=True) == held + 4 * model.parameters


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [("adamw_torch", 8.0), ("adamw_8bit", 2.03), ("paged_adamw_8bit", 2.03), ("sgd", 0.0)],
)
def test_each_optimizer_keeps_its_own_share(
    folder: Path, optimizer: str, bytes_per_weight: float
) -> None:
    found = plan(folder, AMPERE, lora={"use_lora": False}, training={"optimizer": optimizer})
    state = found.disk.checkpoint_bytes - found.disk.final_bytes
    embedding = 128 * read_model(folder).vocab_size
    expected = bytes_per_weight * found.trainable_parameters
    if "8bit" in optimizer:  # that of the input embeddings stays in float32
        expected += (8 - bytes_per_weight) * embedding
    assert state == pytest.approx(expected, abs=60_000)


def test_the_switch_for_8_bits_is_that_of_adam(folder: Path) -> None:
    switch = {"optimization": {"use_8bit_optimizer": True}, "lora": {"use_lora": False}}
    named = plan(folder, lora={"use_lora": False}, training={"optimizer": "adamw_8bit"})
    assert plan(folder, **switch).disk_bytes == named.disk_bytes


def test_pretraining_trains_all_weights_whatever_lora_says(folder: Path) -> None:
    parameters = Parameters.model_validate({"data": {"model_path": str(folder)}})
    model: ModelFiles = read_model(folder)
    found = make_plan(
        parameters,
        TrainingType.PRETRAIN,
        device(),
        model,
        Measured(exact=False, train=SAMPLES),
    )
    assert found.trainable_parameters == found.total_parameters == model.parameters
    assert found.duration_seconds is None
    assert found.disk_free_bytes == 0
    assert not found.exact


def test_a_model_of_bin_files_has_a_plan_too(tmp_path: Path) -> None:
    whole = make_model(tmp_path / "model", hidden=64)
    sections = {"lora": {"lora_r": 8}, "training": {"max_steps": 10}}
    expected = plan(whole, **sections)
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    found = plan(whole, **sections)
    assert found.trainable_parameters == expected.trainable_parameters
    assert found.disk_bytes == pytest.approx(expected.disk_bytes, rel=0.01)
    assert found.peak_memory_bytes == pytest.approx(expected.peak_memory_bytes, rel=0.01)


@pytest.mark.parametrize("pretty", [True, False])
@pytest.mark.parametrize("old_merges", [True, False])
def test_the_tokenizer_is_counted_as_it_is_written_again(
    folder: Path, tmp_path: Path, *, pretty: bool, old_merges: bool
) -> None:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    content = json.loads(file.read_bytes())
    merges = content["model"]["merges"]
    assert isinstance(merges[0], list)
    if old_merges:
        content["model"]["merges"] = [" ".join(pair) for pair in merges]
    options: dict[str, Any] = {"indent": 2} if pretty else {"separators": (",", ":")}
    file.write_text(json.dumps(content, ensure_ascii=False, **options))
    written = tmp_path / "written"
    written.mkdir()
    Tokenizer.from_file(str(file)).save(str(written / "tokenizer.json"))
    rest = sum(
        (folder / n).stat().st_size for n in ("tokenizer_config.json", "chat_template.jinja")
    )
    expected = (written / "tokenizer.json").stat().st_size
    assert saved_tokenizer_bytes(folder) - rest == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 1, "merges":["a b"]}'])
def test_a_damaged_tokenizer_does_no_harm(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert saved_tokenizer_bytes(folder) > 0


@pytest.mark.parametrize("pattern", ["(.*.*)*x", ".*.*.*.*.*.*.*.*x", "(a{999}){999}", "x" * 600])
def test_a_pattern_that_may_take_for_ever_is_refused(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    """Nothing can interrupt a match, and the daemon would answer nobody."""
    file = tmp_path / "peft.json"
    for settings in ({"target_modules": pattern}, {"rank_pattern": {pattern: 4}}):
        file.write_text(json.dumps(settings))
        with pytest.raises(ModelUnreadable, match="pattern"):
            plan(folder, lora={"peft_config_path": str(file)})


def test_a_plain_pattern_of_modules_is_understood(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "peft.json"
    file.write_text(json.dumps({"r": 4, "target_modules": r".*\.(q|v)_proj"}))
    by_pattern = plan(folder, lora={"peft_config_path": str(file)})
    file.write_text(json.dumps({"r": 4, "target_modules": ["q_proj", "v_proj"]}))
    by_name = plan(folder, lora={"peft_config_path": str(file)})
    assert by_pattern.trainable_parameters == by_name.trainable_parameters > 0
