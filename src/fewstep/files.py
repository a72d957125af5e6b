"""Files and folders that are either whole or untouched.

Everything is written under a temporary name beside its target, flushed to the disk, then renamed. A kill, Ctrl-C or a
full disk therefore leaves what was there before; a kill also leaves what was being written under its temporary name,
which the next writer of that target removes.
"""

import errno
import fcntl
import glob
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fewstep.errors import FewstepError


@contextmanager
def write_whole(path: str | Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it replaces `path`, on any failure it is removed.

    `mode`: of the file, such as that of the one that is replaced; by default what the umask lets.

    The temporary name keeps the suffix, since some writers choose their format by it. Missing parent folders are made,
    and what killed writers of `path` left is removed. A device or pipe (`/dev/stdout`) has nothing to replace and is
    yielded itself. FewstepError if the file system refuses, or for a named pipe from which nobody reads.
    """
    path = Path(path)
    with storage_errors(path):
        if path.is_dir():
            raise FewstepError(f"{path} is a folder, not a file; name a file")
        if path.exists() and not path.is_file():
            with _read_meanwhile(path):
                yield path
            return
        path = Path(os.path.realpath(path))  # a link keeps pointing at the file that is replaced
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with _temporary(path, lambda temporary: temporary.touch(exist_ok=False)) as temporary:
            try:
                yield temporary
                if mode is None:
                    give_usual_mode(temporary)
                else:
                    temporary.chmod(mode)
                _flush(temporary)
                os.replace(temporary, path)
                _flush(path.parent)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
                raise


READER_PATIENCE_S = 5.0
"""How long a reader of a named pipe may let itself be waited for."""


@contextmanager
def _read_meanwhile(path: Path) -> Iterator[None]:
    """Of a named pipe, see to it that somebody reads: else opening it to write would wait for ever."""
    if not stat.S_ISFIFO(path.stat().st_mode):
        yield
        return
    deadline_s = time.monotonic() + READER_PATIENCE_S
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        if time.monotonic() > deadline_s:
            raise FewstepError(f"{path} is a pipe from which nobody reads; start its reader first, or name a file")
        time.sleep(0.02)
    try:
        yield  # the pipe is held open, or its reader would see the end of what is written before its beginning
    finally:
        os.close(descriptor)


def write_text_whole(path: str | Path, text: str) -> None:
    """Replace a file by this text, in UTF-8; see `write_whole`."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
