"""Which cycle of self-speculation is faster, from times and acceptances given by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from fewstep.decode.cycles import CycleChooser, DraftCycle
from fewstep.decode.decoder import Round, Shape

CYCLES = [
    DraftCycle("fused", 8, ("fused 8, 8",), ("draft 8",)),
    DraftCycle("two-pass", 8, ("draft 8", "verify 8")),
    DraftCycle("fused", 2, ("fused 2, 2",), ("draft 2",)),
    DraftCycle("two-pass", 2, ("draft 2", "verify 2")),
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


def driven(seconds: Mapping[tuple[str, ...], float], *, accepted: int, left: int = 8, rounds: int = 60) -> CycleChooser:
    """After rounds whose passes take these times, and accept so many guesses if they verify as many."""
    chooser = CycleChooser(CYCLES)
    for _ in range(rounds):
        cycle = chooser.choose(1)
        right = min(accepted, cycle.length)
        chooser.observe(seen(cycle.round, seconds[cycle.round], accepted=right, verified=cycle.length, left=left))
    return chooser


def times(fused: float, two_pass: float, short: float) -> dict[tuple[str, ...], float]:
    """Of a round; those of drafts of two tokens take the share `short`."""
    return {
        cycle.round: (fused if cycle.kind == "fused" else two_pass) * (1 if cycle.length == 8 else short)
        for cycle in CYCLES
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
    cycle = driven(told, accepted=accepted, left=left).choose(1)
    assert (cycle.kind, cycle.length) == chosen


def test_each_cycle_is_timed_before_one_is_preferred_and_for_every_size_of_batch() -> None:
    chooser, tried = CycleChooser(CYCLES), []
    for _ in range(16):
        cycle = chooser.choose(1)
        tried.append((cycle.kind, cycle.length))
        chooser.observe(seen(cycle.round, 1.0, accepted=1, verified=cycle.length))
    assert all(tried.count((cycle.kind, cycle.length)) == 4 for cycle in CYCLES)
    assert chooser.choose(5) == CYCLES[0]


def test_a_cycle_that_was_timed_while_the_machine_was_busy_is_timed_again() -> None:
    chooser, told, best = CycleChooser(CYCLES), times(1.0, 2.0, 1.0), CYCLES[0]
    chosen = []
    for number in range(1200):
        cycle = chooser.choose(1)
        chosen.append(cycle)
        busy = 5 if number < 4 else 1  # while the best of them is timed
        chooser.observe(
            seen(cycle.round, busy * told[cycle.round], accepted=min(6, cycle.length), verified=cycle.length)
        )
    assert chosen[20] != best
    assert chosen[-1] == best
    assert chosen[600:].count(best) > 0.97 * 600


def test_a_round_with_a_pass_for_lost_drafts_counts_as_one_of_its_cycle() -> None:
    chooser = CycleChooser(CYCLES)
    for _ in range(4):
        one = seen(CYCLES[0].round, 1.0, accepted=4, verified=8)
        chooser.observe(replace(one, shapes=[*one.shapes, [Shape("draft 8", 2)]]))
    assert chooser.choose(1) == CYCLES[1]


def test_rounds_in_which_requests_begin_are_not_timed() -> None:
    chooser = CycleChooser(CYCLES)
    for _ in range(9):
        chooser.observe(seen(CYCLES[0].round, 1.0, accepted=0, verified=0, width=48, worth=3))
    assert chooser.choose(1) == CYCLES[0]
    assert chooser.most_worth == 3
    assert chooser.num_worth(CYCLES[0], 1) == 8
    for _ in range(4):
        chooser.observe(seen(CYCLES[0].round, 1.0, accepted=0, verified=8, worth=3))
    assert chooser.num_worth(CYCLES[0], 1) == 3
