"""Stored trajectories as the flat tensors that the CDLM objective trains on.

Axes: P = flat positions of all stored trajectories, N = chosen ones, K = stored top tokens, D = hidden width,
V = vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.train import losses
from fewstep.train.examples import Examples, fingerprint
from fewstep.train.relabel import OF_STUDENT
from fewstep.train.trajectories import TrajectoryArrays, TrajectoryStore


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


def read_table(folder: str | Path, teacher: Network) -> tuple[TrajectoryTable, Examples | None]:
    """The trajectories in `folder`, and the reference answers stored beside them (None if there are none).

    Hidden rows are read by the head of `teacher`, which must therefore not be the network in training. FewstepError for
    a store that is damaged, unfinished, empty, of another schema, or made (or labelled) by another teacher.
    """
    return table_from_store(TrajectoryStore(folder, teacher_hash=network_hash(teacher)), teacher)


def table_from_store(store: TrajectoryStore, teacher: Network | None = None) -> tuple[TrajectoryTable, Examples | None]:
    """As `read_table`, of an open store. `teacher` is needed for hidden rows only. ValueError if it is missing then."""
    store.check_not_empty()
    arrays = store.load()
    examples = Examples(
        torch.from_numpy(arrays.prompt_ids),
        torch.from_numpy(arrays.prompt_offsets),
        torch.from_numpy(arrays.final_ids),
        torch.from_numpy(arrays.offsets),
    )
    table = TrajectoryTable(
        examples,
        torch.from_numpy(arrays.step_rank),
        _distributions(arrays, teacher),
        of_student=OF_STUDENT in store.manifest["decoding"],
    )
    return table, _references(arrays)


def _distributions(arrays: TrajectoryArrays, teacher: Network | None) -> TopDistributions | HiddenDistributions:
    if arrays.topk_ids is not None and arrays.topk_logp is not None and arrays.log_tail is not None:
        return TopDistributions(
            torch.from_numpy(arrays.topk_ids), torch.from_numpy(arrays.topk_logp), torch.from_numpy(arrays.log_tail)
        )
    if teacher is None:
        raise ValueError("hidden rows are read by the teacher's head; give the teacher")
    dtype, head = teacher.dtype, teacher.head
    return HiddenDistributions(arrays.hidden_tensor(), lambda hidden_ND: head(hidden_ND.to(dtype)))


def _references(arrays: TrajectoryArrays) -> Examples | None:
    if not arrays.has_reference.any():
        return None
    prompts = _rows(arrays.prompt_ids, arrays.prompt_offsets, arrays.has_reference)
    answers = _rows(arrays.reference_ids, arrays.reference_offsets, arrays.has_reference)
    return Examples(*prompts, *answers)


def _rows(ids: np.ndarray, offsets: np.ndarray, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """The chosen rows of a ragged array, again as values and offsets."""
    lengths = np.diff(offsets)
    chosen_offsets = np.concatenate([[0], lengths[chosen].cumsum()])
    return torch.from_numpy(ids[np.repeat(chosen, lengths)]), torch.from_numpy(chosen_offsets)
