"""Folders of numbered shard files that resume: what is finished is there, and what is there is finished."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError
from fewstep.files import remove_leftovers, write_whole
from fewstep.json_files import read_json, write_json_whole

MANIFEST_NAME = "manifest.json"

MOST_SHARDS = 10**6
"""More than anybody has, and few enough to go through their numbers."""


class Shards:
    """A folder of numbered shard files under one manifest, made in any order by any number of workers.

    A shard is finished when it has its final name, since it gets that name only once it is whole; nothing else is
    recorded, so nothing can disagree. The manifest is a JSON object that says how all shards are made.
    """

    def __init__(self, folder: str | Path, *, num_shards: int, suffix: str, manifest: Mapping[str, Any]) -> None:
        """Describe a folder that exists; see `create` and `open`."""
        self.folder = Path(folder)
        self.num_shards = num_shards
        self.suffix = suffix
        self.manifest = dict(manifest)

    @classmethod
    def create(cls, folder: str | Path, *, num_shards: int, suffix: str, settings: Mapping[str, Any]) -> "Shards":
        """The folder's shards, its manifest written if there is none.

        FewstepError if the folder holds a manifest made with other settings (the sentence names each that differs), or
        files but no manifest.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        wanted = json.loads(json.dumps({"num_shards": num_shards, "suffix": suffix, **settings}, allow_nan=False))
        if not path.exists():
            if folder.is_dir() and any(not inside.name.startswith(".") for inside in folder.iterdir()):
                raise FewstepError(f"the folder {folder} holds other files and no {MANIFEST_NAME}; choose another")
            try:
                write_json_whole(path, wanted)
            except FewstepError:
                if not path.exists():  # else another worker wrote it at the same moment
                    raise
        difference = describe_difference(read_json(path), wanted)
        if difference:
            raise FewstepError(f"{folder} was made with other settings ({difference}); use the same or another folder")
        return cls(folder, num_shards=num_shards, suffix=suffix, manifest=wanted)

    @classmethod
    def open(cls, folder: str | Path) -> "Shards":
        """The shards of an existing folder, for reading. FewstepError if it has no manifest or a damaged one."""
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            raise FewstepError(f"{folder} has no {MANIFEST_NAME}, so it is not a folder of shards")
        manifest = read_json(path)
        fields = manifest if isinstance(manifest, dict) else {}
        num_shards, suffix = fields.get("num_shards"), fields.get("suffix")
        if type(num_shards) is not int or not 0 <= num_shards <= MOST_SHARDS:
            raise FewstepError(f"{path} is damaged: num_shards must say how many there are, got {num_shards!r:.40}")
        if not isinstance(suffix, str) or not re.fullmatch(r"(\.\w+)+", suffix):
            raise FewstepError(f"{path} is damaged: suffix must be that of the shards' names, got {suffix!r:.40}")
        return cls(folder, num_shards=num_shards, suffix=suffix, manifest=manifest)

    def path(self, index: int) -> Path:
        """Where shard `index` (from 0) lies once it is finished."""
        return self.folder / f"shard-{index:05d}{self.suffix}"

    def finished(self) -> list[int]:
        """Numbers of the finished shards, ascending."""
        there = {path.name for path in self.folder.iterdir() if path.is_file()}
        return [index for index in range(self.num_shards) if self.path(index).name in there]

    def unfinished(self, worker: tuple[int, int] = (0, 1)) -> list[int]:
        """Numbers of the shards that worker k of n (k from 0) has still to make: those of k, k + n, k + 2n, ...

        Leftovers of killed writers of this worker's shards are removed.
        """
        k, n = worker
        if not 0 <= k < n:
            raise FewstepError(f"worker {k} of {n} does not exist; workers count from 0 to {n - 1}")
        mine = range(k, self.num_shards, n)
        for index in mine:
            remove_leftovers(self.path(index))
        return [index for index in mine if not self.path(index).is_file()]

    @contextmanager
    def write(self, index: int) -> Iterator[Path]:
        """A temporary path that becomes shard `index`; see `write_whole`."""
        with write_whole(self.path(index)) as temporary:
            yield temporary


def describe_difference(there: Any, wanted: Mapping[str, Any]) -> str:
    """'seed is 1 there and 2 here, ...' for every setting that differs, or ''. None is the same as not set."""
    if not isinstance(there, dict):
        return "its manifest is no JSON object"
    flat_there, flat_wanted = _flatten(there), _flatten(wanted)
    absent = "not set"
    differing = [
        f"{key} is {flat_there.get(key, absent)} there and {flat_wanted.get(key, absent)} here"
        for key in sorted(flat_there.keys() | flat_wanted.keys())
        if flat_there.get(key) != flat_wanted.get(key)
    ]
    return ", ".join(differing)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
