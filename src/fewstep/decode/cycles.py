"""How long passes take on this device, how many guesses are accepted, and which cycle of self-speculation that favours.

All of it is on the host, and comes from what the loop reads and times in any case: nothing here waits for the device.
"""

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fewstep.decode.decoder import Round

WITH_DRAFT, WITHOUT_DRAFT = 1, 2
"""Pending tokens after a fused pass. A request that it left without a draft computes its last two tokens again, not the
last alone: that is how the host, before it plans a round, learns that the request needs a draft.
"""

_TIMED = 3
"""Rounds of a shape that are timed before its median counts; one before them, which may allocate memory, does not."""

_KEPT = 9
"""Of the latest rounds of a shape the times are kept."""

_TIMED_AGAIN = 128
"""After so many rounds the oldest times of a cycle are forgotten, and `_TIMED` rounds time it again: the machine may
have been busy then.
"""

_PRIOR = (1.5, 2.0)
"""Guesses taken as accepted, and as verified, before any was."""

Kinds = tuple[str, ...]
"""The kinds of the passes of a round."""


@dataclass(frozen=True)
class DraftCycle:
    """A kind of cycle, and the tokens of its drafts.

    `round`: its passes. `redraft`: those after it lost its draft, if any.
    """

    kind: Literal["two-pass", "fused"]
    length: int
    round: Kinds
    redraft: Kinds = ()


@dataclass
class CycleChooser:
    """What has been seen of one model on one device.

    `most_worth`: guesses that the most hopeful request of the last round would have verified.
    """

    cycles: Sequence[DraftCycle]
    most_worth: int = 0
    _seconds: dict[tuple[Kinds, int], deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_KEPT))
    )
    _num_rounds: dict[tuple[Kinds, int], int] = field(default_factory=lambda: defaultdict(int))
    _latest: dict[tuple[Kinds, int], int] = field(default_factory=lambda: defaultdict(int))
    _num_rounds_of_size: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _right: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: _PRIOR[0]))
    _verified: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: _PRIOR[1]))
    _drafts_kept: float = _PRIOR[0]
    _drafts: float = _PRIOR[1]

    def observe(self, seen: Round) -> None:
        """Learn from a round of the loop. What it is told of a request: guesses verified, left, and worth a row."""
        # Of a large batch, requests that have lost their draft take a pass of their own: the second group of the round.
        kinds = tuple(shape.kind for shape in seen.shapes[0])
        verified_r, left_r, worth_r = seen.told_Xr.tolist()
        goes_on_r = [pending >= 0 for pending in seen.pending_r.tolist()]
        self.most_worth = max((one for one, goes_on in zip(worth_r, goes_on_r, strict=True) if goes_on), default=0)
        if any(shapes[0].width > WITHOUT_DRAFT for shapes in seen.shapes):
            return  # requests begin
        size = _size(len(goes_on_r))
        key = kinds, size
        self._num_rounds_of_size[size] += 1
        self._num_rounds[key] += 1
        if self._num_rounds[key] > 1:
            self._seconds[key].append(seen.seconds)
            self._latest[key] = self._num_rounds_of_size[size]
        if self._num_rounds_of_size[size] % _TIMED_AGAIN == 0:
            self._forget_oldest(size)
        for advance, verified, left, goes_on in zip(
            seen.advance_r.tolist(), verified_r, left_r, goes_on_r, strict=True
        ):
            if not goes_on or not verified:
                continue
            accepted = advance - len(kinds)  # each pass makes one token of the base's own final
            for place in range(min(accepted + 1, verified)):
                self._verified[place] += 1
                self._right[place] += place < accepted
            if len(kinds) == 1:
                self._drafts += 1
                self._drafts_kept += left > 0

    def _forget_oldest(self, size: int) -> None:
        """Of the cycle that was timed longest ago, once all are timed, so that it is timed again."""
        if all(self._is_timed(cycle, size) for cycle in self.cycles):
            oldest = min(self.cycles, key=lambda cycle: self._latest[cycle.round, size])
            self._seconds[oldest.round, size].clear()

    def choose(self, num_requests: int) -> DraftCycle:
        """One whose time is not known yet, then the one that gives most tokens a second."""
        size = _size(num_requests)
        for cycle in self.cycles:
            if not self._is_timed(cycle, size):
                return cycle
        return max(self.cycles, key=lambda cycle: self._tokens_per_second(cycle, size))

    def num_worth(self, cycle: DraftCycle, num_requests: int) -> int:
        """How many guesses the round should verify: all while its time is not known, then those worth a row."""
        is_timed = self._is_timed(cycle, _size(num_requests))
        return min(cycle.length, self.most_worth) if is_timed else cycle.length

    def _is_timed(self, cycle: DraftCycle, size: int) -> bool:
        return len(self._seconds[cycle.round, size]) >= _TIMED

    def _tokens_per_second(self, cycle: DraftCycle, size: int) -> float:
        tokens = len(cycle.round) + self._accepted(cycle.length)
        seconds = statistics.median(self._seconds[cycle.round, size])
        if cycle.redraft:
            lost = 1 - self._drafts_kept / self._drafts
            redrafts = self._seconds[cycle.redraft, size]
            seconds += lost * (statistics.median(redrafts) if redrafts else seconds)
            tokens += lost
        return tokens / max(seconds, 1e-9)

    def _accepted(self, length: int) -> float:
        """Guesses expected to be accepted of a draft of this length."""
        right = [self._right[place] / self._verified[place] for place in range(length)]
        return sum(math.prod(right[: count + 1]) for count in range(length))


def _size(num_requests: int) -> int:
    """Numbers of requests whose rounds take about as long: up to a power of two."""
    return (num_requests - 1).bit_length()
