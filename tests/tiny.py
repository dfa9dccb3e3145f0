"""Tiny real models, tokenizers and data for tests, made in 0.2 s and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

TEMPLATES = Path(__file__).parent / "finetuned_runner" / "templates"

# End of turn of each template in `templates/`.
END_OF_TURN = {
    "chatml": "<|im_end|>",
    "chatml_generation": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>",
    "shouting": "<|im_end|>",
    "endless": "<|im_end|>",
}
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<start_of_turn>",
    "<end_of_turn>",
)
_BOS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<s>"}

_VERBS = ("list", "copy", "move", "remove", "count", "sort", "compress", "show")
_THINGS = ("files", "folders", "lines", "words", "processes", "links", "archives", "images")
_PLACES = (
    "in the current folder",
    "below /tmp",
    "of a project",
    "on the disk",
    "by size",
    "since Monday",
)
_COMMANDS = ("ls -l", "cp -r", "mv -n", "rm -i", "wc -l", "sort -u", "tar czf", "head -20")


def chats(count: int, *, turns: int = 1) -> list[dict[str, Any]]:
    """Chats that differ from one another, of `turns` questions and answers each."""
    samples = []
    for number in range(count):
        messages = []
        for turn in range(turns):
            a, b, c = number % 8, (number // 8 + turn) % 8, (number * 5 + turn) % 6
            messages.append(
                {"role": "user", "content": f"How do I {_VERBS[a]} the {_THINGS[b]} {_PLACES[c]}?"}
            )
            answer = f"Use `{_COMMANDS[a]} {_THINGS[b]}`. " * (1 + number % 4)
            messages.append({"role": "assistant", "content": answer.strip()})
        samples.append({"messages": messages})
    return samples


def documents(count: int) -> list[dict[str, Any]]:
    """Texts for pretraining."""
    return [
        {"text": " ".join(message["content"] for message in chat["messages"])}
        for chat in chats(count, turns=3)
    ]


def write_jsonl(path: Path, objects: Iterable[dict[str, Any]]) -> Path:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects))
    return path


def make_model(
    folder: Path,
    template: str | None = "chatml",
    *,
    family: Literal["llama", "qwen3"] = "llama",
    hidden: int = 32,
    layers: int = 2,
    seed: int = 0,
    positions: int = 512,
) -> Path:
    """A model of random weights with a real tokenizer; returns `folder`.

    Args:
        folder: Is made; an existing model in it is kept as it is.
        template: Name of a file in `templates/`; None for a tokenizer without a chat template.
        family: Architecture.
        hidden: Hidden size, a multiple of 16.
        layers: Number of layers.
        seed: Of the weights.
        positions: `max_position_embeddings`.
    """
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = make_tokenizer(folder, template)
    end = END_OF_TURN.get(template or "", "<|endoftext|>")
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]],
        "model_type": family,
        "dtype": "float32",
        "vocab_size": len(vocabulary),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 16,
        "num_key_value_heads": hidden // 16,
        "head_dim": 16,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": vocabulary[_BOS.get(template or "", "<|endoftext|>")],
        "eos_token_id": vocabulary[end],
        "pad_token_id": vocabulary["<|endoftext|>"],
        "use_cache": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _write_weights(folder / "model.safetensors", config, seed)
    return folder


def weights(folder: Path) -> dict[str, Any]:
    """The arrays of an adapter, or of a model."""
    from safetensors.numpy import load_file

    name = "adapter_model.safetensors"
    return load_file(folder / (name if (folder / name).exists() else "model.safetensors"))


def make_tokenizer(folder: Path, template: str | None = "chatml") -> dict[str, int]:
    """Trains a byte-level BPE tokenizer, writes it with its template; returns its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [message["content"] for chat in chats(64) for message in chat["messages"]]
    corpus += ["system user assistant model You are a helpful assistant."] * 8
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=list(_SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BOS.get(template or "", "<|endoftext|>"),
        "eos_token": END_OF_TURN.get(template or "", "<|endoftext|>"),
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    if template is not None:
        text = (TEMPLATES / f"{template}.jinja").read_text()
        (folder / "chat_template.jinja").write_text(text)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def _write_weights(path: Path, config: dict[str, Any], seed: int) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return (generator.standard_normal(shape) * 0.05).astype(np.float32)

    hidden, inner, vocabulary = (
        config["hidden_size"],
        config["intermediate_size"],
        config["vocab_size"],
    )
    weights = {
        "model.embed_tokens.weight": normal(vocabulary, hidden),
        "model.norm.weight": np.ones(hidden, np.float32),
        "lm_head.weight": normal(vocabulary, hidden),
    }
    shapes: dict[str, Sequence[int]] = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config["model_type"] == "qwen3":
        norms |= {"self_attn.q_norm": config["head_dim"], "self_attn.k_norm": config["head_dim"]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        weights |= {f"{prefix}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        weights |= {
            f"{prefix}.{name}.weight": np.ones(size, np.float32) for name, size in norms.items()
        }
    save_file(weights, str(path), metadata={"format": "pt"})
