"""Training rows as flat token tables that live on the training device.

Rows are JSONL or Parquet with `prompt`/`completion`, `messages` or `text` (the formats that trl reads).
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.files import read_rows
from fewstep.models.text import encode_prompt


def ragged(sequences: Sequence[Sequence[int]], dtype: Any = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """Flat values and offsets [N + 1] of N sequences."""
    offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    flat = np.fromiter((item for sequence in sequences for item in sequence), dtype=dtype, count=int(offsets[-1]))
    return flat, offsets


def fingerprint(*tensors: Tensor) -> str:
    """A short hash over types, shapes and values."""
    digest = hashlib.blake2b(digest_size=12)
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Examples:
    """N pairs of prompt and completion (end-of-text included) as flat token ids and offsets [N + 1]."""

    prompt_ids: Tensor
    prompt_offsets: Tensor
    completion_ids: Tensor
    completion_offsets: Tensor

    def __len__(self) -> int:
        return len(self.prompt_offsets) - 1

    def to(self, device: torch.device) -> "Examples":
        return Examples(
            self.prompt_ids.to(device),
            self.prompt_offsets.to(device),
            self.completion_ids.to(device),
            self.completion_offsets.to(device),
        )

    def lengths(self) -> np.ndarray:
        """Prompt and completion lengths on the host, [N, 2]."""
        return torch.stack([self.prompt_offsets.diff(), self.completion_offsets.diff()], 1).cpu().numpy()

    def fingerprint(self) -> str:
        """A hash of all token ids and offsets: other data, another fingerprint."""
        return fingerprint(self.prompt_ids, self.prompt_offsets, self.completion_ids, self.completion_offsets)

    @classmethod
    def from_ids(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> "Examples":
        """ValueError if there is nothing to learn from."""
        if not prompts or len(prompts) != len(completions):
            raise ValueError(
                f"need as many completions as prompts, and at least one; got {len(prompts)}, {len(completions)}"
            )
        return cls(*(torch.from_numpy(part) for pair in (ragged(prompts), ragged(completions)) for part in pair))


def split_row(row: Mapping[str, Any], where: str) -> tuple[str | list[dict[str, str]], str]:
    """Prompt and completion of one row. FewstepError naming `where`, file and line, if it lacks them."""
    prompt: Any
    if "messages" in row:
        messages = list(row["messages"])
        if not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in messages):
            raise FewstepError(f"{where}: every message needs role and content")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise FewstepError(f"{where}: messages must end with one of the assistant, after at least one other")
        prompt, completion = messages[:-1], messages[-1]["content"]
    elif "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
    elif "text" in row:
        prompt, completion = "", row["text"]
    else:
        has = ", ".join(map(repr, row)) or "none"
        raise FewstepError(
            f"{where}: a training row needs prompt and completion, messages, or text; its fields are: {has}"
        )
    if not isinstance(completion, str) or not isinstance(prompt, str | list):
        raise FewstepError(f"{where}: what is to be learnt must be text, got {type(completion).__name__}")
    return prompt, completion


def encode_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "rows",
    max_prompt: int | None = None,
    max_completion: int | None = None,
) -> Examples:
    """Tokenize rows; those over a limit are left out (FewstepError if none is left). Line numbers count from 1."""
    prompts, completions = [], []
    for line, row in enumerate(rows, start=1):
        prompt, completion = split_row(row, f"{source} line {line}")
        prompt_ids = encode_prompt(tokenizer, prompt) if prompt else [_begin(tokenizer)]
        completion_ids = [*tokenizer.encode(completion, add_special_tokens=False), tokenizer.eos_token_id]
        if (max_prompt and len(prompt_ids) > max_prompt) or (max_completion and len(completion_ids) > max_completion):
            continue
        prompts.append(prompt_ids)
        completions.append(completion_ids)
    if not prompts:
        limits = f" within {max_prompt} prompt and {max_completion} completion tokens"
        raise FewstepError(f"{source} holds no training row{limits if max_prompt or max_completion else ''}")
    return Examples.from_ids(prompts, completions)


def _begin(tokenizer: PreTrainedTokenizerBase) -> int:
    begin = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def read_training_rows(path: Path) -> Iterable[Mapping[str, Any]]:
    """Rows of a JSONL or Parquet file. FewstepError if it cannot be read."""
    if path.suffix != ".parquet":
        return read_rows(path)
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise FewstepError(f"could not read {path}: {error}") from error
