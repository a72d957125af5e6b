"""What the recipes train on and decode: GSM-Symbolic's word problems and, if its folder is given, GSM8K's.

Rows become token tables, one file a part, and prompts of trajectories, with any model's tokenizer and chat template.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.models.text import decode_text, encode_prompt
from fewstep.tasks.answers import extract_answer
from fewstep.tasks.gsm8k import gsm8k_rows
from fewstep.tasks.gsm_symbolic import training_rows
from fewstep.train.examples import Examples
from fewstep.train.records import PromptRow
from fewstep.train.token_tables import Limits, Rows, read_tables, write_tables

MAX_PROMPT, MAX_ANSWER = 256, 256
ROWS_PER_PART = 20_000
GSM8K_REPEATS = 10
"""Times that each of GSM8K's 7,473 training problems stands in the tables, beside hundreds of thousands made ones."""


# --- token tables ---


def make_tables(
    folder: Path, tokenizer: Path, examples: int, *, seed: int, workers: int, gsm8k: Path | None = None
) -> None:
    """The missing parts of `examples` rows of GSM-Symbolic, and of GSM8K's training problems if its folder is given."""
    parts: dict[Path, Rows] = {}
    if gsm8k is not None:
        parts[folder / "gsm8k.safetensors"] = partial(gsm8k_rows, gsm8k / "train.jsonl")
    for i, first in enumerate(range(0, examples, ROWS_PER_PART)):
        count = min(ROWS_PER_PART, examples - first)
        path = folder / f"part-{i:04d}-{count}.safetensors"
        for old in set(folder.glob(f"part-{i:04d}-*.safetensors")) - {path}:
            old.unlink()  # of another length, when --examples was another number
        parts[path] = partial(training_rows, seed * 1_000_000 + i, count)
    write_tables(parts, tokenizer, Limits(prompt=MAX_PROMPT, completion=MAX_ANSWER), workers=workers)


def load_examples(folder: Path, count: int | None = None) -> Examples:
    """All parts as one table: GSM-Symbolic's rows, or the first `count` of them, and GSM8K's repeated if there."""
    made, real = read_tables(folder, "part-*.safetensors"), read_tables(folder, "gsm8k.safetensors")
    found = [] if made is None else [made if count is None else made.head(count)]
    found += [] if real is None else [real] * GSM8K_REPEATS
    if not found:
        raise FewstepError(f"{folder} holds no token tables; make them with the recipe's stage `data`")
    return Examples.joined(found)


# --- prompts ---


def prompt_rows(
    tok: PreTrainedTokenizerBase, count: int, seed: int, *, gsm8k: Path | None = None, gsm8k_count: int = 0
) -> tuple[list[PromptRow], dict[str, float | None]]:
    """Training problems with their references, and the answers by id: `count` of GSM-Symbolic by `seed`, and the first
    of GSM8K if its folder is given. Those that are too long are left out.
    """
    symbolic = (row for row in training_rows(seed * 1_000_000) if row["kind"] == "cot")
    named = [(f"symbolic-{i}", row) for i, row in enumerate(islice(symbolic, count))]
    if gsm8k is not None:
        chosen = islice(gsm8k_rows(gsm8k / "train.jsonl"), gsm8k_count)
        named += [(f"gsm8k-{i}", row) for i, row in enumerate(chosen)]
    rows: list[PromptRow] = []
    answers: dict[str, float | None] = {}
    for row_id, row in named:
        prompt_ids = encode_prompt(tok, row["prompt"])
        reference_ids = [*tok.encode(row["completion"], add_special_tokens=False), tok.eos_token_id]
        if len(prompt_ids) <= MAX_PROMPT and len(reference_ids) <= MAX_ANSWER:
            rows.append(PromptRow(row_id, prompt_ids, reference_ids))
            answers[row_id] = extract_answer(row["completion"])
    return rows, answers


def keep_solved(
    tok: PreTrainedTokenizerBase, answers: dict[str, float | None], *, solved: bool = True
) -> Callable[[PromptRow, Output], bool]:
    """Which outputs a store keeps: those with the answer of their row, or all."""
    return lambda row, output: not solved or extract_answer(decode_text(tok, output.token_ids)) == answers[row.id]
