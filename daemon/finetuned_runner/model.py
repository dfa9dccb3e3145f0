"""The model and its tokenizer: loading, LoRA, and what is left behind when the run is over."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
)
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason
from finetuned_daemon.texts import printable
from finetuned_runner import pissa
from finetuned_runner.arguments import Precision, lora_config, need_bitsandbytes
from finetuned_runner.checkpoint import write_folder
from finetuned_runner.encoding import TokenizerUnusable, open_tokenizer
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report
from finetuned_runner.reporting import need_packages

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"

_logger = logging.getLogger(__name__)

Model = PreTrainedModel | PeftModel


# --- loading


def load_tokenizer(parameters: Parameters) -> PreTrainedTokenizerBase:
    """The tokenizer of `data.tokenizer_path`, else of the model.

    Raises:
        RunFailed: MODEL_UNLOADABLE.
    """
    path = parameters.data.tokenizer_path or parameters.data.model_path
    if not path:
        raise RunFailed(EndReason.MODEL_UNLOADABLE, "data.model_path is not set.")
    try:
        return open_tokenizer(path)
    except TokenizerUnusable as error:
        raise RunFailed(EndReason.MODEL_UNLOADABLE, f"{error}.") from error


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with. It is masked, so that any will do where the tokenizer has none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if isinstance(token, int):
            return token
    return 0


def load_model(
    parameters: Parameters, device: str, precision: Precision, report: Report
) -> PreTrainedModel:
    """The base model, from safetensors, else `.bin` files; no code of its folder runs.

    In float32, which mixed precision wants of the weights it trains. Frozen weights on a GPU are
    loaded in the format that is computed with; with QLoRA in 4 bits.

    Raises:
        RunFailed: MODEL_UNLOADABLE.
    """
    need_packages(parameters)
    path = _base_path(parameters, report)
    if not _has_safetensors(path):
        report.notice(
            "data.model_path",
            "MODEL_WITHOUT_SAFETENSORS",
            "The model's weights are in the old .bin format; they are loaded as numbers alone, "
            "without running code in them. What the run saves is in safetensors.",
        )
    options: dict[str, Any] = {"dtype": torch.float32}
    if parameters.extensions.attn_implementation != "auto":
        options["attn_implementation"] = parameters.extensions.attn_implementation
    if parameters.lora.use_lora and device != "cpu":
        options["dtype"] = precision.compute_dtype
    if parameters.optimization.use_qlora:
        if not parameters.lora.use_lora:
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                "QLoRA trains LoRA weights alone: turn lora.use_lora on or "
                "optimization.use_qlora off.",
            )
        need_bitsandbytes("QLoRA", EndReason.MODEL_UNLOADABLE)
        config: Any = BitsAndBytesConfig
        options["quantization_config"] = config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=precision.compute_dtype,
        )
        options["device_map"] = {"": "cpu" if device == "cpu" else 0}
    model = _load(path, options)
    if parameters.optimization.use_qlora and device == "cpu":
        _settle_on_cpu(model)
    return model


def _settle_on_cpu(model: PreTrainedModel) -> None:
    """Makes a model in 4 bits fit to be trained on the CPU."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        # With AVX512-BF16 an evaluation would bring the weights in an order in which no gradient
        # passes through them any more.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # What is not quantized lies in the mapped file, and would keep all of it in memory: of 85
    # million weights 270 MB, while the run trains.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()


def _load(path: str, options: dict[str, Any]) -> PreTrainedModel:
    _check_index(Path(path))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            # False: torch.load with weights_only, which refuses everything but tensors.
            use_safetensors=_has_safetensors(path),
            output_loading_info=True,
            # transformers attaches an adapter it finds beside the model unasked; in a folder that
            # isn't there it finds none.
            adapter_kwargs={"subfolder": "none"},
            **options,
        )
    except pickle.UnpicklingError as error:  # torch's own words say how to run the code after all
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE,
            f"The model in {path} can't be loaded: its .bin file is damaged or holds more than "
            "numbers, which could run code; get it as safetensors.",
        ) from error
    except Exception as error:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE, f"The model in {path} can't be loaded: {_short(error)}"
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        # transformers fills them with random numbers and only warns.
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE,
            f"The model in {path} lacks {len(missing)} of its weights ({missing[0]} ...); get "
            "its files again.",
        )
    _mend_generation_config(model)
    return model


def _check_index(folder: Path) -> None:
    """Raises RunFailed where an index of weights names files elsewhere: they are no model's."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if not (folder / name).is_file():
            continue
        parts = _read_settings(folder / name).get("weight_map")
        files: list[object] = list(parts.values()) if isinstance(parts, dict) else [None]
        if not all(isinstance(file, str) and Path(file).name == file for file in set(files)):
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"The model in {folder} can't be loaded: {name} does not list the files of its "
                "weights.",
            )


def _has_safetensors(path: str) -> bool:
    """Whether there are safetensors, or nothing that could be loaded in their place."""
    folder = Path(path)
    return not any(
        (folder / f"pytorch_model.bin{end}").is_file() for end in ("", ".index.json")
    ) or any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Lets the model be saved: transformers refuses, at the end, what it took at the beginning."""
    config: Any = model.generation_config
    try:
        config.validate(strict=True)
    except ValueError as error:
        _logger.warning("the generation config contradicts itself, sampling is on: %s", error)
        config.do_sample = True  # most carry a temperature, which is for sampling


def _base_path(parameters: Parameters, report: Report) -> str:
    path = os.path.abspath(parameters.data.model_path or "")  # noqa: PTH100 - links stay as the user wrote them
    folder = Path(path)
    if not folder.is_dir():
        raise RunFailed(EndReason.MODEL_UNLOADABLE, f"data.model_path {path} is no folder.")
    has_model, has_adapter = (
        (folder / "config.json").is_file(),
        (folder / _ADAPTER_CONFIG).is_file(),
    )
    if has_adapter and has_model and not parameters.data.attach_lora:
        report.notice(
            "data.attach_lora",
            "ADAPTER_NOT_ATTACHED",
            "The model folder also holds LoRA weights; they are not used, as data.attach_lora is "
            "off.",
        )
    if has_adapter and not has_model:
        base = str(_read_settings(folder / _ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        if not parameters.data.attach_lora:
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"data.model_path {path} holds LoRA weights only: set it to their base model "
                f"({base}).",
            )
        if not Path(base).is_absolute() or not Path(base).is_dir():
            raise RunFailed(
                EndReason.MODEL_UNLOADABLE,
                f"The base model of the LoRA weights in {path} is not there: {base}.",
            )
        return base
    return path


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE, f"{file} can't be read: {_short(error)}"
        ) from error
    if not isinstance(found, dict):
        raise RunFailed(EndReason.MODEL_UNLOADABLE, f"{file} is no JSON object.")
    return cast("dict[str, Any]", found)


def fit_length(model: PreTrainedModel, wanted: int, report: Report) -> int:
    """`training.max_seq_length`, or the longest that the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < wanted:
        report.notice(
            "training.max_seq_length",
            "MAX_SEQ_LENGTH_ABOVE_MODEL",
            f"The model has {positions} positions; samples are cut there instead of at {wanted}.",
        )
        return positions
    return wanted


def check_vocabulary(model: PreTrainedModel, largest_token: int) -> None:
    """Raises RunFailed if the data has tokens that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if largest_token >= rows:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE,
            f"The tokenizer gives token {largest_token}, the model has {rows} only: they don't "
            "belong together.",
        )


# --- LoRA


def add_lora(model: PreTrainedModel, parameters: Parameters, report: Report) -> PeftModel:
    """Freezes the model and adds LoRA weights: fresh, or with `data.attach_lora` of an earlier run.

    Raises:
        RunFailed: MODEL_UNLOADABLE, if the model has no such modules or there are no weights to
            attach.
    """
    if parameters.optimization.use_qlora:
        prepare: Any = prepare_model_for_kbit_training
        # The Trainer turns checkpointing on by itself, without reentrance.
        model = prepare(model, use_gradient_checkpointing=False)
    # The first weights depend on nothing but the seed.
    set_seed(parameters.general.seed)
    if parameters.data.attach_lora:
        return _attach(model, parameters, report)
    config = lora_config(parameters, report)
    _check_targets(model, config)
    init = str(config.init_lora_weights)
    if begins_with_pissa := pissa.is_pissa(config):
        config.init_lora_weights = True
    try:
        adapted: Any = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE, f"LoRA can't be added to this model: {_short(error)}"
        ) from error
    result: PeftModel = adapted
    if begins_with_pissa:
        pissa.begin(result, init, resumes=bool(parameters.data.resume_from_checkpoint))
    return result


def _check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    if not isinstance(
        config.target_modules, (list, set)
    ):  # a pattern, or the architecture's own: peft checks
        return
    names = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
        or type(module).__name__ == "Conv1D"
    }
    missing = [
        target
        for target in sorted(config.target_modules)
        if not any(name == target or name.endswith(f".{target}") for name in names)
    ]
    if missing:
        own = {name.rpartition(".")[2] for name in names}
        known = ", ".join(sorted(own))
        # Embeddings and head are trained on purpose or not at all.
        usual = tuple(
            sorted(own - {"lm_head", "embed_tokens", "wte", "wpe", "embed_in", "embed_out"})
        )
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE,
            f"The model has no module {', '.join(missing)} for lora.lora_target_modules; it has "
            f"{known}.",
            fix={"lora.lora_target_modules": usual} if usual else None,
        )


def _attach(model: PreTrainedModel, parameters: Parameters, report: Report) -> PeftModel:
    data = parameters.data
    folder = Path(data.resume_from_checkpoint or data.model_path or "")
    if not (folder / _ADAPTER_CONFIG).is_file() or not (folder / _ADAPTER_WEIGHTS).is_file():
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE,
            f"There are no LoRA weights to attach in {folder} ({_ADAPTER_CONFIG} with "
            f"{_ADAPTER_WEIGHTS}).",
        )
    try:
        adapted = PeftModel.from_pretrained(
            model, str(folder), is_trainable=True, local_files_only=True
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE, f"The LoRA weights in {folder} don't fit: {_short(error)}"
        ) from error
    report.notice(
        "data.attach_lora",
        "LORA_ATTACHED",
        f"Training starts at step 0 from the LoRA weights in {folder}; their own rank, alpha and "
        "modules hold.",
    )
    return adapted


def check_resumable(checkpoint: Path, model: Model) -> None:
    """Compares a checkpoint's weights with those of the model, by name and shape.

    Raises:
        RunFailed: MODEL_UNLOADABLE, if they are of another model or another LoRA shape.
    """
    file, has_lora = checkpoint / _ADAPTER_WEIGHTS, isinstance(model, PeftModel)
    if file.is_file() != has_lora:
        raise _unfit(
            checkpoint,
            "it holds all weights and this run trains LoRA weights: set lora.use_lora to false"
            if has_lora
            else "it holds LoRA weights and this run trains all weights: set lora.use_lora to true",
        )
    if not isinstance(model, PeftModel):
        return
    there = _read_settings(checkpoint / _ADAPTER_CONFIG)
    here: dict[str, Any] = model.peft_config["default"].to_dict()
    wanted = {key: list(value.shape) for key, value in get_peft_model_state_dict(model).items()}
    if pissa.is_used(model):
        if there.get("r") != 2 * here["r"]:
            raise _unfit(checkpoint, "it began with another lora.lora_r, or without PiSSA")
        here |= pissa.converted(here)
        wanted = {key: pissa.converted_shape(key, shape) for key, shape in wanted.items()}
    for name, made, value in (
        ("lora_r", there.get("r"), here["r"]),
        ("lora_alpha", there.get("lora_alpha"), here["lora_alpha"]),
    ):
        if made != value:
            raise _unfit(checkpoint, f"it was made with lora.{name} {made}, not {value}")
    shapes: dict[str, list[int]] = {}
    with safe_open(str(file), "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - it is no mapping
            shapes[key] = list(weights.get_slice(key).get_shape())
    if shapes != wanted:
        differ = sorted(
            shapes.keys() ^ wanted.keys() or {key for key in wanted if shapes[key] != wanted[key]}
        )
        raise _unfit(
            checkpoint,
            f"its weights are of another model or other lora.lora_target_modules ({differ[0]})",
        )


def restore(model: PreTrainedModel, checkpoint: Path) -> None:
    """Gives a model all weights of a checkpoint.

    Loaded as a model is, for the names in the file may be others than those of the modules (experts
    one by one, a head by an older name); transformers' Trainer passes over what it does not find.

    Raises:
        RunFailed: MODEL_UNLOADABLE, if it lacks weights.
        RuntimeError: It is of another shape.
    """
    saved = _load(str(checkpoint), {"dtype": torch.float32})
    model.load_state_dict(saved.state_dict())


def _unfit(checkpoint: Path, why: str) -> RunFailed:
    return RunFailed(
        EndReason.MODEL_UNLOADABLE, f"The run can't be resumed from {checkpoint}: {why}."
    )


# --- outputs


def save_model(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    report: Report,
    *,
    use_cache: bool,
    add: Callable[[Path], None],
) -> None:
    """Writes model, or adapter, and tokenizer to a folder that is whole or not there.

    Args:
        model: A PeftModel is saved as its adapter.
        tokenizer: Goes with it.
        target: The folder; replaced if it exists.
        report: Records what is written.
        use_cache: `config.use_cache` of the model as it was loaded; training turns it off,
            generation wants it.
        add: Writes what else goes into the folder, last.
    """
    model.config.use_cache = use_cache
    if isinstance(model, PeftModel):
        # Absolute, so that the adapter finds its base from anywhere.
        model.peft_config["default"].base_model_name_or_path = _base_name(model)

    def write(folder: Path) -> None:
        model.save_pretrained(str(folder))
        pissa.convert(model, folder)
        tokenizer.save_pretrained(str(folder))
        add(folder)

    write_folder(target, write, report)


def merged(model: PeftModel, parameters: Parameters, adapter: Path) -> PreTrainedModel:
    """The base model with the LoRA weights worked in; the model given is used up.

    4-bit weights can't take them without loss, so that with QLoRA the base is loaded once more.

    Raises:
        RunFailed: HOST_OUT_OF_MEMORY, if there is no room for that.
    """
    is_quantized = parameters.optimization.use_qlora
    _check_room_to_merge(model, is_quantized=is_quantized)
    if is_quantized:
        base = _load(_base_name(model), {"dtype": "auto"})
        model = PeftModel.from_pretrained(base, str(adapter), local_files_only=True)
    _untie(model)
    whole: PreTrainedModel = model.merge_and_unload()
    return whole


def _check_room_to_merge(model: PeftModel, *, is_quantized: bool) -> None:
    """Raises RunFailed where merging would run out of memory: better than being killed by it."""
    layers = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    needed = 2 * 4 * max(layers, default=0)  # what LoRA adds to the largest matrix, in float32
    if is_quantized:
        folder = Path(_base_name(model))
        needed += sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if needed > free:
        raise RunFailed(
            EndReason.HOST_OUT_OF_MEMORY,
            f"Merging takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; the "
            "trained LoRA weights are whole in the folder final.",
        )


def _untie(model: PeftModel) -> None:
    """Gives embeddings and head a matrix each, where they share one and LoRA is on one of them.

    Else what is merged into one is merged into both.
    """
    base: Any = model.get_base_model()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    if not any(hasattr(layer, "base_layer") for layer in layers):
        return
    embeddings, head = (getattr(layer, "base_layer", layer) for layer in layers)
    if head is not None and head.weight is embeddings.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False


def _base_name(model: PeftModel) -> str:
    base: Any = model.get_base_model()
    return str(base.config.name_or_path)


def _short(error: BaseException) -> str:
    lines = printable(str(error)).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
