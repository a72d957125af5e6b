"""Guesses that branch: which row sees which, and the branch that a forward found right.

Axes: R = requests, T = guesses, S = positions of a path, from the front on.

The rows of a tree stand in slots from the front on, not in those of their positions, and no later forward sees them. So
tokens of the branch that became final stay pending, and the next forward computes them again in their own slots: up to
as many rows more as the tree is deep, and no copying of keys and values.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.decode.decoder import cached_plan
from fewstep.decode.state import State
from fewstep.errors import FewstepError
from fewstep.models.network import Plan, Scores
from fewstep.models.roles import INVISIBLE, Role

ROOT = 0
"""The last final token; the guesses are numbered from 1."""


MOST_GUESSES = 4096
"""Of a tree, whose forward costs as many rows, and whose mask is as wide as it is high."""


def check_size(num_guesses: int, decoder: str) -> None:
    """FewstepError for a tree that is too large, before anything of its size is made."""
    if num_guesses > MOST_GUESSES:
        raise FewstepError(
            f"the {decoder} decoder would verify a tree of {num_guesses} guesses in every pass; set a smaller window "
            f"(or ngram), for at most {MOST_GUESSES}"
        )


@dataclass(frozen=True)
class Tree:
    """`parents`: for each guess, from number 1 on, the number of the one before it, itself a guess or the ROOT."""

    parents: tuple[int, ...]

    @property
    def num_guesses(self) -> int:
        return len(self.parents)

    def path(self, node: int) -> list[int]:
        """The numbers from the root to this one."""
        backwards = [node]
        while backwards[-1] != ROOT:
            backwards.append(self.parents[backwards[-1] - 1])
        return backwards[::-1]

    @property
    def depth(self) -> int:
        return max(len(self.path(node)) - 1 for node in range(self.num_guesses + 1))

    def on(self, device: torch.device) -> "Layout":
        return _layout(self, device)


@dataclass(frozen=True)
class Layout:
    """A tree as tensors: of its guesses, or (`paths`, `depth`) of the root and its guesses.

    `ancestors_TT[t, u]`: whether u is t or before it. `paths_NS`: the numbers from the root to each, then itself again.
    """

    parents_T: Tensor
    ancestors_TT: Tensor
    depth_N: Tensor
    paths_NS: Tensor


@lru_cache(maxsize=64)
def _layout(tree: Tree, device: torch.device) -> Layout:
    paths = [tree.path(node) for node in range(tree.num_guesses + 1)]
    ancestors_TT = torch.zeros(tree.num_guesses, tree.num_guesses, dtype=torch.bool)
    for t, path in enumerate(paths[1:]):
        ancestors_TT[t, torch.tensor(path[1:]) - 1] = True
    depth = tree.depth
    padded = [path + path[-1:] * (depth + 1 - len(path)) for path in paths]
    return Layout(
        torch.tensor(tree.parents, device=device),
        ancestors_TT.to(device),
        torch.tensor([len(path) - 1 for path in paths], device=device),
        torch.tensor(padded, device=device),
    )


@lru_cache(maxsize=64)
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Integers on a device, copied there once: a step copies nothing."""
    return torch.tensor(values, device=device)


def tree_plan(
    kind: str, state: State, role: Role, *, width: int, tree: Tree, guesses_RT: Tensor, scored: tuple[int, ...]
) -> Plan:
    """The pending rows, at most W, then the guesses; scored are the root and the guesses numbered in `scored`."""
    trunk = cached_plan(kind, state, role, width=width, active=0)
    assert trunk.slots_RQ is not None
    device = guesses_RT.device
    layout, length = tree.on(device), state.tokens_RL.shape[1]
    done_R1 = state.done_R[:, None]
    # What follows the end of the canvas is never used; its rows stay within the positions that the network knows.
    positions_RT = (state.front_R[:, None] + layout.depth_N[1:] - 1).minimum(state.canvas_end_R[:, None] - 1)
    blocks_RT = torch.where(done_R1, INVISIBLE, state.front_R[:, None] - 1).expand_as(guesses_RT)
    slots_RT = state.front_R[:, None] + torch.arange(tree.num_guesses, device=device)
    rows_S = width - 1 + constant((ROOT, *scored), device)
    return replace(
        trunk,
        tokens_RQ=torch.cat([trunk.tokens_RQ, guesses_RT], 1),
        positions_RQ=torch.cat([trunk.positions_RQ, positions_RT.clamp(min=0)], 1),
        blocks_RQ=torch.cat([trunk.blocks_RQ, blocks_RT], 1),
        slots_RQ=torch.cat([trunk.slots_RQ, torch.where(done_R1, length, slots_RT)], 1),
        scored_RS=rows_S.expand(len(guesses_RT), -1),
        tree_TT=layout.ancestors_TT,
    )


def longest_path(tree: Tree, right_RT: Tensor) -> tuple[Tensor, Tensor]:
    """The deepest guess that is right with all before it: the path to it [R, S], and its depth [R]; first among equals.

    The path begins with the root, and repeats its last number once it is over.
    """
    layout = tree.on(right_RT.device)
    sound_RT = (right_RT[:, None, :] | ~layout.ancestors_TT).all(-1)
    deepest = (sound_RT * layout.depth_N[1:]).max(1)
    node_R = torch.where(deepest.values > 0, deepest.indices + 1, ROOT)
    return layout.paths_NS[node_R], layout.depth_N[node_R]


def along(path_RS: Tensor, scores: Scores) -> Scores:
    """The scores of the rows on the path, so of the positions from the front on."""

    def pick(field_RND: Tensor) -> Tensor:
        return field_RND.gather(1, path_RS[..., None].expand(-1, -1, field_RND.shape[-1]))

    return Scores(pick(scores.logits_RSV), pick(scores.hidden_RSD))
