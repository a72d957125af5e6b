"""A command never replaces what it reads: the one check that every command makes before it does anything else.

Options say with a `Touches` in their annotation what the command does to the path they name. Files and folders are
compared as the system knows them, so that links, `..` and names that differ in case hide nothing.
"""

import json
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from fewstep.errors import FewstepError
from fewstep.models.checkpoint_files import ADAPTER_CONFIG, HEADS, VOCABULARIES
from fewstep.models.names import BUNDLED
from fewstep.shards import MANIFEST_NAME
from fewstep.train.output import CHECKPOINTS, FINISHED, LOGS, REPORT, SAMPLES


class Touches(Enum):
    """What a command does to the path of an option."""

    READS = auto()
    READS_MODEL = auto()
    """A folder or file, a bundled name or a hub id, settings after a comma; with an adapter its base."""
    WRITES = auto()
    DRAWS = auto()
    """Two files, .png and .svg, of this stem."""
    REPLACES = auto()
    """A folder, as a whole."""
    FILLS = auto()
    """A folder, of which only the command's own files are written."""


@dataclass(frozen=True)
class Touched:
    """A path that an option named."""

    option: str
    touches: Touches
    path: Path


STANDARD_OUTPUT = Path("-")
"""What an option for a file names in place of one."""

PLOT_SUFFIXES = (".png", ".svg")


def plot_stem(path: Path) -> Path:
    """`path` without the suffix of a plot."""
    return path.with_suffix("") if path.suffix in PLOT_SUFFIXES else path


def check_sources(touched: Sequence[Touched]) -> None:
    """FewstepError if something that the command reads would be replaced, or if what it writes would be written twice
    or cannot be.
    """
    touched = [one for one in touched if one.path != STANDARD_OUTPUT]
    sources = [_Source.of(one) for one in touched if one.touches in (Touches.READS, Touches.READS_MODEL)]
    written = list(_written(touched))
    for target in written:
        _check_place(target)
        for source in sources:
            if reason := source.harmed_by(target):
                raise FewstepError(f"{target.option} {target.path} {reason}, and would replace it; name another place")
    for index, target in enumerate(written):
        for other in written[:index]:
            if _collide(target, other) or _collide(other, target):
                raise FewstepError(f"{other.option} and {target.option} would write the same file; name another")


def _check_place(target: Touched) -> None:
    """FewstepError for a path that nothing can be written to, which would else be found after the work.

    Whether the system lets us is tried with a file without a name, in the folder where the temporary file or the first
    folder would be made.
    """
    try:
        with suppress(FileNotFoundError):
            found = os.stat(target.path).st_mode
            if not stat.S_ISREG(found) and not stat.S_ISDIR(found):
                return  # a device or a pipe is written to itself
        path = Path(os.path.realpath(target.path))
        inside = target.touches is Touches.FILLS and path.is_dir()
        folder = next(one for one in ((path,) if inside else path.parents) if one.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FewstepError(f"{target.option} {target.path} cannot be written: {reason}; name another place") from None


def _written(touched: Sequence[Touched]) -> Iterator[Touched]:
    for one in touched:
        if one.touches is Touches.DRAWS:
            stem = plot_stem(one.path)
            if stem.name in ("", ".."):
                raise FewstepError(f"{one.option} {one.path} names no file; .png and .svg are added to its name")
            for suffix in PLOT_SUFFIXES:
                yield Touched(one.option, Touches.WRITES, stem.with_name(stem.name + suffix))
        elif one.touches in (Touches.WRITES, Touches.REPLACES, Touches.FILLS):
            yield one


# What is read

_Identity = tuple[int, int]

_MOST_FILES = 20_000
"""In a folder that is looked through."""

_OWN_FILES = (
    "*config.json", "*.index.json", *VOCABULARIES, "*tokens*.json", "chat_template*", HEADS, MANIFEST_NAME, REPORT,
    SAMPLES,
)  # fmt: skip
"""Names, among those of reports and tables, of the files that make up a model, a training or a folder of shards."""

_OWN_FOLDERS = (LOGS, CHECKPOINTS, FINISHED)
"""What a training writes below its output."""


def _is_own(name: str) -> bool:
    """Whether a file of this name may be a part of a model or of trajectories, unlike a report laid beside them."""
    is_report = Path(name).suffix in (".json", ".jsonl", *PLOT_SUFFIXES)
    return not is_report or any(fnmatch(name, pattern) for pattern in _OWN_FILES)


@dataclass
class _Source:
    """What one option reads: files named as such, folders, the files in these, and where all of them lie."""

    option: str
    is_model: bool
    files: dict[_Identity, Path] = field(default_factory=dict)
    folders: dict[_Identity, Path] = field(default_factory=dict)
    inside: dict[_Identity, Path] = field(default_factory=dict)
    places: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, touched: Touched) -> "_Source":
        source = cls(touched.option, is_model=touched.touches is Touches.READS_MODEL)
        paths = _model_paths(str(touched.path)) if source.is_model else [touched.path]
        for path in paths:
            source._add(path)
        return source

    def _add(self, path: Path) -> None:
        known = _identity(path)
        if known is None:
            return
        self._add_place(path)
        if not os.path.isdir(path):
            self.files[known] = path
            return
        self.folders[known] = path
        for file in islice(_files_of(path), _MOST_FILES):
            identity = _identity(file)
            if identity is not None:
                self.inside[identity] = file
                self._add_place(file)

    def _reads_inside(self, name: str) -> bool:
        """Whether a file of this name in a folder is read: a folder of data may be one of JSONL files."""
        return _is_own(name) or (not self.is_model and Path(name).suffix == ".jsonl")

    def _add_place(self, path: Path) -> None:
        """The place that was named and, if that is a link, where it leads."""
        self.places |= {Path(os.path.realpath(path.parent)) / path.name, Path(os.path.realpath(path))}

    def harmed_by(self, target: Touched) -> str | None:
        """What `target` is to this source, if writing it would replace some of it."""
        known = _identity(target.path)
        if known is None:  # nothing is there
            return None
        if known in self.files or known in self.folders:
            return f"is what {self.option} reads"
        if target.touches is Touches.WRITES:
            if known in self.inside and self._reads_inside(self.inside[known].name):
                return f"is a file of what {self.option} reads"
        elif target.touches is Touches.REPLACES:
            if any(known == _identity(folder) for place in self.places for folder in place.parents):
                return f"holds what {self.option} reads"
            inside = any(_identity(folder) in self.folders for folder in Path(os.path.realpath(target.path)).parents)
            if inside and os.path.isdir(target.path) and any(os.scandir(target.path)):
                return f"is a part of what {self.option} reads"
        elif any(_fills(target.path, place) for place in self.places):
            return f"writes files of its own where {self.option} reads"
        return None


def _fills(folder: Path, place: Path) -> bool:
    """Whether a training or a collection into `folder` writes a file at `place`."""
    real = Path(os.path.realpath(folder))
    if not place.is_relative_to(real):
        return False
    parts = place.relative_to(real).parts
    return parts[0] in _OWN_FOLDERS or (len(parts) == 1 and _is_own(parts[0]) and os.path.isfile(place))


def _collide(file: Touched, other: Touched) -> bool:
    """Whether `file`, if it is one, is the other, or one of the files that the other folder is made of."""
    if file.touches is not Touches.WRITES:
        return False
    known = _identity(file.path)
    if known is None and os.path.exists(file.path):
        return False  # a device takes both
    here, there = (Path(os.path.realpath(one.path)) for one in (file, other))
    if here == there or (known is not None and known == _identity(other.path)):
        return True
    return other.touches is not Touches.WRITES and here.parent == there and _is_own(here.name)


def _model_paths(name: str) -> Iterator[Path]:
    """The folder or file of a model, and of the bases that its adapter is for; none of a hub id."""
    name = name.split(",")[0]
    seen: set[Path] = set()
    path = BUNDLED / name if os.path.isdir(BUNDLED / name) else Path(name)
    while path not in seen and os.path.exists(path):
        seen.add(path)
        yield path
        try:
            base = str(json.loads((path / ADAPTER_CONFIG).read_bytes())["base_model_name_or_path"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or loading will say what is wrong
            return
        choices = [path / base, BUNDLED / base, Path(base)]
        path = next((choice for choice in choices if os.path.isdir(choice)), path)


def _files_of(folder: Path) -> Iterator[Path]:
    """The files of a model or of shards: not what lies deeper, which may be the outputs of others."""
    for entry in os.scandir(folder):
        if entry.is_file():
            yield Path(entry)
        elif "chat_template" in entry.name:
            yield from _files_of(Path(entry))


def _identity(path: Path) -> _Identity | None:
    """What tells a file or folder from all others, through links; None for what is not there, devices and pipes."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        return None
    return found.st_dev, found.st_ino
