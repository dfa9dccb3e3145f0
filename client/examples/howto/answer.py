"""Ask a model every question of a file, before and after training, and write the answers.

The questions come as training data does: one JSON object a line with ``messages``. All messages
before the last one of the assistant make the question, and that last one is the expected answer.
Decoding is greedy, so the same model always gives the same answers.
"""

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

# Beyond the longest expected answer no answer can be right; this much more shows how it goes on.
_SPARE_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """One question of the file.

    Attributes:
        messages: The chat up to the answer.
        text: What the user asked last.
        expected: The answer to compare with.
    """

    messages: list[dict[str, str]]
    text: str
    expected: str


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read the questions of a JSON Lines file.

    Args:
        path: The file.
        limit: How many questions to read at most; all of them if None.

    Returns:
        The questions, in the order of the file.

    Raises:
        ValueError: If a line is not in the ``messages`` format, or there is none.
    """
    questions: list[Question] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(questions) >= limit:
                break
            if line.strip():
                try:
                    questions.append(_parse(line))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}:{number}: not a messages line: {error}") from error
    if not questions:
        raise ValueError(f"{path}: no questions")
    return questions


def _parse(line: str) -> Question:
    """Turn one line of the file into a question."""
    messages = cast("list[dict[str, str]]", json.loads(line)["messages"])
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("no message of the assistant")
    last = len(roles) - 1 - roles[::-1].index("assistant")
    if "user" not in roles[:last]:
        raise ValueError("no message of the user before the last one of the assistant")
    asked = [message["content"] for message in messages[:last] if message["role"] == "user"]
    return Question(messages[:last], asked[-1], messages[last]["content"])


class Answerer:
    """A loaded chat model that answers questions in batches.

    Attributes:
        tokenizer: The tokenizer, padding on the left so that all answers begin in one column.
        model: The model, in float32 on the GPU if there is one.
    """

    def __init__(self, model_dir: Path) -> None:
        """Load a model.

        Args:
            model_dir: A folder with a chat model and its tokenizer.
        """
        # Imported late, so that a wrong argument or file is reported at once, and by name because
        # transformers and peft are only partly typed.
        self._torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(model_dir))
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(model_dir), dtype=self._torch.float32
        )
        self.model: Any = model.to(self._device).eval()

    def add_adapter(self, adapter_dir: Path) -> None:
        """Put a trained adapter on the model.

        Args:
            adapter_dir: The folder of the adapter.
        """
        peft: Any = importlib.import_module("peft")
        adapted: Any = peft.PeftModel.from_pretrained(self.model, str(adapter_dir))
        # Folding the adapter into the weights spares hundreds of small products at each token,
        # about a quarter of the time. Kinds of adapter that are not weights stay as they are.
        fold: Any = getattr(adapted, "merge_and_unload", None)
        self.model = (adapted if fold is None else fold()).eval()

    def longest_answer(self, questions: list[Question]) -> int:
        """Return how many tokens the longest expected answer has."""
        answers = [question.expected for question in questions]
        encoded: Any = self.tokenizer(answers, add_special_tokens=False)
        return max(len(ids) for ids in encoded["input_ids"])

    def answer(
        self,
        questions: list[Question],
        *,
        max_new_tokens: int,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> list[str]:
        """Answer questions greedily.

        Args:
            questions: The questions.
            max_new_tokens: How long an answer may get.
            batch_size: How many questions to answer at a time.
            progress: Called with the number of questions answered so far.

        Returns:
            The answers, in the order of the questions.
        """
        prompts: list[str] = [
            self.tokenizer.apply_chat_template(
                question.messages, tokenize=False, add_generation_prompt=True
            )
            for question in questions
        ]
        # Questions of like length go together, since padding costs as much as text.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].encode()))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, text in zip(
                chosen, self._generate([prompts[i] for i in chosen], max_new_tokens), strict=True
            ):
                answers[index] = text
            progress(start + len(chosen))
        return answers

    def _generate(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """Answer one batch of prompts."""
        # The template has put in every special token already.
        batch: Any = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self._device)
        with self._torch.inference_mode():
            output: Any = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                eos_token_id=self._end_tokens(),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        new: Any = output[:, batch["input_ids"].shape[1] :]
        return cast("list[str]", self.tokenizer.batch_decode(new, skip_special_tokens=True))

    def _end_tokens(self) -> list[int]:
        """Return the tokens that end an answer.

        A chat model may name its end of text in one place and its end of turn in the other.
        """
        named: Any = self.model.generation_config.eos_token_id
        ids: list[Any] = [*named] if isinstance(named, list) else [named]
        ids.append(self.tokenizer.eos_token_id)
        return sorted({int(token) for token in ids if token is not None})


def _counter(label: str, total: int) -> Callable[[int], None]:
    """Return a function that rewrites one progress line on standard error."""

    def show(done: int) -> None:
        if sys.stderr.isatty():
            print(f"\ranswering {label}: {done}/{total}", end="", file=sys.stderr, flush=True)
            if done == total:
                print(file=sys.stderr)
        elif done == total:
            print(f"answering {label}: {done}/{total}", file=sys.stderr)

    return show


def _positive(text: str) -> int:
    """Parse a number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    """Answer the questions and write them with their answers.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Answer questions before and after training.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--adapter", type=Path, help="folder of the trained adapter")
    trained.add_argument("--after-model", type=Path, help="folder of the trained full model")
    parser.add_argument("--questions", type=Path, required=True, help="JSON Lines file")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--limit", type=_positive, help="answer only the first questions")
    parser.add_argument(
        "--max-new-tokens",
        type=_positive,
        help="longest answer, in tokens; default: a little more than the longest expected one",
    )
    parser.add_argument("--batch-size", type=_positive, default=20)
    options = parser.parse_args()
    try:
        questions = read_questions(options.questions, options.limit)
    except (OSError, ValueError) as error:
        print(f"answer: {error}", file=sys.stderr)
        return 1

    def ask(answerer: Answerer, label: str) -> list[str]:
        return answerer.answer(
            questions,
            max_new_tokens=options.max_new_tokens
            or answerer.longest_answer(questions) + _SPARE_TOKENS,
            batch_size=options.batch_size,
            progress=_counter(label, len(questions)),
        )

    # Standard error is for the progress line, not for what the libraries will drop one day.
    warnings.simplefilter("ignore", FutureWarning)
    answerer = Answerer(options.model)
    after: list[str] | None = None
    before = ask(answerer, "before")
    if options.adapter is not None:
        answerer.add_adapter(options.adapter)
        after = ask(answerer, "after")
    elif options.after_model is not None:
        # The old model is let go first: two of them may not fit in memory.
        del answerer
        after = ask(Answerer(options.after_model), "after")
    rows = [
        {
            "question": question.text,
            "expected": question.expected,
            "before": before[index].strip(),
            "after": None if after is None else after[index].strip(),
        }
        for index, question in enumerate(questions)
    ]
    options.out.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
