"""Lookahead decoding: gather n-grams from parallel Jacobi rows, and verify those that fit. arXiv 2402.02057.

Axes: R = requests, W = columns of the lookahead branch, N = length of an n-gram, M = N - 1, C = cells of the branch
(M W), G = n-grams verified, P = n-grams in the pool, T = guesses of the tree.

Level m, column w of the lookahead branch guesses the token `m + w` past the front, as it was m Jacobi iterations after
level 0. A row sees the level-0 guesses up to its column and then its own column's later levels. The row of the last
level answers with a new token, which makes an n-gram with the column above it; that goes into the pool, and the levels
move up by one. In the same forward up to G n-grams of the pool that begin with the last final token are verified.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from fewstep.decode.causal import Causal, NGram, accept_agreed
from fewstep.decode.decoder import Accepted, Shape, Traits, grouped_passes
from fewstep.decode.requests import Canvas, Request
from fewstep.decode.sampling import noise_keys, uniform
from fewstep.decode.state import State
from fewstep.decode.tree import ROOT, Tree, along, check_size, longest_path, tree_plan
from fewstep.models.network import Plan, Scores
from fewstep.values import Count, check_fields

PASSES_KEPT = 64
"""The pool holds the n-grams of this many passes."""

NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True)
class LookaheadState(State):
    """`pool_RPN` is a ring: the next n-gram goes to `cursor_R`; an empty place begins with NO_TOKEN."""

    branch_RMW: Tensor
    pool_RPN: Tensor
    cursor_R: Tensor


@dataclass(frozen=True, kw_only=True)
class Lookahead(Causal):
    """`window` columns of guesses; n-grams of `ngram` tokens, of which up to `window` are verified in a pass.

    A pass accepts up to `ngram` tokens. Greedy only. Plan shapes, with 2 window (ngram - 1) rows each
    besides the pending ones: `decode` (up to ngram pending) and `prefill`.
    """

    name: ClassVar[str] = "lookahead"

    window: Annotated[Count, "Guesses per pass."] = 8
    ngram: Annotated[NGram, Ge(2), "Tokens of an n-gram."] = 4

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        check_size(2 * self.window * (self.ngram - 1), self.name)

    @cached_property
    def chains(self) -> Tree:
        """The n-grams to be verified, side by side, less their first token, which is the root."""
        length = self.ngram - 1
        count = self.window * length
        return Tree(tuple(ROOT if i % length == 0 else i for i in range(count)))

    @cached_property
    def tree(self) -> Tree:
        """The chains of the verification branch, then the lookahead branch level by level."""
        first, parents = self.chains.num_guesses + 1, list(self.chains.parents)
        for level in range(self.ngram - 1):
            for column in range(self.window):
                above = first + (level - 1) * self.window + column
                before = first + column - 1 if column else ROOT
                parents.append(above if level else before)
        return Tree(tuple(parents))

    @cached_property
    def traits(self) -> Traits:
        return Traits(
            roles=("autoregressive",),
            cached=True,
            num_guessed=self.window + self.ngram - 2,
            pass_length=self.tree.num_guesses,
            greedy_only=True,
            branching=True,
            steady=(Shape("decode", self.ngram),),
        )

    def start(self, state: State, requests: Sequence[Request], canvases: Sequence[Canvas]) -> State:
        num_requests, num_cells = len(state.done_R), (self.ngram - 1) * self.window
        cells_RC = torch.arange(num_cells, device=state.tokens_RL.device).expand(num_requests, -1)
        picks_RC = uniform(noise_keys(state.settings.seed_R, cells_RC, state.num_forwards_R), 1)[..., 0]
        guesses_RC = state.tokens_RL.gather(1, (picks_RC * state.context_length_R[:, None]).long())
        pool_size = PASSES_KEPT * self.window
        return LookaheadState(
            **vars(state),
            branch_RMW=guesses_RC.unflatten(1, (self.ngram - 1, self.window)),
            pool_RPN=state.tokens_RL.new_full((num_requests, pool_size, self.ngram), NO_TOKEN),
            cursor_R=torch.zeros_like(state.front_R),
        )

    def passes(self, pending_R: Tensor, length_R: Tensor) -> Iterator[tuple[Tensor, Sequence[Shape]]]:
        for members, width in grouped_passes(pending_R, shapes=(self.ngram,), active=self.tree.num_guesses):
            yield members, [Shape("decode" if width == self.ngram else "prefill", width)]

    def plan(self, state: State, shape: Shape) -> Plan:
        assert isinstance(state, LookaheadState)
        tree, num_chained = self.tree, self.chains.num_guesses
        return tree_plan(
            shape.kind,
            state,
            self.role,
            width=shape.width,
            tree=tree,
            guesses_RT=torch.cat([self._candidates(state), state.branch_RMW.flatten(1)], 1),
            scored=(*range(1, num_chained + 1), *range(tree.num_guesses - self.window + 1, tree.num_guesses + 1)),
        )

    def accept(self, state: State, shape: Shape, scores: Scores) -> Accepted[State]:
        assert isinstance(state, LookaheadState)
        chains = self.chains
        guesses_RT, parents_T = self._candidates(state), chains.on(scores.logits_RSV.device).parents_T
        answers_RS = scores.logits_RSV.argmax(-1)
        path_RS, depth_R = longest_path(chains, guesses_RT == answers_RS[:, parents_T])
        tokens_RS = answers_RS.gather(1, path_RS)
        agreed_RS = torch.arange(tokens_RS.shape[1], device=tokens_RS.device) < depth_R[:, None]
        accepted = accept_agreed(self, state, tokens_RS, agreed_RS, along(path_RS, scores))
        num_accepted_R = accepted.state.front_R - state.front_R
        return replace(accepted, state=_gathered(accepted.state, answers_RS[:, -self.window :], num_accepted_R))

    def _candidates(self, state: LookaheadState) -> Tensor:
        """The latest n-grams of the pool that begin with the last final token, less that token, [R, G (N - 1)]."""
        last_R1 = state.tokens_RL.gather(1, (state.front_R[:, None] - 1).clamp(min=0))
        size = state.pool_RPN.shape[1]
        place_P = torch.arange(size, device=last_R1.device)
        recency_RP = (place_P - state.cursor_R[:, None]) % size + 1
        fits_RP = state.pool_RPN[:, :, 0] == last_R1
        best_RG = (recency_RP * fits_RP).topk(self.window, 1).indices
        chosen_RGN = state.pool_RPN.gather(1, best_RG[..., None].expand(-1, -1, self.ngram))
        return chosen_RGN[:, :, 1:].flatten(1).clamp(min=0)


def _gathered(state: LookaheadState, answers_RW: Tensor, num_accepted_R: Tensor) -> LookaheadState:
    """With the new n-grams in the pool, in place of equal ones, and the lookahead branch moved to the new front."""
    branch_RMW, pool_RPN = state.branch_RMW, state.pool_RPN
    new_RWN = torch.cat([branch_RMW, answers_RW[:, None]], 1).transpose(1, 2)
    equal_RWP = (new_RWN[:, :, None] == pool_RPN[:, None]).all(-1)
    pool_RPN = pool_RPN.masked_fill(equal_RWP.any(1)[..., None], NO_TOKEN)
    later_WW = torch.ones(new_RWN.shape[1], new_RWN.shape[1], dtype=torch.bool, device=new_RWN.device).triu(1)
    repeated_RW = ((new_RWN[:, :, None] == new_RWN[:, None]).all(-1) & later_WW).any(-1)
    new_RWN = new_RWN.masked_fill(repeated_RW[..., None], NO_TOKEN)

    column_W = torch.arange(new_RWN.shape[1], device=new_RWN.device)
    places_RW = (state.cursor_R[:, None] + column_W) % pool_RPN.shape[1]
    pool_RPN = pool_RPN.scatter(1, places_RW[..., None].expand_as(new_RWN), new_RWN)

    # Moving up a level is moving on a position; further steps drop columns on the left and repeat them at the end.
    columns_RW = (column_W + (num_accepted_R - 1).clamp(min=0)[:, None]) % len(column_W)
    levels_RMW = torch.cat([branch_RMW[:, 1:], answers_RW[:, None]], 1)
    live_R = ~state.done_R
    return replace(
        state,
        branch_RMW=torch.where(
            live_R[:, None, None], levels_RMW.gather(2, columns_RW[:, None].expand_as(levels_RMW)), branch_RMW
        ),
        pool_RPN=torch.where(live_R[:, None, None], pool_RPN, state.pool_RPN),
        cursor_R=torch.where(live_R, (state.cursor_R + len(column_W)) % pool_RPN.shape[1], state.cursor_R),
    )
