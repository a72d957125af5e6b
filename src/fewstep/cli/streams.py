"""Standard streams that are closed, full or gone: none of them may cost a command its files.

What cannot be written is dropped, and the command goes on; how its output failed is asked at the end.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_CLOSED = (errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENXIO)
"""Nobody reads any more (`| head`), or nobody ever did."""


class _Lenient(io.RawIOBase):
    """A file descriptor that keeps its first error instead of raising it, and from then on takes everything."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        length = memoryview(data).nbytes
        if self.error is not None:
            return length
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # a pipe that another program made non-blocking is full: wait for its reader
            select.select([], [self._descriptor], [])
            return 0 if length == 0 else self.write(data)
        except OSError as error:
            self.error = error
            return length


class Streams:
    """How standard output went while `lenient_streams` was entered."""

    def __init__(self) -> None:
        self.output: _Lenient | None = None

    def failure(self) -> str | None:
        """Why standard output could not be written, or None if it was, or if it was closed."""
        error = None if self.output is None else self.output.error
        return None if error is None or error.errno in _CLOSED else error.strerror or str(error)


@contextmanager
def lenient_streams() -> Iterator[Streams]:
    """Let standard output and standard error take everything, and give the process those streams that it lacks.

    A stream that somebody has replaced, such as a test, stays as it is.
    """
    _open_missing()
    before = sys.stdout, sys.stderr
    streams = Streams()
    if sys.stdout is sys.__stdout__:
        streams.output, sys.stdout = _lenient(cast(TextIO, sys.stdout))
    if sys.stderr is sys.__stderr__:
        _, sys.stderr = _lenient(cast(TextIO, sys.stderr))
    try:
        yield streams
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """A closed descriptor would otherwise be given to the next file that is opened, and print into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            while os.open(os.devnull, os.O_RDWR) < descriptor:
                pass
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _lenient(stream: TextIO) -> tuple[_Lenient, TextIO]:
    stream.flush()
    raw = _Lenient(stream.fileno())
    # A character that the terminal's encoding lacks is shown escaped rather than ending the command.
    text = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "strict" else stream.errors,
        line_buffering=raw.isatty() or stream is sys.__stderr__,
    )
    return raw, text
