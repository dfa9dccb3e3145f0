"""Settings as a script over torch, transformers and peft, which reads from top to bottom.

It is put together from `pieces`; what the settings do not need does not stand in it. Its losses are
those of our own run up to rounding (a test compares them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import indent, wrap
from typing import Any

from finetuned._version import __version__
from finetuned_daemon.export import pieces
from finetuned_daemon.export.settings import Settings, default_of, label_of
from finetuned_daemon.parameters.needs import effective_optimizer, needs_bitsandbytes
from finetuned_daemon.runs.contract import TrainingType

_WIDTH = 100

# Arguments of transformers' Trainer, by the parameters that they come from.
_ARGUMENTS = {
    "training.batch_size": (
        "per_device_train_batch_size=BATCH_SIZE",
        "per_device_eval_batch_size=BATCH_SIZE",
    ),
    "training.gradient_accumulation_steps": (
        "gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS",
    ),
    "training.num_train_epochs": ("num_train_epochs=NUM_TRAIN_EPOCHS",),
    "training.max_steps": ("max_steps=MAX_STEPS",),
    "general.seed": ("seed=SEED", "data_seed=SEED"),
    "training.learning_rate": ("learning_rate=LEARNING_RATE",),
    "training.optimizer": ("optim=OPTIMIZER",),
    "training.weight_decay": ("weight_decay=WEIGHT_DECAY",),
    "training.max_grad_norm": ("max_grad_norm=MAX_GRAD_NORM",),
    "training.lr_scheduler_type": ("lr_scheduler_type=LR_SCHEDULER_TYPE",),
    "training.lr_num_cycles": ('lr_scheduler_kwargs={"num_cycles": LR_NUM_CYCLES}',),
    # Below 1 a share of the steps, from 1 on a number of them; 1 itself would be one step.
    "training.warmup_ratio": ("warmup_steps=min(WARMUP_RATIO, 0.999999)",),
    "training.warmup_steps": ("warmup_steps=WARMUP_STEPS",),
    "training.save_strategy": ("save_strategy=SAVE_STRATEGY",),
    "training.save_steps": ("save_steps=SAVE_STEPS",),
    "training.save_total_limit": ("save_total_limit=SAVE_TOTAL_LIMIT",),
    "training.eval_strategy": ("eval_strategy=EVAL_STRATEGY", "prediction_loss_only=True"),
    "training.eval_steps": ("eval_steps=EVAL_STEPS",),
    "data.dataloader_num_workers": ("dataloader_num_workers=DATALOADER_NUM_WORKERS",),
    "data.dataloader_pin_memory": ("dataloader_pin_memory=DATALOADER_PIN_MEMORY",),
    "logging.logging_steps": ("logging_steps=LOGGING_STEPS",),
    "extensions.neftune_noise_alpha": ("neftune_noise_alpha=NEFTUNE_NOISE_ALPHA",),
    "extensions.use_liger_kernel": ("use_liger_kernel=USE_LIGER_KERNEL",),
    "extensions.torch_compile": ("torch_compile=TORCH_COMPILE",),
    "extensions.report_to": ("report_to=REPORT_TO",),
}

_LORA = {
    "lora.lora_r": "r=LORA_R",
    "lora.lora_alpha": "lora_alpha=LORA_ALPHA",
    "lora.lora_dropout": "lora_dropout=LORA_DROPOUT",
    "lora.lora_target_modules": "target_modules=LORA_TARGET_MODULES",
    "extensions.use_rslora": "use_rslora=USE_RSLORA",
    "extensions.use_dora": "use_dora=USE_DORA",
}

# Beside those of the two tables; what is in none of them this script does not do.
_ELSEWHERE = frozenset(
    {
        "data.train_file",
        "data.eval_file",
        "data.output_dir",
        "data.model_path",
        "data.tokenizer_path",
        "data.resume_from_checkpoint",
        "data.attach_lora",
        "data.max_samples",
        "data.eval_ratio",
        "data.reshuffle",
        "training.max_seq_length",
        "training.early_stopping_patience",
        "training.early_stopping_threshold",
        "lora.use_lora",
        "lora.merge_lora",
        "lora.peft_config_path",
        "optimization.use_qlora",
        "optimization.use_8bit_optimizer",
        "optimization.fp16",
        "optimization.bf16",
        "optimization.tf32",
        "optimization.gradient_checkpointing",
        "logging.log_level",
        "extensions.attn_implementation",
        "extensions.loraplus_lr_ratio",
    }
)

# Said by other constants, or by which lines stand in the script.
_NO_CONSTANT = frozenset(
    {
        "data.attach_lora",
        "lora.use_lora",
        "optimization.use_qlora",
        "optimization.use_8bit_optimizer",
        "optimization.fp16",
        "optimization.bf16",
        "optimization.tf32",
        "logging.log_level",  # of what the daemon keeps; a terminal shows what transformers says
    }
)

_ONE_GPU = """\
import os

# The Trainer would spread over all GPUs that it sees.
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "{number}")
"""


def script(settings: Settings) -> str:
    """The Python program that trains as the settings say."""
    return _Script(settings).text()


def left_out(settings: Settings) -> list[str]:
    """Settings that the script trains without, each as path, value and label."""
    return _Script(settings).left_out()


class _Script:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._parameters = settings.parameters
        self._is_sft = settings.training_type is TrainingType.SFT
        self._has_lora = self._is_sft and self._parameters.lora.use_lora
        self._has_four_bits = self._has_lora and self._parameters.optimization.use_qlora
        data, training = self._parameters.data, self._parameters.training
        self._evaluates = training.eval_strategy != "no" and bool(data.eval_file or data.eval_ratio)
        self._attaches = self._has_lora and data.attach_lora
        self._speeds_up_b = self._has_lora and bool(self._parameters.extensions.loraplus_lr_ratio)
        self._on_gpu = settings.device != "cpu"
        self._values = self._effective()

    def _effective(self) -> dict[str, Any]:
        """What takes effect here, by path: also without what other things make idle."""
        values = dict(self._settings.in_effect)
        data, training = self._parameters.data, self._parameters.training
        values["training.optimizer"] = effective_optimizer(self._parameters)
        values["data.tokenizer_path"] = data.tokenizer_path or data.model_path
        idle = set[str]()
        if not self._evaluates:
            idle |= {path for path in values if path.startswith(("training.eval", "data.eval"))}
            idle |= {path for path in values if path.startswith("training.early_stopping")}
        idle.add("data.eval_ratio" if data.eval_file else "data.eval_file")
        if training.early_stopping_patience == 0:
            idle.add("training.early_stopping_patience")
        if training.warmup_steps == 0:
            idle.add("training.warmup_steps")
        if training.max_steps <= 0:
            idle.add("training.max_steps")
        if not self._on_gpu:
            idle.add("data.dataloader_pin_memory")
        # Off, and not worth a line.
        for path in ("lora.peft_config_path", "data.max_samples"):
            if not values.get(path):
                idle.add(path)
        for path, value in values.items():
            if path.startswith("extensions.") and value == default_of(path):
                idle.add(path)
        return {path: value for path, value in values.items() if path not in idle}

    def _has(self, path: str) -> bool:
        return path in self._values

    # --- the whole

    def text(self) -> str:
        """The program."""
        main = [*self._begin(), *self._load(), *self._read(), *self._train(), *self._save()]
        functions = [pieces.READ_RECORDS]
        if self._is_sft:
            functions += [pieces.READ_CHAT, pieces.ENCODE_CHAT]
        else:
            functions.append(pieces.LOAD_DOCUMENTS)
        functions.append(pieces.PAD)
        if self._has("training.early_stopping_patience"):
            functions.append(pieces.EARLY_STOPPING)
        if self._speeds_up_b:
            functions.append(pieces.LORA_PLUS)
        body = "\n\n".join(indent(step.strip("\n"), "    ") for step in main)
        program = "\n\n\n".join(
            [
                self._settings_text(),
                "# --- data\n\n\n" + "\n\n\n".join(piece.strip("\n") for piece in functions),
                f"# --- training\n\n\ndef main():\n{body}",
                pieces.START.lstrip("\n"),
            ]
        )
        number = self._settings.device.partition(":")[2] or "0"
        first = f"{_ONE_GPU.format(number=number)}\n" if self._on_gpu else ""
        return f"{self._head()}\n\n{first}{_imports(program)}\n\n{program}"

    def _head(self) -> str:
        origin = self._settings.origin
        packages = "torch, transformers (5.16 or newer) and peft (0.20 or newer)"
        if not self._has_lora:
            packages = "torch and transformers (5.16 or newer)"
        if needs_bitsandbytes(self._parameters):
            packages += ", and bitsandbytes"
        about = f"It needs {packages}, and nothing else."
        if not self.left_out() and not self._draws_noise:
            about += (
                " With the same versions and device it has the losses of that run up to rounding."
            )
        lines = [
            f'"""Trains as {origin} does.',
            "",
            f"Written by finetuned {__version__}. {about}",
        ]
        missing = self._missing()
        if missing:
            lines += ["", "Not done here:", *(f"- {what}" for what in missing)]
        wrapped = [
            part
            for line in lines
            for part in (wrap(line, _WIDTH, subsequent_indent="  " * line.startswith("- ")) or [""])
        ]
        return "\n".join([*wrapped, '"""'])

    def _missing(self) -> list[str]:
        """What the run does and the script does not."""
        missing = list[str]()
        if self._parameters.training.save_strategy != "no":
            minutes = self._parameters.training.save_interval_minutes
            missing += [
                f"training.save_interval_minutes = {minutes}: checkpoints by the clock; those by "
                "steps or epochs are saved",
                "whole checkpoints: one that was cut short looks like any other",
                "keeping the best checkpoint beyond training.save_total_limit",
            ]
        missing.append("a stop that saves: Ctrl-C loses what came after the last checkpoint")
        if self._draws_noise:
            missing.append(
                "the same random numbers for dropout and noise: they come in other order"
            )
        if self._evaluates:
            missing.append(
                "an evaluation loss per token: transformers takes the mean of the batches' means"
            )
        return missing + [f"{what}: IT TRAINS WITHOUT IT" for what in self.left_out()]

    @property
    def _draws_noise(self) -> bool:
        return bool(
            self._values.get("lora.lora_dropout") or self._has("extensions.neftune_noise_alpha")
        )

    def left_out(self) -> list[str]:
        """Settings that it trains without."""
        known = {*_ARGUMENTS, *_LORA, *_ELSEWHERE, "training.save_interval_minutes"}
        return [
            f"{path} = {value!r} ({label_of(path)})"
            for path, value in self._values.items()
            if path not in known and value != default_of(path)
        ]

    # --- settings

    def _settings_text(self) -> str:
        lines = ["# --- settings", ""]
        shown = {*_ARGUMENTS, *_LORA, *_ELSEWHERE} - _NO_CONSTANT
        for path, value in self._values.items():
            if path in shown:
                if path == "data.output_dir":
                    value = f"{value.rstrip('/')}/script-{self._settings.file_stem}"
                lines += _constant(path, value)
        if self._attaches:
            data = self._parameters.data
            adapter = data.resume_from_checkpoint or data.model_path
            lines += [f"ADAPTER_PATH = {adapter!r}  # LoRA weights to go on from"]
            lines = [line for line in lines if not line.startswith("RESUME_FROM_CHECKPOINT")]
        return "\n".join([*lines, *self._device()])

    def _device(self) -> list[str]:
        optimization = self._parameters.optimization
        precision = "bf16" if optimization.bf16 else "fp16" if optimization.fp16 else "float32"
        if not self._on_gpu:
            is_wish = precision == "fp16"
            precision = "float32" if is_wish else precision
            note = "  # the CPU has no fp16" if is_wish else ""
            return ["ON_GPU = False", f'PRECISION = "{precision}"{note}']
        lines = ["ON_GPU = torch.cuda.is_available()"]
        if precision == "fp16":
            lines.append('PRECISION = "fp16" if ON_GPU else "float32"  # the CPU has no fp16')
        else:
            lines.append(f'PRECISION = "{precision}"')
        if optimization.tf32:
            lines.append("TF32 = ON_GPU")
        return lines

    # --- model

    def _begin(self) -> list[str]:
        if self._attaches:
            return [pieces.OWN_FOLDER]
        return [pieces.OWN_FOLDER_OR_RESUMED]

    def _load(self) -> list[str]:
        base = "MODEL_PATH"
        steps = [
            """
set_seed(SEED)
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_PATH)
candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
pad_id = next(token for token in candidates if token is not None)
"""
        ]
        if self._attaches:
            base = "base"
            steps.append("""
base = MODEL_PATH
if not Path(base, "config.json").is_file():  # a folder of LoRA weights alone
    base = PeftConfig.from_pretrained(base).base_model_name_or_path
""")
        load, options = "", ["dtype=torch.float32"]
        if self._has_lora and self._on_gpu:
            load = (
                '\ndtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}\n'
                "dtype = dtypes.get(PRECISION, torch.float32) if ON_GPU else torch.float32"
            )
            options = ["dtype=dtype"]
        if self._has_four_bits:
            if not self._on_gpu:
                load = '\ndtype = torch.bfloat16 if PRECISION == "bf16" else torch.float32'
            load += pieces.FOUR_BITS.rstrip("\n")
            where = "0 if ON_GPU else 'cpu'".replace("'", '"') if self._on_gpu else '"cpu"'
            options += ["quantization_config=quantization", f'device_map={{"": {where}}}']
        if self._has("extensions.attn_implementation"):
            options.append("attn_implementation=ATTN_IMPLEMENTATION")
        call = f"AutoModelForCausalLM.from_pretrained({base}, {', '.join(options)})"
        if len(call) > 80:
            inside = "".join(f"    {option},\n" for option in (base, *options))
            call = f"AutoModelForCausalLM.from_pretrained(\n{inside})"
        steps.append(f"{load}\nmodel = {call}\nuse_cache = model.config.use_cache")
        if self._has_four_bits:
            steps.append(pieces.FOUR_BITS_ON_CPU)
        steps.append(pieces.MAX_LENGTH)
        if self._has_lora:
            steps.append(self._add_lora())
        else:
            steps.append(_CHECKPOINTING)
        return steps

    def _add_lora(self) -> str:
        lines = list[str]()
        if self._has_four_bits:
            lines.append(
                "model = prepare_model_for_kbit_training(\n"
                "    model, use_gradient_checkpointing=GRADIENT_CHECKPOINTING\n)"
            )
        lines.append("set_seed(SEED)")
        if self._attaches:
            lines.append(
                "model = PeftModel.from_pretrained(model, ADAPTER_PATH, is_trainable=True)"
            )
        elif self._has("lora.peft_config_path"):
            lines += [pieces.PEFT_FILE.strip("\n"), "lora = LoraConfig(**settings)"]
            lines.append("model = get_peft_model(model, lora)")
        else:
            chosen = ['task_type="CAUSAL_LM"']
            chosen += [text for path, text in _LORA.items() if self._has(path)]
            inside = "".join(f"    {option},\n" for option in chosen)
            lines += [f"lora = LoraConfig(\n{inside})", "model = get_peft_model(model, lora)"]
        return "\n".join([*lines, _CHECKPOINTING])

    # --- data, training, results

    def _read(self) -> list[str]:
        limit = ", MAX_SAMPLES" if self._has("data.max_samples") else ""
        lines = [f"train_set = load_samples(TRAIN_FILE, tokenizer, max_length{limit})"]
        lines.append("eval_set = None")
        if self._has("data.eval_file"):
            lines[-1] = "eval_set = load_samples(EVAL_FILE, tokenizer, max_length)"
        elif self._has("data.eval_ratio"):
            lines[-1] = pieces.SPLIT.strip("\n")
        lines.append(pieces.FIXED_ORDER.strip("\n"))
        return ["\n".join(lines)]

    def _train(self) -> list[str]:
        arguments = ["output_dir=OUTPUT_DIR", "use_cpu=not ON_GPU"]
        arguments += ['fp16=PRECISION == "fp16"', 'bf16=PRECISION == "bf16"']
        if self._on_gpu and self._parameters.optimization.tf32:
            arguments.append("tf32=TF32 or None")
        for path, texts in _ARGUMENTS.items():
            if self._has(path):
                arguments += texts
        arguments.append('train_sampling_strategy="random" if RESHUFFLE else "sequential"')
        if not self._has("data.dataloader_pin_memory"):
            arguments.append("dataloader_pin_memory=False")
        if not self._has("extensions.report_to"):
            arguments.append('report_to="none"')
        arguments.append("remove_unused_columns=False")
        inside = "".join(f"    {argument},\n" for argument in arguments)
        stop = "    callbacks=[EarlyStopping()],\n"
        resumes = not self._attaches
        kind = "LoraPlusTrainer" if self._speeds_up_b else "Trainer"
        return [
            f"arguments = TrainingArguments(\n{inside})",
            f"trainer = {kind}(\n"
            "    model=model,\n"
            "    args=arguments,\n"
            "    data_collator=partial(pad, pad_id=pad_id),\n"
            "    train_dataset=train_set,\n"
            "    eval_dataset=eval_set,\n"
            "    processing_class=tokenizer,\n"
            f"{stop if self._has('training.early_stopping_patience') else ''}"
            ")\n"
            f"trainer.train({'resume_from_checkpoint=RESUME_FROM_CHECKPOINT' * resumes})\n"
            "trainer.save_state()  # trainer_state.json, with the losses",
        ]

    def _save(self) -> list[str]:
        steps = [
            'final = Path(OUTPUT_DIR, "final")\n'
            "model.config.use_cache = use_cache\n"
            "model.save_pretrained(final)\n"
            "tokenizer.save_pretrained(final)"
        ]
        if self._has_lora:
            merge = "whole = model.merge_and_unload()"
            if self._has_four_bits:
                merge = (
                    "# 4-bit weights can't take LoRA weights in without loss.\n"
                    'base = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype="auto")\n'
                    "whole = PeftModel.from_pretrained(base, final).merge_and_unload()"
                )
            merge += (
                '\nmerged = Path(OUTPUT_DIR, "merged")\n'
                "whole.save_pretrained(merged)\ntokenizer.save_pretrained(merged)"
            )
            steps.append(f"if MERGE_LORA:\n{indent(merge, '    ')}")
        return [*steps, 'print(f"done: {OUTPUT_DIR}")']


_CHECKPOINTING = """\
if GRADIENT_CHECKPOINTING:
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in newer versions
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})"""


def _constant(path: str, value: Any) -> list[str]:
    name = path.partition(".")[2].upper()
    line = f"{name} = {_literal(value)}"
    if len(line) > _WIDTH and isinstance(value, list):
        line = f"{name} = [\n" + "".join(f"    {_literal(item)},\n" for item in value) + "]"
    note = f"  # {label_of(path)}"
    return [line + note] if len(line + note) <= _WIDTH else [line]


def _literal(value: Any) -> str:
    if isinstance(value, str):
        # As formatters write it: in double quotes unless it holds some.
        plain = repr(value)
        return f'"{plain[1:-1]}"' if plain.startswith("'") and '"' not in value else plain
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


# What the program may import, by module; it imports what it names.
_IMPORTS = (
    ("functools", ("partial",)),
    ("pathlib", ("Path",)),
    (
        "peft",
        (
            "LoraConfig",
            "PeftConfig",
            "PeftModel",
            "get_peft_model",
            "prepare_model_for_kbit_training",
        ),
    ),
    (
        "transformers",
        (
            "AutoModelForCausalLM",
            "AutoTokenizer",
            "BitsAndBytesConfig",
            "Trainer",
            "TrainerCallback",
            "TrainingArguments",
            "set_seed",
        ),
    ),
)
_STANDARD = ("json", "os", "random", "re", "sys")


def _imports(program: str) -> str:
    def names(candidates: Iterable[str], suffix: str = r"\b") -> list[str]:
        return [name for name in candidates if re.search(rf"\b{name}{suffix}", program)]

    own = [f"import {name}" for name in names(_STANDARD, r"\.")]
    others = ["import torch"] if names(("torch",), r"\.") else []
    for module, candidates in _IMPORTS:
        found = names(candidates)
        if found:
            line = f"from {module} import {', '.join(found)}"
            if len(line) > 88:
                line = f"from {module} import (\n" + "".join(f"    {n},\n" for n in found) + ")"
            (own if module in ("functools", "pathlib") else others).append(line)
    return "\n".join([*own, "", *others])
