"""What the benchmarks train: a small Qwen3 of random weights, and chats from the standard library.

A user shows a function, an assistant says what it does: a prompt about as long as its answer, as
chats have it.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else -%}
{{ message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
VOCABULARY = 8192

_ANSWER = range(150, 3000)
_PROMPT = range(100, 1000)


def write_chats(path: Path, count: int) -> None:
    """Writes chats of one question and one answer, spread over the library."""
    chats = list(_chats())
    chosen = [chats[len(chats) * number // count] for number in range(count)]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chosen))


def _chats() -> Iterator[dict[str, Any]]:
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name) if name not in ("antigravity", "this") else None
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        origin = Path(str(spec.origin))
        files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            yield from _of_file(file)


def _of_file(file: Path) -> Iterator[dict[str, Any]]:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        answer = ast.get_docstring(node) or ""
        if len(answer) not in _ANSWER:
            continue
        node.body = node.body[1:] or [ast.Pass()]
        source = ast.unparse(node)[: _PROMPT.stop - 1]
        if len(source) in _PROMPT:
            prompt = f"What does this do?\n\n```python\n{source}\n```"
            yield {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": answer},
                ]
            }


def make_model(folder: Path, chats: Path) -> None:
    """Makes a Qwen3 of 7 million weights, with a tokenizer trained on the chats."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    transformers.utils.logging.disable_progress_bar()
    messages = [m for line in chats.read_text().splitlines() for m in json.loads(line)["messages"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (message["content"] for message in messages),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(str(folder))
