"""What may end a training before its last step: Ctrl-C and SIGTERM, no memory, a process that is gone."""

import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from fewstep.errors import FewstepError

ONE_CTRL_C_S = 1.0
"""A Ctrl-C in a terminal reaches a process of torchrun twice: from the terminal, and from the launcher."""


class Interrupt:
    """Notes the first Ctrl-C, or SIGTERM, so that the run stops between two steps; a second Ctrl-C acts at once.

    SIGTERM is left to whoever listens to it already, as the command line does, which calls this handler.
    """

    def __init__(self, *, main: bool) -> None:
        self.wanted = False
        self._main = main
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # no other may listen
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
            if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.wanted:
            self.wanted, self._since = True, now
            if self._main:
                print("stopping after this step; another Ctrl-C stops at once", file=sys.stderr)
        elif number == signal.SIGINT and now - self._since > ONE_CTRL_C_S:
            raise KeyboardInterrupt


@contextmanager
def told_failures(accelerator: Accelerator) -> Iterator[None]:
    """Turn torch's errors about memory or a process that has ended into one sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise FewstepError(
                f"a step needs more memory than there is on {accelerator.device}; use fewer rows or a shorter "
                "row_length, and make up for it by a higher accumulation"
            ) from error
        if accelerator.num_processes > 1 and re.search(r"gloo|nccl|connection (closed|reset)", str(error), re.I):
            raise FewstepError(
                f"another of the {accelerator.num_processes} processes has ended; its message tells why"
            ) from error
        raise
