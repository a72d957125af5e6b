"""Shards of decoded prompts on disk: Parquet files, each written whole, under a manifest that says who made them.

Token ids are list columns. `RecordShards` writes and reads what every record has; a subclass adds what its kind of
decoding left behind. `RecordStore` reads a finished folder of them.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError
from fewstep.shards import Shards
from fewstep.train.examples import Examples, Origin

SCHEMA_VERSION = 1
_METADATA_KEY = b"fewstep"

_COUNTS = ("num_prompts", "num_records", "num_prompt_tokens", "num_reference_tokens", "num_forwards")
_MOST = 1 << 48
"""Beyond any count that memory holds."""

RecordT = TypeVar("RecordT")


@dataclass(frozen=True)
class PromptRow:
    """A prompt to decode; `id` is unique. `reference_ids`: a reference answer, stored beside what is decoded."""

    id: str
    prompt_ids: Sequence[int]
    reference_ids: Sequence[int] | None = None


def prompts_of(examples: Examples) -> list[PromptRow]:
    """The prompts of examples, with their completions as references; their ids are 0, 1, ..."""
    return [PromptRow(str(i), *pair) for i, pair in enumerate(examples.pairs())]


class RecordShards(ABC, Generic[RecordT]):
    """Reads and writes the Parquet files of one folder, as its manifest describes them.

    A subclass names its `kind`, who makes its records (`maker`) and the facts that it counts (`counts`), and has the
    abstract methods below.
    """

    kind: ClassVar[str]
    maker: ClassVar[str]
    counts: ClassVar[tuple[str, ...]]

    def __init__(self, shards: Shards) -> None:
        """FewstepError if the folder holds another kind or schema."""
        manifest = shards.manifest
        if manifest.get("kind") != self.kind:
            raise FewstepError(f"{shards.folder} holds {manifest.get('kind')}, not {self.kind}; choose another folder")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise FewstepError(
                f"{shards.folder} holds {self.kind} of schema {manifest.get('schema_version')}, and this version reads "
                f"schema {SCHEMA_VERSION}; collect them again"
            )
        self.shards = shards
        try:
            self.maker_hash = str(manifest["teacher_hash"])
            if not isinstance(manifest["decoding"], dict):
                raise TypeError("decoding holds no settings")
            self._describe(manifest)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FewstepError(
                f"the manifest of {shards.folder} is damaged ({error}); collect again elsewhere"
            ) from None

    @abstractmethod
    def _describe(self, manifest: Mapping[str, Any]) -> None:
        """Take what the manifest says of this kind. KeyError, TypeError or ValueError if it is damaged."""

    @staticmethod
    @abstractmethod
    def output_of(record: RecordT) -> Output:
        """What was decoded."""

    @abstractmethod
    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[RecordT]
    ) -> tuple[dict[str, pa.Array], dict[str, int]]:
        """The columns of this kind, and the facts that count their flat values, `num_positions` among them.

        ValueError naming a record that lacks what is to be stored.
        """

    @abstractmethod
    def _arrays(self, column: Mapping[str, pa.Array]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Those columns as flat arrays and lengths, and which fact counts which of them.

        ValueError, KeyError or ArrowException if they are damaged.
        """

    def write(
        self, index: int, records: Sequence[tuple[PromptRow, RecordT]], *, num_prompts: int, num_forwards: int
    ) -> dict[str, int]:
        """Write shard `index` whole and return its facts. ValueError if a record lacks what is to be stored."""
        rows = [row for row, _ in records]
        own, counts = self._columns(index, [row.id for row in rows], [record for _, record in records])
        columns: dict[str, pa.Array] = {
            "id": pa.array([row.id for row in rows], pa.string()),
            "prompt_ids": list_column([row.prompt_ids for row in rows]),
            "num_forwards": pa.array([self.output_of(record).num_forwards for _, record in records], pa.int32()),
            "reference_ids": list_column([row.reference_ids for row in rows]),
            **own,
        }
        facts = {
            "num_prompts": num_prompts,
            "num_records": len(records),
            "num_prompt_tokens": sum(len(row.prompt_ids) for row in rows),
            "num_reference_tokens": sum(0 if row.reference_ids is None else len(row.reference_ids) for row in rows),
            "num_forwards": num_forwards,
            **counts,
        }
        made_by = {"schema_version": SCHEMA_VERSION, "teacher_hash": self.maker_hash, "shard": index}
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

    def facts(self, index: int) -> dict[str, int]:
        """The counts in a shard's metadata. FewstepError if it is damaged or of another maker, schema or place."""
        return self._checked_facts(index, self._reading(index, pq.read_schema).metadata)

    def read(self, index: int) -> dict[str, Any]:
        """The columns of a shard: ids, flat arrays and lengths. FewstepError as `facts`."""
        table = self._reading(
            index,
            lambda path: pq.read_table(path, use_threads=False, page_checksum_verification=True, partitioning=None),
        )
        facts = self._checked_facts(index, table.schema.metadata)
        try:
            table.validate(full=True)
            return self._checked_arrays(table, facts)
        except Exception as error:  # pyarrow and numpy have many for columns that are not what they should be
            raise self.damaged(index, error) from error

    def _checked_arrays(self, table: pa.Table, facts: Mapping[str, int]) -> dict[str, Any]:
        """ValueError, KeyError or ArrowException if the columns do not fit together."""
        column = {name: _one_chunk(table.column(name)) for name in table.column_names}
        for name, values in column.items():
            if values.null_count and name != "reference_ids":
                raise ValueError(f"{name} holds nulls")
        if column["id"].type != pa.string():
            raise ValueError(f"the ids are stored as {column['id'].type}")
        own, counted_by = self._arrays(column)
        arrays: dict[str, Any] = {
            "ids": column["id"].to_pylist(),
            "prompt_lengths": column["prompt_ids"].value_lengths().to_numpy(),
            "prompt_ids": column["prompt_ids"].flatten().to_numpy(),
            "has_reference": np.asarray(column["reference_ids"].is_valid()),
            "reference_lengths": column["reference_ids"].value_lengths().fill_null(0).to_numpy(),
            "reference_ids": column["reference_ids"].flatten().to_numpy(),
            "num_forwards": column["num_forwards"].to_numpy(),
            **own,
        }
        counted_by = {
            "ids": "num_records", "prompt_ids": "num_prompt_tokens", "reference_ids": "num_reference_tokens",
            **counted_by,
        }  # fmt: skip
        for name, fact in counted_by.items():
            if len(arrays[name]) != facts[fact]:
                raise ValueError(f"{name} holds {len(arrays[name])} rows, its metadata say {facts[fact]}")
        check_range("num_forwards", arrays["num_forwards"], 0)
        check_range("prompt_ids", arrays["prompt_ids"], 0)
        check_range("reference_ids", arrays["reference_ids"], 0)
        return arrays

    def _reading(self, index: int, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.shards.path(index))
        except Exception as error:  # a damaged file makes pyarrow raise what its bytes happen to spell
            raise self.damaged(index, error) from error

    def _checked_facts(self, index: int, metadata: Mapping[bytes, bytes] | None) -> dict[str, int]:
        path = self.shards.path(index)
        try:
            facts = json.loads((metadata or {})[_METADATA_KEY])
            schema_version, maker_hash, shard = facts["schema_version"], facts["teacher_hash"], facts["shard"]
        except (KeyError, TypeError, ValueError):
            raise FewstepError(f"{path} is not a shard of {self.kind}; delete it and collect again") from None
        if schema_version != SCHEMA_VERSION:
            raise FewstepError(
                f"{path} has schema {schema_version} of {self.kind}, not {SCHEMA_VERSION}; delete it and collect again"
            )
        if maker_hash != self.maker_hash:
            raise FewstepError(
                f"{path} was made by another {self.maker} ({str(maker_hash)[:12]}, not {self.maker_hash[:12]}); "
                "delete it and collect again"
            )
        if shard != index:
            raise FewstepError(f"{path} holds shard {shard}; delete it and collect again")
        counts = {name: facts.get(name) for name in (*_COUNTS, *self.counts)}
        for name, count in counts.items():
            if type(count) is not int or not 0 <= count < _MOST:
                raise self.damaged(index, ValueError(f"its metadata say {count!r:.40} of {name}"))
        return counts

    def damaged(self, index: int, error: BaseException) -> FewstepError:
        """The sentence about a shard in which `error` was found."""
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return FewstepError(
            f"the shard {self.shards.path(index)} is damaged ({reason[0]}); "
            "delete it and collect again, which remakes only that shard"
        )


ShardsT = TypeVar("ShardsT", bound=RecordShards[Any])


class RecordStore(Generic[ShardsT]):
    """A finished folder of records, for reading."""

    def __init__(self, folder: str | Path, files: type[ShardsT], *, teacher_hash: str | None = None) -> None:
        """FewstepError if the folder is no store of this kind and schema, is unfinished, or was made by a network other
        than the one of `teacher_hash`.
        """
        shards = Shards.open(folder)
        self.files = files(shards)
        self.folder = shards.folder
        self.manifest = shards.manifest
        if teacher_hash is not None and teacher_hash != self.files.maker_hash:
            raise FewstepError(
                f"the {self.files.kind} in {folder} were made by another {files.maker} ({self.files.maker_hash[:12]}, "
                f"not {teacher_hash[:12]}); collect them again with this one"
            )
        self.finished = shards.finished()
        if len(self.finished) < shards.num_shards:
            raise FewstepError(
                f"{folder} holds {len(self.finished)} of {shards.num_shards} shards; run collect again to finish it"
            )
        self.facts = [self.files.facts(index) for index in self.finished]

    def check_not_empty(self) -> None:
        """FewstepError if no record was kept."""
        if not len(self):
            raise FewstepError(
                f"{self.folder} holds no {self.files.kind}, since all were rejected; collect with a weaker filter"
            )

    def columns(self, check: Callable[[Mapping[str, Any]], None] | None = None) -> dict[str, Any]:
        """The columns of all shards, one shard after the other: `ids`, flat arrays and lengths.

        FewstepError for a damaged shard; a shard for whose columns `check` raises a ValueError counts as damaged.
        """
        parts = []
        for index in self.finished:
            part = self.files.read(index)
            try:
                if check is not None:
                    check(part)
            except ValueError as error:
                raise self.files.damaged(index, error) from error
            parts.append(part)
        ids = [name for part in parts for name in part["ids"]]
        return {"ids": ids} | {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "ids"
        }

    def origin(self, ids: Sequence[str]) -> tuple[Origin, ...]:
        """Where examples of these records come from."""
        return (Origin(str(self.folder), "record", ids),)

    def count(self, fact: str) -> int:
        """A sum over the shards: num_prompts, num_records, num_positions, num_forwards, ..."""
        return sum(facts[fact] for facts in self.facts)

    def __len__(self) -> int:
        return self.count("num_records")


def check_range(name: str, values: np.ndarray, least: float, most: float | None = None) -> None:
    """ValueError unless all values are finite, at least `least`, and at most `most`, if that is given."""
    if not len(values):
        return
    lowest, highest = values.min(), values.max()
    if not (lowest >= least and highest < np.inf and (most is None or highest <= most)):
        raise ValueError(f"{name} holds values from {lowest} to {highest}")


def concatenated(parts: Sequence[np.ndarray], dtype: Any, width: int | None = None) -> np.ndarray:
    """Arrays one after the other in this type; an empty array if there are none."""
    shape = (0,) if width is None else (0, width)
    return np.concatenate([np.empty(shape, dtype), *parts], dtype=dtype, casting="same_kind")


def offsets_of(lengths: Sequence[int] | np.ndarray, dtype: Any = np.int64) -> np.ndarray:
    """Where each of N parts begins, and the last ends, [N + 1]."""
    offsets = np.zeros(len(lengths) + 1, dtype=dtype)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged(values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """Flat values of N rows with these lengths, as tensors: the values and the offsets [N + 1]."""
    return torch.from_numpy(values), torch.from_numpy(offsets_of(lengths))


def references_of(columns: Mapping[str, Any]) -> Examples | None:
    """The reference answers with their prompts; None if no record has one."""
    has_reference, prompt_lengths = columns["has_reference"], columns["prompt_lengths"]
    if not has_reference.any():
        return None
    prompts = ragged(columns["prompt_ids"][np.repeat(has_reference, prompt_lengths)], prompt_lengths[has_reference])
    return Examples(*prompts, *ragged(columns["reference_ids"], columns["reference_lengths"][has_reference]))


def list_column(sequences: Sequence[Sequence[int] | None]) -> pa.Array:
    """A list column of int32; None stays a null."""
    arrays = [np.empty(0, np.int32) if part is None else np.asarray(part, dtype=np.int32) for part in sequences]
    missing = pa.array([part is None for part in sequences], pa.bool_())
    return list_column_of(concatenated(arrays, np.int32), [len(part) for part in arrays], missing)


def list_column_of(flat: np.ndarray, lengths: Sequence[int], missing: pa.Array | None = None) -> pa.Array:
    """A list column of the values `flat`, in rows of these lengths."""
    return pa.ListArray.from_arrays(pa.array(offsets_of(lengths, np.int32)), pa.array(flat), mask=missing)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])
