"""Drawing decoders at work: each lane is one model on one problem, its canvas a row of masks that turn into tokens."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

# Neighbouring steps differ clearly, so tokens that became final in the same pass are seen as one group.
STEP_COLOURS = (
    "#f2a65a", "#58a6ff", "#7ee787", "#ff7b9c", "#d2a8ff", "#e3d34b",
    "#39c5cf", "#ff8f6b", "#9ecbff", "#b8e986", "#f778ba", "#c9a26d",
)  # fmt: skip
MASK = "░"
SILENT_TOKEN = "·"
"""Stands for a final token without text, such as the end-of-text and what follows it."""

SECONDS_PER_FRAME = 0.05


@contextmanager
def drawn_live(
    console: Console, draw: Callable[[], RenderableType], *, transient: bool = False
) -> Iterator[Callable[[], None]]:
    """Yields what to call after a change; it draws every SECONDS_PER_FRAME at most. At the end what `draw` makes then
    stays, unless `transient`.
    """
    with Live(console=console, auto_refresh=False, vertical_overflow="crop", transient=transient) as live:
        drawn_s = 0.0

        def redraw() -> None:
            nonlocal drawn_s
            if time.perf_counter() - drawn_s > SECONDS_PER_FRAME:
                live.update(draw(), refresh=True)
                drawn_s = time.perf_counter()

        yield redraw
        if not transient:
            live.update(draw(), refresh=True)


def colour_of(step: int) -> str:
    """Of the tokens that became final in this pass."""
    return STEP_COLOURS[step % len(STEP_COLOURS)]


@dataclass
class Lane:
    """One model on one problem. `texts`: None where the canvas is masked; `steps`: the pass that finalised each."""

    name: str
    texts: list[str | None]
    steps: list[int] = field(default_factory=list)
    num_forwards: int = 0
    seconds: float = 0.0
    verdict: str = ""

    def __post_init__(self) -> None:
        self.steps = [0] * len(self.texts)

    def finalise(self, position: int, text: str, step: int) -> None:
        """The token at `position` of the canvas became final in pass `step`."""
        self.texts[position] = text
        self.steps[position] = step

    def canvas(self) -> Text:
        """The canvas as coloured text."""
        drawn = Text(overflow="fold")
        for text, step in zip(self.texts, self.steps, strict=True):
            if text is None:
                drawn.append(MASK, style="bright_black")
            elif not text:
                drawn.append(SILENT_TOKEN, style="bright_black")
            else:
                drawn.append(text.replace("\n", "↵ "), style=colour_of(step))
        return drawn


def draw(question: str, lanes: list[Lane], *, height: int) -> RenderableType:
    """The question, and below it the lanes side by side, each `height` lines high."""
    sides = Table.grid(expand=True)
    panels = []
    for lane in lanes:
        sides.add_column(ratio=1)
        status = f"{lane.num_forwards} passes · {lane.seconds:.2f} s {lane.verdict}"
        panels.append(
            Panel(lane.canvas(), title=lane.name, subtitle=status, height=height, border_style="bright_black")
        )
    sides.add_row(*panels)
    return Group(Text(question, style="bold"), sides)
