"""What is read from the files of a model, and what is said of damaged ones."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning import model_files
from finetuned_daemon.planning.adapter import plan_adapter
from finetuned_daemon.planning.model_files import (
    ModelFiles,
    ModelUnreadable,
    base_folder,
    lora_target_names,
    read_model,
)
from tiny import make_model


def write_tensors(file: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    """A safetensors file of zeros."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + model_files.Tensor(dtype, tuple(shape)).size_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    write_raw(file, json.dumps(header).encode(), end)


def write_raw(file: Path, header: bytes, data_bytes: int) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes))


def write_config(folder: Path, **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", layers=3)


def complaint(path: Path) -> str:
    """What is said of an unreadable model, in English; the Chinese must be there as well."""
    with pytest.raises(ModelUnreadable) as caught:
        read_model(path)
    assert caught.value.text.zh != caught.value.text.en
    return caught.value.text.en


def test_a_model_is_described_from_its_config_and_headers(folder: Path) -> None:
    model = read_model(folder)
    config = json.loads((folder / "config.json").read_bytes())
    assert (model.hidden_size, model.layers, model.heads, model.head_size) == (32, 3, 2, 16)
    assert (model.intermediate_size, model.vocab_size) == (64, config["vocab_size"])
    assert (model.model_type, model.dtype, model.format) == ("llama", "F32", "safetensors")
    assert model.max_position_embeddings == 512
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert model.parameters == 3 * layer + 2 * model.vocab_size * 32 + 32
    assert model.size_bytes == (folder / "model.safetensors").stat().st_size
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert sorted(lora_target_names(model)) == sorted([*names, "embed_tokens", "lm_head"])
    assert model.input_embedding == "model.embed_tokens"
    assert model.output_embedding == "lm_head"


def test_tied_embeddings_count_once_and_have_an_output_layer(tmp_path: Path) -> None:
    write_config(tmp_path / "tied", model_type="llama", hidden_size=8, tie_word_embeddings=True)
    tensors = {"model.embed_tokens.weight": ("BF16", [50, 8]), "model.norm.weight": ("BF16", [8])}
    write_tensors(tmp_path / "tied/model.safetensors", tensors)
    model = read_model(tmp_path / "tied")
    assert model.parameters == 50 * 8 + 8
    assert model.modules["lm_head"] == (50, 8)
    assert model.dtype == "BF16"
    # Some models are stored with both.
    write_tensors(
        tmp_path / "tied/model.safetensors", {**tensors, "lm_head.weight": ("BF16", [50, 8])}
    )
    assert read_model(tmp_path / "tied").parameters == model.parameters


def test_the_language_model_of_a_larger_one_counts(tmp_path: Path) -> None:
    write_config(
        tmp_path / "nested",
        model_type="gemma3",
        text_config={"hidden_size": 16, "num_hidden_layers": 5, "max_position_embeddings": 99},
    )
    write_tensors(tmp_path / "nested/model.safetensors", {"a.weight": ("F16", [4, 4])})
    model = read_model(tmp_path / "nested")
    assert (model.hidden_size, model.layers, model.max_position_embeddings) == (16, 5, 99)


def test_names_of_other_architectures_are_understood(tmp_path: Path) -> None:
    write_config(
        tmp_path / "gpt2", model_type="gpt2", n_embd=24, n_layer=2, n_head=3, n_positions=64
    )
    write_tensors(
        tmp_path / "gpt2/model.safetensors",
        {
            "wte.weight": ("F32", [30, 24]),
            "h.0.attn.c_attn.weight": ("F32", [24, 72]),
            "h.0.attn.bias": ("U8", [1, 1, 64, 64]),
            "h.0.ln_1.weight": ("F32", [24]),
        },
    )
    model = read_model(tmp_path / "gpt2")
    assert (model.hidden_size, model.layers, model.heads, model.head_size) == (24, 2, 3, 8)
    assert model.intermediate_size == 4 * 24
    assert model.tie_word_embeddings
    assert model.parameters == 30 * 24 + 24 * 72 + 24
    assert lora_target_names(model) == ["wte", "c_attn", "lm_head"]


def test_shards_are_read_together_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write_config(folder, model_type="llama", hidden_size=4)
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for number, file in enumerate(files):
        write_tensors(folder / file, {f"model.layers.{number}.a.weight": ("F32", [4, 4])})
    index = {"weight_map": {f"model.layers.{n}.a.weight": file for n, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(folder).parameters == 32
    (folder / files[1]).unlink()
    assert "a part of the weights is missing: model-00002-of-00002.safetensors" in complaint(folder)


@pytest.mark.parametrize(
    "weight_map", [None, {}, {"a": 1}, {"a": "../outside.safetensors"}, {"a": "/etc/passwd"}]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, weight_map: Any) -> None:
    write_config(tmp_path / "m", model_type="llama")
    (tmp_path / "m/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "does not list the files" in complaint(tmp_path / "m")


def test_a_model_of_bin_files_is_guessed_from_their_size(tmp_path: Path) -> None:
    write_config(tmp_path / "old", model_type="llama", hidden_size=4, torch_dtype="float16")
    (tmp_path / "old/pytorch_model.bin").write_bytes(bytes(2000))
    model = read_model(tmp_path / "old")
    assert (model.format, model.parameters, model.dtype) == ("bin", 1000, "F16")
    assert not model.tensors


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        (b"not json", 0),
        (b"[]", 0),
        (b"[" * 100_000, 0),
        (b'{"a": 1}', 0),
        (b'{"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', 4),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', 4),
        (b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}', 4),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', 4),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', 4),
        (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', 4),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', 4),
    ],
)
def test_a_damaged_header_is_a_sentence(folder: Path, header: bytes, data_bytes: int) -> None:
    write_raw(folder / "model.safetensors", header, data_bytes)
    assert "no safetensors file, or is damaged" in complaint(folder)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 64, (1 << 40).to_bytes(8, "little")]
)
def test_a_header_that_can_not_be_one_is_not_read(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "no safetensors file, or is damaged" in complaint(folder)


def test_a_file_that_was_cut_off_says_how_much_is_there(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1000)
    assert f"it has {size - 1000} bytes and should have {size}" in complaint(folder)


def test_a_folder_without_weights_or_config_says_which(tmp_path: Path) -> None:
    write_config(tmp_path / "m", model_type="llama")
    assert "has neither model.safetensors nor" in complaint(tmp_path / "m")
    (tmp_path / "m/config.json").write_text("[]")
    assert "config.json is no JSON object" in complaint(tmp_path / "m")
    (tmp_path / "m/config.json").unlink()
    assert "has no config.json" in complaint(tmp_path / "m")
    assert "can't be read" in complaint(tmp_path / "absent")


def test_a_model_is_read_once_and_again_when_it_changes(folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(lambda _: read_model(folder), range(32))
    again = read_model(folder)
    assert again is read_model(folder)
    assert again == first
    assert all(other == first for other in others)
    shutil.rmtree(folder)
    make_model(folder, layers=1)
    assert read_model(folder).layers == 1


def test_a_folder_of_lora_weights_alone_leads_to_their_base_model(
    folder: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    assert base_folder(adapter) == folder
    assert base_folder(folder) == folder
    config.write_text("[]")
    with pytest.raises(ModelUnreadable, match="no JSON object"):
        base_folder(adapter)


def test_the_longest_input_is_that_of_the_model(folder: Path) -> None:
    model = read_model(folder)
    assert (model.fitting_length(256), model.fitting_length(2048)) == (256, 512)


def test_the_experts_of_a_layer_are_no_targets(tmp_path: Path) -> None:
    write_config(tmp_path / "moe", model_type="qwen3_moe", hidden_size=4)
    write_tensors(
        tmp_path / "moe/model.safetensors",
        {
            "model.layers.0.mlp.experts.0.gate_proj.weight": ("F32", [8, 4]),
            "model.layers.0.self_attn.q_proj.weight": ("F32", [4, 4]),
        },
    )
    assert lora_target_names(read_model(tmp_path / "moe")) == ["q_proj"]


def adapter_of(model: ModelFiles, **lora: Any) -> int:
    return plan_adapter(Parameters.model_validate({"lora": lora}), model).parameters


def test_rank_times_both_widths_are_trained(folder: Path) -> None:
    model = read_model(folder)
    assert adapter_of(model, lora_r=4, lora_target_modules=["q_proj"]) == 3 * 4 * (32 + 32)
    assert adapter_of(model, lora_r=4, lora_target_modules=["layers.1.mlp.up_proj"]) == 4 * 96
    assert adapter_of(model, lora_target_modules=["lm_head"]) == 16 * (32 + model.vocab_size)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"r": 4, "target_modules": "all-linear"}, 3 * 4 * (4 * 64 + 3 * 96)),
        ({"r": 4}, 3 * 4 * 2 * 64),
        ({"target_modules": ["q_proj"]}, 3 * 8 * 64),
        ({"r": 4, "target_modules": r".*\.1\..*_proj"}, 4 * (4 * 64 + 3 * 96)),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, 2 * 4 * 64),
        ({"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 0}, 4 * 64),
        ({"r": 4, "target_modules": ["q_proj", "k_proj"], "rank_pattern": {"k_proj": 2}}, 3 * 384),
        ({"r": 4, "target_modules": "all-linear", "exclude_modules": ["up_proj"]}, 3 * 1792),
        ({"r": 4, "target_modules": ["q_proj"], "use_dora": True}, 3 * (4 * 64 + 32)),
    ],
)
def test_a_lora_configuration_decides_what_is_trained(
    folder: Path, tmp_path: Path, config: dict[str, Any], expected: int
) -> None:
    file = tmp_path / "lora.json"
    file.write_text(json.dumps(config))
    assert adapter_of(read_model(folder), peft_config_path=str(file)) == expected


@pytest.mark.parametrize(
    "content", ["", "[]", '{"r": "many"}', '{"r": 4, "target_modules": "("}', '{"rank_pattern": 1}']
)
def test_a_lora_configuration_that_is_none_is_a_sentence(
    folder: Path, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "lora.json"
    file.write_text(content)
    with pytest.raises(ModelUnreadable, match="can't be used"):
        adapter_of(read_model(folder), peft_config_path=str(file))
