"""safetensors files, tensor by tensor: a header in JSON, then raw bytes.

A tensor that only changes its name keeps its bytes, so converting a file is copying it under another header: no tensor
is ever held in memory.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.files import read_json, write_json_whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in, by safetensors' names."""

_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies: `num_bytes` from `start` on, counted from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def named(self, name: str) -> "Place":
        return replace(self, name=name)

    def read(self) -> Tensor:
        """The tensor, in float32."""
        with safe_open(self.file, framework="pt") as file:
            return file.get_tensor(self.name).float()

    def copy_to(self, stream: IO[bytes]) -> None:
        """Append the bytes."""
        with self.file.open("rb") as source:
            source.seek(self.start)
            left = self.num_bytes
            while left:
                chunk = source.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise FewstepError(f"{self.file} ended early, in the middle of {self.name}; was it changed?")
                stream.write(chunk)
                left -= len(chunk)


def read_places(folder: Path) -> list[Place]:
    """All tensors of a folder, file by file, in the order of their bytes.

    FewstepError naming the file if there are no safetensors, a shard is missing or damaged, or naming the tensor if it
    is in another place than the index says.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            others = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
            found = f"; {others[0].name} cannot be read safely, convert it to safetensors first" if others else ""
            raise FewstepError(f"{folder} has neither {SINGLE} nor {INDEX}{found}")
        return _read_header(folder / SINGLE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewstepError(f"{index} has no weight_map, which says which file holds which tensor")
    places: list[Place] = []
    for name in sorted(set(weight_map.values())):
        file = folder / name
        if not file.exists():
            key = next(key for key, place in weight_map.items() if place == name)
            raise FewstepError(f"the shard {file} is missing; {index.name} says it holds {key}")
        places += _read_header(file)
    held = {(place.name, place.file.name) for place in places}
    astray = [key for key, name in weight_map.items() if (key, name) not in held]
    if astray:
        raise FewstepError(f"{folder / weight_map[astray[0]]} does not hold {astray[0]}, as {index.name} says")
    return places


def _read_header(file: Path) -> list[Place]:
    damaged = f"{file} is no whole safetensors file"
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _LARGEST_HEADER + 1
        if length > min(_LARGEST_HEADER, size):
            raise FewstepError(f"{damaged}: it has no readable header; fetch it again")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            begin = _LENGTH.size + length
            places = [
                Place(
                    name=name,
                    file=file,
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    start=begin + entry["data_offsets"][0],
                    num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            ]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise FewstepError(f"{damaged}: its header cannot be read; fetch it again") from error
    expected = max((place.start + place.num_bytes for place in places), default=begin)
    if expected != size:
        raise FewstepError(f"{damaged}: it has {size} bytes and its header speaks of {expected}; fetch it again")
    return sorted(places, key=lambda place: place.start)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to write: `write` appends its bytes, of which there are as many as dtype and shape say."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    write: Callable[[IO[bytes]], None]

    @property
    def num_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize * torch.Size(self.shape).numel()


def copied(place: Place, name: str) -> Entry:
    """The tensor of another file under a new name."""
    return Entry(name=name, dtype=place.dtype, shape=place.shape, write=place.copy_to)


def write_shards(folder: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write one file per shard, and their index if there are several; tensors are written one after the other."""
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, entries)
        weight_map |= {entry.name: name for entry in entries}
    total = sum(entry.num_bytes for entries in shards for entry in entries)
    write_json_whole(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: Path, entries: Sequence[Entry]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.num_bytes],
        }
        end += entry.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with path.open("wb") as stream:
        stream.write(_LENGTH.pack(len(text)) + text)
        for entry in entries:
            entry.write(stream)


def grouped(entries: Sequence[Entry], largest_bytes: int) -> Iterator[list[Entry]]:
    """Neighbouring tensors in shards of at most `largest_bytes` (a single larger tensor has its own)."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > largest_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    if shard:
        yield shard


def check_fit(places: Mapping[str, Place], expected: Mapping[str, tuple[int, ...]]) -> None:
    """FewstepError naming file and tensor if one is of no readable type, of another shape, or not `expected` at all.

    `places` by stock name; `expected`: the shapes of the stock network.
    """
    for name, place in places.items():
        if place.dtype not in DTYPES:
            raise FewstepError(
                f"{place.file} holds {place.name} as {place.dtype}; only {', '.join(DTYPES)} weights can be imported"
            )
        if name not in expected:
            raise FewstepError(f"{place.file} holds {place.name}, which fits nowhere in the network of its config.json")
        if place.shape != expected[name]:
            raise FewstepError(
                f"{place.file} holds {place.name} with the shape {list(place.shape)}; "
                f"config.json makes it {list(expected[name])}"
            )
