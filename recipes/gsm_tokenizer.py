"""The tokenizer of the bundled models: byte-level BPE over GSM-Symbolic rows, single digits, 2,048 tokens.

Run ``python recipes/gsm_tokenizer.py src/fewstep/bundled/gsm-tokenizer`` to make the folder and print how many tokens
questions and answers take.
"""

import argparse
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fewstep.tasks.gsm_symbolic import INSTRUCTION, make_problems, training_rows

SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>", "<bos>", "<answer>")  # ids 0 to 4
VOCAB_SIZE = 2048
TRAINING_SEED = 700_000_000
NUM_TRAINING_ROWS = 60_000
MAX_PROMPT_TOKENS = 160
MAX_ANSWER_TOKENS = 256

# An operator between numbers with its two spaces, one digit, one line break, a word with the space before it (and the
# space behind it if a digit follows), another sign, spaces.
PIECES = r" [-+*/=×÷x] (?=[\d(])|\d|\n| ?\p{L}+(?: (?=\d))?| ?[^\s\p{L}\d]| +|\s"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<bos>' + message['content'] | trim + '<answer>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ message['content'] | trim + '<eos>' }}"
    "{%- else -%}{{ raise_exception('Only the roles user and assistant are known.') }}{%- endif -%}"
    "{%- endfor -%}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train on `texts`. Ids 0 to 4 are SPECIAL_TOKENS, the 256 bytes follow, then what is frequent."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Nine prompts in ten end with this sentence; as one token it leaves room for longer questions.
    tokenizer.add_tokens([AddedToken(INSTRUCTION, normalized=False)])
    pad, eos, mask, bos, _ = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        mask_token=mask,
        bos_token=bos,
        additional_special_tokens=["<answer>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """The tokenizer on the first training rows of TRAINING_SEED."""
    rows = training_rows(TRAINING_SEED, NUM_TRAINING_ROWS)
    return build_tokenizer((text for row in rows for text in (row["prompt"], row["completion"])), vocab_size)


def fits(tokenizer: PreTrainedTokenizerFast) -> Callable[[str, str], bool]:
    """For `training_rows`: whether prompt (with <bos> and <answer>) and answer (with <eos>) keep to the two limits."""

    def is_short(prompt: str, completion: str) -> bool:
        prompt_ids, answer_ids = tokenizer([prompt, completion]).input_ids
        return len(prompt_ids) + 2 <= MAX_PROMPT_TOKENS and len(answer_ids) + 1 <= MAX_ANSWER_TOKENS

    return is_short


def length_report(tokenizer: PreTrainedTokenizerFast, num_rows: int = 20_000) -> str:
    """Quantiles of prompt tokens (with <bos> and <answer>) and answer tokens (with <eos>) of solved problems."""
    rows = [row for row in islice(training_rows(TRAINING_SEED + 1), num_rows) if row["kind"] == "cot"]
    held_out = make_problems("heldout", 500)
    counts = {
        "prompt": [2 + len(ids) for ids in tokenizer([row["prompt"] for row in rows]).input_ids],
        "answer": [1 + len(ids) for ids in tokenizer([row["completion"] for row in rows]).input_ids],
        "held-out prompt": [2 + len(ids) for ids in tokenizer([problem.question for problem in held_out]).input_ids],
    }
    lines = []
    for name, lengths in counts.items():
        lengths.sort()
        shares = (0.5, 0.9, 0.99, 0.999, 1.0)
        quantiles = ", ".join(f"{share:.1%}: {lengths[max(0, int(share * len(lengths)) - 1)]}" for share in shares)
        limit = MAX_ANSWER_TOKENS if name == "answer" else MAX_PROMPT_TOKENS
        over = sum(length > limit for length in lengths) / len(lengths)
        mean = sum(lengths) / len(lengths)
        lines.append(f"{name}: mean {mean:.1f}, {quantiles}; over {limit}: {over:.3%}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and save the tokenizer of the bundled models.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.vocab_size)
    tokenizer.save_pretrained(arguments.folder)
    print(length_report(tokenizer))


if __name__ == "__main__":
    main()
