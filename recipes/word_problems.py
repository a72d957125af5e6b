"""What the recipes train on and decode: GSM-Symbolic's word problems and, if its folder is given, GSM8K's.

Rows become token tables, one file a part, and prompts of trajectories, with any model's tokenizer and chat template.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.models.load import load_tokenizer
from fewstep.models.text import decode_text, encode_prompt
from fewstep.tasks.answers import extract_answer
from fewstep.tasks.gsm8k import gsm8k_rows
from fewstep.tasks.gsm_symbolic import training_rows
from fewstep.train.examples import Examples, encode_rows
from fewstep.train.records import PromptRow

MAX_PROMPT, MAX_ANSWER = 256, 256
ROWS_PER_PART = 20_000
GSM8K_REPEATS = 10
"""Times that each of GSM8K's 7,473 training problems stands in the tables, beside hundreds of thousands made ones."""


# --- token tables ---


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of token tables: `count` rows of GSM-Symbolic by `seed`, or the rows of a GSM8K file.

    `tokenizer` is the folder of a model.
    """

    path: Path
    tokenizer: Path
    seed: int = 0
    count: int = 0
    gsm8k: Path | None = None

    def make(self) -> Path:
        """Write it, unless it is there."""
        if not self.path.exists():
            torch.set_num_threads(1)
            rows = training_rows(self.seed, self.count) if self.gsm8k is None else gsm8k_rows(self.gsm8k)
            tokenizer = load_tokenizer(self.tokenizer)
            examples = encode_rows(
                enumerate(rows, start=1), tokenizer, max_prompt=MAX_PROMPT, max_completion=MAX_ANSWER
            )
            with write_whole(self.path) as file:
                save_file(examples.tensors(), file)
        return self.path


def make_tables(
    folder: Path, tokenizer: Path, examples: int, *, seed: int, workers: int, gsm8k: Path | None = None
) -> None:
    """The missing parts of `examples` rows of GSM-Symbolic, and of GSM8K's training problems if its folder is given."""
    load_tokenizer(tokenizer)  # what is wrong with it is told once, before the workers
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for i, first in enumerate(range(0, examples, ROWS_PER_PART)):
        count = min(ROWS_PER_PART, examples - first)
        path = folder / f"part-{i:04d}-{count}.safetensors"
        for old in set(folder.glob(f"part-{i:04d}-*.safetensors")) - {path}:
            old.unlink()  # of another length, when --examples was another number
        parts.append(Part(path=path, tokenizer=tokenizer, seed=seed * 1_000_000 + i, count=count))
    if gsm8k is not None:
        parts.insert(0, Part(path=folder / "gsm8k.safetensors", tokenizer=tokenizer, gsm8k=gsm8k / "train.jsonl"))
    with Pool(min(workers, len(parts))) as pool:
        for done, path in enumerate(pool.imap_unordered(Part.make, parts), start=1):
            if done % 25 == 0 or done == len(parts):
                print(f"{path}: {done} of {len(parts)} parts", flush=True)


def load_examples(folder: Path, count: int | None = None) -> Examples:
    """All parts as one table: GSM-Symbolic's rows, or the first `count` of them, and GSM8K's repeated if there."""
    made = [Examples(**load_file(file), origins=()) for file in sorted(folder.glob("part-*.safetensors"))]
    real = [Examples(**load_file(file), origins=()) for file in folder.glob("gsm8k.safetensors")]
    if not made and not real:
        raise FewstepError(f"{folder} holds no token tables; make them with the recipe's stage `data`")
    if made and count is not None:
        made = [Examples.joined(made).head(count)]
    return Examples.joined([*made, *real * GSM8K_REPEATS])


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
