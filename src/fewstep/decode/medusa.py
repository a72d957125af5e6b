"""Medusa decoding: extra heads guess the next tokens, and a tree of their best is verified. arXiv 2401.10774.

Axes: R = requests, K = heads, T = guesses of the tree, C = candidates of a head.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import Tensor

from fewstep.decode.causal import Causal, accept_agreed
from fewstep.decode.declarations import Details
from fewstep.decode.decoder import Accepted, Shape, Traits, grouped_passes
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.resources import Resources
from fewstep.decode.state import State
from fewstep.decode.tree import ROOT, Tree, along, check_size, constant, longest_path, tree_plan
from fewstep.errors import FewstepError
from fewstep.models.medusa import MedusaHeads
from fewstep.models.network import Plan, Scores
from fewstep.values import Count, check_fields

_MOST_CANDIDATES = 10
"""Of a head; the paper's trees use no more."""

_KEPT_BY_NEXT_HEAD = 0.7
"""How much a guess is worth beside one a position earlier."""


@dataclass(frozen=True, kw_only=True)
class MedusaState(State):
    """`guesses_RT`: the tokens of the tree that the next pass verifies."""

    guesses_RT: Tensor


@dataclass(frozen=True, kw_only=True)
class Medusa(Causal):
    """The heads' best candidates for the next K positions, as a tree of `window` guesses.

    Plan shapes, with `window` rows each besides the pending ones: `decode` (up to K + 1 pending) and `prefill`. Greedy
    only. With `typical`, a threshold epsilon, a guess is accepted as soon as its probability exceeds
    min(epsilon, sqrt(epsilon) exp(-entropy)), the paper's typical acceptance; the answer may then differ.
    """

    name: ClassVar[str] = "medusa"

    heads: MedusaHeads
    window: Annotated[Count, "Guesses per pass."] = 32
    typical: Annotated[
        float | None,
        "Threshold of typical acceptance, with which answers may differ from the model's own.",
        Details(default="exact acceptance"),
    ] = None

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        check_size(self.window, self.name)
        if self.typical is not None and not 0 < self.typical < 1:
            raise FewstepError(f"typical is a probability in (0, 1), got {self.typical}; try 0.3")

    @classmethod
    def build(
        cls,
        resources: Resources,
        *,
        heads: Annotated[str | None, "The folder of Medusa heads.", Details(reads="FOLDER")] = None,
        **given: Any,
    ) -> Self:
        """FewstepError without heads."""
        if heads is None:
            raise FewstepError("the medusa decoder needs heads (--heads): name the folder that holds them")
        return cls(role=resources.role, heads=resources.heads(heads), **given)

    @cached_property
    def _choices(self) -> tuple[tuple[int, ...], ...]:
        """For each guess which candidate of each head the path to it takes, best first."""
        return _best_paths(len(self.heads), min(_MOST_CANDIDATES, self.heads.num_drawable), self.window)

    @cached_property
    def tree(self) -> Tree:
        number = {(): ROOT} | {path: i + 1 for i, path in enumerate(self._choices)}
        return Tree(tuple(number[path[:-1]] for path in self._choices))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=len(self.heads),
            pass_length=max(self.tree.num_guesses, len(self.heads) + 1),
            greedy_only=True,
            branching=True,
            steady=(Shape("decode", len(self.heads) + 1),),
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        nothing_RT = torch.zeros((len(state.done_R), self.tree.num_guesses), dtype=torch.long)
        return MedusaState(**vars(state), guesses_RT=nothing_RT)

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        most = len(self.heads) + 1
        for members, width in grouped_passes(pending_R, shapes=(most,), active=self.tree.num_guesses):
            yield members, [Shape("decode" if width == most else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        assert isinstance(state, MedusaState)
        every = tuple(range(1, self.tree.num_guesses + 1))
        return tree_plan(
            shape.kind,
            state,
            self.role,
            width=shape.width,
            tree=self.tree,
            guesses_RT=state.guesses_RT,
            scored=every,
        )

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, MedusaState)
        guesses_RT, parents_T = state.guesses_RT, self.tree.on(state.guesses_RT.device).parents_T
        answers_RS = scores.logits_RSV.argmax(-1)
        right_RT = guesses_RT == answers_RS[:, parents_T]
        if self.typical is not None:
            right_RT |= _typical(scores.logits_RSV[:, parents_T], guesses_RT, self.typical)
        path_RS, depth_R = longest_path(self.tree, right_RT)
        followed = along(path_RS, scores)
        agreed_RS = torch.arange(path_RS.shape[1], device=path_RS.device) < depth_R[:, None]
        guessed_RS = guesses_RT.gather(1, (path_RS.roll(-1, 1) - 1).clamp(min=0))
        tokens_RS = torch.where(agreed_RS, guessed_RS, answers_RS.gather(1, path_RS))
        accepted = accept_agreed(self, state, tokens_RS, agreed_RS, followed)
        next_RT = torch.where(state.done_R[:, None], guesses_RT, self._guess(followed, depth_R))
        return replace(accepted, state=replace(accepted.state, guesses_RT=next_RT))

    def _guess(self, followed: Scores, depth_R: Tensor) -> Tensor:
        """The tree that follows the last token accepted, from the row that gave it, [R, T]."""
        width = followed.hidden_RSD.shape[-1]
        hidden_RD = followed.hidden_RSD.gather(1, depth_R[:, None, None].expand(-1, 1, width))[:, 0]
        count = 1 + max(path[-1] for path in self._choices)
        candidates_RKC = self.heads.score(hidden_RD).topk(count, -1).indices
        places = tuple((len(path) - 1) * count + path[-1] for path in self._choices)
        return candidates_RKC.flatten(1)[:, constant(places, hidden_RD.device)]


def _best_paths(num_heads: int, num_candidates: int, count: int) -> tuple[tuple[int, ...], ...]:
    """The `count` most promising paths of candidates, each after the path that it prolongs.

    The c-th candidate (from 1) of a head is taken to be right in proportion to 1 / c^2, and each head a little less
    often than the one before it.
    """
    paths: list[tuple[int, ...]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-_KEPT_BY_NEXT_HEAD, (0,))]
    while heap and len(paths) < count:
        worth, path = heapq.heappop(heap)
        paths.append(path)
        rank = path[-1] + 1
        if rank < num_candidates:
            heapq.heappush(heap, (worth * rank**2 / (rank + 1) ** 2, (*path[:-1], rank)))
        if len(path) < num_heads:
            heapq.heappush(heap, (worth * _KEPT_BY_NEXT_HEAD, (*path, 0)))
    return tuple(paths)


def _typical(logits_RTV: Tensor, guesses_RT: Tensor, epsilon: float) -> Tensor:
    """Whether each guess is as probable as the entropy of its place lets one expect."""
    log_probs_RTV = logits_RTV.log_softmax(-1)
    entropy_RT = torch.special.entr(log_probs_RTV.exp()).sum(-1)
    needed_RT = (epsilon**0.5 * (-entropy_RT).exp()).clamp(max=epsilon)
    return log_probs_RTV.gather(2, guesses_RT[..., None])[..., 0].exp() > needed_RT
