"""safetensors files, tensor by tensor: a header in JSON, then raw bytes.

A tensor that only changes its name keeps its bytes, so converting a file is copying it under another header: no tensor
is ever held in memory.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.models.checkpoint_files import INDEX, SINGLE, read_object

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in, by safetensors' names."""
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
    **{f"{sign}{bits}": bits for sign in "IU" for bits in (16, 32, 64)},
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Of the types that safetensors knows."""

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
    if (folder / SINGLE).exists():  # an index beside it is of an earlier save; transformers does not look at it either
        return _read_header(folder / SINGLE)
    if not index.exists():
        others = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        found = f"; {others[0].name} cannot be read safely, convert it to safetensors first" if others else ""
        raise FewstepError(f"{folder} has neither {SINGLE} nor {INDEX}{found}")
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewstepError(f"{index} has no weight_map, which says which file holds which tensor")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise FewstepError(f"{index} says that {name!r} holds {key}, which is no name of a file beside it")
    places: list[Place] = []
    for name in sorted(set(weight_map.values())):
        file = folder / name
        if not file.is_file():
            key = next(key for key, place in weight_map.items() if place == name)
            raise FewstepError(f"the shard {file} is missing; {index.name} says it holds {key}")
        places += _read_header(file)
    held = {(place.name, place.file.name) for place in places}
    astray = [key for key, name in weight_map.items() if (key, name) not in held]
    if astray:
        raise FewstepError(f"{folder / weight_map[astray[0]]} does not hold {astray[0]}, as {index.name} says")
    return places


def _read_header(file: Path) -> list[Place]:
    """Tensors in the order of their bytes, of which each has as many as its shape needs, one behind the other."""
    damaged = f"{file} is no whole safetensors file"
    if not file.is_file():
        raise FewstepError(f"{file} is no file; put the file in its place")
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _LARGEST_HEADER + 1
        if length > min(_LARGEST_HEADER, size):
            raise FewstepError(f"{damaged}: it has no readable header; fetch it again")
        begin = _LENGTH.size + length
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            places = [_place(name, file, entry, begin) for name, entry in header.items()]
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise FewstepError(f"{damaged}: its header cannot be read; fetch it again") from error
    expected = max((place.start + place.num_bytes for place in places), default=begin)
    if expected != size:
        raise FewstepError(f"{damaged}: it has {size} bytes and its header speaks of {expected}; fetch it again")
    places.sort(key=lambda place: (place.start, place.num_bytes))
    end = begin
    for place in places:
        bits = math.prod(place.shape) * _ITEM_BITS.get(place.dtype, 0)
        if place.start != end or (place.dtype in _ITEM_BITS and 8 * place.num_bytes != bits):
            raise FewstepError(
                f"{damaged}: the {place.num_bytes} bytes that its header gives {place.name} are not those of its shape "
                f"{list(place.shape)}, or overlap with others; fetch it again"
            )
        end += place.num_bytes
    return places


def _place(name: str, file: Path, entry: Any, begin: int) -> Place:
    """What the header says of one tensor; ValueError for numbers that are no counts."""
    shape, (first, last) = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last - first)):
        raise ValueError(name)
    dtype = str(entry["dtype"])
    return Place(name=name, file=file, dtype=dtype, shape=tuple(shape), start=begin + first, num_bytes=last - first)


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
