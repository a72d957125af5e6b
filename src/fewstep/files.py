"""Files that are either whole or untouched: atomic writes, JSON and JSONL, and folders of shards that resume.

Everything is written under a temporary name beside its target, flushed to the disk, then renamed. A kill, Ctrl-C or a
full disk therefore leaves what was there before; a kill also leaves what was being written under its temporary name,
which the next writer of that target removes.
"""

import errno
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import secrets
import select
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fewstep.errors import FewstepError

MANIFEST_NAME = "manifest.json"

MOST_BYTES = 1 << 28
"""Of a line or a text: far more than anybody has, and few enough that a device without an end is soon told."""

PATIENCE_S = 5.0
"""How long a writer of a named pipe may let itself be waited for."""

MOST_SHARDS = 10**6
"""More than anybody has, and few enough to go through their numbers."""


# Whole files and folders


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`, on any failure it is removed.

    The temporary name keeps the suffix, since some writers choose their format by it. Missing parent folders are made,
    and what killed writers of `path` left is removed. A device or pipe (`/dev/stdout`) has nothing to replace and is
    yielded itself. FewstepError if the file system refuses.
    """
    path = Path(path)
    with storage_errors(path):
        if path.is_dir():
            raise FewstepError(f"{path} is a folder, not a file; name a file")
        if path.exists() and not path.is_file():
            yield path
            return
        path = Path(os.path.realpath(path))  # a link keeps pointing at the file that is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with _temporary(path, lambda temporary: temporary.touch(exist_ok=False)) as temporary:
            try:
                yield temporary
                give_usual_mode(temporary)
                _flush(temporary)
                os.replace(temporary, path)
                _flush(path.parent)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise


@contextmanager
def write_folder_whole(target: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new empty folder beside `target`; on success it becomes `target`, on any failure it is removed.

    FewstepError if `target` exists (an empty folder does not count) and `overwrite` is False. With `overwrite` the old
    and the new folder swap their names in one step, where the system can; elsewhere the old one is set aside first, and
    a kill between these two steps is mended by the next writer. What killed writers of `target` left is removed.
    """
    with storage_errors(Path(target)):
        target = Path(os.path.realpath(target))
        settle(target)
        if target.is_file():
            raise FewstepError(f"{target} is a file, not a folder; name a folder")
        occupied = target.is_dir() and any(target.iterdir())
        if occupied and not overwrite:
            raise FewstepError(f"the folder {target} is not empty; choose another, or overwrite it (--overwrite)")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(target, lambda temporary: temporary.mkdir()) as temporary:
            try:
                yield temporary
                for inside in [temporary, *temporary.rglob("*")]:
                    give_usual_mode(inside)
                    _flush(inside)
                if not occupied:
                    os.replace(temporary, target)
                elif not _swap(temporary, target):
                    _replace_in_two_steps(temporary, target)
                _flush(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)  # unfinished, or the old one


def settle(path: str | Path) -> None:
    """Put back the folder that a killed writer of `path` had set aside, and remove what killed writers left."""
    path = Path(os.path.realpath(path))
    for aside in _left_by_killed_writers(path, "old"):
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, path)
    remove_leftovers(path)


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files and folders that killed writers of `path` left beside it; none of a living one."""
    for leftover in _left_by_killed_writers(Path(os.path.realpath(path)), "tmp"):
        with suppress(OSError):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


# Temporary names. A writer holds a lock on what it has under one; the system takes the lock back when the writer dies.

_LONGEST_NAME = 200
"""Bytes up to which a name is a part of its temporary one; systems allow 255."""


def _temporary_name(path: Path, kind: str, tag: str | None = None) -> str:
    """Hidden, and with the suffix of `path`. `kind`: tmp for what is being written, old for what is set aside."""
    stem, suffix = path.stem, path.suffix
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        stem, suffix = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32], ""
    if tag is None:
        return f".{stem}.{secrets.token_hex(4)}.{kind}{suffix}"
    return f".{glob.escape(stem)}.{tag}.{kind}{glob.escape(suffix)}"


@contextmanager
def _temporary(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """What `create` makes under a new temporary name beside `path`, locked as that of a living writer."""
    descriptor = None
    while descriptor is None:  # another writer may take it for a leftover before it is locked
        temporary = path.with_name(_temporary_name(path, "tmp"))
        create(temporary)
        descriptor = lock(temporary)
    try:
        yield temporary
    finally:
        os.close(descriptor)


def _left_by_killed_writers(path: Path, kind: str) -> Iterator[Path]:
    """Temporary files and folders of `path` whose writers do not live; each is locked until the next is asked for."""
    try:
        found = list(path.parent.glob(_temporary_name(path, kind, "?" * 8)))
    except OSError:
        return
    for leftover in found:
        with suppress(OSError):
            descriptor = lock(leftover, surely=True)
            if descriptor is not None:
                try:
                    yield leftover
                finally:
                    os.close(descriptor)


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS)


def lock(path: Path, *, surely: bool = False) -> int | None:
    """A descriptor that holds the lock of a file or folder, until it is closed; None if another has it or it is gone.

    On a file system without locks the descriptor locks nothing, or with `surely` there is none. OSError if `path`
    cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno in _NO_LOCKS and not surely:
            return descriptor
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    os.close(descriptor)
    return None


def _swap(first: Path, second: Path) -> bool:
    """Exchange the names of two folders in one step, which no kill can halve; False where the system cannot."""
    import ctypes

    here, swap = -100, 2  # AT_FDCWD; RENAME_EXCHANGE, and RENAME_SWAP on macOS
    system = ctypes.CDLL(None)
    names = os.fsencode(first), os.fsencode(second)
    try:
        if sys.platform == "darwin":
            return bool(system.renamex_np(names[0], names[1], swap) == 0)
        return bool(system.renameat2(here, names[0], here, names[1], swap) == 0)
    except AttributeError:
        return False


def _replace_in_two_steps(new: Path, target: Path) -> None:
    """Set the old folder aside, and give the new one its name; a kill between the two is mended by `settle`."""
    aside = target.with_name(_temporary_name(target, "old"))
    descriptor = lock(target)
    try:
        os.replace(target, aside)
        try:
            os.replace(new, target)
        except BaseException:
            os.replace(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


_UMASK = os.umask(0o077)  # it can only be read by setting it: once, before there are threads
os.umask(_UMASK)


def give_usual_mode(path: Path) -> None:
    """Let a file be read and written by whom the umask lets; nothing for a folder.

    Some writers, safetensors among them, write through a private file of their own, which others could not read.
    """
    mode = path.stat().st_mode
    if path.is_file() and mode & 0o666 != 0o666 & ~_UMASK:
        with suppress(PermissionError):  # some file systems have one mode for all
            path.chmod(mode & 0o7111 | 0o666 & ~_UMASK)


def _flush(path: Path) -> None:
    """Put a file, or the entries of a folder, on the disk: a power cut after the rename must not leave it empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):  # some systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn failures of the file system, also those that a library wrapped, into one sentence."""
    try:
        yield
    except FewstepError:
        raise
    except Exception as error:  # libraries wrap what the system said in classes of their own
        reason = _storage_reason(error, path.parent)
        if reason is None:
            raise
        raise FewstepError(f"could not write {path}: {reason}; what was there before is unchanged") from error


_FULL = "the disk is full; free some space or choose another folder"
_TOO_LARGE = "a file would be larger than this system or its limit (ulimit -f) allows"
_TORCH_CUT_SHORT = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""In what torch says when a file could not be written to its end, which leaves out why."""


def _storage_reason(error: BaseException, folder: Path) -> str | None:
    """Why the file system refused, or None if the error is about something else.

    safetensors, tokenizers and torch report it with classes and messages of their own, hence the look at the text, at
    the chain of causes and at the disk itself.
    """
    link: BaseException | None = error
    while link is not None:
        told = re.search(r"\(os error (\d+)\)", str(link))  # Rust's words
        number = link.errno if isinstance(link, OSError) else int(told[1]) if told else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(link):
            return _FULL
        if number == errno.EFBIG:
            return _TOO_LARGE
        if isinstance(link, OSError):
            elsewhere = isinstance(link.filename, str | Path) and Path(link.filename).parent != folder
            return (link.strerror or str(link)) + (f": {link.filename}" if elsewhere else "")
        if number is not None:
            return os.strerror(number)
        if isinstance(link, ValueError) and "embedded null" in str(link):
            return "its name holds a null character"
        link = link.__cause__ or link.__context__
    try:
        full = shutil.disk_usage(folder).free < 4096
    except (OSError, ValueError):
        full = False
    if full:
        return _FULL
    return _TOO_LARGE if any(words in str(error) for words in _TORCH_CUT_SHORT) else None


# JSON and JSONL


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. FewstepError naming file, line and column."""
    try:
        return _parse_json(read_text(Path(path)), str(path))
    except json.JSONDecodeError as error:
        raise FewstepError(f"{path} line {error.lineno} column {error.colno} is not valid JSON: {error.msg}") from None


def _parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; json's own error if it is none. FewstepError for one that Python cannot hold or write
    again.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise FewstepError(f"{where} is nested too deeply to be read") from None
    except ValueError:  # of int(), for what the decoder has found to be a number
        raise FewstepError(f"{where} holds a number of thousands of digits, which cannot be read") from None
    if "\\ud" in text.lower() and not is_unicode(json.dumps(value, ensure_ascii=False)):
        raise FewstepError(f"{where} holds a \\u escape that is half a character (a surrogate alone), which is no text")
    return value


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: bytes that were none stand in a text of Python's as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def write_json_whole(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON. FewstepError if it holds something JSON cannot say (NaN among it)."""
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FewstepError(f"could not write {path}: {error}") from error
    with write_whole(path) as temporary:
        # A path may hold bytes that are no UTF-8, which Python keeps as surrogates; JSON writes these as escapes.
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def numbered_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line of a JSONL file; blank lines are skipped.

    FewstepError naming file and line if a line is no JSON object.
    """
    path = Path(path)
    try:
        with open_to_read(path) as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MOST_BYTES), b""), start=1):
                if len(line) == MOST_BYTES:
                    raise FewstepError(f"{path} line {number} does not end within {MOST_BYTES >> 20} MiB; is it text?")
                if not line.strip():
                    continue
                yield number, _parse_row(path, number, line)
    except OSError as error:
        raise FewstepError(f"could not read {path}: {error.strerror or error}") from error


def read_rows(path: str | Path, required: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one a line. FewstepError naming file and line if one lacks a `required` field."""
    for number, row in numbered_rows(path):
        missing = [field for field in required if field not in row]
        if missing:
            has = ", ".join(map(repr, row)) or "none"
            raise FewstepError(f"{path} line {number} has no field {missing[0]!r}; its fields are: {has}")
        yield row


def write_rows_whole(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; `rows` may be a generator, and the file appears only once all are written."""
    with write_whole(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _parse_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = _parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"{path} line {number}")
    except UnicodeDecodeError:
        raise FewstepError(f"{path} line {number} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise FewstepError(
            f"{path} line {number} is not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        ) from None
    if not isinstance(row, dict):
        raise FewstepError(f'{path} line {number} is not a JSON object, such as {{"id": "1", "prompt": "..."}}')
    return row


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. FewstepError naming it if it cannot be read."""
    try:
        with open_to_read(path) as stream:
            data = stream.read(MOST_BYTES)
        if len(data) == MOST_BYTES:
            raise FewstepError(f"{path} does not end within {MOST_BYTES >> 20} MiB; is it the right file?")
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
    except OSError as error:
        raise FewstepError(f"could not read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise FewstepError(f"{path} is not UTF-8 text") from None


def open_to_read(path: Path) -> IO[bytes]:
    """The bytes of a file, device or pipe. FewstepError for a named pipe into which nobody writes; OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or opening such a pipe would wait for ever
    stream = os.fdopen(descriptor, "rb")
    try:
        mode = os.fstat(descriptor).st_mode
        first = _first_of_pipe(path, descriptor) if stat.S_ISFIFO(mode) else b""
        os.set_blocking(descriptor, True)
        return io.BytesIO(first + stream.read(MOST_BYTES)) if first else stream
    except BaseException:
        stream.close()
        raise


def _first_of_pipe(path: Path, descriptor: int) -> bytes:
    """What a pipe holds within `PATIENCE_S`; nothing if its writer takes longer, and FewstepError if there is none."""
    deadline_s = time.monotonic() + PATIENCE_S
    while (left_s := deadline_s - time.monotonic()) > 0:
        select.select([descriptor], [], [], left_s)
        try:
            if first := os.read(descriptor, 1 << 16):
                return first
        except BlockingIOError:
            return b""
        time.sleep(min(0.02, left_s))
    raise FewstepError(f"{path} is a pipe into which nothing is written; start its writer first, or name a file")


# Shards


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
