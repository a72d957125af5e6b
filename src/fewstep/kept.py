"""Results that are kept and resumed: one guard for commands and recipes.

What makes results, `made_by`, is a JSON object that holds "weights" (the hash of every network's weights) and all
settings and inputs. It is kept with the results, and results of anything else are refused in one sentence that names
each thing that differs, never mixed in.

The results of one run are kept one by one in a file beside the one that will hold them all (`out.jsonl.kept`): what
made them in its first line, then a line for each, written as it comes. A kill may cut the last line off, which is then
made again, as is any damaged line; whole lines stay. A result that stays, such as that of one job of many, is a file of
its own.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fewstep.errors import FewstepError
from fewstep.files import storage_errors
from fewstep.json_files import read_json, write_json_whole
from fewstep.shards import describe_difference

SUFFIX = ".kept"
_LONGEST_NAME = 200  # bytes


def check_made_by(made_by: Mapping[str, Any]) -> None:
    """ValueError unless "weights" stand in it, or in each of its parts."""
    parts = made_by.values()
    if "weights" not in made_by and not (parts and all(isinstance(one, Mapping) and "weights" in one for one in parts)):
        raise ValueError(f"what makes a result includes the hash of the weights, got {sorted(made_by)}")


def keep_result(path: Path, result: Any, made_by: Mapping[str, Any]) -> None:
    """Write a JSON value to a file of its own, together with what it depends on. FewstepError if the file system
    refuses.
    """
    write_json_whole(path, {"made_by": _told(made_by), "result": result})


def kept_result(path: Path, made_by: Mapping[str, Any]) -> Any | None:
    """What `keep_result` wrote to this file, or None if it is not there. FewstepError if something else made it."""
    told = _told(made_by)
    if not path.exists():
        return None
    there = read_json(path)
    if not isinstance(there, dict) or "result" not in there or "made_by" not in there:
        raise FewstepError(f"{path} holds no kept result; move it away")
    if difference := describe_difference(there["made_by"], told):
        raise FewstepError(
            f"{path} keeps a result of other weights or settings ({difference}); remove the file to make it again, or "
            "name another folder"
        )
    return there["result"]


def _told(made_by: Mapping[str, Any]) -> Any:
    """As it is read again from JSON."""
    check_made_by(made_by)
    return json.loads(json.dumps(made_by))


class Kept:
    """Results by key, those of an earlier run too; `add` puts one on the disk at once, if there is a file at all."""

    def __init__(self, path: Path | None = None, stream: IO[bytes] | None = None, *, prefix: str = "") -> None:
        """See `kept_results`; without arguments nothing is written. `prefix` is that of `under`."""
        self.path = path
        self.results: dict[str, Any] = {}
        self.num_found = 0
        self._stream = stream
        self._prefix = prefix

    def get(self, key: str) -> Any | None:
        """The result of this key, or None if there is none yet."""
        return self.results.get(self._prefix + key)

    def add(self, key: str, result: Any) -> None:
        """Keep a JSON value. FewstepError if the disk is full; what was kept before stays."""
        key = self._prefix + key
        self.results[key] = result
        if self._stream is not None and self.path is not None:
            with storage_errors(self.path):
                self._stream.write(_line({"key": key, "result": result}))
                self._stream.flush()

    def under(self, prefix: str) -> "Kept":
        """The same results, of which keys begin with this prefix: for several runs in one file."""
        part = Kept(self.path, self._stream, prefix=self._prefix + prefix)
        part.results = self.results
        return part


def kept_path(target: Path) -> Path:
    """Where the results for `target` are kept until it is written."""
    target = Path(os.path.realpath(target))
    name = os.fsencode(target.name)
    return target.with_name((target.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()) + SUFFIX)


@contextmanager
def kept_results(target: Path | None, made_by: Callable[[], Mapping[str, Any]]) -> Iterator[Kept]:
    """The results kept for `target`; to be left only once `target` is written, when the file beside it is removed.

    `made_by`: what makes the results; asked only if there is a file to keep them in. Without a
    target, or for one that is a pipe or device, nothing is kept. FewstepError if the results there are of something
    else (the sentence names each thing that differs), or if another process is making them. A KeyboardInterrupt without
    words is given some that say how to go on.
    """
    if target is None or (target.exists() and not target.is_file()):
        yield Kept()
        return
    path = kept_path(target)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = _opened(path)
    with stream:
        kept = Kept(path, stream)
        with storage_errors(path):
            _begin(kept, stream, _told(made_by()))
        try:
            yield kept
        except KeyboardInterrupt as interrupt:
            if str(interrupt) or not kept.results:
                raise
            raise KeyboardInterrupt(
                f"interrupted; answers kept in {path}: {len(kept.results)}; repeat the command to go on"
            ) from interrupt
        finally:
            if not kept.results:
                path.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _opened(path: Path) -> IO[bytes]:
    """The file, made if it is missing, and locked: nobody else adds to it."""
    while True:
        stream = path.open("a+b")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise FewstepError(f"another process is adding to {path}; wait for it, or name another file") from None
        except OSError:
            return stream  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            return stream
        stream.close()  # it was finished, and removed, in between


def _begin(kept: Kept, stream: IO[bytes], made_by: Mapping[str, Any]) -> None:
    """Read what is there, or write the first line."""
    stream.seek(0)
    first = stream.readline()
    if not _is_cut_off(first):
        there = _read(first)
        if there.keys() != {"made_by"} or not isinstance(there["made_by"], dict):
            raise FewstepError(f"{kept.path} holds no kept results; move it away")
        end = len(first)
        for line in stream:
            if not line.endswith(b"\n"):
                break  # it was cut off
            end += len(line)
            entry = _read(line)
            if "result" in entry and isinstance(entry.get("key"), str):
                kept.results[entry["key"]] = entry["result"]
        kept.num_found = len(kept.results)
        difference = describe_difference(there["made_by"], made_by)
        if difference and kept.results:
            raise FewstepError(
                f"{kept.path} keeps answers of a run with other settings ({difference}), which was interrupted; repeat "
                "that run to finish it, or remove the file to begin anew"
            )
        if not difference:
            stream.truncate(end)
            return
    stream.truncate(0)
    stream.write(_line({"made_by": made_by}))
    stream.flush()


def _is_cut_off(first: bytes) -> bool:
    """Whether a kill left no more than the beginning of a first line, which no file of somebody else has."""
    begins = _line({"made_by": {}})[: -len(b"}}\n")]
    if first.endswith(b"\n") or _read(first).keys() > {"made_by"}:
        return False
    return first.startswith(begins) or begins.startswith(first)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n"


def _read(line: bytes) -> dict[str, Any]:
    """The object of a line; an empty one if it is damaged."""
    try:
        value = json.loads(line.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
