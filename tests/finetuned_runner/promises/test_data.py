"""What the parameters of the section `data` do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetuned_daemon.runs.contract import EndReason, Evaluation
from tiny import chats, weights, write_jsonl

# One step over all of a handful of chats: its loss is that of the model as it was loaded.
ONE_STEP = {"batch_size": 6, "gradient_accumulation_steps": 1}
# So little that the weights stay what they were.
STILL = {"learning_rate": 1e-6, "gradient_accumulation_steps": 1}


def sharegpt(chat: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {
        "conversations": [
            {"from": names[message["role"]], "value": message["content"]}
            for message in chat["messages"]
        ]
    }


@pytest.mark.proves("data.train_file")
def test_what_stands_in_the_file_is_learned(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """A step over a whole file has the loss and the tokens of its chats, whatever their format."""
    model = shop.model(layers=1)
    for samples, convert in ((chats(6), dict), (chats(6), sharegpt), (chats(12)[6:], dict)):
        file = write_jsonl(shop.root / "train.jsonl", map(convert, samples))
        run = train(data={"train_file": str(file)}, training=ONE_STEP)
        assert run.losses() == {1: pytest.approx(oracle.loss(model, samples), rel=1e-5)}
        assert tokens_of_steps(run) == [oracle.num_tokens(model, samples)]


@pytest.mark.proves("data.model_path")
def test_the_model_of_the_folder_is_trained_and_the_folder_stays_as_it_was(
    train: Any, oracle: Any, shop: Any
) -> None:
    """The first loss is that of the folder's model; no byte of the folder changes."""
    file = write_jsonl(shop.root / "train.jsonl", chats(6))
    losses = set()
    for seed in (1, 2):
        model = shop.model(layers=1, seed=seed)
        before = {path.name: path.read_bytes() for path in model.iterdir()}
        run = train(
            data={"train_file": str(file), "model_path": str(model)},
            training=ONE_STEP,
            lora={"use_lora": False},
        )
        assert run.losses() == {1: pytest.approx(oracle.loss(model, chats(6)), rel=1e-5)}
        assert {path.name: path.read_bytes() for path in model.iterdir()} == before
        losses.add(run.losses()[1])
    assert len(losses) == 2


@pytest.mark.proves("data.tokenizer_path")
def test_another_tokenizer_and_its_template_make_the_tokens(train: Any, shop: Any) -> None:
    """Losses and the final folder are those of the tokenizer given, not of the model's own."""
    of_model, other = shop.model(layers=1), shop.model("llama3", layers=1)
    own = train(training=ONE_STEP)
    given = train(data={"tokenizer_path": str(other)}, training=ONE_STEP)
    theirs = train(data={"model_path": str(other)}, training=ONE_STEP)
    assert given.losses() == theirs.losses() != own.losses()
    template = "chat_template.jinja"
    saved = (given.output / "final" / template).read_text()
    assert saved == (other / template).read_text() != (of_model / template).read_text()
    bare = shop.root / "bare"
    shutil.copytree(of_model, bare)
    for name in ("tokenizer.json", "tokenizer_config.json", template):
        (bare / name).unlink()
    run = train(data={"model_path": str(bare), "tokenizer_path": str(other)}, training=ONE_STEP)
    assert run.losses() == theirs.losses()


@pytest.mark.proves("data.eval_file")
def test_the_evaluation_file_is_scored_and_never_trained_on(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """The evaluation loss is that of its chats, and the tokens trained on are the others' alone."""
    model, learned, scored = shop.model(layers=1), chats(6), chats(10)[6:]
    run = train(
        data={
            "train_file": str(write_jsonl(shop.root / "train.jsonl", learned)),
            "eval_file": str(write_jsonl(shop.root / "eval.jsonl", scored)),
        },
        training={**ONE_STEP, **STILL, "eval_strategy": "epoch"},
    )
    (evaluation,) = run.events(Evaluation)
    expected = oracle.loss(model, scored)
    assert evaluation.values["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(oracle.loss(model, learned), rel=1e-3)
    assert tokens_of_steps(run) == [oracle.num_tokens(model, learned)]


@pytest.mark.proves("data.eval_ratio", "general.seed")
def test_the_seed_draws_the_share_that_is_scored_and_the_rest_is_trained_on(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """A quarter of four samples is one: scored, not trained on, and chosen by the seed."""
    model, samples = shop.model(layers=1), chats(4)
    lengths = [oracle.num_tokens(model, [chat]) for chat in samples]
    assert len(set(lengths)) == 4, "a length tells which it is"
    file = write_jsonl(shop.root / "four.jsonl", samples)
    drawn = []
    for seed in (1, 1, 2, 3):
        run = train(
            data={"train_file": str(file), "eval_ratio": 0.25},
            training={**ONE_STEP, **STILL, "eval_strategy": "epoch"},
            general={"seed": seed},
        )
        (trained,) = tokens_of_steps(run)
        held = lengths.index(sum(lengths) - trained)
        (evaluation,) = run.events(Evaluation)
        loss = oracle.loss(model, [samples[held]])
        assert evaluation.values["eval_loss"] == pytest.approx(loss, rel=1e-4)
        drawn.append(held)
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.proves("data.max_samples")
def test_only_the_first_samples_are_used(train: Any, shop: Any) -> None:
    """With 3 of 12 the run is that of a file with these 3; 0, or more than there are, takes all."""
    whole = write_jsonl(shop.root / "whole.jsonl", chats(12))
    head = write_jsonl(shop.root / "head.jsonl", chats(12)[:3])
    some = train(data={"train_file": str(whole), "max_samples": 3})
    assert some.losses() == train(data={"train_file": str(head)}).losses()
    for every in (0, 100):
        run = train(data={"train_file": str(whole), "max_samples": every})
        assert run.result.step == 3 * some.result.step


@pytest.mark.proves("data.reshuffle", "training.batch_size", "general.seed")
def test_off_is_one_seeded_order_for_all_epochs_and_on_a_new_one_in_each(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """Samples told by their lengths: the order repeats, or differs each time; the seed draws it."""
    samples = [
        {
            "messages": [
                {"role": "user", "content": "list " * (number + 1)},
                {"role": "assistant", "content": "ls"},
            ]
        }
        for number in range(8)
    ]
    lengths = [oracle.num_tokens(shop.model(layers=1), [chat]) for chat in samples]
    assert len(set(lengths)) == 8
    file = str(write_jsonl(shop.root / "eight.jsonl", samples))

    def order(batch_size: int = 1, seed: int = 42, **data: Any) -> list[list[int]]:
        """The lengths of each step, for each of three epochs."""
        run = train(
            data={"train_file": file, **data},
            training={**STILL, "batch_size": batch_size, "num_train_epochs": 3},
            general={"seed": seed},
        )
        seen = tokens_of_steps(run)
        size = len(seen) // 3
        return [seen[start : start + size] for start in range(0, len(seen), size)]

    fixed = order()
    assert sorted(fixed[0]) == sorted(lengths)
    assert fixed[0] != lengths, "shuffled once"
    assert fixed[0] == fixed[1] == fixed[2]
    fresh = order(reshuffle=True)
    assert all(sorted(epoch) == sorted(lengths) for epoch in fresh)
    assert len({tuple(epoch) for epoch in fresh}) == 3
    for reshuffle, seen in ((False, fixed), (True, fresh)):
        # A batch of four is four of the same order at once; so that this is the seed's doing, too.
        fours = order(batch_size=4, reshuffle=reshuffle)
        assert fours == [[sum(epoch[:4]), sum(epoch[4:])] for epoch in seen]
    assert order(seed=7) != fixed


@pytest.mark.proves("data.dataloader_num_workers")
def test_worker_processes_load_the_data_and_change_nothing(train: Any) -> None:
    """While the run trains there are as many loader processes as asked for; losses are the same."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    seen = list[int]()

    def count(*_: Any) -> None:
        names = [child.name() for child in psutil.Process().children()]
        seen.append(names.count("pt_data_worker"))  # as torch names them

    losses = []
    for workers in (0, 2):
        hook = register_optimizer_step_post_hook(count)
        run = train(data={"dataloader_num_workers": workers, "reshuffle": True})
        hook.remove()
        assert max(seen) == workers
        seen.clear()
        losses.append(run.losses())
    assert losses[0] == losses[1]


@pytest.mark.proves("data.dataloader_pin_memory")
def test_locked_memory_without_a_gpu_is_off_with_a_notice(train: Any) -> None:
    """On the CPU the run says that it is of no use, and is the same without."""
    run = train(data={"dataloader_pin_memory": True})
    assert run.notices()["PIN_MEMORY_WITHOUT_GPU"].field == "data.dataloader_pin_memory"
    plain = train()
    assert not plain.notices()
    assert run.losses() == plain.losses()


@pytest.mark.proves("data.attach_lora")
def test_attached_weights_begin_a_new_run_with_their_own_shape(
    train: Any, oracle: Any, shop: Any
) -> None:
    """The first step has the loss of base plus adapter, at step 1 and the schedule's beginning."""
    file = str(write_jsonl(shop.root / "train.jsonl", chats(6)))
    training = {**ONE_STEP, "learning_rate": 1e-2, "num_train_epochs": 4, "save_strategy": "epoch"}
    first = train(data={"train_file": file}, training=training, lora={"lora_r": 3})
    checkpoint = first.output / "checkpoint-4"
    expected = oracle.loss(shop.model(layers=1), chats(6), adapter=checkpoint)
    assert expected < first.losses()[1] - 0.05
    # Of the checkpoint that is named; and of the model's folder where none is.
    for data in ({"resume_from_checkpoint": str(checkpoint)}, {"model_path": str(checkpoint)}):
        run = train(data={"train_file": file, "attach_lora": True, **data}, training=training)
        assert run.notices()["LORA_ATTACHED"].field == "data.attach_lora"
        assert list(run.losses()) == [1, 2, 3, 4]
        assert run.losses()[1] == pytest.approx(expected, rel=1e-5)
        assert run.rates() == first.rates()
        config = json.loads((run.output / "final" / "adapter_config.json").read_text())
        assert config["r"] == 3
    before, after = weights(checkpoint), weights(run.output / "final")
    assert any((before[name] != after[name]).any() for name in before)
    none = train(data={"train_file": file, "attach_lora": True})
    assert none.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert Path(none.spec.parameters.data.model_path).name in none.result.message
