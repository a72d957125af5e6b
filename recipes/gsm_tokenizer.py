"""The tokenizer of the bundled models: byte-level BPE over GSM-Symbolic rows, single digits, 2,048 tokens.

python recipes/gsm_tokenizer.py src/fewstep/bundled/gsm-tokenizer
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from transformers import PreTrainedTokenizerFast

from fewstep.models.fresh import fresh_tokenizer
from fewstep.tasks.gsm_symbolic import INSTRUCTION, training_rows

VOCAB_SIZE = 2048
TRAINING_SEED = 700_000_000
NUM_TRAINING_ROWS = 60_000
MAX_PROMPT_TOKENS = 160
MAX_ANSWER_TOKENS = 256

# An operator between numbers with its two spaces, one digit, one line break, a word with the space before it (and the
# space behind it if a digit follows), another sign, spaces.
PIECES = r" [-+*/=×÷x] (?=[\d(])|\d|\n| ?\p{L}+(?: (?=\d))?| ?[^\s\p{L}\d]| +|\s"


def build_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train on `texts`."""
    # Nine prompts in ten end with the instruction; as one token it leaves room for longer questions.
    return fresh_tokenizer(texts, vocab_size, pieces=PIECES, whole=[INSTRUCTION], normalises=True, trims=True)


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
