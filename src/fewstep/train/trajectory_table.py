"""Trajectories as the flat tensors that the CDLM objective trains on; `trajectories.read_table` reads them from a
store.

Axes: P = flat positions of all stored trajectories, N = chosen ones, K = stored top tokens, D = hidden width,
V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.train import losses
from fewstep.train.examples import Examples, fingerprint


@dataclass(frozen=True)
class TopDistributions:
    """The teacher's distribution at each stored position: top-K ids and log-probabilities [P, K], log of the mass
    outside them [P].
    """

    ids_PK: Tensor
    logp_PK: Tensor
    tail_P: Tensor

    def at(self, positions_N: Tensor) -> "TopDistributions":
        """Those at these stored positions."""
        return TopDistributions(self.ids_PK[positions_N], self.logp_PK[positions_N], self.tail_P[positions_N])

    def fingerprint(self) -> str:
        return f"top {self.ids_PK.shape[1]}: {fingerprint(self.tail_P)}"

    def divergence(self, student_PV: Tensor, direction: str) -> Tensor:
        """Mean divergence in nats."""
        return losses.divergence_from_top(
            self.ids_PK.long(), self.logp_PK, self.tail_P, student_PV, direction=direction
        )


@dataclass(frozen=True)
class HiddenDistributions:
    """The teacher's hidden row after the final norm at each stored position [P, D], and the teacher's own head."""

    hidden_PD: Tensor
    head: Callable[[Tensor], Tensor]

    def at(self, positions_N: Tensor) -> "HiddenDistributions":
        """Those at these stored positions."""
        return HiddenDistributions(self.hidden_PD[positions_N], self.head)

    def fingerprint(self) -> str:
        return f"hidden {self.hidden_PD.shape[1]}: {fingerprint(self.hidden_PD[:, 0])}"

    def divergence(self, student_PV: Tensor, direction: str) -> Tensor:
        """Mean divergence in nats."""
        # Full precision also where the student trains in bfloat16.
        with torch.no_grad(), torch.autocast(student_PV.device.type, enabled=False):
            teacher_PV = self.head(self.hidden_PD)
        return losses.divergence(teacher_PV, student_PV, direction=direction)


@dataclass(frozen=True)
class TrajectoryTable:
    """Trajectories as flat tensors: prompts and final ids, and each position's step rank [P].

    Rank 0 is not recorded: a position that was given, or that was never finalised and holds the mask token.
    `of_student`: the final ids are what the student drew, at states that it visited itself; the distributions are the
    teacher's all the same.
    """

    examples: Examples
    rank_P: Tensor
    distributions: TopDistributions | HiddenDistributions | None
    of_student: bool = False

    def __post_init__(self) -> None:
        if len(self.rank_P) != len(self.examples.completion_ids):
            raise ValueError(f"{len(self.rank_P)} ranks for {len(self.examples.completion_ids)} stored positions")


def join(first: TrajectoryTable, second: TrajectoryTable) -> TrajectoryTable:
    """The trajectories of both, those of `first` first. FewstepError unless both hold as many top tokens a position."""
    one, other = first.distributions, second.distributions
    if not (isinstance(one, TopDistributions) and isinstance(other, TopDistributions)):
        raise FewstepError("joining trajectories needs distributions stored as top_k in both")
    if one.ids_PK.shape[1] != other.ids_PK.shape[1]:
        raise FewstepError(
            f"trajectories with the top {one.ids_PK.shape[1]} tokens of a position cannot be joined with others that "
            f"have {other.ids_PK.shape[1]}; collect both with the same --top-k"
        )
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(TopDistributions)]
    return TrajectoryTable(
        Examples.joined([first.examples, second.examples]),
        torch.cat([first.rank_P, second.rank_P]),
        TopDistributions(*(torch.cat(pair) for pair in pairs)),
        of_student=first.of_student or second.of_student,
    )
