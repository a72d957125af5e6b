"""Shards of a diffusion teacher's trajectories, on the Parquet files of `record_shards`.

Axes: G = canvas positions of an output.

Ranks are a list column as token ids are. The distribution at the pass that finalised a position, one row per stored
position, is a binary column per array, little-endian and row-major. `trajectories` says what the columns mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.train.record_shards import RecordShards, check_range, concatenated, list_column_of, offsets_of
from fewstep.values import Count, check_fields

_FLOAT16_LOWEST = float(np.finfo(np.float16).min)
_LARGEST_RANK = int(np.iinfo(np.int16).max)
_MOST_TOKENS = 1 << 31

_ROUNDING = 0.01
"""By how much a log-probability of 0 may be above it once it is rounded."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How the teacher's distribution is stored: its top `width` tokens with the mass of the rest, or hidden rows.

    `top_k` needs no head, is small, and works from a larger teacher. `hidden` keeps rows after the final norm,
    `width` wide, from which the teacher's own head rebuilds the whole distribution.
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
