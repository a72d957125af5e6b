"""How prompts are prefilled where requests share more than passes: in pieces, and from keys and values of earlier ones.

Until the last piece of its prompt a request has a slot, which is done in the loop's state: no pass of the others
changes it. Pieces write to the slot's cache alone.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder, cached_plan
from fewstep.decode.requests import Ticket
from fewstep.decode.sharing import Prefixes, Sharing, unit_of_contexts
from fewstep.decode.state import State
from fewstep.models.cache import KVCache
from fewstep.models.network import Network


@dataclass(frozen=True)
class _Beginning:
    """A request that gets a slot: how many of its positions are in the cache, and whether the rest comes in pieces."""

    ticket: Ticket
    slot: int
    num_taken: int
    in_pieces: bool


@dataclass
class _Prefill:
    """The row of the state with which a request will join once its prompt is cached up to the last piece."""

    row: State
    num_cached: int
    front: int


class Prefiller:
    """Gives queued requests their slots, and fills the cache with their prompts. See `Sharing` for what is shared."""

    def __init__(
        self,
        sharing: Sharing,
        decoder: Decoder,
        networks: Mapping[str, Network],
        caches: Mapping[str, KVCache],
    ) -> None:
        sharing.check(decoder)
        self.num_passes = 0
        self._sharing, self._decoder = sharing, decoder
        self._networks, self._caches = networks, caches
        self._device = networks["target"].device
        self._unit = unit_of_contexts(networks.values())
        reuses = sharing.reuse_prefixes and decoder.traits.cached
        self._prefixes = Prefixes(list(networks.values())) if reuses else None
        self._prefills: dict[int, _Prefill] = {}  # by slot, in the order in which they began
        self._rows_left: float = 0
        self._beginnings: list[_Beginning] = []
        self._joined: dict[int, Ticket] = {}  # in the last round, by slot

    @property
    def busy(self) -> bool:
        """Whether prompts are prefilled in pieces."""
        return bool(self._prefills)

    def go_on(self) -> list[tuple[list[int], State]]:
        """Prefill a piece of the prompt that began first; the slot and the row of its request, if the last one is left
        for the step with which it joins.
        """
        if self._prefixes is not None:
            for slot, ticket in self._joined.items():  # their contexts are in the cache now
                prompt_ids = ticket.request.prompt_ids
                self._prefixes.hold(slot, prompt_ids, self._front(ticket), len(prompt_ids))
        self._joined.clear()
        self._rows_left = float("inf") if self._sharing.prefill_rows is None else self._sharing.prefill_rows
        if not self._prefills:
            return []
        slot, prefill = next(iter(self._prefills.items()))
        num_pending = prefill.front - prefill.num_cached
        end = self._next_cut(prefill.num_cached, num_pending)
        if end is not None:
            self._run_piece(slot, prefill, end)
            return []
        del self._prefills[slot]
        self._rows_left -= num_pending
        return [([slot], prefill.row)]

    def choose(self, queue: deque[Ticket], free: list[int]) -> tuple[list[Ticket], list[int]]:
        """Take those that begin now, in their order, from the queue, and slots for them from the free ones."""
        self._beginnings, is_first = [], True
        while queue and free:
            ticket = queue[0]
            slot, source, num_taken = self._choose_slot(ticket, free)
            num_pending = self._front(ticket) - num_taken if self._caches else 0
            in_pieces = bool(self._caches) and self._next_cut(num_taken, num_pending) is not None
            if not in_pieces and num_pending > self._rows_left and not (is_first and self._rows_left > 0):
                break
            queue.popleft()
            free.remove(slot)
            self._take(slot, source, num_taken)
            if not in_pieces:
                self._rows_left, is_first = self._rows_left - num_pending, False
            self._beginnings.append(_Beginning(ticket, slot, num_taken, in_pieces))
        return [one.ticket for one in self._beginnings], [one.slot for one in self._beginnings]

    def prepared(self, rows: State) -> State:
        """The rows of the state of those that were chosen, whose caches are empty: with what was taken over, and done
        where a prompt comes in pieces.
        """
        taken_R = torch.tensor([one.num_taken for one in self._beginnings])
        if taken_R.any():
            rows = rows.with_cached(taken_R)
        for i, one in enumerate(self._beginnings):
            for name, cache in self._caches.items():
                if one.num_taken:
                    cache.number(one.slot, self._context_blocks(name, one))
            if one.in_pieces:
                row = rows.select(torch.tensor([i])).to(self._device)
                self._prefills[one.slot] = _Prefill(row, one.num_taken, int(rows.front_R[i]))
            else:
                self._joined[one.slot] = one.ticket
        return replace(rows, done_R=torch.tensor([one.in_pieces for one in self._beginnings]))

    def leave(self, slot: int, ticket: Ticket, state: State, row: int) -> None:
        """A request has left its slot, whose row of the state this is, on the CPU."""
        self._prefills.pop(slot, None)
        self._joined.pop(slot, None)
        if self._prefixes is not None:
            num_cached = int(state.in_all_caches_R[row])
            tokens = state.tokens_RL[row, :num_cached].tolist()
            self._prefixes.hold(slot, tokens, num_cached, len(ticket.request.prompt_ids))

    def _front(self, ticket: Ticket) -> int:
        """Where the request begins to decode: positions before it are prefilled."""
        return self._decoder.role.first_block_start(len(ticket.request.prompt_ids))

    # Prompts in pieces

    def _next_cut(self, num_cached: int, num_pending: int) -> int | None:
        """Up to which position the next piece of a prompt goes; None if what is pending is one piece."""
        limit, unit = self._sharing.prefill_rows, self._unit
        if limit is None or unit is None or num_pending <= limit:
            return None
        end = max((num_cached + limit) // unit, num_cached // unit + 1) * unit
        return end if end < num_cached + num_pending else None

    def _run_piece(self, slot: int, prefill: _Prefill, end: int) -> None:
        slot_r = torch.tensor([slot], device=self._device)
        seen = replace(prefill.row, front_R=torch.full_like(prefill.row.front_R, end))
        for name, network in self._networks.items():
            plan = cached_plan("prefill", seen, network.role, width=end - prefill.num_cached, active=0)
            network.hidden(replace(plan, network=name), self._caches[name].view(slot_r, end))
            self.num_passes += 1
        prefill.row, prefill.num_cached = prefill.row.with_cached(seen.front_R), end

    # Keys and values of earlier requests

    def _choose_slot(self, ticket: Ticket, free: list[int]) -> tuple[int, int, int]:
        """A free slot for a request, the slot whose keys and values it begins with, and how many of them."""
        if self._prefixes is None:
            return free[-1], free[-1], 0
        # A row that scores the next token has to be pending.
        most = self._front(ticket) - self._decoder.role.scores_next_token
        source, count = self._prefixes.longest(ticket.request.prompt_ids, most)
        goes_on = 2 * count >= self._prefixes.held_by(source)  # little is lost if what it holds is overwritten
        if source in free and (goes_on or len(free) == 1):
            return source, source, count
        return next(slot for slot in free if slot != source), source, count  # the one that is free for longest

    def _take(self, slot: int, source: int, count: int) -> None:
        if self._prefixes is not None:
            self._prefixes.forget(slot)
        if count and source != slot:
            for cache in self._caches.values():
                cache.copy_first(source, slot, count)

    def _context_blocks(self, name: str, beginning: _Beginning) -> Tensor:
        """The block numbers of what was taken over, in the context of the request that takes it."""
        context_length = torch.tensor(len(beginning.ticket.request.prompt_ids), device=self._device)
        positions_L = torch.arange(beginning.num_taken, device=self._device)
        return self._networks[name].role.blocks(positions_L, context_length)
