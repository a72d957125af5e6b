"""Which cycle of self-speculation is faster, from times and acceptances given by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from fewstep.decode.decoder import Round, Shape
from fewstep.decode.pace import Choice, Pace

CHOICES = [
    Choice("fused", 8, ("fused 8, 8",), ("draft 8",)),
    Choice("two-pass", 8, ("draft 8", "verify 8")),
    Choice("fused", 2, ("fused 2, 2",), ("draft 2",)),
    Choice("two-pass", 2, ("draft 2", "verify 2")),
]


def seen(
    kinds: Sequence[str], seconds: float, *, accepted: int, verified: int, left: int = 8, worth: int = 8, width: int = 1
) -> Round:
    """A round of one request that goes on."""
    return Round(
        shapes=[[Shape(kind, width) for kind in kinds]],
        seconds=seconds,
        advance_r=torch.tensor([accepted + len(kinds)]),
        pending_r=torch.tensor([1]),
        told_Xr=torch.tensor([[verified], [left], [worth]]),
    )


def driven(seconds: Mapping[tuple[str, ...], float], *, accepted: int, left: int = 8, rounds: int = 60) -> Pace:
    """After rounds whose passes take these times, and accept so many guesses if they verify as many."""
    pace = Pace(CHOICES)
    for _ in range(rounds):
        choice = pace.choose(1)
        right = min(accepted, choice.length)
        pace.observe(seen(choice.round, seconds[choice.round], accepted=right, verified=choice.length, left=left))
    return pace


def times(fused: float, two_pass: float, short: float) -> dict[tuple[str, ...], float]:
    """Of a round; those of drafts of two tokens take the share `short`."""
    return {
        choice.round: (fused if choice.cycle == "fused" else two_pass) * (1 if choice.length == 8 else short)
        for choice in CHOICES
    }


@pytest.mark.parametrize(
    ("told", "accepted", "left", "chosen"),
    [
        (times(1.0, 2.0, 1.0), 6, 8, ("fused", 8)),  # a pass costs a pass, as on a GPU
        (times(3.0, 2.0, 1.0), 6, 8, ("two-pass", 8)),  # rows cost
        (times(1.0, 2.0, 0.4), 1, 8, ("fused", 2)),  # long drafts are in vain, and short ones cheaper
        (times(1.0, 1.4, 1.0), 6, 0, ("two-pass", 8)),  # no fused pass leaves a draft
    ],
)
def test_the_faster_cycle_is_chosen(
    told: dict[tuple[str, ...], float], accepted: int, left: int, chosen: tuple[str, int]
) -> None:
    choice = driven(told, accepted=accepted, left=left).choose(1)
    assert (choice.cycle, choice.length) == chosen


def test_each_choice_is_timed_before_one_is_preferred_and_for_every_size_of_batch() -> None:
    pace, tried = Pace(CHOICES), []
    for _ in range(16):
        choice = pace.choose(1)
        tried.append((choice.cycle, choice.length))
        pace.observe(seen(choice.round, 1.0, accepted=1, verified=choice.length))
    assert all(tried.count((choice.cycle, choice.length)) == 4 for choice in CHOICES)
    assert pace.choose(5) == CHOICES[0]


def test_a_choice_that_was_timed_while_the_machine_was_busy_is_timed_again() -> None:
    pace, told, best = Pace(CHOICES), times(1.0, 2.0, 1.0), CHOICES[0]
    chosen = []
    for number in range(1200):
        choice = pace.choose(1)
        chosen.append(choice)
        busy = 5 if number < 4 else 1  # while the best of them is timed
        pace.observe(
            seen(choice.round, busy * told[choice.round], accepted=min(6, choice.length), verified=choice.length)
        )
    assert chosen[20] != best
    assert chosen[-1] == best
    assert chosen[600:].count(best) > 0.97 * 600


def test_a_round_with_a_pass_for_lost_drafts_counts_as_one_of_its_cycle() -> None:
    pace = Pace(CHOICES)
    for _ in range(4):
        one = seen(CHOICES[0].round, 1.0, accepted=4, verified=8)
        pace.observe(replace(one, shapes=[*one.shapes, [Shape("draft 8", 2)]]))
    assert pace.choose(1) == CHOICES[1]


def test_rounds_in_which_requests_begin_are_not_timed() -> None:
    pace = Pace(CHOICES)
    for _ in range(9):
        pace.observe(seen(CHOICES[0].round, 1.0, accepted=0, verified=0, width=48, worth=3))
    assert pace.choose(1) == CHOICES[0]
    assert pace.most_worth == 3
    assert pace.num_worth(CHOICES[0], 1) == 8
    for _ in range(4):
        pace.observe(seen(CHOICES[0].round, 1.0, accepted=0, verified=8, worth=3))
    assert pace.num_worth(CHOICES[0], 1) == 3
