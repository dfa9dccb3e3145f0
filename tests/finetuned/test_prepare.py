"""Both clients before a run: parameters, templates, edits, data, environment, quota."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import Daemon
from finetuned import (
    Aborted,
    AlreadyExists,
    DatasetReport,
    FailedPrecondition,
    InspectionProgress,
    InvalidArgument,
    NotFound,
    ParameterViolation,
    TaskState,
    TrainingType,
    template_document,
)
from finetuned._language import language_of
from tiny import chats, make_tokenizer, write_jsonl

if TYPE_CHECKING:
    from conftest import Scene

Make = Callable[..., Any]


async def listed(items: Any) -> list[Any]:
    return [item async for item in items]


def by_field(violations: list[ParameterViolation]) -> dict[str, ParameterViolation]:
    return {violation.field: violation for violation in violations}


def mapping(scene: Scene, **training: Any) -> dict[str, Any]:
    return {
        "data": {
            "train_file": str(scene.data),
            "model_path": str(scene.model),
            "output_dir": str(scene.output),
        },
        "training": training,
    }


async def test_the_schema_is_the_form_of_a_type(client: Any) -> None:
    sft = await client.parameter_schema("sft")
    pretrain = await client.parameter_schema(TrainingType.TRAINING_TYPE_PRETRAIN)
    sections = [section.name for section in sft.sections]
    assert sections[:3] == ["data", "training", "lora"]
    assert "lora" not in [section.name for section in pretrain.sections]
    (label,) = {f.label.zh for s in sft.sections for f in s.fields if f.path == "lora.lora_r"}
    assert label == "LoRA的r参数"


async def test_what_is_wrong_is_an_answer_with_values_of_the_fields_own_types(
    client: Any, scene: Scene
) -> None:
    found = by_field(await client.validate("sft", mapping(scene, batch_size=0), device="cpu"))
    assert found["training.batch_size"].severity == "error"
    assert found["training.batch_size"].reason == "OUT_OF_RANGE"
    assert found["training.batch_size"].suggested_value == 1
    assert type(found["training.batch_size"].suggested_value) is int
    assert found["optimization.fp16"].severity == "notice"
    assert found["optimization.fp16"].suggested_value is False


async def test_what_cannot_be_sent_is_in_the_same_answer(client: Any, scene: Scene) -> None:
    wrong = mapping(scene, batch_size="four", learning_rate=7) | {"lorra": {"lora_r": 4}}
    found = by_field(await client.validate("sft", wrong))
    assert found["training.batch_size"].reason == "WRONG_TYPE"
    assert found["lorra"].reason == "UNKNOWN_FIELD"
    assert found["training.learning_rate"].reason == "OUT_OF_RANGE"


async def test_sentences_come_in_the_clients_language(make: Make, daemon: Daemon) -> None:
    sentences = {}
    for language in ("en", "zh"):
        client = make(daemon.address, language=language)
        found = by_field(await client.validate("sft", {"training": {"batch_size": 0}}))
        sentences[language] = found["training.batch_size"].message
        with pytest.raises(InvalidArgument) as refused:
            await client.create_task("sft", {"training": {"batch_size": 0}})
        assert refused.value.violations[0].description == sentences[language]
    assert sentences["en"].startswith("must be")
    assert "必须" in sentences["zh"]


def test_the_language_is_that_of_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    assert language_of(None) == "en"
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    assert language_of(None) == "zh"
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    assert language_of(None) == "en"
    monkeypatch.setenv("LC_ALL", "zh_TW.Big5")
    assert language_of(None) == "zh"
    assert language_of("en") == "en"
    with pytest.raises(InvalidArgument, match="must be en or zh, not 'fr'"):
        language_of("fr")


async def test_an_edit_is_judged_with_the_tasks_own_parameters(client: Any, scene: Scene) -> None:
    task = await client.create_task("sft", mapping(scene, batch_size=8), display_name="base")
    found = by_field(
        await client.validate(
            parameters={"training": {"learning_rate": 7.0}}, task="base", device="cpu"
        )
    )
    assert set(found) >= {"training.learning_rate"}
    assert "data.train_file" not in found
    with pytest.raises(NotFound):
        await client.validate(task="another")
    assert (await client.get_task(task.name)).etag == task.etag


async def test_a_template_lives_from_a_task_to_its_end(client: Any, scene: Scene) -> None:
    await client.create_task("sft", mapping(scene, batch_size=8), display_name="base")
    made = await client.create_template("My Base", task="base", parameters={"lora": {"lora_r": 4}})
    assert made.parameters.training.batch_size == 8
    assert made.parameters.lora.lora_r == 4
    for name in (made.name, made.name.removeprefix("templates/"), "My Base"):
        assert (await client.get_template(name)).name == made.name
    assert [t.display_name for t in await listed(client.list_templates("sft"))] == [
        "SFT",
        "My Base",
    ]
    task = await client.create_task("sft", {"lora": {"lora_r": 2}}, template="My Base")
    assert (task.template, task.parameters.training.batch_size) == (made.name, 8)
    assert task.parameters.lora.lora_r == 2
    changed = await client.update_template(
        "My Base", {"training": {"batch_size": 4}}, reset=["lora.lora_r"], display_name="Mine"
    )
    assert (changed.display_name, changed.parameters.training.batch_size) == ("Mine", 4)
    assert changed.parameters.lora.lora_r == 16
    with pytest.raises(Aborted):
        await client.delete_template("Mine", etag=made.etag)
    await client.delete_template("Mine", etag=changed.etag)
    with pytest.raises(NotFound):
        await client.get_template("Mine")
    await client.delete_template("Mine", allow_missing=True)
    assert (await client.get_task(task.name)).parameters.training.batch_size == 8


async def test_presets_stay_and_names_are_unique(client: Any) -> None:
    assert (await client.get_template("sft")).preset
    assert (await client.get_template("Pretrain")).name == "templates/pretrain"
    with pytest.raises(FailedPrecondition):
        await client.update_template("sft", {"training": {"batch_size": 4}})
    with pytest.raises(FailedPrecondition):
        await client.delete_template("templates/pretrain")
    with pytest.raises(AlreadyExists):
        await client.create_template("SFT", "sft")
    with pytest.raises(TypeError, match="a template's name is a str"):
        await client.get_template(4)


async def test_a_templates_document_makes_the_same_template_again(client: Any) -> None:
    parameters = {
        "training": {"batch_size": 8, "learning_rate": 1e-5},
        "lora": {"lora_target_modules": ["q_proj"]},
    }
    made = await client.create_template("one", "sft", parameters)
    document = template_document(made, await client.parameter_schema("sft"))
    assert document == {
        "kind": "template",
        "training_type": "sft",
        "display_name": "one",
        "parameters": parameters,
    }
    again = await client.create_template("two", "sft", document["parameters"])
    assert again.parameters == made.parameters
    whole = template_document(made)
    assert whole["parameters"]["training"]["num_train_epochs"] == 2
    third = await client.create_template("three", "sft", whole["parameters"])
    assert third.parameters == made.parameters


async def test_an_edit_changes_what_it_names_and_nothing_else(client: Any, scene: Scene) -> None:
    task = await client.create_task(
        "sft", mapping(scene, batch_size=8, max_seq_length=256), display_name="old", device="cpu"
    )
    changed = await client.update_task(
        "old",
        {"lora": {"lora_r": 4}},
        display_name="new",
        reset=["training.max_seq_length"],
        etag=task.etag,
    )
    assert (changed.display_name, changed.device) == ("new", "cpu")
    assert changed.parameters.lora.lora_r == 4
    assert changed.parameters.training.batch_size == 8
    assert changed.parameters.training.max_seq_length == 512
    with pytest.raises(Aborted):
        await client.update_task("new", device="cpu", etag=task.etag)
    with pytest.raises(InvalidArgument, match=r"did you mean training\.batch_size"):
        await client.update_task("new", reset=["training.batchsize"])
    checked = await client.update_task("new", {"lora": {"lora_r": 2}}, validate_only=True)
    assert checked.parameters.lora.lora_r == 2
    assert (await client.get_task("new")).parameters.lora.lora_r == 4
    whole = await client.update_task("new", {"training": {"batch_size": 1}}, reset=["training"])
    assert whole.parameters.training.batch_size == 1
    assert (await client.update_task("new", device="")).device == ""


async def test_an_edit_reaches_the_template_only_where_that_is_said(
    client: Any, scene: Scene
) -> None:
    await client.create_template("own", "sft", mapping(scene, batch_size=8))
    await client.create_task("sft", template="own", display_name="task")
    await client.update_task("task", {"training": {"batch_size": 4}})
    assert (await client.get_template("own")).parameters.training.batch_size == 8
    await client.update_task("task", {"training": {"batch_size": 2}}, update_template=True)
    assert (await client.get_template("own")).parameters.training.batch_size == 2


@pytest.mark.parametrize("deletes", [False, True])
async def test_a_deletion_tells_what_became_of_the_files(
    client: Any, scene: Scene, deletes: bool
) -> None:
    task = await client.train("sft", scene.play(steps=2, save_steps=1), device="cpu")
    await client.wait(task.name)
    assert list(scene.output.rglob("manifest.json"))
    answer = await client.delete_task(task.name, delete_outputs=deletes)
    assert bool(answer.deleted_files) == deletes
    assert bool(answer.left_output_dirs) != deletes
    assert bool(list(scene.output.rglob("manifest.json"))) != deletes
    missing = await client.delete_task(task.name, allow_missing=True, delete_outputs=True)
    assert missing.deleted_files == 0


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with a training quota."""
    folder = tmp_path / "limited"
    folder.mkdir()
    daemon = Daemon(folder, "--training-quota", "7").start()
    yield daemon
    daemon.close()


async def test_the_quota_is_there_where_there_is_one(
    make: Make, daemon: Daemon, limited: Daemon
) -> None:
    quota = await make(limited.address).quota()
    assert (quota.limit, quota.used, quota.reserved) == (7, 0, 0)
    assert not (await make(daemon.address).quota()).HasField("limit")


async def test_the_environment_is_looked_at(client: Any) -> None:
    answer = await client.check_environment()
    names = [item.name for item in answer.items]
    assert {"python", "torch"} <= set(names)
    assert answer.status
    assert [device.device for device in answer.devices][-1] == "cpu"


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with the real runner, which reads data."""
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


async def test_an_inspection_ends_with_its_report(make: Make, real: Daemon, tmp_path: Path) -> None:
    client = make(real.address)
    data = write_jsonl(tmp_path / "chats.jsonl", chats(30))
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    make_tokenizer(folder)
    items = await listed(
        client.inspect_dataset(
            data, tokenizer_path=folder, max_seq_length=128, max_rendered_samples=2
        )
    )
    *progress, report = items
    assert all(isinstance(item, InspectionProgress) for item in progress)
    assert isinstance(report, DatasetReport)
    assert (report.usable, report.samples, len(report.rendered_samples)) == (True, 30, 2)
    assert 0 < report.learned_tokens < report.tokens
    with pytest.raises(InvalidArgument) as refused:
        await listed(client.inspect_dataset(str(tmp_path / "nothing.jsonl"), max_seq_length=1))
    assert {violation.field for violation in refused.value.violations} == {"path", "max_seq_length"}
    with pytest.raises(InvalidArgument, match="must be one of fail, skip"):
        await listed(client.inspect_dataset(str(data), bad_line_policy="ignore"))


async def test_a_text_that_stands_alone_is_one(client: Any, scene: Scene) -> None:
    values = mapping(scene, batch_size=8, learning_rate=1e-5)
    await client.create_task("sft", values, display_name="t")
    assert [t.display_name for t in await listed(client.list_tasks("pending"))] == ["t"]
    assert await listed(client.list_tasks("completed")) == []
    pending = TaskState.TASK_STATE_PENDING
    assert [t.display_name for t in await listed(client.list_tasks(pending))] == ["t"]
    assert [t.display_name for t in await listed(client.list_tasks(["pending"]))] == ["t"]
    task = await client.update_task("t", reset="training")
    assert task.parameters.training.batch_size == 2
    assert task.parameters.data.model_path == str(scene.model)


async def test_all_parameters_of_a_template_can_be_reset(client: Any) -> None:
    values = {"training": {"batch_size": 8}, "lora": {"lora_r": 4}}
    await client.create_template("t", "sft", values)
    template = await client.update_template(
        "t", {"training": {"learning_rate": 1e-5}}, reset="parameters"
    )
    assert template.parameters.training.batch_size == 2
    assert template.parameters.training.learning_rate == 1e-5
    assert template.parameters.lora.lora_r == 16
    assert template.display_name == "t"
