"""Trajectories of a diffusion teacher: what each position became, at which pass, and the teacher's distribution then.

Axes: N = stored canvas positions of a record, K = stored top tokens, D = hidden width, R = requests, G = canvas
positions.

Ranks. `step_rank[i]` is the number, from 1, of the pass that finalised canvas position i. Rank 0 means not recorded:
either the position was given (`final_ids` holds the given token) or it was never finalised (`final_ids` holds the
mask token). The state after k passes is therefore always

    y_k[i] = final_ids[i] if step_rank[i] <= k else mask

from k = 0, the start, to k = the largest rank, the end. Records are cut after the last recorded position; beyond the
cut every state holds the mask. Ranks may have gaps (a pass that only committed a block finalised nothing).

On disk: Parquet shards, each written whole, under a manifest. Token ids and ranks are list columns. The distribution
at the pass that finalised a position, one row per stored position, is a binary column per array, little-endian and
row-major.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.files import Shards

SCHEMA_VERSION = 1
_METADATA_KEY = b"fewstep"
_FLOAT16_LOWEST = float(np.finfo(np.float16).min)
_LARGEST_RANK = int(np.iinfo(np.int16).max)


# What a record holds


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the teacher's distribution is stored: its top `width` tokens with the mass of the rest, or hidden rows.

    `top_k` needs no head, is small, and works from a larger teacher. `hidden` keeps rows after the final norm,
    `width` wide, from which the teacher's own head rebuilds the whole distribution.
    """

    kind: Literal["top_k", "hidden"] = "top_k"
    width: int = 64
    dtype: Literal["float16", "bfloat16"] = "float16"

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "hidden"):
            raise FewstepError(f"a distribution is stored as top_k or hidden, got {self.kind!r}")
        if self.width < 1:
            raise FewstepError(f"the width of a stored distribution is at least 1, got {self.width}; try 64 for top_k")
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
    """Whose trajectories these are: the hash of the weights and the two facts that readers need of the vocabulary."""

    hash: str
    vocab_size: int
    mask_token_id: int


@dataclass(frozen=True)
class PromptRow:
    """A prompt to decode; `id` is unique. `reference_ids`: a reference answer, stored beside the trajectory."""

    id: str
    prompt_ids: Sequence[int]
    reference_ids: Sequence[int] | None = None


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

    @property
    def recorded(self) -> np.ndarray:
        """Which positions a pass finalised, so that their distribution rows mean something; bool [N]."""
        return self.step_rank > 0

    def state_after(self, num_passes: int) -> np.ndarray:
        """The canvas after `num_passes` passes, int32 [canvas_length]."""
        state = np.full(self.canvas_length, self.mask_token_id, dtype=np.int32)
        known = self.step_rank <= num_passes
        state[: len(known)][known] = self.final_ids[known]
        return state


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

    def positions(self, indices_R: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the first `length` positions of some records lie in the flat rows, for gathering padded batches.

        Returns int64 indices [R, length] and which of them exist, bool [R, length]; the others point at row 0.
        """
        starts_R, ends_R = self.offsets[indices_R], self.offsets[np.asarray(indices_R) + 1]
        index_RN = starts_R[:, None] + np.arange(length)
        present_RN = index_RN < ends_R[:, None]
        return np.where(present_RN, index_RN, 0), present_RN

    def hidden_tensor(self) -> Tensor:
        """The hidden rows in their own type, [., D], sharing memory. ValueError if the store holds top-k."""
        if self.hidden is None:
            raise ValueError("these trajectories hold top-k log-probabilities, not hidden rows")
        rows = torch.from_numpy(self.hidden)
        return rows.view(torch.bfloat16) if self.hidden_dtype == "bfloat16" else rows


# Shards on disk


class ShardFiles:
    """Reads and writes the Parquet files of one folder, as its manifest describes them."""

    def __init__(self, shards: Shards) -> None:
        manifest = shards.manifest
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise FewstepError(
                f"{shards.folder} has trajectory schema {manifest.get('schema_version')}, this version reads "
                f"{SCHEMA_VERSION}; collect the trajectories again"
            )
        self.shards = shards
        try:
            self.distribution = Distribution(**manifest["distribution"])
            self.teacher = Teacher(
                hash=manifest["teacher_hash"],
                vocab_size=manifest["vocab_size"],
                mask_token_id=manifest["mask_token_id"],
            )
        except (KeyError, TypeError) as error:
            raise FewstepError(
                f"the manifest of {shards.folder} is damaged ({error}); collect again elsewhere"
            ) from None
        self.columns = self.distribution.columns(self.teacher.vocab_size)

    def write(
        self, index: int, records: Sequence[tuple[PromptRow, Output]], *, num_prompts: int, num_forwards: int
    ) -> dict[str, int]:
        """Write shard `index` whole and return its facts. ValueError if an output lacks what is to be stored."""
        rows = [row for row, _ in records]
        outputs = [output for _, output in records]
        lengths = [_stored_length(row.id, output) for row, output in records]
        cut = list(zip(outputs, lengths, strict=True))
        steps = _concatenate([output.step_G[:length].numpy() for output, length in cut], "<i2")
        ids = _concatenate([output.canvas_ids_G[:length].numpy() for output, length in cut], "<i4")
        ids[steps < 0] = self.teacher.mask_token_id
        columns: dict[str, pa.Array] = {
            "id": pa.array([row.id for row in rows], pa.string()),
            "prompt_ids": _list_column([row.prompt_ids for row in rows]),
            "final_ids": _list_column_of(ids, lengths),
            "step_rank": _list_column_of(np.maximum(steps, 0), lengths),
            "canvas_length": pa.array([len(output.canvas_ids_G) for output in outputs], pa.int32()),
            "num_forwards": pa.array([output.num_forwards for output in outputs], pa.int32()),
            "reference_ids": _list_column([row.reference_ids for row in rows]),
        }
        parts = [self._distribution_rows(row.id, output, n) for row, (output, n) in zip(rows, cut, strict=True)]
        for name, (dtype, width) in self.columns.items():
            flat = _concatenate([part[name] for part in parts], dtype, width)
            flat[steps <= 0] = 0
            if not self._finite(flat):
                raise FewstepError(
                    f"{name} of shard {index} cannot be stored: some values are not finite as "
                    f"{self.distribution.dtype}; look at the teacher's outputs, or store hidden rows as bfloat16"
                )
            columns[name] = _binary_column_of(flat, lengths, dtype.itemsize * width)
        facts = {
            "num_prompts": num_prompts,
            "num_records": len(records),
            "num_positions": sum(lengths),
            "num_prompt_tokens": sum(len(row.prompt_ids) for row in rows),
            "num_reference_tokens": sum(0 if row.reference_ids is None else len(row.reference_ids) for row in rows),
            "num_forwards": num_forwards,
        }
        made_by = {"schema_version": SCHEMA_VERSION, "teacher_hash": self.teacher.hash, "shard": index}
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(made_by | facts)})
        with self.shards.write(index) as temporary:
            pq.write_table(
                table,
                temporary,
                compression="zstd",
                compression_level=1,
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
            )
        return facts

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

    def facts(self, index: int) -> dict[str, int]:
        """The counts in a shard's metadata. FewstepError if it is damaged or of another teacher, schema or place."""
        return self._checked_facts(index, self._reading(index, pq.read_schema).metadata)

    def read(self, index: int) -> dict[str, Any]:
        """The columns of a shard: ids, flat arrays and lengths. FewstepError as `facts`."""
        table = self._reading(
            index,
            lambda path: pq.read_table(path, use_threads=False, page_checksum_verification=True, partitioning=None),
        )
        facts = self._checked_facts(index, table.schema.metadata)
        try:
            return self._arrays(table, facts)
        except (KeyError, ValueError, pa.ArrowException) as error:
            raise self._damaged(index, error) from error

    def _arrays(self, table: pa.Table, facts: Mapping[str, int]) -> dict[str, Any]:
        """ValueError, KeyError or ArrowException if the columns do not fit together."""
        column = {name: _one_chunk(table.column(name)) for name in table.column_names}
        lengths = column["final_ids"].value_lengths().to_numpy()
        arrays: dict[str, Any] = {
            "ids": column["id"].to_pylist(),
            "prompt_lengths": column["prompt_ids"].value_lengths().to_numpy(),
            "prompt_ids": column["prompt_ids"].flatten().to_numpy(),
            "lengths": lengths,
            "final_ids": column["final_ids"].flatten().to_numpy(),
            "step_rank": column["step_rank"].flatten().to_numpy(),
            "has_reference": np.asarray(column["reference_ids"].is_valid()),
            "reference_lengths": column["reference_ids"].value_lengths().fill_null(0).to_numpy(),
            "reference_ids": column["reference_ids"].flatten().to_numpy(),
            "canvas_length": column["canvas_length"].to_numpy(),
            "num_forwards": column["num_forwards"].to_numpy(),
        }
        for name, (dtype, width) in self.columns.items():
            flat = _flat_bytes(column[name]).view(dtype)
            arrays[name] = flat.reshape(-1, width) if width > 1 or name != "log_tail" else flat
        promised = {
            "ids": facts["num_records"],
            "prompt_ids": facts["num_prompt_tokens"],
            "reference_ids": facts["num_reference_tokens"],
            **dict.fromkeys(("final_ids", "step_rank", *self.columns), facts["num_positions"]),
        }
        for name, length in promised.items():
            if len(arrays[name]) != length:
                raise ValueError(f"{name} holds {len(arrays[name])} rows, its metadata say {length}")
        return arrays

    def _reading(self, index: int, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.shards.path(index))
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(index, error) from error

    def _checked_facts(self, index: int, metadata: Mapping[bytes, bytes] | None) -> dict[str, int]:
        path = self.shards.path(index)
        try:
            facts = json.loads((metadata or {})[_METADATA_KEY])
            schema_version, teacher_hash, shard = facts["schema_version"], facts["teacher_hash"], facts["shard"]
        except (KeyError, TypeError, ValueError):
            raise FewstepError(f"{path} is not a shard of trajectories; delete it and collect again") from None
        if schema_version != SCHEMA_VERSION:
            raise FewstepError(f"{path} has trajectory schema {schema_version}, not {SCHEMA_VERSION}; collect it again")
        if teacher_hash != self.teacher.hash:
            raise FewstepError(
                f"{path} was made by another teacher ({teacher_hash[:12]}, not {self.teacher.hash[:12]}); "
                "delete it and collect again"
            )
        if shard != index:
            raise FewstepError(f"{path} holds shard {shard}; delete it and collect again")
        return {name: count for name, count in facts.items() if name.startswith("num_")}

    def _damaged(self, index: int, error: BaseException) -> FewstepError:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return FewstepError(
            f"the trajectory shard {self.shards.path(index)} is damaged ({reason[0]}); "
            "delete it and collect again, which remakes only that shard"
        )


def _stored_length(name: str, output: Output) -> int:
    """Positions up to and including the last one that a pass finalised. ValueError for impossible steps."""
    finalised = (output.step_G > 0).nonzero()[:, 0]
    if not len(finalised):
        raise ValueError(f"{name}: the decoding finalised nothing")
    if output.step_G.max() > _LARGEST_RANK:
        raise ValueError(f"{name}: a step beyond {_LARGEST_RANK} cannot be stored")
    return int(finalised[-1]) + 1


def _concatenate(parts: Sequence[np.ndarray], dtype: Any, width: int | None = None) -> np.ndarray:
    shape = (0,) if width is None else (0, width)
    return np.concatenate([np.empty(shape, dtype), *parts], dtype=dtype, casting="same_kind")


def _offsets(lengths: Sequence[int] | np.ndarray, dtype: Any = np.int64) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=dtype)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _list_column(sequences: Sequence[Sequence[int] | None]) -> pa.Array:
    """A list column of int32; None stays a null."""
    arrays = [np.empty(0, np.int32) if part is None else np.asarray(part, dtype=np.int32) for part in sequences]
    missing = pa.array([part is None for part in sequences], pa.bool_())
    return _list_column_of(_concatenate(arrays, np.int32), [len(part) for part in arrays], missing)


def _list_column_of(flat: np.ndarray, lengths: Sequence[int], missing: pa.Array | None = None) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(_offsets(lengths, np.int32)), pa.array(flat), mask=missing)


def _binary_column_of(flat: np.ndarray, lengths: Sequence[int], row_bytes: int) -> pa.Array:
    offsets = _offsets(lengths) * row_bytes
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(flat))]
    return pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)


def _flat_bytes(column: pa.Array) -> np.ndarray:
    """All bytes of a large_binary column as one array, without a copy."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    return np.frombuffer(data or b"", np.uint8)[ends[0] : ends[-1]] if len(ends) else np.empty(0, np.uint8)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


# Reading


class TrajectoryStore:
    """A folder of trajectories, for reading."""

    def __init__(self, folder: str | Path, *, teacher_hash: str | None = None, allow_unfinished: bool = False) -> None:
        """FewstepError if the folder is no store of this schema, unfinished, or made by another than `teacher_hash`."""
        shards = Shards.open(folder)
        self._files = ShardFiles(shards)
        self.folder = shards.folder
        self.manifest = shards.manifest
        self.teacher = self._files.teacher
        self.distribution = self._files.distribution
        if teacher_hash is not None and teacher_hash != self.teacher.hash:
            raise FewstepError(
                f"the trajectories in {folder} were made by another teacher ({self.teacher.hash[:12]}, "
                f"not {teacher_hash[:12]}); collect them again with this one"
            )
        self._finished = shards.finished()
        if len(self._finished) < shards.num_shards and not allow_unfinished:
            raise FewstepError(
                f"{folder} holds {len(self._finished)} of {shards.num_shards} shards; run collect again to finish it"
            )
        self._facts = [self._files.facts(index) for index in self._finished]

    def count(self, fact: str) -> int:
        """A sum over the shards: num_prompts, num_records, num_positions, num_forwards, ..."""
        return sum(facts[fact] for facts in self._facts)

    def __len__(self) -> int:
        return self.count("num_records")

    def __iter__(self) -> Iterator[Trajectory]:
        """Every record, one shard in memory at a time. FewstepError for a damaged shard."""
        for index, facts in zip(self._finished, self._facts, strict=True):
            arrays = self._load([index], [facts], num_threads=1)
            for record in range(len(arrays)):
                yield arrays[record]

    def load(self, *, num_threads: int | None = None) -> TrajectoryArrays:
        """All records in flat arrays, shards read in parallel. FewstepError for a damaged shard."""
        return self._load(self._finished, self._facts, num_threads=num_threads)

    def _load(
        self, shards: Sequence[int], facts: Sequence[Mapping[str, int]], *, num_threads: int | None
    ) -> TrajectoryArrays:
        counted_by = {
            **dict.fromkeys(("prompt_lengths", "lengths", "reference_lengths"), "num_records"),
            **dict.fromkeys(("has_reference", "canvas_length", "num_forwards"), "num_records"),
            **dict.fromkeys(("final_ids", "step_rank", *self._files.columns), "num_positions"),
            "prompt_ids": "num_prompt_tokens",
            "reference_ids": "num_reference_tokens",
        }
        shapes: dict[str, tuple[Any, tuple[int, ...]]] = dict.fromkeys(counted_by, (np.int32, ()))
        shapes |= {"step_rank": (np.int16, ()), "has_reference": (np.bool_, ())}
        shapes |= {
            name: (dtype, () if name == "log_tail" else (width,))
            for name, (dtype, width) in self._files.columns.items()
        }
        starts = {name: _offsets([shard[fact] for shard in facts]) for name, fact in counted_by.items()}
        arrays = {name: np.empty((int(starts[name][-1]), *row), dtype=dtype) for name, (dtype, row) in shapes.items()}

        def fill(number: int) -> list[str]:
            part = self._files.read(shards[number])
            for name, array in arrays.items():
                array[starts[name][number] : starts[name][number + 1]] = part[name]
            return part["ids"]

        with ThreadPoolExecutor(max_workers=num_threads) as readers:
            ids = [name for part in readers.map(fill, range(len(shards))) for name in part]
        return TrajectoryArrays(
            ids=ids,
            prompt_offsets=_offsets(arrays.pop("prompt_lengths")),
            offsets=_offsets(arrays.pop("lengths")),
            reference_offsets=_offsets(arrays.pop("reference_lengths")),
            mask_token_id=self.teacher.mask_token_id,
            hidden_dtype=self.distribution.dtype if self.distribution.kind == "hidden" else None,
            **arrays,
        )
