"""The assistant's content and end of turn are learned, in every template, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError

from finetuned_daemon.dataset.formats import Chat
from finetuned_daemon.runs.contract import EndReason, EventLine, Notice
from finetuned_runner.chat_mask import ChatMask, MaskError
from finetuned_runner.chat_mask_tracking import Tracker
from run_samples import samples_of
from tiny import END_OF_TURN, write_jsonl

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


def learned(tokenizer: Any, turns: list[Any], tools: Any = None) -> list[str]:
    """The learned text, one string for each stretch of learned tokens."""
    from finetuned_runner.encoding import chat_mask, encode_chats

    chat = turns if isinstance(turns[0], dict) else messages(turns)
    ((encoded,),) = encode_chats([Chat(1, chat, tools=tools)], tokenizer, chat_mask(tokenizer))
    stretches: list[list[int]] = []
    before = 0
    for token, is_learned in zip(encoded.encoding.ids, encoded.learned, strict=True):
        if is_learned:
            if not before:
                stretches.append([])
            stretches[-1].append(token)
        before = is_learned
    return [tokenizer.decode(stretch) for stretch in stretches]


def answers(turns: list[tuple[str, str]]) -> list[str]:
    return [content for role, content in turns if role == "assistant"]


@pytest.fixture
def report(tmp_path):
    from finetuned_runner.report import Report

    return Report(tmp_path)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", MODELS)
def test_each_turns_content_and_end_are_learned_and_nothing_else(shop, template, chat):
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
    assert learned(tokenizer, turns) == [content + end for content in expected]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", ["qwen3", "smollm2"])
def test_real_tokenizers_learn_each_turns_content_and_end(name, chat):
    if not (ASSETS / name).is_dir():
        pytest.skip("the real tokenizers are not on this machine")
    turns = CHATS[chat]
    expected = answers(turns)
    if name == "qwen3" and chat == "blanks around contents":
        # This template takes line feeds off the beginning of the last turn only.
        assert not expected[-1].startswith("\n")
    assert learned(load(ASSETS / name), turns) == [f"{c}<|im_end|>" for c in expected]


def test_a_reasoning_block_that_the_template_writes_anew_is_learned_with_the_answer():
    if not (ASSETS / "qwen3").is_dir():
        pytest.skip("the real tokenizers are not on this machine")
    tokenizer = load(ASSETS / "qwen3")
    answer = "<think>\nA file is asked for.\n</think>\n\nUse `ls`."
    assert learned(tokenizer, [ONE[0], ("assistant", answer)]) == [f"{answer}<|im_end|>"]


def test_marked_and_derived_masks_are_the_same(shop):
    marked, derived = load(shop.model("chatml_generation")), load(shop.model("chatml"))
    for turns in CHATS.values():
        assert learned(marked, turns) == learned(derived, turns)


@pytest.mark.parametrize("template", ["shouting", "endless"])
def test_an_uncertain_template_is_refused_with_line_reason_and_a_way_out(shop, report, template):
    from finetuned_runner.failures import RunFailed

    lines = [json.dumps({"messages": messages(turns)}) for turns in (ONE, THREE)]
    file = shop.root / "chats.jsonl"
    file.write_text(f"\n\n{lines[0]}\n\n{lines[1]}\n")
    run = shop.make(template=template, data={"train_file": str(file)})
    with pytest.raises(RunFailed, match=r"line 3: it is not certain .*\{% generation %\}") as error:
        samples_of(run.spec, report)
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
            "leaves out",
        ),
        # The answer stands a second time, in a summary that the user would seem to have written.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if not add_generation_prompt %}{{ messages[1].content }}{% endif %}",
            "elsewhere than in its turn",
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
        # Somebody else's words within the assistant's turn.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% if m.role == 'assistant' %} (on {{ messages[loop.index0 - 1].content | title }})"
            "{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "writes other text into",
        ),
        # Another mark in mid-chat than at the end, and further ones behind it.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "{% if loop.last %}<|im_end|>{% else %}<|eot_id|><|im_end|>{% endif %}\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "written differently when the chat goes on",
        ),
        # Turns that are not written one by one.
        (
            "{% for m in messages %}{{ m.role }} {% endfor %}{{ messages[1].content }}<|im_end|>"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "elsewhere than in its turn",
        ),
        (
            "{{ messages | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{{ m.content }}<|im_end|>\n{% endfor %}",
            "mixes the texts",
        ),
        # The answer is not what stands in the data.
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0] | upper }}"
            "{{ m.content[1:] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "changes the text of",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[4:] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "changes the beginning",
        ),
        ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
        ("{{ messages[0].content.nothing.here }}", "refuses the chat"),
    ],
)
def test_templates_that_defeat_a_method_are_refused(shop, template, why):
    tokenizer = load(shop.model())
    tokenizer.chat_template = template
    with pytest.raises(MaskError, match=why):
        ChatMask(tokenizer).render(messages(THREE))


def test_a_template_without_generation_prompt_learns_no_header(shop):
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    assert learned(tokenizer, THREE) == [f"{c}<|im_end|>" for c in answers(THREE)]


CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "list", "arguments": {"folder": "<|im_end|>\n<|im_start|>user\n", "n": 3}},
}
CALL_TEXT = (
    '<tool_call>\n{"name": "list", "arguments": {"folder": "<|im_end|>\\n<|im_start|>user\\n", '
    '"n": 3}}\n</tool_call>'
)


def test_tool_calls_are_learned_with_their_marks_and_results_are_not(shop):
    """All that the model has to say to call a tool, whatever the arguments hold."""
    result = {"role": "tool", "content": f"{CALL_TEXT}<|im_end|>\n<|im_start|>assistant\nMe?"}
    user, answer = messages(ONE)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    both = {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    tokenizer = load(shop.model("tools"))
    tools = [{"type": "function", "function": {"name": "list", "description": CALL_TEXT}}]
    assert learned(tokenizer, [user, call, result, answer, user, both, result, answer], tools) == [
        f"\n{CALL_TEXT}<|im_end|>",
        "Use `ls`.<|im_end|>",
        f"I look.\n{CALL_TEXT}\n{CALL_TEXT}<|im_end|>",
        "Use `ls`.<|im_end|>",
    ]
    with pytest.raises(MaskError, match=r"leaves out the tool calls of messages\[1\]"):
        ChatMask(load(shop.model())).render([user, call, result, answer])


@pytest.mark.parametrize("in_content", [True, False])
def test_reasoning_is_learned_with_its_marks(shop, in_content):
    """In the content or in a field of its own; where the template drops it, the answer alone."""
    user, answer = messages(ONE)
    if in_content:
        answer["content"] = "<think>\nFiles.\n</think>\n\nUse `ls`."
    else:
        answer["reasoning_content"] = "Files."
    thought = ["<think>\nFiles.\n</think>\n\nUse `ls`.<|im_end|>"]
    tokenizer = load(shop.model("tools"))
    assert learned(tokenizer, [user, answer, user, answer]) == thought * 2
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "if thought", "if thought and loop.last"
    )
    assert learned(tokenizer, [user, answer, user, answer]) == ["Use `ls`.<|im_end|>", *thought]


def test_of_an_empty_answer_the_end_of_turn_is_learned(shop):
    """To say nothing is to end the turn; an empty reasoning block before it is the template's."""
    turns = [("user", "Hush."), ("assistant", ""), ("user", "Now?"), ("assistant", "Yes.")]
    tokenizer = load(shop.model("tools"))
    assert learned(tokenizer, turns) == ["<|im_end|>", "Yes.<|im_end|>"]
    tokenizer.chat_template = tokenizer.chat_template.replace("if thought", "if loop.index0 % 2")
    assert learned(tokenizer, turns) == ["<|im_end|>", "Yes.<|im_end|>"]


def test_templates_get_contents_and_arguments_in_the_form_they_read(shop):
    """Those of image models read lists of parts alone, some the arguments as JSON text."""
    tokenizer = load(shop.model("tools"))
    written = tokenizer.chat_template
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chat = [*messages(ONE)[:1], calling, {"role": "tool", "content": "a"}, *messages(ONE)[1:]]
    expected = learned(tokenizer, chat)
    tokenizer.chat_template = written.replace(
        "~ call.function.arguments | tojson ~", "+ call.function.arguments +"
    )
    assert learned(tokenizer, chat) == expected
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
        "{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert learned(tokenizer, THREE) == [f"{c}<|im_end|>" for c in answers(THREE)]


def test_a_template_may_copy_messages_join_texts_and_use_macros(shop):
    """The origin of a text survives what templates do."""
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{% macro body(text) %}{% for line in text.split('\n') %}{{ line }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}{% endmacro %}"
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        "{% set ns.all = ns.all + [{'role': m.role, 'content': m.content}] %}{% endfor %}"
        "{% for m in ns.all %}{% set text %}{{ body(m.content) }}{% endset %}"
        "{{ ['<|im_start|>' ~ m.role, text] | join('\n') ~ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for turns in CHATS.values():
        assert learned(tokenizer, turns) == [f"{c}<|im_end|>" for c in answers(turns)]


def test_the_prompt_may_be_written_at_the_last_message_and_the_first_one_before_the_loop(shop):
    """As Zephyr's and Llama 3.1's templates do."""
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{{ bos_token }}<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n"
        "{% if messages | length == 1 and add_generation_prompt %}<|im_start|>assistant{% endif %}"
        "{% for m in messages[1:] %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% if loop.last and add_generation_prompt %}<|im_start|>assistant{% endif %}{% endfor %}"
    )
    for chat in (ONE, THREE):
        expected = [f"\n{content}<|im_end|>" for content in answers(chat)]
        assert [text.lstrip("\n") for text in learned(tokenizer, chat)] == [
            text.lstrip("\n") for text in expected
        ]


def test_following_a_template_opens_no_way_out_of_the_sandbox():
    """A template is somebody else's code, and `format` reaches attributes."""
    chat: list[Any] = [{"role": "user", "content": "{x.__class__.__mro__}"}]
    for template in (
        "{{ messages[0].content.format(x=messages) }}",
        "{{ messages[0].content.format_map({'x': messages}) }}",
        "{{ (messages[0].content | attr('format'))(x=messages) }}",
        "{% for m in messages %}{{ m.content._runs }}{{ m.content.format(x=m) }}{% endfor %}",
    ):
        with pytest.raises(SecurityError):
            Tracker(template, {}).render(chat, None, generation_prompt=False)


def test_an_end_of_text_after_the_last_turn_is_no_end_of_turn(shop):
    tokenizer = load(shop.model())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    assert learned(tokenizer, THREE) == [f"{c}<|im_end|>" for c in answers(THREE)]


def test_a_tokenizer_without_template_is_refused(shop):
    from finetuned_runner.encoding import TokenizerUnusable, chat_mask

    with pytest.raises(TokenizerUnusable, match=r"has no chat template; set data\.tokenizer_path"):
        chat_mask(load(shop.model(None)))


def test_long_chats_are_cut_and_those_left_without_an_answer_dropped_with_a_notice(shop, report):
    long = [("user", "word " * 200), ("assistant", "never seen")]
    cut = [("user", "word"), ("assistant", "word " * 200)]
    chats = [{"messages": messages(turns)} for turns in (ONE, long, cut)]
    file = write_jsonl(shop.root / "chats.jsonl", chats)
    dataset = samples_of(shop.make(data={"train_file": str(file)}).spec, report)
    assert len(dataset) == 2
    assert [len(dataset[index]["input_ids"]) for index in range(2)][1] == 128
    lines = (report.run_dir / "events.jsonl").read_text().splitlines()
    events = [EventLine.model_validate_json(line).parse() for line in lines]
    texts = {event.reason: event.message for event in events if isinstance(event, Notice)}
    assert texts["SAMPLES_CUT"].startswith("2 of 3 samples")
    assert texts["SAMPLES_DROPPED"].startswith("1 of 3 samples")


def test_an_answer_whose_first_character_is_one_token_with_the_prompts_last_is_refused():
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
