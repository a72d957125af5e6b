"""Trajectories of a diffusion teacher on disk: what each position became, at which pass, and the teacher's distribution
then; and the table of them that CDLM trains on.

Axes: G = canvas positions of an output, N = stored canvas positions of a record, K = stored top tokens, D = hidden
width.

Ranks. `step_rank[i]` is the number, from 1, of the pass that finalised canvas position i. Rank 0 means not recorded:
either the position was given (`final_ids` holds the given token) or it was never finalised (`final_ids` holds the
mask token). The state after k passes is therefore always

    y_k[i] = final_ids[i] if step_rank[i] <= k else mask

from k = 0, the start, to k = the largest rank, the end. Records are cut after the last recorded position; beyond the
cut every state holds the mask. Ranks may have gaps (a pass that only committed a block finalised nothing).

The shards are those of `records`. Ranks are a list column as token ids are. The distribution at the pass that finalised
a position, one row per stored position, is a binary column per array, little-endian and row-major.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.train.examples import Examples
from fewstep.train.records import (
    PromptRow,
    RecordShards,
    RecordStore,
    check_range,
    concatenated,
    list_column_of,
    offsets_of,
    references_of,
)
from fewstep.train.trajectory_table import HiddenDistributions, TopDistributions, TrajectoryTable
from fewstep.values import Count, check_fields

OF_STUDENT = "states_of"
"""Key among the decoding settings in the manifest of a relabelled store: the hash of the student that decoded."""

_FLOAT16_LOWEST = float(np.finfo(np.float16).min)
_LARGEST_RANK = int(np.iinfo(np.int16).max)
_MOST_TOKENS = 1 << 31

_ROUNDING = 0.01
"""By how much a log-probability of 0 may be above it once it is rounded."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the teacher's distribution is stored: its top `width` tokens with the mass of the rest, or hidden rows.

    `top_k` needs no head, is small, and works from a larger teacher. `hidden` keeps rows after the final norm, `width`
    wide, from which the teacher's own head rebuilds the whole distribution.
    """

    kind: Literal["top_k", "hidden"] = "top_k"
    width: Count = 64
    dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "hidden"):
            raise FewstepError(f"a distribution is stored as top_k or hidden, got {self.kind!r}")
        check_fields(self, "a stored distribution")
        if self.dtype not in (("float16",) if self.kind == "top_k" else ("float16", "bfloat16")):
            raise FewstepError(f"a distribution of kind {self.kind} cannot be stored as {self.dtype!r}; use float16")

    def columns(self, vocab_size: int) -> dict[str, tuple[np.dtype[Any], int]]:
        """Element type and row width of each stored array."""
        if self.kind == "hidden":
            # numpy has no bfloat16: its 16 bits are kept as an integer
            return {"hidden": (np.dtype("<f2" if self.dtype == "float16" else "<i2"), self.width)}
        token = np.dtype("<i2" if vocab_size <= 2**15 else "<i4")
        half = np.dtype("<f2")
        return {"topk_ids": (token, self.width), "topk_logp": (half, self.width), "log_tail": (half, 1)}


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Whose trajectories these are: the hash of the weights, the two facts that readers need of the vocabulary, and the
    tokens that end an answer.
    """

    hash: str
    vocab_size: int
    mask_token_id: int
    stop_token_ids: tuple[int, ...] = ()


class TrajectoryShards(RecordShards[Output]):
    """Records of a diffusion decoding that recorded its distributions."""

    kind: ClassVar[str] = "diffusion trajectories"
    maker: ClassVar[str] = "teacher"
    counts: ClassVar[tuple[str, ...]] = ("num_positions",)

    def _describe(self, manifest: Mapping[str, Any]) -> None:
        for name in ("vocab_size", "mask_token_id"):
            if type(manifest[name]) is not int:
                raise TypeError(f"{name} is {manifest[name]!r:.40}, no integer")
        if not 0 <= manifest["mask_token_id"] < manifest["vocab_size"] < _MOST_TOKENS:
            raise ValueError(f"there is no token {manifest['mask_token_id']} among {manifest['vocab_size']}")
        self.distribution = Distribution(**manifest["distribution"])
        self.teacher = Teacher(
            hash=self.maker_hash, vocab_size=manifest["vocab_size"], mask_token_id=manifest["mask_token_id"]
        )
        self.columns = self.distribution.columns(self.teacher.vocab_size)

    @staticmethod
    def output_of(record: Output) -> Output:
        return record

    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[Output]
    ) -> tuple[dict[str, pa.Array], dict[str, int]]:
        lengths = [_stored_length(name, output) for name, output in zip(names, records, strict=True)]
        cut = list(zip(records, lengths, strict=True))
        steps = concatenated([output.step_G[:length].numpy() for output, length in cut], "<i2")
        ids = concatenated([output.canvas_ids_G[:length].numpy() for output, length in cut], "<i4")
        ids[steps < 0] = self.teacher.mask_token_id
        columns: dict[str, pa.Array] = {
            "final_ids": list_column_of(ids, lengths),
            "step_rank": list_column_of(np.maximum(steps, 0), lengths),
            "canvas_length": pa.array([len(output.canvas_ids_G) for output in records], pa.int32()),
        }
        parts = [self._distribution_rows(name, output, n) for name, (output, n) in zip(names, cut, strict=True)]
        for name, (dtype, width) in self.columns.items():
            flat = concatenated([part[name] for part in parts], dtype, width)
            flat[steps <= 0] = 0
            if not self._finite(flat):
                raise FewstepError(
                    f"{name} of shard {index} cannot be stored: some values are not finite as "
                    f"{self.distribution.dtype}; look at the teacher's outputs, or store hidden rows as bfloat16"
                )
            columns[name] = _binary_column_of(flat, lengths, dtype.itemsize * width)
        return columns, {"num_positions": sum(lengths)}

    def _distribution_rows(self, name: str, output: Output, length: int) -> dict[str, np.ndarray]:
        """The first `length` rows of each stored array. ValueError if the output did not record them."""
        if self.distribution.kind == "hidden":
            if output.hidden_GD is None:
                raise ValueError(f"{name}: the decoding recorded no hidden rows")
            hidden = output.hidden_GD[:length]
            if self.distribution.dtype == "bfloat16":
                rows = {"hidden": hidden.to(torch.bfloat16).view(torch.int16)}
            else:
                rows = {"hidden": hidden.to(torch.float16)}
        else:
            if output.top_k is None:
                raise ValueError(f"{name}: the decoding recorded no top-k log-probabilities")
            rows = {
                "topk_ids": output.top_k.ids_GK[:length],
                "topk_logp": output.top_k.log_probs_GK[:length].clamp_min(_FLOAT16_LOWEST),
                "log_tail": output.top_k.tail_mass_G[:length, None].log().clamp_min(_FLOAT16_LOWEST),
            }
        for column, (_, width) in self.columns.items():
            if rows[column].shape != (length, width):
                raise ValueError(f"{name}: {column} has the shape {tuple(rows[column].shape)}, not {(length, width)}")
        return {column: values.numpy() for column, values in rows.items()}

    def _finite(self, flat: np.ndarray) -> bool:
        if flat.dtype.kind == "f":
            return bool(np.isfinite(flat).all())
        return self.distribution.dtype != "bfloat16" or bool(
            torch.from_numpy(flat).view(torch.bfloat16).isfinite().all()
        )

    def _arrays(self, column: Mapping[str, pa.Array]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        arrays: dict[str, np.ndarray] = {
            "lengths": column["final_ids"].value_lengths().to_numpy(),
            "final_ids": column["final_ids"].flatten().to_numpy(),
            "step_rank": column["step_rank"].flatten().to_numpy(),
            "canvas_length": column["canvas_length"].to_numpy(),
        }
        for name, (dtype, width) in self.columns.items():
            row_bytes = dtype.itemsize * width
            if (_byte_lengths(column[name]) != arrays["lengths"] * row_bytes).any():
                raise ValueError(f"{name} does not hold {row_bytes} bytes for each position")
            flat = _flat_bytes(column[name]).view(dtype)
            arrays[name] = flat.reshape(-1, width) if width > 1 or name != "log_tail" else flat
        if (column["step_rank"].value_lengths().to_numpy() != arrays["lengths"]).any():
            raise ValueError("step_rank and final_ids are not of one length")
        for name in ("prompt_ids", "reference_ids"):
            check_range(name, column[name].flatten().to_numpy(), 0, self.teacher.vocab_size - 1)
        self._check_values(arrays)
        return arrays, dict.fromkeys(("final_ids", "step_rank", *self.columns), "num_positions")

    def _check_values(self, arrays: Mapping[str, np.ndarray]) -> None:
        """ValueError for what no decoding leaves behind, such as a token that the vocabulary does not have."""
        last_token = self.teacher.vocab_size - 1
        check_range("final_ids", arrays["final_ids"], 0, last_token)
        check_range("step_rank", arrays["step_rank"], 0, _LARGEST_RANK)
        check_range("the lengths of answers", arrays["lengths"], 1)
        if (arrays["canvas_length"] < arrays["lengths"]).any():
            raise ValueError("an answer is longer than its canvas")
        if self.distribution.kind == "top_k":
            check_range("topk_ids", arrays["topk_ids"], 0, last_token)
            for name in ("topk_logp", "log_tail"):
                check_range(name, arrays[name], _FLOAT16_LOWEST, _ROUNDING)
        elif not self._finite(arrays["hidden"]):
            raise ValueError("hidden holds values that are not finite")


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

    def prompt_rows(self) -> list[PromptRow]:
        """What was decoded, to be decoded again."""
        return [
            PromptRow(
                one.id, one.prompt_ids.tolist(), None if one.reference_ids is None else one.reference_ids.tolist()
            )
            for one in self
        ]

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


def read_table(folder: str | Path, teacher: Network) -> tuple[TrajectoryTable, Examples | None]:
    """The trajectories in `folder`, and the reference answers stored beside them (None if there are none).

    Hidden rows are read by the head of `teacher`, which must therefore not be the network in training. FewstepError for
    a store that is damaged, unfinished, empty, of another schema, or made (or labelled) by another teacher.
    """
    return table_from_store(TrajectoryStore(folder, teacher_hash=network_hash(teacher)), teacher)


def table_from_store(store: TrajectoryStore, teacher: Network | None = None) -> tuple[TrajectoryTable, Examples | None]:
    """As `read_table`, of an open store. `teacher` is needed for hidden rows only. ValueError if it is missing then."""
    store.check_not_empty()
    arrays = store.load()
    examples = Examples(
        torch.from_numpy(arrays.prompt_ids),
        torch.from_numpy(arrays.prompt_offsets),
        torch.from_numpy(arrays.final_ids),
        torch.from_numpy(arrays.offsets),
        store.origin(arrays.ids),
    )
    if teacher is not None:
        examples.check_tokens(teacher.vocab_size)
    table = TrajectoryTable(
        examples,
        torch.from_numpy(arrays.step_rank),
        _distributions(arrays, teacher),
        of_student=OF_STUDENT in store.manifest["decoding"],
    )
    references = references_of(
        {
            **vars(arrays),
            "prompt_lengths": np.diff(arrays.prompt_offsets),
            "reference_lengths": np.diff(arrays.reference_offsets),
        }
    )
    return table, references


def _distributions(arrays: TrajectoryArrays, teacher: Network | None) -> TopDistributions | HiddenDistributions:
    if arrays.topk_ids is not None and arrays.topk_logp is not None and arrays.log_tail is not None:
        return TopDistributions(
            torch.from_numpy(arrays.topk_ids), torch.from_numpy(arrays.topk_logp), torch.from_numpy(arrays.log_tail)
        )
    if teacher is None:
        raise ValueError("hidden rows are read by the teacher's head; give the teacher")
    dtype, head = teacher.dtype, teacher.head
    return HiddenDistributions(arrays.hidden_tensor(), lambda hidden_ND: head(hidden_ND.to(dtype)))


def _stored_length(name: str, output: Output) -> int:
    """Positions up to and including the last one that a pass finalised. FewstepError for impossible steps."""
    finalised = (output.step_G > 0).nonzero()[:, 0]
    if not len(finalised):
        raise FewstepError(f"prompt {name}: the decoding finalised nothing, so it has no trajectory")
    if output.step_G.max() > _LARGEST_RANK:
        raise FewstepError(f"prompt {name}: a step beyond {_LARGEST_RANK} cannot be stored; decode in fewer")
    return int(finalised[-1]) + 1


def _binary_column_of(flat: np.ndarray, lengths: Sequence[int], row_bytes: int) -> pa.Array:
    offsets = offsets_of(lengths) * row_bytes
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(flat))]
    return pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)


def _flat_bytes(column: pa.Array) -> np.ndarray:
    """All bytes of a large_binary column as one array, without a copy."""
    ends = _ends(column)
    return np.frombuffer(column.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]] if len(ends) else np.empty(0, "u1")


def _byte_lengths(column: pa.Array) -> np.ndarray:
    """How many bytes each row of a large_binary column holds."""
    return np.diff(_ends(column))


def _ends(column: pa.Array) -> np.ndarray:
    """Where each row of a large_binary column begins in its bytes, and the last ends. ValueError for another type."""
    if column.type != pa.large_binary():
        raise ValueError(f"a distribution is stored as {column.type}")
    if not len(column):
        return np.empty(0, np.int64)
    return np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
