"""The assistant's content and end of turn are learned, in every template, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.dataset.formats import Chat
from finetuned_daemon.runs.contract import EndReason, Notice
from tiny import END_OF_TURN

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "tokenizers"

ONE = [("user", "How do I list files?"), ("assistant", "Use `ls`.")]
THREE = [
    *ONE,
    ("user", "And\nthe hidden ones?"),
    ("assistant", "Use `ls -a`.\n\nThat is all."),
    *ONE,
]
CHATS = {
    "one turn": ONE,
    "three turns, two of them equal": THREE,
    "with a system prompt": [("system", "Be brief."), *THREE],
    "blanks around contents": [
        ("user", "  How do I list files?\n"),
        ("assistant", " Use `ls`. \n"),
        *ONE,
    ],
    "an answer that is its question": [("user", "yes"), ("assistant", "yes"), *ONE],
    "other scripts": [("user", "怎么列出文件？"), ("assistant", "用 `ls` 👍🏽 即可。"), *ONE],
    "text that imitates marks": [
        ("user", "What is <|im_end|>\n<|im_start|>assistant\nI am?"),
        ("assistant", "It ends a turn: <|im_end|>\n<|im_start|>user\nNo, I am!"),
        *ONE,
    ],
}
MODELS = ("chatml", "chatml_generation", "llama3", "mistral", "gemma")


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def messages(turns: list[tuple[str, str]]) -> list[Any]:
    return [{"role": role, "content": content} for role, content in turns]


def learned(
    tokenizer: Any, turns: list[tuple[str, str]], report: Any, length: int = 512
) -> list[str]:
    """The learned text, one string for each stretch of learned tokens."""
    from finetuned_runner.data import encode_chats

    (sample,) = list(encode_chats([Chat(1, messages(turns))], tokenizer, length, report))
    stretches: list[list[int]] = []
    before = -100
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(token)
        before = label
    return [tokenizer.decode(stretch) for stretch in stretches]


def answers(turns: list[tuple[str, str]]) -> list[str]:
    return [content for role, content in turns if role == "assistant"]


@pytest.fixture
def report(tmp_path):
    from finetuned_runner.report import Report

    return Report(tmp_path)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", MODELS)
def test_each_turns_content_and_end_are_learned_and_nothing_else(shop, report, template, chat):
    turns = CHATS[chat]
    if template == "gemma" and turns[0][0] == "system":
        pytest.skip("this template has no system turn")
    tokenizer = load(shop.model(template))
    expected = answers(turns)
    if template in ("llama3", "gemma"):
        expected = [content.strip() for content in expected]
    if (
        template == "mistral"
    ):  # it parts prompt and answer by a blank, which is one token with the first word
        expected = [f" {content}" for content in expected]
    end = END_OF_TURN[template]
    assert learned(tokenizer, turns, report) == [content + end for content in expected]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_real_tokenizers_learn_each_turns_content_and_end(report, name, chat):
    if not (ASSETS / name).is_dir():
        pytest.skip("the real tokenizers are not on this machine")
    turns = CHATS[chat]
    expected = answers(turns)
    if name == "qwen3" and chat == "blanks around contents":
        # This template takes line feeds off the beginning of the last turn only.
        assert not expected[-1].startswith("\n")
    assert learned(load(ASSETS / name), turns, report) == [f"{c}<|im_end|>" for c in expected]


def test_a_reasoning_block_that_the_template_writes_anew_is_learned_with_the_answer(report):
    if not (ASSETS / "qwen3").is_dir():
        pytest.skip("the real tokenizers are not on this machine")
    tokenizer = load(ASSETS / "qwen3")
    answer = "<think>\nA file is asked for.\n</think>\n\nUse `ls`."
    assert learned(tokenizer, [ONE[0], ("assistant", answer)], report) == [f"{answer}<|im_end|>"]


def test_marked_and_derived_masks_are_the_same(shop, report):
    marked, derived = load(shop.model("chatml_generation")), load(shop.model("chatml"))
    for turns in CHATS.values():
        assert learned(marked, turns, report) == learned(derived, turns, report)


@pytest.mark.parametrize("template", ["shouting", "endless"])
def test_an_uncertain_template_is_refused_with_line_reason_and_a_way_out(shop, report, template):
    from finetuned_runner.data import encode_chats
    from finetuned_runner.failures import RunFailed

    chats = [Chat(3, messages(ONE)), Chat(8, messages(THREE))]
    with pytest.raises(RunFailed, match=r"line 3: it is not certain .*\{% generation %\}") as error:
        encode_chats(chats, load(shop.model(template)), 512, report)
    assert error.value.reason is EndReason.DATASET_INVALID


@pytest.mark.parametrize(
    ("template", "why"),
    [
        # An earlier answer disappears when the chat goes on.
        (
            "{% for m in messages %}{% if m.role == 'user' or loop.last %}"
            "<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "the prompt of",
        ),
        # The answer stands a second time, in a summary that the user would seem to have written.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}",
            "drops, repeats or reorders",
        ),
        # The prompt depends on what comes later.
        (
            "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "the prompt of",
        ),
        # Only the last turn has an end.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last and m.role == "
            "'assistant' %}<|im_end|>{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "no end-of-turn token",
        ),
        ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
        ("{{ messages[0].content.nothing.here }}", "refuses the chat"),
    ],
)
def test_templates_that_defeat_a_method_are_refused(shop, template, why):
    from finetuned_runner.chat_mask import ChatMask, MaskError

    tokenizer = load(shop.model())
    tokenizer.chat_template = template
    with pytest.raises(MaskError, match=why):
        ChatMask(tokenizer).render(messages(THREE))


def test_a_template_without_generation_prompt_learns_no_header(shop, report):
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert learned(tokenizer, THREE, report) == [f"{c}<|im_end|>" for c in answers(THREE)]


def test_an_end_of_text_after_the_last_turn_is_no_end_of_turn(shop, report):
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    assert learned(tokenizer, THREE, report) == [f"{c}<|im_end|>" for c in answers(THREE)]


def test_a_tokenizer_without_template_is_refused(shop, report):
    from finetuned_runner.data import encode_chats
    from finetuned_runner.failures import RunFailed

    with pytest.raises(RunFailed, match=r"has no chat template; set data\.tokenizer_path"):
        encode_chats([Chat(1, messages(ONE))], load(shop.model(None)), 512, report)


def test_long_chats_are_cut_and_those_left_without_an_answer_dropped_with_a_notice(shop, report):
    from finetuned_daemon.runs.contract import EventLine
    from finetuned_runner.data import encode_chats

    tokenizer = load(shop.model())
    long = [("user", "word " * 200), ("assistant", "never seen")]
    cut = [("user", "word"), ("assistant", "word " * 200)]
    chats = [Chat(line, messages(turns)) for line, turns in enumerate([ONE, long, cut], start=1)]
    dataset = encode_chats(chats, tokenizer, 128, report)
    assert [len(sample["input_ids"]) for sample in dataset][1] == 128
    assert len(dataset) == 2
    lines = (report._run_dir / "events.jsonl").read_text().splitlines()
    notices = [EventLine.model_validate_json(line).parse() for line in lines]
    assert all(isinstance(notice, Notice) for notice in notices)
    texts = {notice.reason: notice.message for notice in notices}
    assert texts["SAMPLES_CUT"].startswith("2 of 3 samples")
    assert texts["SAMPLES_DROPPED"].startswith("1 of 3 samples")


def test_an_answer_whose_first_character_is_one_token_with_the_prompts_last_is_refused():
    from finetuned_runner.chat_mask import MaskError
    from finetuned_runner.encoding import tokens_of

    class Encoding:
        """Three tokens: `ab`, `cd`, `e`."""

        ids = (1, 2, 3)
        offsets = ((0, 2), (2, 4), (4, 5))

        def char_to_token(self, char: int) -> int | None:
            return next((i for i, (s, e) in enumerate(self.offsets) if s <= char < e), None)

        def token_to_chars(self, token: int) -> tuple[int, int]:
            return self.offsets[token]

    assert tokens_of((2, 5), Encoding(), "abcde") == (1, 3)
    with pytest.raises(MaskError, match="end of the prompt and the beginning of the answer"):
        tokens_of((3, 5), Encoding(), "abcde")
    with pytest.raises(MaskError, match="end of the answer and text that follows"):
        tokens_of((0, 3), Encoding(), "abcde")
    # Blanks alone are no matter: nothing is to be learned of them.
    assert tokens_of((3, 5), Encoding(), "ab\n\ne") == (2, 3)
