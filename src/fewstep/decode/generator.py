"""What answers requests: they go in, events and outputs come out. The loop, which runs a decoder, is one such.

A generator of another kind (whole texts from noise, passes captured by an engine) stands beside the loop: who drives a
generator knows only what is written here.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

from fewstep.decode.requests import Event, Output, Request
from fewstep.errors import FewstepError


class Generator(Protocol):
    """Answers requests, several at once. Its memory stays with it, so that later requests allocate nothing.

    A step is a round of work for every request under way; requests may be submitted and cancelled between any two.
    """

    @property
    def busy(self) -> bool:
        """Whether a request is queued or under way."""

    def submit(self, request: Request) -> int:
        """Queue a request; returns the number by which all else calls it. FewstepError if it cannot be answered."""

    def step(self) -> list[tuple[int, Output]]:
        """One round; returns the requests that it completed."""

    def events(self) -> list[tuple[int, Event]]:
        """What the last round finalised of every request, each request's by position, of those it completed too."""

    def cancel(self, number: int) -> Output | None:
        """Give a request up; None if it was not begun. FewstepError if it is not there.

        The output holds the final tokens before the first open position alone, and counts those: no mask token, no
        guess, and nothing that was finalised behind it. Its `finish_reason` is then "cancelled".
        """


class Numbered(Protocol):
    """A request under way, or queued."""

    @property
    def number(self) -> int:
        """The one that `Generator.submit` returned."""


NumberedT = TypeVar("NumberedT", bound=Numbered)


def given_up(number: int, queue: deque[NumberedT], live: Mapping[int, NumberedT]) -> int | None:
    """The slot of a request that is cancelled; None if it was queued, from where it is taken away.

    `live`: what is under way, by slot. FewstepError if it is in neither.
    """
    queued = next((ticket for ticket in queue if ticket.number == number), None)
    if queued is not None:
        queue.remove(queued)
        return None
    slot = next((slot for slot, ticket in live.items() if ticket.number == number), None)
    if slot is None:
        raise FewstepError(f"there is no request {number} to cancel: it is done, or was never submitted")
    return slot


Watch = Callable[[int, Event], bool]
"""Told what becomes final, with the request's index; True ends the request with this round."""


def submit_all(generator: Generator, requests: Sequence[Request]) -> dict[int, int]:
    """Queue the requests, longest first; each one's index by its number."""
    lengths = [len(one.prompt_ids) + (len(one.canvas) if one.canvas else one.max_new_tokens) for one in requests]
    order = sorted(range(len(requests)), key=lambda index: -lengths[index])
    return {generator.submit(requests[index]): index for index in order}


def rounds(
    generator: Generator, requests: Sequence[Request], watch: Watch | None = None
) -> Iterator[list[tuple[int, Output]]]:
    """Answer the requests with an idle generator: after each round the outputs that it brought, by index.

    `watch` is told of a round's events before its outputs are yielded.
    """
    index_of = submit_all(generator, requests)
    while generator.busy:
        completed = dict(generator.step())
        if watch is not None:
            ended = [number for number, event in generator.events() if watch(index_of[number], event)]
            for number in dict.fromkeys(ended):
                if number not in completed:
                    output = generator.cancel(number)
                    assert output is not None, "it has been told of, so it was begun"
                    completed[number] = output
        yield [(index_of[number], output) for number, output in completed.items()]


def answer(
    generator: Generator,
    requests: Sequence[Request],
    *,
    on_output: Callable[[int, Output], None] | None = None,
    watch: Watch | None = None,
) -> list[Output]:
    """The outputs of the requests, in the given order; `on_output(index, output)` is called as each completes."""
    outputs: dict[int, Output] = {}
    for completed in rounds(generator, requests, watch):
        for index, output in completed:
            outputs[index] = output
            if on_output is not None:
                on_output(index, output)
    return [outputs[index] for index in range(len(requests))]
