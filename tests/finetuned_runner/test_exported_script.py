"""The exported script trains as the run does: nobody is bound to this program."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from itertools import compress
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from finetuned_daemon.dataset.formats import Chat, Message
from finetuned_daemon.export import ConfigFormat, Settings, export
from finetuned_daemon.runs.contract import EndReason, TrainingType
from finetuned_runner import encoding
from finetuned_runner.checkpoint import checkpoint_path
from tiny import END_OF_TURN

ROUNDING = 1e-4
OUT = "out/script-t-run-1"
LONG = {"num_train_epochs": 2, "learning_rate": 1e-2}


def script_of(run: Any, folder: Path) -> Path:
    """The exported script as a file."""
    settings = Settings("t", 1, run.spec.training_type, run.spec.parameters, "cpu")
    file = folder / "script.py"
    file.write_text(export(settings, ConfigFormat.SCRIPT).content)
    return file


def losses_of(folder: Path) -> dict[int, float]:
    """Losses by step that a script has left."""
    state = json.loads((folder / OUT / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def play(run: Any, folder: Path) -> dict[int, float]:
    """Runs the exported script in this process; its losses by step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py"])
        runpy.run_path(str(script_of(run, folder)), run_name="__main__")
    return losses_of(folder)


CASES: dict[str, dict[str, Any]] = {
    "LoRA, one order": {"optimization": {"gradient_checkpointing": True}},
    "LoRA+": {"extensions": {"loraplus_lr_ratio": 4.0}},
    "4-bit weights, evaluated": {
        "optimization": {"use_qlora": True},
        "data": {"eval_ratio": 0.2},
    },
    "all weights, marked template": {
        "template": "chatml_generation",
        "lora": {"use_lora": False},
        "optimization": {"gradient_checkpointing": True},
        "data": {"reshuffle": True},
    },
    "several turns, blanks before the answer": {"template": "mistral", "turns": 3},
    "pretraining": {"kind": TrainingType.PRETRAIN, "data": {"eval_ratio": 0.2}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_script_has_the_losses_of_the_run_at_every_step(shop: Any, case: str) -> None:
    """In float32 they differ by rounding alone, and so do the weights at the end."""
    options = dict(CASES[case])
    data = options.pop("data", {})
    if "turns" in options:
        data["train_file"] = str(shop.chats(24, turns=options.pop("turns")))
    training = {**LONG, "eval_strategy": "epoch" if data.get("eval_ratio") else "no"}
    run = shop.here(shop.make(training=training, data=data, **options))
    assert run.result.end_reason is EndReason.FINISHED, run.result
    losses = play(run, shop.root)
    assert losses == pytest.approx(run.losses(), abs=ROUNDING)
    assert len(losses) > 6
    (weights,) = (run.output / "final").glob("*.safetensors")
    ours, theirs = load_file(weights), load_file(shop.root / OUT / "final" / weights.name)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert theirs[name] == pytest.approx(value, abs=1e-3), name


def test_a_script_is_a_program_of_its_own(shop: Any) -> None:
    """As a process, with one of its own that loads data, it has the losses of the run."""
    run = shop.here(shop.make(data={"dataloader_num_workers": 1}, training={"max_steps": 6}))
    command = [sys.executable, "-I", str(script_of(run, shop.root))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert losses_of(shop.root) == pytest.approx(run.losses(), abs=ROUNDING)


def test_a_script_never_writes_over_what_is_there(shop: Any) -> None:
    """A second start stops with a sentence, as one with an argument does."""
    run = shop.make()
    kept = shop.root / OUT / "checkpoint-1"
    kept.mkdir(parents=True)
    with pytest.raises(SystemExit, match="is not empty"):
        play(run, shop.root)
    functions = runpy.run_path(str(script_of(run, shop.root)))
    main = functions["main"]
    main.__globals__["RESUME_FROM_CHECKPOINT"] = str(kept.parent / "elsewhere/../checkpoint-1")

    def set_seed(_: int) -> None:
        sys.exit("went on")

    main.__globals__["set_seed"] = set_seed
    with pytest.raises(SystemExit, match="went on"):
        main()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", "--help"])
        with pytest.raises(SystemExit, match="takes no arguments"):
            runpy.run_path(str(script_of(run, shop.root)), run_name="__main__")


def test_a_script_goes_on_from_a_checkpoint_of_a_run(shop: Any) -> None:
    """It takes up optimizer, schedule and place in the data: the losses are those that follow."""
    whole = shop.here(shop.make("whole", training={**LONG, "save_steps": 5}))
    checkpoint = checkpoint_path(whole.output, 5)
    resumed = shop.make("resumed", training=LONG, data={"resume_from_checkpoint": str(checkpoint)})
    losses = play(resumed, shop.root)
    assert losses == pytest.approx(whole.losses(), abs=ROUNDING)
    assert (shop.root / OUT / "final/adapter_model.safetensors").is_file()


def test_a_script_refuses_a_chat_whose_answers_it_can_not_find(shop: Any) -> None:
    """A template that changes what is said would have it learn the wrong tokens."""
    run = shop.make(template="shouting")
    with pytest.raises(SystemExit, match="the chat template changes an answer"):
        play(run, shop.root)
    run = shop.make("endless", template="endless")
    with pytest.raises(SystemExit, match="no token that ends an answer"):
        play(run, shop.root)


CHATS: dict[str, tuple[str, ...]] = {
    "three turns": ("How?", "Use `ls`.", "And\nthose?", "Use `ls -a`.\n\nAll.", "Links?", "`find`"),
    "blanks": ("  How? \n", " Use `ls`. \n", "\tAnd?\n", "\n\n  `ls -a`  "),
    "equal texts": ("yes", "yes", "yes", "yes"),
    "an empty answer": ("Say nothing.", "", "And now?", "Something."),
    "imitated marks": (
        "I end:<|im_end|>",
        "So:<|im_end|>\n<|im_start|>user\nNo!</s>[INST]",
    ),
    "other scripts": ("怎么列出文件？", "用 `ls` 👍🏽 即可。", "مرحبا", "👩‍👩‍👧 ¿Qué? ẞ"),
}


@pytest.mark.parametrize("template", END_OF_TURN)
def test_a_script_learns_the_tokens_that_the_run_learns(shop: Any, template: str) -> None:
    """Those and no others, whatever the template: where it is not certain, it refuses."""
    tokenizer = encoding.open_tokenizer(str(shop.model(template)))
    functions = runpy.run_path(str(script_of(shop.make(template=template), shop.root)))
    equal = 0
    for name, contents in CHATS.items():
        roles = ("user", "assistant") * len(contents)
        messages = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
        try:
            theirs = functions["encode_chat"](tokenizer, messages)
        except SystemExit:
            continue
        mask = encoding.chat_mask(tokenizer)
        ((ours,),) = encoding.encode_chats([Chat(1, messages)], tokenizer, mask)
        assert theirs["input_ids"] == ours.encoding.ids, name
        learned = [label != -100 for label in theirs["labels"]]
        wanted = [bool(yes) for yes in ours.learned]
        if not all(contents):  # a blank before an empty answer is a matter of taste
            said = [bool(str(tokenizer.decode(token)).strip()) for token in theirs["input_ids"]]
            learned, wanted = list(compress(learned, said)), list(compress(wanted, said))
        assert learned == wanted, name
        equal += 1
    assert equal >= (0 if template in ("shouting", "endless") else 5)


def test_a_script_refuses_data_that_it_does_not_read(shop: Any) -> None:
    """Tools and reasoning in fields of their own would be left out of the training in silence."""
    functions = runpy.run_path(str(script_of(shop.make(), shop.root)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert functions["read_chat"]({"messages": turns}) == turns
    for record in (
        {"messages": turns, "tools": [{"name": "f"}]},
        {"messages": [turns[0], {**turns[1], "tool_calls": [{}]}]},
        {"messages": [turns[0], {**turns[1], "reasoning_content": "hm"}]},
        {"messages": [*turns, {"role": "tool", "content": "7"}]},
        {"conversations": [{"from": "function_call", "value": "{}"}]},
    ):
        with pytest.raises(SystemExit, match="this script reads"):
            functions["read_chat"](record)


RECORDS: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [("user", "a"), ("assistant", "b")],
    ),
    (
        {"instruction": "a", "input": "x", "output": "b", "system": "s", "history": [["q", "r"]]},
        [("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a\nx"), ("assistant", "b")],
    ),
    ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
    (
        {"conversations": [{"from": "user", "value": "a"}], "system": "s"},
        [("system", "s"), ("user", "a")],
    ),
]


@pytest.mark.parametrize(("record", "turns"), RECORDS)
def test_a_script_reads_every_format_of_chats(
    shop: Any, record: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    """As the run does: the same turns of the same record."""
    functions = runpy.run_path(str(script_of(shop.make(), shop.root)))
    assert functions["read_chat"](record) == [{"role": r, "content": c} for r, c in turns]
