"""The log of a training run: history, TensorBoard, a progress bar on a terminal and plain lines elsewhere."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from fewstep.errors import FewstepError

Figures = dict[str, float]


class RunLog:
    """A context manager. `history` is kept by every process; only the one that is `main` shows and writes it.

    FewstepError from whatever writes, if the file system refuses.
    """

    def __init__(self, folder: Path, *, max_steps: int, main: bool) -> None:
        self.history: list[Figures] = []
        self._folder, self._max_steps, self._main = folder, max_steps, main
        self._writer: SummaryWriter | None = None
        console = Console(stderr=True)
        self._on_terminal = console.is_terminal
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
            disable=not (main and self._on_terminal),
        )

    def start(self, step: int) -> None:
        """Begin at `step`; what a killed run logged after it is no longer shown."""
        self._task = self._bar.add_task("training", total=self._max_steps, completed=step, loss="")
        if self._main:
            with self._writing():
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else None)

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def figures(self, step: int, figures: Figures) -> None:
        """Log numbers by name; several calls of one step make one line of the history."""
        if self.history and self.history[-1]["step"] == step:
            self.history[-1].update(figures)
        else:
            self.history.append({"step": step, **figures})
        if self._writer is None:
            return
        with self._writing():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
        if "loss" in figures:
            self._bar.update(self._task, loss=f"loss {figures['loss']:.4f}")
        if not self._on_terminal:
            shown = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
            print(f"step {step}/{self._max_steps} {shown}", file=sys.stderr, flush=True)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Log texts by name: all to TensorBoard, the first to be read at once."""
        if self._writer is None:
            return
        with self._writing():
            for name, text in texts.items():
                self._writer.add_text(name, text, step)
        for name in list(texts)[:1]:
            self._bar.console.print(f"{name} at step {step}: {texts[name]}", markup=False, highlight=False)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FewstepError(
                f"could not write the log in {self._folder}: {error.strerror or error}; free some space or choose "
                "another output folder"
            ) from error

    def __enter__(self) -> "RunLog":
        # TensorBoard writes in a thread, and tells of its failures again when it is next called.
        self._hook = threading.excepthook
        threading.excepthook = lambda raised: None if isinstance(raised.exc_value, OSError) else self._hook(raised)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as failure:  # what was trained is worth more than the last lines of the log
            if error is None:
                print(f"the log in {self._folder} is not whole: {failure.strerror or failure}", file=sys.stderr)
        finally:
            threading.excepthook = self._hook


LOSS_ROWS = 12
LOSSES = ("loss", "distillation", "consistency", "denoising", "autoregressive", "hard", "accepted")


def losses(report: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of a run's `report.json`, if there is one: up to LOSS_ROWS of the logged steps, evenly spread, as `loss_lines`,
    and as `loss_names` which parts of the loss they have.
    """
    logged = [line for line in report["history"] if "loss" in line] if report else []
    count = min(LOSS_ROWS, len(logged))
    chosen = sorted({round(i * (len(logged) - 1) / max(1, count - 1)) for i in range(count)})
    return {
        "loss_names": [name for name in LOSSES if logged and name in logged[0]],
        "loss_lines": [logged[i] for i in chosen],
    }
