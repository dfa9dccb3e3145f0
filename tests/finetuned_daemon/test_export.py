"""Settings as files: YAML that reads back to the same, and scripts that leave nothing unsaid."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuned.cli.params import draft, read_file
from finetuned_daemon.errors import InvalidRequest
from finetuned_daemon.export import ConfigFormat, Settings, export
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.parameters.needs import in_effect
from finetuned_daemon.runs.contract import TrainingType

FILES = {
    "data": {"model_path": "/models/small", "train_file": "/data/a.jsonl", "output_dir": "/out"}
}
EVALUATED = {
    "data": {**FILES["data"], "eval_ratio": 0.1},
    "training": {"eval_strategy": "steps", "early_stopping_patience": 2},
}
ODD = {
    "data": {
        "model_path": "/models/a \"b\" 'c' #d: \\ é 模型 \u2028",
        "train_file": "/data/line\nfeed\t.jsonl",
        "output_dir": "/out/",
        "eval_file": "/data/null",
        "max_samples": 7,
    },
    "training": {"learning_rate": 1e-5, "save_strategy": "no", "max_steps": 3},
    "lora": {"lora_target_modules": ["q_proj", "layers.1.mlp, gate"], "lora_r": 4},
    "optimization": {"fp16": False},
    "extensions": {"lora_init": "pissa", "neftune_noise_alpha": 5.0},
}
VARIANTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "lora": (FILES, "sft", "cpu"),
    "odd": (ODD, "sft", "cpu"),
    "evaluated": (EVALUATED, "sft", "cuda:1"),
    "full": ({**FILES, "lora": {"use_lora": False}}, "sft", ""),
    "qlora": ({**FILES, "optimization": {"use_qlora": True}}, "sft", "cuda:0"),
    "qlora on the CPU": ({**FILES, "optimization": {"use_qlora": True}}, "sft", "cpu"),
    "PEFT file": ({**FILES, "lora": {"peft_config_path": "/p.json"}}, "sft", "cpu"),
    "attached": ({"data": {**FILES["data"], "attach_lora": True}}, "sft", "cpu"),
    "resumed": ({"data": {**FILES["data"], "resume_from_checkpoint": "/c"}}, "sft", "cpu"),
    "pretrain": (EVALUATED, "pretrain", "cpu"),
    "pretrain on a GPU": ({**FILES, "optimization": {"tf32": True}}, "pretrain", "cuda:0"),
}


def settings(variant: str) -> Settings:
    sections, training_type, device = VARIANTS[variant]
    return Settings(
        task='a "task"',
        run=2,
        training_type=TrainingType(training_type.upper()),
        parameters=Parameters.model_validate(sections),
        device=device,
    )


def script_of(variant: str) -> str:
    return export(settings(variant), ConfigFormat.SCRIPT).content


@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_yaml_is_read_back_to_the_same_task(variant: str, tmp_path: Path) -> None:
    """Whatever stands in a path or a list, `finetunectl` makes the same parameters of it."""
    exported = settings(variant)
    file = tmp_path / "config.yaml"
    file.write_text(export(exported, ConfigFormat.YAML).content, encoding="utf-8")
    plan = draft(read_file(file))
    assert plan.violations == []
    read = Parameters.model_validate(protos.to_dict(plan.parameters))
    wanted = exported.parameters.model_dump()
    wanted["data"]["output_dir"] = wanted["data"]["output_dir"].rstrip("/")  # as a path it is
    assert read.model_dump() == wanted
    assert (plan.training_type, plan.device) == (exported.training_type.lower(), exported.device)


def test_exported_yaml_has_the_types_of_its_values_for_every_reader() -> None:
    """What other programs read is a number where ours is one."""
    document = yaml.safe_load(export(settings("odd"), ConfigFormat.YAML).content)
    for section, values in ODD.items():
        assert document[section] == values


def test_a_value_at_its_default_stands_in_a_comment() -> None:
    """The file tells apart what was chosen, and keeps what was not, for later versions."""
    text = export(settings("lora"), ConfigFormat.YAML).content
    assert set(yaml.safe_load(text)) == {"training_type", "device", "data"}
    assert "#   training.learning_rate: 0.0002\n" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_script_is_whole_and_needs_nothing_of_ours(variant: str) -> None:
    """It compiles, uses every constant that it has, has every one that it uses, imports three."""
    tree = ast.parse(script_of(variant))
    compile(tree, "script.py", "exec")
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id.isupper()]
    assigned = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    assert assigned == used
    roots = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module or "")
    standard = {"functools", "json", "os", "pathlib", "random", "re", "sys"}
    assert roots - standard <= {"torch", "transformers", "peft"}
    assert ("peft" in roots) == (variant not in ("full", "pretrain", "pretrain on a GPU"))


# Of what the daemon keeps of the log alone.
SAYS_NOTHING = {"logging.log_level"}


@pytest.mark.parametrize("training_type", ["sft", "pretrain"])
def test_no_parameter_is_left_out_in_silence(training_type: str) -> None:
    """Each that takes effect changes what the script does, or what it says that it does not do."""
    sections = {**EVALUATED, "lora": {"merge_lora": True}}
    base = Parameters.model_validate(sections)

    def text(parameters: Parameters) -> str:
        kind = TrainingType(training_type.upper())
        return export(Settings("t", 0, kind, parameters, "cuda:0"), ConfigFormat.SCRIPT).content

    silent = set[str]()
    for section, model in SECTIONS.items():
        for name in model.model_fields:
            values = getattr(base, section)
            other = _another(section, name, getattr(values, name))
            changed = base.model_copy(
                update={section: values.model_copy(update={name: other})}, deep=True
            )
            path = f"{section}.{name}"
            if path in in_effect(changed, training_type) and text(changed) == text(base):
                silent.add(path)
    assert silent == SAYS_NOTHING


def _another(section: str, name: str, value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case list():
            return value[:1]
        case None:
            return "/another"
        case _:
            choices = SECTIONS[section].model_fields[name].annotation
            known = getattr(choices, "__args__", ("/another",))
            return next((c for c in known if isinstance(c, str) and c != value), "/another")


def test_what_a_script_does_not_do_stands_at_its_top() -> None:
    """A setting that it can't follow is named, with its value, before anything else."""
    about = ast.get_docstring(ast.parse(script_of("odd"))) or ""
    assert "extensions.lora_init = 'pissa'" in about
    assert "IT TRAINS WITHOUT IT" in about
    assert "up to rounding" not in about
    assert "IT TRAINS WITHOUT IT" not in script_of("evaluated")
    assert "up to rounding" in " ".join(script_of("full").split())
    (left_out,) = export(settings("odd"), ConfigFormat.SCRIPT).left_out
    assert left_out.startswith("extensions.lora_init = 'pissa' (")


def test_a_script_without_model_or_data_is_refused() -> None:
    """Every path that is missing is named; as YAML the same settings are no trouble."""
    unfinished = Settings("t", 0, TrainingType.SFT, Parameters(), "")
    with pytest.raises(InvalidRequest) as refused:
        export(unfinished, ConfigFormat.SCRIPT)
    assert {v.field for v in refused.value.violations} == {f"data.{name}" for name in FILES["data"]}
    assert "At their defaults" in export(unfinished, ConfigFormat.YAML).content


def test_the_name_of_the_file_says_what_it_is_of() -> None:
    """A task's own words become a file name without blanks, slashes and quotes."""
    assert export(settings("lora"), ConfigFormat.YAML).name == "a_task-run-2.yaml"
    assert export(settings("lora"), ConfigFormat.SCRIPT).name == "a_task-run-2.py"
    odd = Settings("../..", 0, TrainingType.SFT, Parameters(), "")
    assert export(odd, ConfigFormat.YAML).name == "task.yaml"
