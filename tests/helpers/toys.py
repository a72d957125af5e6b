"""A decoder and two policies as a newcomer would write them, each in one place; `test_declarations` registers them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, NGram, verify
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import Accepted, Shape, Traits, cached_plan, grouped_passes
from fewstep.decode.own_policies import PreviousPass
from fewstep.decode.state import State, scored_positions, write
from fewstep.models.network import Plan, Scores
from fewstep.values import Count


@dataclass(frozen=True, kw_only=True)
class Echo(Causal):
    """Guesses that the last token repeats itself."""

    name: ClassVar[str] = "echo"

    repeats: Annotated[Count, "How often the last token is guessed again.", Details(aliases=("echoes",))] = 2
    ngram: Annotated[NGram, "Nothing that matters."] = 7

    @property
    def traits(self) -> Traits:
        return Traits(roles=("autoregressive",), cached=True, num_guessed=self.repeats, pass_length=1 + self.repeats)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(1,), active=self.repeats):
            yield members, [Shape("verify" if width == 1 else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        return cached_plan(shape.kind, state, self.role, width=shape.width, active=self.repeats)

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        accepted, _ = verify(self, state, shape, scores)
        after = accepted.state
        positions_RS = scored_positions(after, self.repeats)
        open_RS = ~after.final_RL.gather(1, positions_RS) & ~after.done_R[:, None]
        last_R1 = after.tokens_RL.gather(1, (after.front_R[:, None] - 1).clamp(min=0))
        guessed = write(after.tokens_RL, positions_RS, open_RS, last_R1.expand_as(positions_RS))
        return Accepted(type(after)(**{**vars(after), "tokens_RL": guessed}), accepted.positions_RS, accepted.chosen_RS)


def settled_twice(
    tokens: Tensor, confidence: Tensor, previous: PreviousPass, *, trust: Annotated[float, "Enough at once."] = 0.9
) -> Tensor:
    """What the last pass drew too, or what is confident."""
    return (tokens == previous.tokens) | (confidence >= trust)


@dataclass(frozen=True, kw_only=True)
class LogitGap:
    """Where the best logit is so far above the second; only of what it names."""

    logit_gap: Annotated[float, "Smallest distance of the two best logits."] = 2.0

    def __call__(self, logits_RBV: Tensor) -> Tensor:
        best = logits_RBV.topk(2, -1).values
        return best[..., 0] - best[..., 1] >= torch.as_tensor(self.logit_gap)
