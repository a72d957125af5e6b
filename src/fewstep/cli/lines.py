"""Lines that a person types, with Ctrl-C and a history, or that come from a pipe."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from fewstep.cli.report import note
from fewstep.errors import FewstepError

PROMPT, PROMPT_GOES_ON = ">>> ", "... "


class Interrupts:
    """While it is entered, Ctrl-C during an answer asks it to stop after the pass under way.

    A second one, and any other Ctrl-C, is a KeyboardInterrupt. So is SIGTERM, which is to end the program: see
    `Termination`.
    """

    def __init__(self) -> None:
        self.answering = False
        self.asked_to_stop = False
        self.terminated = False
        self._before: Any = None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def during_answer(self) -> Iterator[None]:
        self.answering, self.asked_to_stop = True, False
        try:
            yield
        except KeyboardInterrupt:
            if self.terminated:
                raise
            self.asked_to_stop = True
        finally:
            self.answering = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.terminated = number == signal.SIGTERM
        if self.terminated or not self.answering or self.asked_to_stop:
            raise KeyboardInterrupt
        self.asked_to_stop = True


def typed_lines(interrupts: Interrupts) -> Iterator[str]:
    """What a person types, until Ctrl-D. Ctrl-C drops what was typed so far."""
    while True:
        try:
            yield _joined(_read_typed)
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if interrupts.terminated:
                raise
            note("\nCtrl-D or /quit ends the conversation.")


def piped_lines() -> Iterator[str]:
    """Lines of a pipe or a file. FewstepError if they are not UTF-8."""
    while True:
        try:
            yield _joined(_read_piped)
        except EOFError:
            return
        except UnicodeDecodeError:
            raise FewstepError("standard input is not UTF-8 text; convert it first, for example with iconv") from None


def _joined(read: Callable[[str], str]) -> str:
    """A line, with those that follow it as long as they end in a backslash."""
    lines = [read(PROMPT)]
    with suppress(EOFError):
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(read(PROMPT_GOES_ON))
    return "\n".join(lines)


def _read_typed(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return _read_piped(prompt)


def _read_piped(_: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removeprefix("\ufeff").rstrip("\r\n")


@contextmanager
def line_editing(words: Sequence[str]) -> Iterator[None]:
    """Editing and history of what is typed, and completion of these words, where Python has readline.

    The history is kept from one chat to the next in a file that its owner alone can read.
    """
    try:
        import readline
    except ImportError:
        yield
        return

    def complete(begun: str, number: int) -> str | None:
        fitting = [f"{word} " for word in words if begun and word.startswith(begun)]
        return fitting[number] if number < len(fitting) else None

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "fewstep" / "chat_history"
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with suppress(OSError):  # a home that cannot be written costs the history alone
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)
