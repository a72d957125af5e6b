"""Requests answered by the loop as `stream` does it, and a generator that has no loop at all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fewstep.decode.decoder import Decoder
from fewstep.decode.generator import Generator, answer
from fewstep.decode.loop import loop_for
from fewstep.decode.requests import Event, Output, Request
from fewstep.errors import FewstepError
from fewstep.models.network import Network

OPEN = 0
"""What stands where nothing is final yet."""


def streamed(net: Network, request: Request, decoder: Decoder) -> tuple[list[Event], Output]:
    """All that the loop told of the request, and its output."""
    events: list[Event] = []

    def watch(_: int, event: Event) -> bool:
        events.append(event)
        return False

    (output,) = answer(loop_for(net, decoder, [request]), [request], watch=watch)
    return events, output


@dataclass
class Table:
    """Answers prompts from a table, as many at once as it has slots: no decoder, no cache, no forward.

    `pass_of(position, length)`: the pass, from 1, in which a position becomes final; two passes by default.
    """

    answers: Mapping[tuple[int, ...], list[int]]
    num_slots: int = 1
    ends: tuple[int, ...] = ()
    pass_of: Callable[[int, int], int] = lambda position, length: 1 + position % 2
    queued: dict[int, Request] = field(default_factory=dict)
    live: dict[int, Request] = field(default_factory=dict)
    passes: dict[int, int] = field(default_factory=dict)
    told: list[tuple[int, Event]] = field(default_factory=list)

    @property
    def busy(self) -> bool:
        return bool(self.queued or self.live)

    def submit(self, request: Request) -> int:
        if tuple(request.prompt_ids) not in self.answers:
            raise FewstepError("the table has no answer to this prompt")
        number = len(self.passes)
        self.queued[number], self.passes[number] = request, 0
        return number

    def step(self) -> list[tuple[int, Output]]:
        while self.queued and len(self.live) < self.num_slots:
            number = next(iter(self.queued))
            self.live[number] = self.queued.pop(number)
        self.told, completed = [], []
        for number, request in list(self.live.items()):
            self.passes[number] += 1
            ids, steps = self._rows(request)
            self.told += [
                (number, Event(at, ids[at], steps[at], 1.0))
                for at in range(len(ids))
                if steps[at] == self.passes[number]
            ]
            if max(steps) == self.passes[number]:
                completed.append((number, self._leave(number)))
        return completed

    def events(self) -> list[tuple[int, Event]]:
        return self.told

    def cancel(self, number: int) -> Output | None:
        if self.queued.pop(number, None) is not None:
            return None
        return self._leave(number)

    def _rows(self, request: Request) -> tuple[list[int], list[int]]:
        ids = self.answers[tuple(request.prompt_ids)][: request.max_new_tokens]
        return ids, [self.pass_of(at, len(ids)) for at in range(len(ids))]

    def _leave(self, number: int) -> Output:
        num_passes = self.passes[number]
        ids, steps = self._rows(self.live.pop(number))
        shown = [one if step <= num_passes else OPEN for one, step in zip(ids, steps, strict=True)]
        ends = [at for at, one in enumerate(shown) if one in self.ends]
        num_final = next((at for at, step in enumerate(steps) if step > num_passes), len(shown))
        token_ids = shown[: min([num_final, *(end + 1 for end in ends)])]
        ended = bool(token_ids) and token_ids[-1] in self.ends
        return Output(
            token_ids=token_ids,
            num_tokens=len(token_ids),
            num_forwards=num_passes,
            seconds=0.0,
            finish_reason="stop" if ended else "length" if num_final == len(shown) else "cancelled",
            canvas_ids_G=torch.tensor(shown),
            step_G=torch.tensor([step if step <= num_passes else -1 for step in steps]),
            confidence_G=torch.ones(len(shown)),
        )


class Tables:
    """Makes a `Table`, and counts how many it made."""

    def __init__(self, answers: Mapping[tuple[int, ...], list[int]], **options: Any) -> None:
        self.answers, self.options = answers, options
        self.made: list[Table] = []

    def __call__(
        self,
        settings: Any,
        requests: Sequence[Request],
        *,
        batch_size: int = 32,
        record: Any = None,
        listeners: Any = (),
        kept: Generator | None = None,
    ) -> Table:
        if "threshold" in settings.own:
            raise FewstepError("a table has no threshold")
        if isinstance(kept, Table) and kept.num_slots == batch_size:
            return kept
        self.made.append(Table(self.answers, batch_size, **self.options))
        return self.made[-1]
