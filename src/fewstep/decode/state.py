"""The state that every decoder shares, and the one mechanism behind all of them.

Axes: R = requests, L = positions (context, then canvas, then padding), S = positions scored in a step, V = vocabulary,
E = tokens that end an answer, N = numbers of a policy.

A request's positions are, from the left: `[0, cached)` final tokens whose keys and values are in the cache; `[cached,
front)` *pending*, final tokens that are not in it yet; `[front, front + block_size)` *active*, the block being
decoded. Every forward of a cached decoder carries a request's pending positions and its active ones. So the first
forward fuses the prefill with a first step, the forward after a finished block fuses its commit with the next block's
first step, and autoregressive decoding is the case whose blocks are single tokens. An uncached decoder forwards
everything and has nothing pending.

Open positions hold what a decoder finds useful: a mask token, a guess that the next pass verifies, or a placeholder
where its guesses stand elsewhere.

All fields are tensors of fixed shapes on the device, the requests first; a decoder that remembers more adds its own in
a subclass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

NEVER = -1
"""A stop token of a request that does not stop early; the pass of a position that is not final yet."""


class Rows:
    """Tensors with the requests first, in fields that may be Rows themselves, or None for what is not kept."""

    def select(self, requests_r: Tensor) -> Self:
        """These requests alone, copied."""
        return self.map(lambda field: field.index_select(0, requests_r))

    def put(self, requests_r: Tensor, other: Self) -> None:
        """Write the requests of `other` into these rows, in place."""
        for mine, its in zip(self.tensors().values(), other.tensors().values(), strict=True):
            mine.index_copy_(0, requests_r, its)

    def to(self, device: torch.device) -> Self:
        """All tensors in one copy, since each by itself would be waited for."""
        fields = sorted(self.tensors().values(), key=lambda field: -field.element_size())  # so that each is aligned
        if device == fields[0].device:
            return self
        moved = torch.cat([field.reshape(-1).view(torch.uint8) for field in fields]).to(device)
        parts = moved.split([field.numel() * field.element_size() for field in fields])
        found = {id(field): part.view(field.dtype).view(field.shape) for field, part in zip(fields, parts, strict=True)}
        return self.map(lambda field: found[id(field)])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With every tensor replaced by what the function makes of it."""
        made = {
            name: value.map(function) if isinstance(value, Rows) else function(value)
            for name, value in vars(self).items()
            if value is not None
        }
        return replace(self, **made)  # type: ignore[type-var]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, those of nested fields among them."""
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if value is not None:
                found |= value.tensors() if isinstance(value, Rows) else {name: value}
        return found


@dataclass(frozen=True, kw_only=True)
class Settings(Rows):
    """What each request asks for; see Request."""

    stop_tokens_RE: Tensor  # NEVER = none
    seed_R: Tensor
    policy_RN: Tensor  # numbers of the policy
    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor


@dataclass(frozen=True, kw_only=True)
class Previous(Rows):
    """What the last pass drew at the positions that it scored, and its untempered probability; NEVER and 0 elsewhere.

    A policy sees of it the positions that it chooses from.
    """

    last_tokens_RL: Tensor
    last_confidence_RL: Tensor


@dataclass(frozen=True, kw_only=True)
class State(Rows):
    """R requests; see the module."""

    tokens_RL: Tensor
    final_RL: Tensor  # context, finalised and padding positions; the others are open
    step_RL: Tensor  # the request's pass, from 1, that finalised the position; 0 = given, NEVER = open
    confidence_RL: Tensor  # untempered probability of the token when it was finalised; 1 = given
    context_length_R: Tensor
    decode_end_R: (
        Tensor  # the request is done once all positions before it, or an end of the text among them, are final
    )
    canvas_end_R: Tensor
    front_R: Tensor
    cached_R: Tensor
    done_R: Tensor
    num_forwards_R: Tensor  # also the number of the request's last pass
    num_draft_forwards_R: Tensor
    settings: Settings
    previous: Previous | None = None  # kept for a policy that reads it

    @property
    def pending_R(self) -> Tensor:
        """Number of pending positions; -1 for a request that is done."""
        return torch.where(self.done_R, -1, self.front_R - self.cached_R)

    def with_cached(self, cached_R: Tensor) -> Self:
        """With so many positions in all caches."""
        return replace(self, cached_R=cached_R)

    @property
    def in_all_caches_R(self) -> Tensor:
        """Number of positions whose keys and values are in the cache of every network."""
        return self.cached_R

    @property
    def told(self) -> tuple[Tensor, ...]:
        """Integers of each request that the host reads after a round for a decoder's `Traits.observe`."""
        return ()


StateT = TypeVar("StateT", bound=State)


def first_open(state: State) -> Tensor:
    """First position that is not final, L where all are, [R]."""
    length = state.tokens_RL.shape[1]
    return torch.where(state.final_RL, length, torch.arange(length, device=state.tokens_RL.device)).amin(1)


def scored_positions(state: State, count: int) -> Tensor:
    """The `count` positions from the front on, [R, S]."""
    return state.front_R[:, None] + torch.arange(count, device=state.front_R.device)


def is_stop(state: State, tokens_RS: Tensor) -> Tensor:
    """Whether each token ends its request, [R, S]."""
    return (tokens_RS[..., None] == state.settings.stop_tokens_RE[:, None]).any(-1)


def write(field_RL: Tensor, positions_RS: Tensor, chosen_RS: Tensor, values_RS: Tensor) -> Tensor:
    """`field_RL` with the chosen positions, each named once, set to the values."""
    return field_RL.scatter(1, positions_RS, torch.where(chosen_RS, values_RS, field_RL.gather(1, positions_RS)))
