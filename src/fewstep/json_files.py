"""JSON, JSONL and text: read with sentences that name file and line, written whole or not at all."""

import io
import json
import os
import select
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fewstep.errors import FewstepError
from fewstep.files import write_whole

MOST_BYTES = 1 << 28
"""Of a line or a text: far more than anybody has, and few enough that a device without an end is soon told."""

PATIENCE_S = 5.0
"""How long a writer of a named pipe may let itself be waited for."""


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. FewstepError naming file, line and column."""
    try:
        return parse_json(read_text(Path(path)), str(path))
    except json.JSONDecodeError as error:
        raise FewstepError(f"{path} line {error.lineno} column {error.colno} is not valid JSON: {error.msg}") from None


def parse_json(text: str, where: str, **options: Any) -> Any:
    """The value of a JSON text; json's own error if it is none. FewstepError for one that Python cannot hold or write
    again. `options`: of `json.loads`; what a function among them raises as FewstepError is raised.
    """
    try:
        value = json.loads(text, **options)
    except (json.JSONDecodeError, FewstepError):
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
        row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"), f"{path} line {number}")
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
        return io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8").read()
    except UnicodeDecodeError:
        raise FewstepError(f"{path} is not UTF-8 text") from None


def read_bytes(path: Path) -> bytes:
    """What is in a file. FewstepError naming it if it cannot be read, or if it is longer than a text can be."""
    try:
        with open_to_read(path) as stream:
            data = stream.read(MOST_BYTES)
    except OSError as error:
        raise FewstepError(f"could not read {path}: {error.strerror or error}") from error
    if len(data) == MOST_BYTES:
        raise FewstepError(f"{path} does not end within {MOST_BYTES >> 20} MiB; is it the right file?")
    return data


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
