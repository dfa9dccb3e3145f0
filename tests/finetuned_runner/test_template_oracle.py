"""The derived mask is that of the same template with generation blocks, in two dozen families.

The package trl carries the chat templates of model families, each beside a variant of the same with
`{% generation %}` blocks: an oracle that nobody of us wrote. What is derived from the first must be
what the second says, or the chat is refused.

python tests/finetuned_runner/test_template_oracle.py    writes tests/data/templates.txt anew
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[1] / "data" / "templates.txt"
LARGEST_REFUSED = 0.1
COLUMNS = ("chats", "equal", "refused", "wrong", "unusable")

# The tokens that begin a text and end it, by how the family's name begins; in templates they are
# variables. Those that a template writes out are found in it.
SPECIAL = {
    "cohere": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<bos>", "<turn|>"),
    "gemma": ("<bos>", "<eos>"),
    "glm4moe": (None, "<|endoftext|>"),
    "gptoss": ("<|startoftext|>", "<|return|>"),
    "idefics3": ("<|begin_of_text|>", "<end_of_utterance>"),
    "lfm2": ("<|startoftext|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
    "llava_next": ("<s>", "</s>"),
    "muse_glimmer": ("<|begin_of_text|>", "<|eot|>"),
    "nemotron": ("<s>", "<|im_end|>"),
    "phi3": ("<s>", "<|endoftext|>"),
    "qwen": (None, "<|im_end|>"),
    "smolvlm": ("<|im_start|>", "<end_of_utterance>"),
}
TOKEN = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜<>\s]+｜>|<\|[a-z_]+>|<[a-z_]+\|>|</?s>|\[/?INST\]|\[gMASK\]|<sop>"
    r"|<(?:start|end)_of_(?:turn|utterance)>|</?(?:think|tool_call|tool_response)>"
)

# Where the variant is not the measure: what it learns behind the last turn's end, and why we don't.
EXCEPTIONS = dict.fromkeys(
    ("phi3", "phi3_5"),
    (
        "<|endoftext|>",
        "the template writes it once, behind the whole chat; each turn ends with <|end|>, at which "
        "generation stops",
    ),
)

Chat = list[dict[str, Any]]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def turns(*contents: str, system: str | None = None) -> Chat:
    """Questions and answers in turn."""
    chat = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant")
    return chat + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def call(city: str, content: str = "") -> dict[str, Any]:
    """An assistant turn that calls a tool."""
    function = {"name": "get_weather", "arguments": {"city": city, "days": 2}}
    calls = [{"id": "call00001", "type": "function", "function": function}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(content: str) -> dict[str, Any]:
    """What the tool answers."""
    return {
        "role": "tool",
        "name": "get_weather",
        "tool_call_id": "call00001",
        "content": content,
    }


def reasoned(*contents: str) -> Chat:
    """Questions and answers, each answer with its reasoning in a field of its own."""
    chat = turns(*contents)
    for message in chat[1::2]:
        message["reasoning_content"] = f"Thinking of {message['content'].split()[0]}."
    return chat


ANSWERS = ("How do I list files?", "Use `ls`.", "And\nhidden ones?", "Use `ls -a`.\n\nThat is all.")
LONG = (*ANSWERS, "And links?", "Use `find -type l`.")
CHATS: dict[str, list[Chat]] = {
    "one turn": [turns(*ANSWERS[:2])],
    "three turns": [turns(*LONG)],
    "system": [turns(*ANSWERS, system="Be brief.")],
    "blanks around contents": [
        turns("  How? \n", " Use `ls`. \n", "\tAnd?\n", "\n\n  `ls -a`  "),
    ],
    "equal texts": [turns("yes", "yes", "yes", "yes", "no", "yes")],
    "reasoning": [
        turns(
            "Files?",
            "<think>\nThey want files.\n</think>\n\nUse `ls`.",
            "Links?",
            "<think>\nThey want links.\n\nOf all kinds.\n</think>\n\nUse `find`.",
        ),
        reasoned(*ANSWERS),
    ],
    "tool calls": [
        [
            *turns("Weather up north?"),
            call("Bergen"),
            result("Rain, 7 degrees."),
            *turns("", "It rains.")[1:],
        ],
        [
            *turns("Weather up north?"),
            call("Bergen", "I look it up."),
            result("Rain, 7 degrees."),
            *turns("", "It rains.", "And in Rome?")[1:],
            call("Roma"),
        ],
    ],
    "empty contents": [
        turns("Say nothing.", "", "And now?", "Something."),
        turns("a", "b", "c", ""),
    ],
    "imitated marks": [],  # made from each template's own
    "other scripts": [
        turns("怎么列出文件？", "用 `ls` 👍🏽 即可。", "مرحبا", "👩‍👩‍👧 ¿Qué? ẞ"),
        turns("怎么列出文件？", "用 `ls` 👍🏽 即可。", system="你是助手 🤖。\n\n"),
    ],
}


@dataclass
class Row:
    """What came of a family's chats."""

    family: str
    counts: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# --- the oracle


def folder() -> Path:
    spec = find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def families() -> Iterator[str]:
    for path in sorted(folder().glob("*_training.jinja")):
        family = path.name.removesuffix("_training.jinja")
        if path.with_name(f"{family}.jinja").is_file():
            yield family


def mask_of(family: str, file: str) -> Any:
    """The mask of a template, with a tokenizer that knows its special tokens and no more."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from finetuned_runner.chat_mask import ChatMask

    template = (folder() / file).read_text(encoding="utf-8")
    bos, eos = next(tokens for name, tokens in SPECIAL.items() if family.startswith(name))
    tokens = sorted({*TOKEN.findall(template), eos, *([bos] if bos else [])})
    bare = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, tokens[0]))
    bare.add_special_tokens(tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return ChatMask(tokenizer)


def judge(family: str) -> Row:
    """Compares all chats of a family."""
    from finetuned_runner.chat_mask import MaskError

    ours = mask_of(family, f"{family}.jinja")
    theirs = mask_of(family, f"{family}_training.jinja")
    assert (ours.has_generation_blocks, theirs.has_generation_blocks) == (False, True)
    row = Row(family)
    for kind, chats in CHATS.items():
        tools = TOOLS if kind == "tool calls" else None
        for chat in chats or [imitations(theirs)]:
            try:
                expected, text = theirs.render(chat, tools), ours.write(chat, tools)
            except MaskError:
                row.counts["unusable"] += 1  # the template refuses it
                continue
            is_told = tells(text, chat) and tells(expected.text, chat)
            row.counts["chats" if is_told else "unusable"] += 1
            try:
                rendered = ours.render(chat, tools)
            except MaskError as error:
                if is_told:
                    row.counts["refused"] += 1
                    row.causes[re.sub(r"messages\[\d+\]", "messages[N]", str(error))] += 1
                continue
            prompts = generation_prompts(ours, chat, tools)
            trailing, _ = EXCEPTIONS.get(family, ("", ""))
            if wrong := difference(rendered, expected, prompts, trailing):
                row.counts["wrong"] += 1
                row.wrong.append(f"{family}, {kind}: {wrong}")
            elif is_told:
                row.counts["equal"] += 1
    return row


def tells(text: str, chat: Chat) -> bool:
    """Whether a template wrote what a chat tells: contents, tool calls and results.

    Many templates leave out what they don't know, without an error.
    """
    flat = squeezed(text)
    told = [message["content"].split("</think>")[-1] for message in chat]
    for message in chat:
        for made in message.get("tool_calls", ()):
            told += [made["function"]["name"], made["function"]["arguments"]["city"]]
    return all(squeezed(part) in flat for part in told)


def imitations(mask: Any) -> Chat:
    """Contents that hold what the template itself writes between two turns."""
    words = ("Zq0xW", "Zq1xW", "Zq2xW")
    text = mask.write(turns(*words))
    asked, answered = (text.partition(one)[2].partition(other)[0] for one, other in pairwise(words))
    return turns(
        f"What is{asked}I am?",
        f"It ends a turn:{answered}No, I am!",
        asked,
        f"Well{asked}so be it{answered}",
    )


def generation_prompts(mask: Any, chat: Chat, tools: Any) -> list[str]:
    """What the template writes behind the last content where an answer is asked for."""
    prompts: list[str] = []
    for index, message in enumerate(chat):
        if message["role"] == "assistant" and index:
            before = [*chat[: index - 1], {**chat[index - 1], "content": "Zq9xW"}]
            asked = mask.write(before, tools, generation_prompt=True)
            prompts.append(squeezed(asked.rpartition("Zq9xW")[2]))
    return prompts


# --- comparing


def squeezed(text: str) -> str:
    return "".join(text.split())


def stretches(rendered: Any) -> list[tuple[str, str]]:
    """The text before each learned stretch, and the stretch; at last what follows. No blanks."""
    found: list[tuple[str, str]] = []
    at = 0
    for start, end in [*rendered.spans, (len(rendered.text), len(rendered.text))]:
        before, learned = squeezed(rendered.text[at:start]), squeezed(rendered.text[start:end])
        if not before and found and learned:
            found[-1] = (found[-1][0], found[-1][1] + learned)
        else:
            found.append((before, learned))
        at = end
    return found


def difference(ours: Any, theirs: Any, prompts: list[str], trailing: str = "") -> str:
    """What differs, leading scaffolds aside; empty: nothing does.

    A scaffold is an empty reasoning block; of theirs, a part of the generation prompt as well.
    """
    parts = {mark for prompt in prompts for mark in marks_of(prompt)}
    block = re.compile(r"<([^<>/]+)></\1>")
    mine, others = stretches(ours), stretches(theirs)
    if len(mine) != len(others):
        return f"{len(mine) - 1} stretches, not {len(others) - 1}: {mine}, not {others}"
    for number, ((before, learned), (other_before, other_learned)) in enumerate(
        zip(mine, others, strict=True), start=1
    ):
        if number == len(mine) - 1:
            other_learned = other_learned.removesuffix(trailing)
        if number == len(mine):
            before = before.removesuffix(trailing)
        if learned.endswith(other_learned):
            extra, scaffold = learned.removesuffix(other_learned), block
            other_before = other_before.removesuffix(extra)
        elif other_learned.endswith(learned):
            extra = without_reasoning(other_learned.removesuffix(learned), before)
            before = before.removesuffix(extra)
            scaffold = re.compile("|".join([block.pattern, *map(re.escape, parts)]))
        else:
            return f"learned {learned!r}, not {other_learned!r}"
        if extra and not scaffold.fullmatch(extra):
            return f"learned {learned!r}, not {other_learned!r}"
        if before != other_before and before != other_before.removesuffix(extra):
            return f"{before!r} stands before, not {other_before!r}"
    return ""


def marks_of(prompt: str) -> Iterator[str]:
    """The marks of a generation prompt, its beginnings and its ends; none as short as a word."""
    yield from re.findall(r"<[^<>]+>", prompt)
    for size in range(5, len(prompt) + 1):
        yield prompt[:size]
        yield prompt[-size:]


def without_reasoning(extra: str, before: str) -> str:
    """What a variant learns more, of that which the original writes too.

    Some variants write the reasoning of all turns where the original drops that of earlier ones.
    """
    if not extra.endswith("</think>"):
        return extra
    return next(part for end in range(len(extra), -1, -1) if before.endswith(part := extra[:end]))


# --- the table


def table(rows: list[Row]) -> str:
    """What is kept in the repository, for reading."""
    total, causes = Counter[str](), Counter[str]()
    for row in rows:
        total += row.counts
        causes += row.causes
    count = sum(len(chats) or 1 for chats in CHATS.values())
    lines = [
        "Masks derived from chat templates without generation blocks, against the same templates",
        f"with them, as trl {metadata.version('trl')} carries them: "
        f"{len(rows)} pairs, {count} chats of {len(CHATS)} kinds.",
        "Unusable: the template refuses the chat, or leaves out what it tells.",
        "",
        f"{'family':<24}" + "".join(f"{column:>10}" for column in COLUMNS),
    ]
    for name, counts in [*((row.family, row.counts) for row in rows), ("all", total)]:
        lines.append(f"{name:<24}" + "".join(f"{counts[column]:>10}" for column in COLUMNS))
    lines += ["", "Refused, by cause:"]
    lines += [f"{number:>4}  {cause}" for cause, number in causes.most_common()]
    lines += ["", "Learned by the variant, and not by ours:"]
    lines += [f"  {family}: {text}: {why}" for family, (text, why) in EXCEPTIONS.items()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [judge(family) for family in families()]


def test_no_mask_differs_from_the_one_that_the_marked_template_gives(rows: list[Row]) -> None:
    """In any version of trl: right or refused, never wrong."""
    assert [wrong for row in rows for wrong in row.wrong] == []
    assert len(rows) >= 24
    assert all(row.counts["chats"] >= 5 for row in rows)


def test_at_most_a_tenth_of_the_chats_is_refused(rows: list[Row]) -> None:
    """A mask that refuses everything is never wrong either."""
    refused, used = (sum(row.counts[column] for row in rows) for column in ("refused", "chats"))
    assert used > 10 * len(rows)
    assert refused <= LARGEST_REFUSED * used


def test_the_table_in_the_repository_is_what_comes_out(rows: list[Row]) -> None:
    """`tests/data/templates.txt` is for reading."""
    kept = TABLE.read_text(encoding="utf-8")
    made_with = re.search(r"trl (\S+) carries", kept)
    assert made_with
    if made_with[1] != metadata.version("trl"):
        pytest.skip(f"the table was made with trl {made_with[1]}")
    assert kept == table(rows)


if __name__ == "__main__":
    TABLE.write_text(table([judge(family) for family in families()]), encoding="utf-8")
