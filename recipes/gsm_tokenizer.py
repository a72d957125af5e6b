"""The tokenizer of the bundled models: byte-level BPE over GSM-Symbolic rows, single digits, 2,048 tokens.

python recipes/gsm_tokenizer.py src/fewstep/bundled/gsm-tokenizer
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fewstep.tasks.gsm_symbolic import INSTRUCTION, training_rows

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
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    in_pieces = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([in_pieces, to_bytes])
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
        tokenizer_object=tokenizer, pad_token=pad, eos_token=eos, mask_token=mask, bos_token=bos,
        additional_special_tokens=["<answer>"], chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def train_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """The tokenizer on the first training rows of TRAINING_SEED."""
    rows = training_rows(TRAINING_SEED, NUM_TRAINING_ROWS)
    return build_tokenizer((text for row in rows for text in (row["prompt"], row["completion"])), vocab_size)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(min=512)] = VOCAB_SIZE,
) -> None:
    """Train and save the tokenizer of the bundled models."""
    train_tokenizer(vocab_size).save_pretrained(folder)


if __name__ == "__main__":
    run_recipe(app)
