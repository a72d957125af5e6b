"""How requests share a loop: how long a prompt may hold up others, and which keys and values serve a second request.

Axes: L = positions.

A position's keys and values may serve another request if they depend on tokens alone that both have. With causal
attention these are the position's own and all before it; with block-causal context those of its block and all blocks
before it; with a bidirectional context all tokens of the context. The same rule says where a prompt may be cut so that
it is prefilled piece by piece.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from fewstep.decode.decoder import Decoder, Shape
from fewstep.errors import FewstepError
from fewstep.models.network import Network
from fewstep.values import check_fields


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How requests share a loop; by default only passes.

    `prefill_rows`: a round prefills at most about so many positions of prompts that begin, and one piece of as many of
    a longer one; a prompt that cannot be cut is prefilled in one pass, alone. None: whatever begins is prefilled at
    once. `reuse_prefixes`: keys and values are taken over from requests that began with the same tokens, where that is
    exact. `strict`: passes have shapes that do not depend on other requests, so that tokens do not either, in numbers
    of any precision; each pass then computes the rows of all slots.
    """

    prefill_rows: Annotated[int, Ge(1)] | None = None
    reuse_prefixes: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.strict and self.reuse_prefixes:
            raise FewstepError(
                "strict passes do not depend on other requests, of which reuse_prefixes takes keys and values over; "
                "set one or the other"
            )

    def check(self, decoder: Decoder) -> None:
        """FewstepError if the decoder cannot be run so."""
        if self.strict and decoder.traits.observe is not None:
            raise FewstepError(
                "strict passes do not depend on how long others took, by which cycle auto chooses; set the cycle to "
                "two-pass or fused"
            )


def strict_groups(decoder: Decoder, pending_R: Tensor, length_R: Tensor) -> list[tuple[Tensor, tuple[Shape, ...]]]:
    """As `decoder.passes`; each request has the passes that it would have alone."""
    members: dict[tuple[Shape, ...], list[int]] = {}
    for i in range(len(pending_R)):
        ((_, shapes),) = decoder.passes(pending_R[i, None], length_R[i, None])
        members.setdefault(tuple(shapes), []).append(i)
    return [(torch.tensor(several), shapes) for shapes, several in members.items()]


def unit_of_contexts(networks: Iterable[Network]) -> int | None:
    """Contexts may be cut, and shared, at multiples of so many positions; None if they are one piece for a network."""
    units = [network.role.context_unit for network in networks]
    return None if None in units else lcm(*[unit for unit in units if unit is not None])


@dataclass(frozen=True, eq=False)
class Held:
    """What is in a slot of the cache: keys and values of these tokens, the first `context_length` of them a context."""

    tokens_L: np.ndarray
    context_length: int


class Prefixes:
    """What the slots of a loop hold, and what of it a new request may take over."""

    def __init__(self, networks: Sequence[Network]) -> None:
        target, *drafts = networks
        self._unit = unit_of_contexts(networks)
        # Rows of an answer see what rows of a context do, so that an answer may become one.
        is_one = target.role.name == "autoregressive" or target.role.context_attention == "block_causal"
        self._shares_answers = is_one and all(draft.role.name == "autoregressive" for draft in drafts)
        boundaries = [network.architecture.long_from for network in networks]
        self._boundaries = [boundary for boundary in boundaries if boundary is not None]
        self._held: dict[int, Held] = {}

    def hold(self, slot: int, tokens: Sequence[int], num_cached: int, context_length: int) -> None:
        """The slot has the keys and values of the first `num_cached` tokens."""
        if self._unit is None:
            shared = context_length if num_cached >= context_length else 0
        else:
            shared = num_cached if self._shares_answers else min(num_cached, context_length)
        self._held[slot] = Held(np.array(tokens[:shared]), context_length)

    def forget(self, slot: int) -> None:
        """What the slot held is overwritten."""
        self._held.pop(slot, None)

    def held_by(self, slot: int) -> int:
        """How many positions of the slot may be of use."""
        return len(self._held[slot].tokens_L) if slot in self._held else 0

    def longest(self, prompt_ids: Sequence[int], most: int) -> tuple[int, int]:
        """The slot that holds the most positions that a request with this context may take over, and how many, at most
        `most`; (-1, 0) if none does.
        """
        prompt_L = np.array(prompt_ids)
        best = (-1, 0)
        for slot, held in self._held.items():
            count = self._shared(prompt_L, held, most)
            if count > best[1]:
                best = slot, count
        return best

    def _shared(self, prompt_L: np.ndarray, held: Held, most: int) -> int:
        if any((len(prompt_L) > each) != (held.context_length > each) for each in self._boundaries):
            return 0
        if self._unit is None:
            return min(most, len(prompt_L)) if np.array_equal(prompt_L, held.tokens_L) else 0
        length = min(len(prompt_L), len(held.tokens_L), most)
        differs = (prompt_L[:length] != held.tokens_L[:length]).nonzero()[0]
        return int(differs[0] if len(differs) else length) // self._unit * self._unit
