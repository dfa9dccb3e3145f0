"""What the files of a model's folder say of it: config.json and the headers of its weights."""

from __future__ import annotations

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finetuned_daemon.json_file import NotJson, parse_json, read_json_file
from finetuned_daemon.texts import Text

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
BIN_WEIGHTS = "pytorch_model.bin"
BIN_WEIGHTS_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"

_LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
_REMEMBERED = 32
"""Models; one of 100 shards and 10,000 tensors takes some megabytes."""

_MOST_LAYERS = 1000
"""Beyond this a config is wrong."""

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Number formats of safetensors (https://github.com/huggingface/safetensors), in bits."""
_TORCH_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_FLOATS = frozenset(name for name in DTYPE_BITS if name[0] == "F" or name == "BF16")

# Other architectures' names of the same thing; the first that a config has counts.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim", "n_embed"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "vocab_size": ("vocab_size", "n_vocab"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
}
# Tensors that are stored with some models and are no parameters: causal masks, frequencies.
_BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.masked_bias|rotary_emb\.inv_freq)$")
# transformers 5 joins the experts of a layer into one tensor, which LoRA on modules does not reach.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")


class ModelUnreadable(Exception):
    """The files are no model that can be read; `text` says what is wrong with which."""

    def __init__(self, text: Text) -> None:
        self.text = text
        super().__init__(text.en)


class Tensor(NamedTuple):
    """One tensor of a safetensors file."""

    dtype: str
    """As in the file, such as `BF16`."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return -(-self.elements * DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model, as its files describe it. Sizes that its config does not tell are 0."""

    path: Path
    format: Literal["safetensors", "bin"]
    tensors: Mapping[str, Tensor]
    """By name; empty where the weights are in `.bin` files, which can't be read without torch."""
    weights: Mapping[str, Tensor]
    """Those of the tensors that become parameters: no masks, no whole numbers, none twice."""
    modules: Mapping[str, tuple[int, int]]
    """Shape of the weight of each module that is a matrix, by the module's full name.

    With tied embeddings also the output layer, which has no tensor of its own. Of `.bin` files as
    the config lets expect.
    """
    parameters: int
    """Of `.bin` files guessed from their size."""
    size_bytes: int
    """Of all files of weights."""
    dtype: str
    """Format of most weights, as in safetensors."""
    model_type: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    auto_map: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Code of its own that the folder brings, which is never run."""

    @property
    def input_embedding(self) -> str:
        """Full name of the module of the input embeddings; empty where it is not found."""
        return self._module(_INPUT_EMBEDDINGS)

    @property
    def output_embedding(self) -> str:
        """Full name of the module that gives the logits; empty where it is not found."""
        return self._module(_OUTPUT_EMBEDDINGS)

    def fitting_length(self, wanted: int) -> int:
        """`training.max_seq_length`, or the longest that the model has positions for."""
        return min(wanted, self.max_position_embeddings or wanted)

    def _module(self, leaves: tuple[str, ...]) -> str:
        return next((n for n in self.modules if n.rpartition(".")[2] in leaves), "")


def lora_target_names(model: ModelFiles) -> list[str]:
    """Last part of the names of the modules that LoRA can be put on, in the model's order."""
    return list(
        OrderedDict.fromkeys(
            name.rpartition(".")[2] for name in model.modules if is_lora_target(name)
        )
    )


def is_lora_target(module: str) -> bool:
    """Whether LoRA can be put on a matrix of this full name: not on one expert of several."""
    return not _EXPERT.search(f".{module}.")


# --- reading

_Identity = tuple[tuple[str, int, int, int], ...]
_lock = threading.Lock()
_known: OrderedDict[Path, tuple[_Identity, ModelFiles]] = OrderedDict()


def base_folder(path: Path) -> Path:
    """The folder of the model: `path`, or where that holds LoRA weights alone, their base model's.

    Raises:
        ModelUnreadable: The adapter's configuration can't be read.
    """
    if (path / "config.json").is_file() or not (path / ADAPTER_CONFIG).is_file():
        return path
    return Path(str(_read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path") or path))


def read_model(path: Path) -> ModelFiles:
    """The model in a folder; remembered for as long as its files do not change. Thread safe.

    Raises:
        ModelUnreadable: config.json or the weights are missing, or are not what they should be.
    """
    try:
        identity = _identity(path)
        with _lock:
            known = _known.get(path)
            if known is not None and known[0] == identity:
                _known.move_to_end(path)
                return known[1]
        model = _read_model(path)
    except OSError as error:
        name, why = error.filename or path, error.strerror or str(error)
        text = Text(f"{name} can't be read: {why}", f"无法读取 {name}：{why}")
        raise ModelUnreadable(text) from error
    with _lock:
        _known[path] = identity, model
        _known.move_to_end(path)
        while len(_known) > _REMEMBERED:
            _known.popitem(last=False)
    return model


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header alone.

    Raises:
        ModelUnreadable: It can't be read, is damaged or not whole.
    """
    try:
        return _read_tensors(file)
    except OSError as error:
        why = error.strerror or str(error)
        raise ModelUnreadable(
            Text(f"{file} can't be read: {why}", f"无法读取 {file}：{why}")
        ) from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with open(file, "rb") as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise _damaged(file)
        try:
            header = parse_json(stream.read(length))
        except NotJson:
            raise _damaged(file) from None
    if not isinstance(header, dict):
        raise _damaged(file)
    places = list[tuple[int, int]]()
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, offsets = _read_entry(entry)
        if tensor is None or offsets[1] - offsets[0] != tensor.size_bytes:
            raise _damaged(file)
        tensors[name] = tensor
        places.append((offsets[0], offsets[1]))
    end = 0
    for start, stop in sorted(places):
        if start != end:  # in the midst of another's values, or behind a hole
            raise _damaged(file)
        end = stop
    if size != 8 + length + end:
        sentence = Text(
            f"{file.name} is not whole: it has {size} bytes and should have {8 + length + end}; "
            "get it again",
            f"{file.name} 不完整：现有 {size} 字节，应有 {8 + length + end} 字节；请重新获取",
        )
        raise ModelUnreadable(sentence)
    return tensors


def _read_entry(entry: Any) -> tuple[Tensor | None, tuple[int, ...]]:
    if not isinstance(entry, dict):
        return None, ()
    dtype = entry.get("dtype")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if (
        not isinstance(dtype, str)
        or dtype not in DTYPE_BITS
        or shape is None
        or offsets is None
        or len(offsets) != 2
    ):
        return None, ()
    return Tensor(dtype, shape), offsets


def _sizes(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    sizes = tuple(item for item in value if type(item) is int and 0 <= item < 1 << 62)
    return sizes if len(sizes) == len(value) else None


def _damaged(file: Path) -> ModelUnreadable:
    return ModelUnreadable(
        Text(
            f"{file.name} is no safetensors file, or is damaged; get it again",
            f"{file.name} 不是 safetensors 文件或已损坏；请重新获取",
        )
    )


def _identity(path: Path) -> _Identity:
    entries: list[tuple[str, int, int, int]] = []
    for file in path.iterdir():
        if file.suffix in (".json", ".safetensors", ".bin"):
            status = file.stat()
            entries.append((file.name, status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(sorted(entries))


def _read_model(path: Path) -> ModelFiles:
    config = _read_object(path / "config.json")
    files = _files(path, WEIGHTS, WEIGHTS_INDEX)
    if files:
        tensors = {name: t for file in files for name, t in _read_tensors(file).items()}
        return _describe(path, config, tensors, sum(file.stat().st_size for file in files))
    files = _files(path, BIN_WEIGHTS, BIN_WEIGHTS_INDEX)
    if not files:
        sentence = Text(
            f"{path} has neither {WEIGHTS} nor {WEIGHTS_INDEX}",
            f"{path} 中既没有 {WEIGHTS}，也没有 {WEIGHTS_INDEX}",
        )
        raise ModelUnreadable(sentence)
    return _describe(path, config, {}, sum(file.stat().st_size for file in files))


def _files(path: Path, whole: str, index: str) -> list[Path]:
    """Files of weights, in the order in which transformers looks for them; [] if there are none."""
    if (path / whole).is_file():
        return [path / whole]
    if not (path / index).is_file():
        return []
    parts = _read_object(path / index).get("weight_map")
    names = set(parts.values()) if isinstance(parts, dict) else set[Any]()
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise ModelUnreadable(
            Text(f"{index} does not list the files of the weights", f"{index} 没有列出权重文件")
        )
    for name in sorted(names):
        if not (path / name).is_file():
            sentence = Text(
                f"a part of the weights is missing: {name} ({index} lists {len(names)} files)",
                f"缺少部分权重：{name}（{index} 列出了 {len(names)} 个文件）",
            )
            raise ModelUnreadable(sentence)
    return [path / name for name in sorted(names)]


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = read_json_file(file)
        if isinstance(found, dict):
            return found
    except FileNotFoundError:
        sentence = Text(f"{file.parent} has no {file.name}", f"{file.parent} 中没有 {file.name}")
        raise ModelUnreadable(sentence) from None
    except NotJson:
        pass  # said below
    raise ModelUnreadable(
        Text(f"{file.name} is no JSON object", f"{file.name} 不是 JSON 对象")
    ) from None


# --- from config and tensors to a description


def _describe(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], size_bytes: int
) -> ModelFiles:
    nested = config.get("text_config")
    text: dict[str, Any] = {**config, **nested} if isinstance(nested, dict) else config
    sizes = {name: _first_size(text, names) for name, names in _NAMES.items()}
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype")
    stored = _TORCH_DTYPES.get(str(dtype).removeprefix("torch."), "F32")
    tied = bool(text.get("tie_word_embeddings", not _has_output(tensors) and bool(tensors)))
    weights = dict(_parameters(tensors, tied=tied))
    if weights:
        stored = _most_common(weights.values())
    modules = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in weights.items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }
    if not tensors:
        modules = _usual_modules(text, sizes)
    if tied and modules and not _has_output(weights):
        shape = next((s for n, s in modules.items() if _leaf(n) in _INPUT_EMBEDDINGS), None)
        if shape is not None:
            modules["lm_head"] = shape
    heads = sizes["heads"]
    head_size = _first_size(text, ("head_dim",)) or (sizes["hidden_size"] // heads if heads else 0)
    auto_map = config.get("auto_map")
    model_type = config.get("model_type")
    return ModelFiles(
        path=path,
        format="safetensors" if tensors else "bin",
        tensors=tensors,
        weights=weights,
        modules=modules,
        parameters=sum(tensor.elements for tensor in weights.values())
        or size_bytes * 8 // DTYPE_BITS[stored],
        size_bytes=size_bytes,
        dtype=stored,
        model_type=model_type if isinstance(model_type, str) else "",
        hidden_size=sizes["hidden_size"],
        layers=sizes["layers"],
        heads=heads,
        kv_heads=sizes["kv_heads"] or heads,
        head_size=head_size,
        intermediate_size=sizes["intermediate_size"] or 4 * sizes["hidden_size"],
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=sizes["max_position_embeddings"],
        tie_word_embeddings=tied,
        auto_map=auto_map if isinstance(auto_map, dict) else {},
    )


def _usual_modules(
    config: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """The matrices of a model of Llama's build; of another none, as their names are not known."""
    width, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["heads"]
    if not (width and inner and heads and sizes["kv_heads"]):
        return {}
    head = _first_size(config, ("head_dim",)) or width // heads
    queries, keys = heads * head, sizes["kv_heads"] * head
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    modules = {"model.embed_tokens": (sizes["vocab_size"], width)}
    for layer in range(min(sizes["layers"], _MOST_LAYERS)):
        modules |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    return modules | {"lm_head": (sizes["vocab_size"], width)}


def _parameters(tensors: Mapping[str, Tensor], *, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """What becomes a parameter: no masks, no whole numbers, tied embeddings once."""
    has_input = any(_leaf(n.removesuffix(".weight")) in _INPUT_EMBEDDINGS for n in tensors)
    for name, tensor in tensors.items():
        is_copy = tied and has_input and _leaf(name.removesuffix(".weight")) in _OUTPUT_EMBEDDINGS
        if tensor.dtype in _FLOATS and not _BUFFERS.search(name) and not is_copy:
            yield name, tensor


def _has_output(tensors: Mapping[str, Tensor]) -> bool:
    return any(_leaf(name.removesuffix(".weight")) in _OUTPUT_EMBEDDINGS for name in tensors)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _most_common(tensors: Iterable[Tensor]) -> str:
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.elements
    return max(totals, key=lambda dtype: totals[dtype])


def _first_size(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and 0 < value < 1 << 40:
            return value
    return 0
