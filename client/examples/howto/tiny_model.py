"""For `make demo-pretrain`: a tiny model from nothing, and a text that every Python has."""

from __future__ import annotations

import importlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 512


def default_text(file: Path) -> Path:
    """Write Python's own reference texts as JSON lines, a topic a line; returns the file."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    with file.open("w", encoding="utf-8") as out:
        for topic in topics.values():
            out.write(json.dumps({"text": topic.strip()}) + "\n")
    return file


def make_model(folder: Path, text: Path) -> Path:
    """Make a Llama of some hundred thousand random weights, and a tokenizer learned from the text.

    Args:
        folder: Where to save it; returned.
        text: JSON lines with `text`, or plain text.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    tokenizers: Any = importlib.import_module("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(text), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def complete(folder: Path, beginning: str) -> str:
    """Let a model write on from a beginning, sampled with a fixed seed."""
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    torch.manual_seed(0)
    ids: Any = tokenizer(beginning, return_tensors="pt")
    output: Any = model.generate(
        **ids, max_new_tokens=80, do_sample=True, temperature=0.7, pad_token_id=0
    )
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return textwrap.shorten(text, 400, placeholder=" ...")


def _texts(file: Path) -> Iterator[str]:
    for line in file.read_text("utf-8").splitlines():
        yield str(json.loads(line)["text"]) if file.suffix == ".jsonl" else line
