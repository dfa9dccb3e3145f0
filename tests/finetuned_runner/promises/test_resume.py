"""A run that is cut off and resumed, again and again, is the run that never was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetuned_daemon.runs.contract import (
    EndReason,
    Evaluation,
    LogLine,
    Metrics,
    Progress,
)
from tiny import weights

DEADLINE = 60.0

# 24 samples less 5: 19 make five steps an epoch. Step 10 ends one, and is evaluated and saved too.
TRAINING = {
    "num_train_epochs": 3,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_steps": 2,
}
STEPS = 15
# Early; at the end of an epoch with an evaluation due; late.
CUTS = (3, 10, 13)

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Lets a run come to its end in a process of its own; `how` and `at` cut it: see `warm`."""
    warm = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def start(run: Any, how: str = "", at: int = 0) -> Any:
        assert warm.stdin is not None
        assert warm.stdout is not None
        warm.stdin.write(json.dumps({"folder": str(run.folder), "how": how, "at": at}) + "\n")
        warm.stdin.flush()
        pid = int(warm.stdout.readline())
        end = time.monotonic() + DEADLINE
        while psutil.pid_exists(pid):
            assert time.monotonic() < end, run.lines()[-3:]
            time.sleep(0.01)
        return run

    yield start
    warm.kill()
    warm.communicate()


def make(shop: Any, name: str, kind: str, **data: Any) -> Any:
    """A run with all that is random: order, dropout, evaluation; and with loader processes."""
    return shop.make(
        name,
        data={"reshuffle": True, "eval_ratio": 0.2, "dataloader_num_workers": 2, **data},
        training=TRAINING,
        lora={"use_lora": kind == "lora", "lora_dropout": 0.1},
    )


def numbers(run: Any) -> dict[int, dict[str, float]]:
    """Loss, gradient norm and learning rate of each step, to the last bit."""
    return {event.step: event.values for event in run.events(Metrics)}


def scores(run: Any) -> dict[int, float]:
    """The evaluation losses by step."""
    return {event.step: event.values["eval_loss"] for event in run.events(Evaluation)}


def tokens(run: Any) -> dict[int, int]:
    """The token counter by step."""
    return {event.step: event.num_tokens for event in run.events(Progress)}


@pytest.fixture(scope="module")
def uninterrupted(module_shop: Any, start: Start) -> Callable[[str], Any]:
    """The runs that were never cut; that of LoRA by `python -m finetuned_runner` itself."""
    runs: dict[str, Any] = {}

    def uninterrupted(kind: str) -> Any:
        if kind not in runs:
            run = make(module_shop, f"whole-{kind}", kind)
            runs[kind] = module_shop.start(run) if kind == "lora" else start(run)
        return runs[kind]  # its process may still be at work

    return uninterrupted


def newest(output: Path) -> str:
    """The newest checkpoint of a folder; what was not whole doesn't bear that name."""
    return str(max(output.glob("checkpoint-*"), key=lambda path: int(path.name[11:])))


@pytest.mark.proves("data.resume_from_checkpoint")
@pytest.mark.parametrize(
    ("kind", "cuts"),
    [
        pytest.param("lora", ["stop", "stop", "stop_within"], id="LoRA, stopped"),
        pytest.param("lora", ["kill", "kill", "kill_saving"], id="LoRA, killed"),
        pytest.param("full", ["stop_within", "stop", "kill"], id="all weights"),
    ],
)
def test_a_run_cut_at_three_points_ends_as_if_it_never_was(
    shop: Any, start: Start, uninterrupted: Any, kind: str, cuts: list[str]
) -> None:
    """Stopped or killed early, at an epoch's end and late: every number and weight is the same."""
    whole = uninterrupted(kind)
    at, data, parts = 0, dict[str, Any](), list[Any]()
    for cut, step in zip(cuts, CUTS, strict=True):
        run = start(make(shop, f"part-{step}", kind, **data), cut, step - at)
        parts.append(run)
        if cut.startswith("stop"):
            assert run.result.end_reason is EndReason.STOPPED_BY_USER, run.result
            assert run.result.step == step
            expected = step
        else:
            assert not (run.folder / "result.json").exists(), "really killed"
            expected = (step - 1) // 2 * 2  # a checkpoint every two steps
        if cut == "kill_saving":
            left = {path.name for path in run.output.iterdir()}
            assert len(left) > len(run.checkpoints()), "a part of one that never was whole"
        data["resume_from_checkpoint"] = newest(run.output)
        assert Path(data["resume_from_checkpoint"]).name == f"checkpoint-{expected}"
        at = expected
    parts.append(start(make(shop, "last", kind, **data)))
    assert parts[-1].result.end_reason is EndReason.FINISHED, parts[-1].result

    if whole.process is not None:
        assert whole.wait() == 0, whole.result
    known = numbers(whole)
    assert list(known) == list(range(1, STEPS + 1))
    for run in parts:
        assert numbers(run) == {step: known[step] for step in numbers(run)}
        assert scores(run).items() <= scores(whole).items()
        assert tokens(run).items() <= tokens(whole).items()
    assert set().union(*map(numbers, parts)) == set(range(1, STEPS + 1))
    # The run that goes on makes up for the evaluation that a stop at its step left out.
    assert set().union(*map(scores, parts)) == {5, 10, 15}
    assert tokens(parts[-1])[STEPS] == tokens(whole)[STEPS]
    first, last = (weights(run.output / "final") for run in (whole, parts[-1]))
    assert {name: w.tobytes() for name, w in first.items()} == {
        name: w.tobytes() for name, w in last.items()
    }


@pytest.mark.proves("logging.log_level")
def test_only_lines_from_this_level_on_are_kept(shop: Any, start: Start) -> None:
    """Each level has the lines of those above it too, and none below; metrics come at every one."""
    model = shop.root / "model"
    shutil.copytree(shop.model(layers=1), model)
    # It contradicts itself, of which each load warns.
    (model / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    levels = ["debug", "info", "warning", "error"]
    for number, level in enumerate(levels):
        run = shop.make(
            level,
            data={"model_path": str(model)},
            training={"max_steps": 1},
            logging={"log_level": level},
        )
        start(run)
        assert run.result.end_reason is EndReason.STEP_LIMIT, run.result
        kept = {line.level for line in run.events(LogLine)}
        assert kept == set(levels[number:3]), "nothing goes wrong here: no error"
        assert len(run.losses()) == 1
