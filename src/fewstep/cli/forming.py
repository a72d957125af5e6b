"""An answer while it forms: settled text, then tokens that are final with open positions between them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fewstep.cli.lanes import MASK, SILENT_TOKEN, colour_of, drawn_live
from fewstep.cli.terminal import printable

if TYPE_CHECKING:
    from fewstep.decode.requests import Event
    from fewstep.engine.language_model import LanguageModel

_ROOM_FOR_PROMPT = 3
"""Lines of the terminal that are left to the question and the figures."""


class Forming:
    """The answer of one request, of which tokens become final in any order; before that they may be told as they stand.

    `block_size`: open positions are shown up to the end of the block of the last final token, but none from
    `max_new_tokens` on.
    """

    def __init__(self, lm: "LanguageModel", *, block_size: int, max_new_tokens: int) -> None:
        from fewstep.models.text import TokenTexts

        self.num_tokens = 0
        self.num_forwards = 0
        self._block_size, self._max_new_tokens = block_size, max_new_tokens
        self._texts = TokenTexts(lm.network.tokenizer)
        self._ends = set(lm.network.stop_token_ids)
        self._settled: list[tuple[str, int]] = []
        self._ahead: dict[int, Event] = {}
        self._provisional: dict[int, Event] = {}  # as the last pass left them

    @property
    def num_settled(self) -> int:
        """Tokens before the first open position."""
        return len(self._settled)

    def add(self, event: "Event") -> str:
        """A token is final, or stands as told; returns what the settled text grows by."""
        if event.step > self.num_forwards:
            self.num_forwards = event.step
            self._provisional.clear()
        if not event.final:
            self._provisional[event.position] = event
            return ""
        self.num_tokens += 1
        self._ahead[event.position] = event
        grown = []
        while (event_here := self._ahead.pop(len(self._settled), None)) is not None:
            text = self._texts.add(event_here.token_id)
            self._settled.append((text, event_here.step))
            grown.append(text)
        return "".join(grown)

    def drawn(self) -> Text:
        """All of it, each token in the colour of the pass that finalised it."""
        drawn = Text(overflow="fold")
        for text, step in self._settled:
            drawn.append(printable(text), style=colour_of(step))
        last = max([len(self._settled) - 1, *self._ahead, *self._provisional])
        end = min(self._max_new_tokens, -(-(last + 1) // self._block_size) * self._block_size)
        for position in range(len(self._settled), end):
            event = self._ahead.get(position) or self._provisional.get(position)
            if event is None:
                drawn.append(MASK, style="bright_black")
            else:
                text = "" if event.token_id in self._ends else printable(event.text)
                drawn.append(text or SILENT_TOKEN, style=colour_of(event.step) if event.final else "bright_black")
        return drawn

    def last_lines(self, console: Console) -> RenderableType:
        """As much of its end as the terminal has lines for, and the figures so far."""
        lines = self.drawn().wrap(console, console.width)[-max(1, console.height - _ROOM_FOR_PROMPT) :]
        figures = f"{self.num_forwards} passes · {self.num_tokens} tokens" if self.num_forwards else "..."
        return Group(*lines, Text(figures, style="bright_black"))


@contextmanager
def shown_forming(forming: Forming, console: Console) -> Iterator[Callable[[], None]]:
    """Yields what to call after a change. What was drawn vanishes at the end, when the whole answer can be printed."""
    with drawn_live(console, lambda: forming.last_lines(console), transient=True) as redraw:
        yield redraw
