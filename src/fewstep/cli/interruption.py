"""Ctrl-C with a sentence of its own, such as the trainer's: typer keeps only the exit code of a KeyboardInterrupt."""

from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells report it."""


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
