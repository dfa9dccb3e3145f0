"""The text of the exported script, in pieces: which of them stand in it, `script` decides."""

from __future__ import annotations

READ_RECORDS = '''
def read_records(path):
    """The records of a file: a JSON object a line, or one JSON array."""
    text = Path(path).read_bytes().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.split("\\n") if line.strip()]
'''

# --- chats

READ_CHAT = '''
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}


def read_chat(record):
    """The turns of a record, in any of the usual formats."""
    lists = (record.get("messages"), record.get("conversations"), record.get("prompt"))
    for turn in [turn for turns in lists if isinstance(turns, list) for turn in turns]:
        if turn.get("tool_calls") or turn.get("reasoning_content"):
            sys.exit(f"this script reads no tool calls and no reasoning apart: {record}")
    if record.get("tools"):
        sys.exit(f"this script reads no tools: {record}")
    if record.get("messages") is not None:
        turns = [(turn["role"], turn["content"]) for turn in record["messages"]]
    elif record.get("conversations") is not None:  # ShareGPT
        turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
        if record.get("system") and turns[0][0] != "system":
            turns.insert(0, ("system", record["system"]))
    elif record.get("output") is not None:  # Alpaca
        turns = [("system", record["system"])] if record.get("system") else []
        for question, answer in record.get("history") or []:
            turns += [("user", question), ("assistant", answer)]
        question = "\\n".join(filter(None, (record["instruction"], record.get("input"))))
        turns += [("user", question), ("assistant", record["output"])]
    elif isinstance(record["prompt"], list):
        both = record["prompt"] + record["completion"]
        turns = [(turn["role"], turn["content"]) for turn in both]
    else:
        turns = [("user", record["prompt"]), ("assistant", record["completion"])]
    for role, content in turns:
        if role not in ROLES or not isinstance(content, str):
            sys.exit(f"this script reads plain texts of system, user and assistant, not {record}")
    return [{"role": ROLES[role], "content": content} for role, content in turns]
'''

ENCODE_CHAT = '''
EMPTY_BLOCK = r"\\s*<([^<>/]+)>\\s*</\\1>\\s*"


def learned_spans(tokenizer, chat):
    """A chat as text, and the spans that are learned: what the model has to say, to its end.

    An answer is found by putting a word in its place: what stands around it is the template's.
    """

    def render(messages, **options):
        if not messages:
            return ""
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    whole, spans, word = render(chat), [], "Zq7xW"
    special = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    special = "|".join(map(re.escape, special)) or "(?!)"
    for index, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        probe = [*chat[:index], {**turn, "content": word}, *chat[index + 1 :]]
        head, _, tail = render(probe).partition(word)
        content = whole[len(head) : len(whole) - len(tail)]
        if whole != head + content + tail or content.strip() != turn["content"].strip():
            sys.exit(f"the chat template changes an answer, or its own text with it: {chat}")
        # What ends a turn also stands where the chat ends with it; what begins the next does not.
        at_end = render(probe[: index + 1]).partition(word)[2]
        ending = re.match(rf"\\s*(?:{special})+", os.path.commonprefix([tail, at_end]))
        if ending is None:
            sys.exit(f"the chat template has no token that ends an answer: {chat}")
        end, eos = ending.group(), tokenizer.eos_token
        if eos and eos in end:
            end = end[: end.index(eos) + len(eos)]
        # An answer begins where its prompt ends; an empty reasoning block is none of it.
        prompt = render(chat[:index], add_generation_prompt=True)
        written = head.removeprefix(prompt)
        is_answer = head.startswith(prompt) and not re.fullmatch(EMPTY_BLOCK, written)
        start = len(prompt) if is_answer else len(head)
        spans.append((start, len(head) + len(content) + len(end)))
    return whole, spans


def encode_chat(tokenizer, chat):
    """A chat in tokens; what is not learned has the label -100."""
    if re.search(r"\\{%[-+]?\\s*generation\\s*[-+]?%\\}", tokenizer.get_chat_template()):
        encoded = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, learned = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if yes else -100 for token, yes in zip(tokens, learned, strict=True)]
        return {"input_ids": tokens, "labels": labels}
    text, spans = learned_spans(tokenizer, chat)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [-100] * len(tokens)
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= end]
        if inside:
            labels[inside[0] : inside[-1] + 1] = tokens[inside[0] : inside[-1] + 1]
        for a, b in offsets:
            if (a < start < b and text[a:start].strip()) or (a < end < b and text[end:b].strip()):
                sys.exit(f"a token holds the border of an answer: {chat}")
    return {"input_ids": tokens, "labels": labels}


def load_samples(path, tokenizer, max_length, limit=None):
    """The chats of a file in tokens, cut on the right; without those that have nothing to learn."""
    samples = []
    for record in read_records(path)[:limit]:
        sample = encode_chat(tokenizer, read_chat(record))
        sample = {key: values[:max_length] for key, values in sample.items()}
        if any(label != -100 for label in sample["labels"][1:]):
            samples.append(sample)
    return samples
'''

# --- documents

LOAD_DOCUMENTS = '''
def load_samples(path, tokenizer, max_length, limit=None):
    """Blocks of tokens: the texts one after the other, each with the end-of-text token."""
    if Path(path).suffix.lower() == ".txt":
        texts = [Path(path).read_bytes().decode("utf-8-sig")]
    else:
        texts = [record["text"] for record in read_records(path)[:limit]]
    tokens = []
    for text in texts:
        tokens += tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    blocks = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]
'''

# --- batches

PAD = '''
def pad(samples, pad_id):
    """A batch, padded on the right to a multiple of 8 tokens."""
    length = -(-max(len(sample["input_ids"]) for sample in samples) // 8) * 8

    def rows(values, fill):
        return torch.tensor([row + [fill] * (length - len(row)) for row in values])

    return {
        "input_ids": rows([sample["input_ids"] for sample in samples], pad_id),
        "attention_mask": rows([[1] * len(sample["input_ids"]) for sample in samples], 0),
        "labels": rows([sample["labels"] for sample in samples], -100),
    }
'''

EARLY_STOPPING = '''
class EarlyStopping(TrainerCallback):
    """Ends the training once the evaluation loss has not improved for a while."""

    best, without_gain = None, 0

    def on_evaluate(self, args, state, control, metrics, **_):
        loss = metrics["eval_loss"]
        if self.best is None or self.best - loss > EARLY_STOPPING_THRESHOLD:
            self.best, self.without_gain = loss, 0
        else:
            self.without_gain += 1
        if self.without_gain >= EARLY_STOPPING_PATIENCE:
            control.should_training_stop = True
'''

LORA_PLUS = '''
class LoraPlusTrainer(Trainer):
    """LoRA+: the B matrices learn faster than the A matrices."""

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        of_b = {id(p) for name, p in self.model.named_parameters() if ".lora_B." in name}
        for group in list(optimizer.param_groups) if is_new else []:
            fast = [p for p in group["params"] if id(p) in of_b]
            if fast:
                group["params"] = [p for p in group["params"] if id(p) not in of_b]
                rate = group["lr"] * LORAPLUS_LR_RATIO
                optimizer.add_param_group({**group, "params": fast, "lr": rate})
        return optimizer
'''

START = """
if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("this script takes no arguments: its settings stand at its top")
    main()
"""

# --- the steps of main()

OWN_FOLDER = """
output = Path(OUTPUT_DIR)
if output.is_dir() and any(output.iterdir()):
    sys.exit(f"{output} is not empty: move it away, or change OUTPUT_DIR")
"""

OWN_FOLDER_OR_RESUMED = """
output = Path(OUTPUT_DIR)
if output.is_dir() and any(output.iterdir()):
    resumed = Path(RESUME_FROM_CHECKPOINT or "/").resolve()
    if output.resolve() not in resumed.parents:
        sys.exit(
            f"{output} is not empty: move it away, change OUTPUT_DIR, or go on from a "
            "checkpoint in it with RESUME_FROM_CHECKPOINT"
        )
"""

MAX_LENGTH = """
positions = getattr(model.config, "max_position_embeddings", None) or MAX_SEQ_LENGTH
max_length = min(MAX_SEQ_LENGTH, positions)
"""

FOUR_BITS = """
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=dtype,
)
"""

FOUR_BITS_ON_CPU = """
# To evaluate, some CPUs would pack the weights in an order in which they can't be trained.
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
"""

PEFT_FILE = """
settings = json.loads(Path(PEFT_CONFIG_PATH).read_bytes())
for key in ("peft_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"):
    settings.pop(key, None)
settings |= {"task_type": "CAUSAL_LM", "inference_mode": False}
"""

SPLIT = """
size = max(1, round(len(train_set) * EVAL_RATIO))
chosen = set(random.Random(SEED).sample(range(len(train_set)), size))
eval_set = [train_set[i] for i in sorted(chosen)]
train_set = [sample for i, sample in enumerate(train_set) if i not in chosen]
"""

FIXED_ORDER = """
if not RESHUFFLE:  # one order for all epochs, drawn by the seed
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(SEED))
    train_set = [train_set[i] for i in order.tolist()]
"""
