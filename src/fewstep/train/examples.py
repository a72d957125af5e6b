"""Training rows as flat token tables that live on the training device.

Rows are JSONL or Parquet with `prompt`/`completion`, `messages` or `text` (the formats that trl reads).
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fewstep.errors import FewstepError
from fewstep.json_files import numbered_rows
from fewstep.models.rows import split_prompt_row, split_row
from fewstep.models.text import Message, encode_completion, encode_prompt


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
class Origin:
    """Where examples come from: rows of a file, or records of a folder, each with its `key` there."""

    source: str
    kind: Literal["line", "record"]
    keys: Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class Examples:
    """N pairs of prompt and completion (end-of-text included) as flat token ids and offsets [N + 1].

    `origins`: where they come from, one after the other, if that is known; error messages name examples by them.
    """

    prompt_ids: Tensor
    prompt_offsets: Tensor
    completion_ids: Tensor
    completion_offsets: Tensor
    origins: tuple[Origin, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """The tokens and offsets by name, which a file of tensors can hold: all but the origins."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def name(self, index: int) -> str:
        """An example as a sentence names it: `rows.jsonl line 3`."""
        left = index
        for origin in self.origins:
            if left < len(origin.keys):
                return f"{origin.source} {origin.kind} {origin.keys[left]}"
            left -= len(origin.keys)
        return f"example {index + 1}"

    def check_tokens(self, vocab_size: int) -> None:
        """FewstepError naming the first example with a token outside the vocabulary of `vocab_size` tokens."""
        for ids, offsets in ((self.prompt_ids, self.prompt_offsets), (self.completion_ids, self.completion_offsets)):
            outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
            if len(outside):
                example = int(torch.searchsorted(offsets, outside[0], right=True)) - 1
                raise FewstepError(
                    f"{self.name(example)} holds the token id {int(ids[outside[0]])}, and the network has {vocab_size} "
                    "tokens; the tokenizer does not fit it"
                )

    def __len__(self) -> int:
        return len(self.prompt_offsets) - 1

    def pairs(self) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and completion of each example."""
        (prompt_ids, prompts), (completion_ids, completions) = (
            (ids.tolist(), pairwise(offsets.tolist()))
            for ids, offsets in (
                (self.prompt_ids, self.prompt_offsets),
                (self.completion_ids, self.completion_offsets),
            )
        )
        for (a, b), (c, d) in zip(prompts, completions, strict=True):
            yield prompt_ids[a:b], completion_ids[c:d]

    def head(self, count: int) -> "Examples":
        """The first `count`, or all if there are fewer."""
        prompts, completions = self.prompt_offsets[: count + 1], self.completion_offsets[: count + 1]
        return Examples(
            self.prompt_ids[: prompts[-1]], prompts, self.completion_ids[: completions[-1]], completions, self.origins
        )

    def lengths(self) -> np.ndarray:
        """Prompt and completion lengths on the host, [N, 2]."""
        return torch.stack([self.prompt_offsets.diff(), self.completion_offsets.diff()], 1).cpu().numpy()

    def fingerprint(self) -> str:
        """A hash of all token ids and offsets, which differs for other data."""
        return fingerprint(self.prompt_ids, self.prompt_offsets, self.completion_ids, self.completion_offsets)

    @classmethod
    def joined(cls, parts: Sequence["Examples"]) -> "Examples":
        """The examples of all parts, one part after the other."""

        def of(name: str) -> tuple[Tensor, Tensor]:
            lengths = torch.cat([getattr(part, f"{name}_offsets").diff() for part in parts])
            offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            return torch.cat([getattr(part, f"{name}_ids") for part in parts]), offsets

        known = all(sum(len(origin.keys) for origin in part.origins) == len(part) for part in parts)
        origins = tuple(origin for part in parts for origin in part.origins) if known else ()
        return cls(*of("prompt"), *of("completion"), origins)

    @classmethod
    def from_ids(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> "Examples":
        """ValueError if there is nothing to learn from."""
        if not prompts or len(prompts) != len(completions):
            raise ValueError(
                f"need as many completions as prompts, and at least one; got {len(prompts)}, {len(completions)}"
            )
        prompt_ids, prompt_offsets = map(torch.from_numpy, ragged(prompts))
        completion_ids, completion_offsets = map(torch.from_numpy, ragged(completions))
        return cls(prompt_ids, prompt_offsets, completion_ids, completion_offsets)


def encode_rows(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str = "rows",
    max_prompt: int | None = None,
    max_completion: int | None = None,
    stop_token_ids: Sequence[int] = (),
) -> Examples:
    """Tokenize rows that come with their line numbers; those over a limit are left out.

    A completion ends with the tokenizer's end-of-text, unless its text ends with that or one of `stop_token_ids`.

    FewstepError if none is left, or naming `source` and line for a row that cannot be encoded.
    """
    prompts, completions, lines = [], [], []
    for line, row in rows:
        where = f"{source} line {line}"
        prompt, completion = split_row(row, where)
        try:
            prompt_ids = (
                encode_prompt(tokenizer, prompt, stop_token_ids=stop_token_ids) if prompt else [_begin(tokenizer)]
            )
        except FewstepError as error:
            raise FewstepError(f"{where}: {error}") from None
        completion_ids = encode_completion(tokenizer, completion, stop_token_ids)
        if not prompt and completion_ids[:1] == prompt_ids and len(completion_ids) > 1:
            completion_ids = completion_ids[1:]  # a text that begins with its begin-of-text
        if _exceeds(prompt_ids, max_prompt) or _exceeds(completion_ids, max_completion):
            continue
        prompts.append(prompt_ids)
        completions.append(completion_ids)
        lines.append(line)
    if not prompts:
        limits = [
            f"{limit} {part}"
            for limit, part in ((max_prompt, "prompt"), (max_completion, "completion"))
            if limit is not None
        ]
        within = f" within {' and '.join(limits)} tokens" if limits else ""
        raise FewstepError(f"{source} holds no training row{within}")
    return replace(Examples.from_ids(prompts, completions), origins=(Origin(source, "line", lines),))


def _exceeds(ids: Sequence[int], limit: int | None) -> bool:
    return limit is not None and len(ids) > limit


def _begin(tokenizer: PreTrainedTokenizerBase) -> int:
    begin = tokenizer.bos_token_id
    return tokenizer.eos_token_id if begin is None else begin


def cut_after_end(examples: Examples, eos_token_id: int, mask_token_id: int | None) -> Examples:
    """The examples whose completion has an end-of-text and no mask before it, cut there. FewstepError if none has."""
    prompts, completions = [], []
    for prompt_ids, ids in examples.pairs():
        if eos_token_id in ids and mask_token_id not in (kept := ids[: ids.index(eos_token_id) + 1]):
            prompts.append(prompt_ids)
            completions.append(kept)
    if not prompts:
        raise FewstepError(
            "no trajectory reaches its end-of-text, so there is no teacher text to train on; allow more new tokens "
            "when they are collected"
        )
    return Examples.from_ids(prompts, completions)


def prompts_in(path: Path, limit: int | None = None) -> list[str | list[Message]]:
    """What the first rows of a file ask: their prompt, or the messages up to an assistant's last. FewstepError for a
    row without them.
    """
    rows = islice(numbered_training_rows(path), limit)
    return [split_prompt_row(row, f"{path} line {line}")[0] for line, row in rows]


def numbered_training_rows(path: Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """Rows of a JSONL or Parquet file with their line numbers, from 1. FewstepError if it cannot be read."""
    if path.suffix != ".parquet":
        return numbered_rows(path)
    import pyarrow.parquet as parquet

    try:
        return enumerate(parquet.read_table(path).to_pylist(), start=1)
    except Exception as error:  # pyarrow and datetime raise what damaged bytes, odd times and durations spell
        raise FewstepError(f"could not read {path}: {error}") from error
