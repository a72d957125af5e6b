"""Token tables: rows that worker processes tokenize in parts, one file each, before a training reads them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.models.load import load_tokenizer
from fewstep.train.examples import Examples, encode_rows


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rows with more tokens in their prompt or completion are left out."""

    prompt: int
    completion: int


Rows = Callable[[], Iterable[Mapping[str, Any]]]
"""Makes the training rows of a part, in the worker that tokenizes them; a function or a partial of one."""


def write_tables(parts: Mapping[Path, Rows], tokenizer: Path, limits: Limits, *, workers: int = 1) -> None:
    """Tokenize the parts whose files are not there, each written whole; the folders are made.

    `tokenizer`: the folder of it or of a model. Progress is printed now and then. FewstepError if the tokenizer cannot
    be read, before any worker starts, or if no row of a part is within the limits.
    """
    load_tokenizer(tokenizer)
    write = partial(_write, tokenizer=tokenizer, limits=limits)
    if workers == 1:
        _watch(map(write, parts.items()), len(parts))
    else:
        with Pool(min(workers, len(parts))) as pool:
            _watch(pool.imap_unordered(write, parts.items()), len(parts))


def _watch(written: Iterable[Path], count: int) -> None:
    for done, path in enumerate(written, start=1):
        if done % 25 == 0 or done == count:
            print(f"{path}: {done} of {count} parts", flush=True)


def _write(part: tuple[Path, Rows], *, tokenizer: Path, limits: Limits) -> Path:
    path, rows = part
    if not path.exists():
        torch.set_num_threads(1)  # or the workers would wait for each other's
        examples = encode_rows(
            enumerate(rows(), start=1),
            load_tokenizer(tokenizer),
            max_prompt=limits.prompt,
            max_completion=limits.completion,
        )
        with write_whole(path) as temporary:
            save_file(examples.tensors(), temporary)
    return path


def read_tables(folder: Path, pattern: str = "*.safetensors") -> Examples | None:
    """The examples of the files that the pattern names, by name; None if there are none. FewstepError if one is no
    table.
    """
    parts = []
    for path in sorted(folder.glob(pattern)):
        try:
            parts.append(Examples(**load_file(path), origins=()))
        except Exception as error:  # safetensors raises its own, and Examples a TypeError for other names
            raise FewstepError(f"{path} is no token table: {error}; remove it, and make it again") from None
    return Examples.joined(parts) if parts else None
