"""Ctrl-C and SIGTERM: both end a command as a KeyboardInterrupt, which may bring a sentence of its own.

typer keeps only the exit code of a KeyboardInterrupt, hence InterruptionError.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells report it."""

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, which schedulers send before they kill."""


class InterruptionError(Exception):
    """A KeyboardInterrupt that says something. The command line prints it and exits with INTERRUPTED."""


@contextmanager
def spoken_interrupts() -> Iterator[None]:
    """Raise a KeyboardInterrupt that says something as InterruptionError, which typer leaves alone."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):
            raise
        raise InterruptionError(str(interrupt)) from interrupt


class Termination:
    """While it is entered, SIGTERM does what Ctrl-C would do at that moment; `arrived` says whether it came.

    Whoever handles Ctrl-C, such as a trainer that first saves a checkpoint, thereby handles SIGTERM too. Only the first
    one counts: some schedulers send several, and a second Ctrl-C would stop without saving.
    """

    def __init__(self) -> None:
        self.arrived = False
        # Only a main thread may listen; a SIGTERM that is ignored stays so.
        self._listens = (
            threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        )

    def __enter__(self) -> "Termination":
        if self._listens:
            signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.arrived:
            return
        self.arrived = True
        handle = signal.getsignal(signal.SIGINT)
        if not callable(handle):  # a shell starts what it runs in the background deaf to Ctrl-C
            raise KeyboardInterrupt
        handle(number, frame)  # which may tell the two apart


@contextmanager
def one_voice(*, patience_s: float = 30.0) -> Iterator[None]:
    """Under a launcher of several processes let the first one speak of what all of them meet.

    Any other process waits with its own error: if the first has ended too, the launcher ends this one meanwhile, in
    silence; and after an interruption it says nothing.
    """
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    try:
        yield
    except (InterruptionError, KeyboardInterrupt):
        raise SystemExit(INTERRUPTED) from None
    except Exception:  # whatever the first process meets and tells, too
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(patience_s)
        raise
