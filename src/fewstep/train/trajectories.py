"""Trajectories of a diffusion teacher: what each position became, at which pass, and the teacher's distribution then.

Axes: N = stored canvas positions of a record, K = stored top tokens, D = hidden width.

Ranks. `step_rank[i]` is the number, from 1, of the pass that finalised canvas position i. Rank 0 means not recorded:
either the position was given (`final_ids` holds the given token) or it was never finalised (`final_ids` holds the
mask token). The state after k passes is therefore always

    y_k[i] = final_ids[i] if step_rank[i] <= k else mask

from k = 0, the start, to k = the largest rank, the end. Records are cut after the last recorded position; beyond the
cut every state holds the mask. Ranks may have gaps (a pass that only committed a block finalised nothing).
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.train.record_shards import PromptRow, RecordStore, offsets_of
from fewstep.train.trajectory_shards import TrajectoryShards

__all__ = ["PromptRow", "Trajectory", "TrajectoryArrays", "TrajectoryStore"]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One record; see the module for ranks and the cut. Arrays share the memory of what they were read from."""

    id: str
    prompt_ids: np.ndarray
    final_ids: np.ndarray
    step_rank: np.ndarray
    canvas_length: int
    num_forwards: int
    mask_token_id: int
    reference_ids: np.ndarray | None = None
    topk_ids: np.ndarray | None = None
    topk_logp: np.ndarray | None = None
    log_tail: np.ndarray | None = None
    hidden: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class TrajectoryArrays:
    """n records as flat arrays: record i holds the rows `offsets[i] : offsets[i + 1]`, in the order of the prompts.

    `prompt_ids`, `final_ids`, `reference_ids`: int32. `step_rank`: int16. Offsets: int64 [n + 1]. `canvas_length`,
    `num_forwards`: int32 [n]. `has_reference`: bool [n]. One row per stored position: `topk_ids` int16 (int32 if the
    vocabulary exceeds 32768) [., K], `topk_logp` float16 [., K], `log_tail` float16 [.], or `hidden` float16 or
    bfloat16 bits as int16 [., D]. Log-probabilities are finite, at least -65504. Rows of rank 0 are zeros and mean
    nothing.
    """

    ids: list[str]
    prompt_ids: np.ndarray
    prompt_offsets: np.ndarray
    final_ids: np.ndarray
    step_rank: np.ndarray
    offsets: np.ndarray
    reference_ids: np.ndarray
    reference_offsets: np.ndarray
    has_reference: np.ndarray
    canvas_length: np.ndarray
    num_forwards: np.ndarray
    mask_token_id: int
    topk_ids: np.ndarray | None = None
    topk_logp: np.ndarray | None = None
    log_tail: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_dtype: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Trajectory:
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        rows = slice(self.offsets[index], self.offsets[index + 1])
        prompt = slice(self.prompt_offsets[index], self.prompt_offsets[index + 1])
        reference = slice(self.reference_offsets[index], self.reference_offsets[index + 1])
        return Trajectory(
            id=self.ids[index],
            prompt_ids=self.prompt_ids[prompt],
            final_ids=self.final_ids[rows],
            step_rank=self.step_rank[rows],
            canvas_length=int(self.canvas_length[index]),
            num_forwards=int(self.num_forwards[index]),
            mask_token_id=self.mask_token_id,
            reference_ids=self.reference_ids[reference] if self.has_reference[index] else None,
            topk_ids=None if self.topk_ids is None else self.topk_ids[rows],
            topk_logp=None if self.topk_logp is None else self.topk_logp[rows],
            log_tail=None if self.log_tail is None else self.log_tail[rows],
            hidden=None if self.hidden is None else self.hidden[rows],
        )

    def hidden_tensor(self) -> Tensor:
        """The hidden rows in their own type, [., D], sharing memory. ValueError if the store holds top-k."""
        if self.hidden is None:
            raise ValueError("these trajectories hold top-k log-probabilities, not hidden rows")
        rows = torch.from_numpy(self.hidden)
        return rows.view(torch.bfloat16) if self.hidden_dtype == "bfloat16" else rows


class TrajectoryStore(RecordStore[TrajectoryShards]):
    """A folder of trajectories, for reading."""

    def __init__(self, folder: str | Path, *, teacher_hash: str | None = None) -> None:
        """FewstepError if the folder is no store of this schema, unfinished, or made by another than `teacher_hash`."""
        super().__init__(folder, TrajectoryShards, teacher_hash=teacher_hash)
        self.teacher = self.files.teacher
        self.distribution = self.files.distribution

    def __iter__(self) -> Iterator[Trajectory]:
        """Every record, one shard in memory at a time. FewstepError for a damaged shard."""
        for index, facts in zip(self.finished, self.facts, strict=True):
            arrays = self._load([index], [facts], num_threads=1)
            for record in range(len(arrays)):
                yield arrays[record]

    def load(self, *, num_threads: int | None = None) -> TrajectoryArrays:
        """All records in flat arrays, shards read in parallel. FewstepError for a damaged shard."""
        return self._load(self.finished, self.facts, num_threads=num_threads)

    def _load(
        self, shards: Sequence[int], facts: Sequence[Mapping[str, int]], *, num_threads: int | None
    ) -> TrajectoryArrays:
        counted_by = {
            **dict.fromkeys(("prompt_lengths", "lengths", "reference_lengths"), "num_records"),
            **dict.fromkeys(("has_reference", "canvas_length", "num_forwards"), "num_records"),
            **dict.fromkeys(("final_ids", "step_rank", *self.files.columns), "num_positions"),
            "prompt_ids": "num_prompt_tokens",
            "reference_ids": "num_reference_tokens",
        }
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = dict.fromkeys(counted_by, (np.int32, ()))
        shapes |= {"step_rank": (np.int16, ()), "has_reference": (np.bool_, ())}
        shapes |= {
            name: (dtype, () if name == "log_tail" else (width,)) for name, (dtype, width) in self.files.columns.items()
        }
        starts = {name: offsets_of([shard[fact] for shard in facts]) for name, fact in counted_by.items()}
        try:
            arrays = {
                name: np.empty((int(starts[name][-1]), *row), dtype=dtype) for name, (dtype, row) in shapes.items()
            }
        except (MemoryError, ValueError) as error:
            raise FewstepError(f"the trajectories in {self.folder} do not fit the memory, or are damaged") from error

        def fill(number: int) -> list[str]:
            part = self.files.read(shards[number])
            for name, array in arrays.items():
                array[starts[name][number] : starts[name][number + 1]] = part[name]
            return part["ids"]

        with ThreadPoolExecutor(max_workers=num_threads) as readers:
            ids = [name for part in readers.map(fill, range(len(shards))) for name in part]
        return TrajectoryArrays(
            ids=ids,
            prompt_offsets=offsets_of(arrays.pop("prompt_lengths")),
            offsets=offsets_of(arrays.pop("lengths")),
            reference_offsets=offsets_of(arrays.pop("reference_lengths")),
            mask_token_id=self.teacher.mask_token_id,
            hidden_dtype=self.distribution.dtype if self.distribution.kind == "hidden" else None,
            **arrays,
        )
