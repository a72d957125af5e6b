"""Which passes an answer is made of, and what each must read and compute: seen from outside, round by round.

Axes: R = requests.

`Watch` is a listener: it notes what the host has to know of the state after a round. The decoder itself then says
which passes the next round was made of, so that a run is described whoever ran its passes. A listener waits for the
device, so runs that are timed have none; they are the same requests, and so the same rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.decode.admission import positions_needed
from fewstep.decode.decoder import Decoder, Shape
from fewstep.decode.requests import Request
from fewstep.decode.state import State
from fewstep.decode.steps import begin
from fewstep.measure.roofline import Rates, Sizes, Work
from fewstep.models.network import Network


@dataclass(frozen=True)
class RoundWork:
    """What one round of the requests of a batch must read and compute.

    `kind`: those of its passes, such as "denoise" or "draft + verify"; "prefill" for the first with a KV cache.
    `works`: of each forward. `tokens`: that became final, of all requests.
    """

    kind: str
    works: Sequence[Work]
    tokens: int

    def floor_seconds(self, rates: Rates) -> float:
        return sum(work.floor_seconds(rates) for work in self.works)

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.works)

    @property
    def bytes_read(self) -> float:
        return sum(work.bytes_read for work in self.works)


@dataclass(frozen=True)
class _Seen:
    """Of a state: what decides the next round's passes, and how many positions are open."""

    pending_R: Tensor
    front_R: Tensor
    num_open: int

    @classmethod
    def of(cls, state: State) -> "_Seen":
        num_open = (~state.final_RL).sum()[None].expand_as(state.front_R)
        pending_R, front_R, open_R = torch.stack((state.pending_R, state.front_R, num_open)).cpu()
        return cls(pending_R, front_R, int(open_R[0]))


class Watch:
    """A listener of a generator whose slots one batch fills."""

    def __init__(self) -> None:
        self._seen: list[_Seen] = []

    def __call__(self, state: State) -> None:
        self._seen.append(_Seen.of(state))

    def rounds(
        self, network: Network, decoder: Decoder, requests: Sequence[Request], dtype: torch.dtype
    ) -> list[RoundWork]:
        """The rounds of these requests, which were decoded in these numbers while it listened; it forgets them."""
        seen, self._seen = self._seen, []
        planned = _Planned(network, decoder, requests, dtype)
        rounds = [planned.round(*pair) for pair in zip([planned.first, *seen], seen, strict=False)]
        if decoder.traits.cached:
            rounds[0] = replace(rounds[0], kind="prefill")
        return rounds


class _Planned:
    """What the decoder plans for some requests."""

    def __init__(self, network: Network, decoder: Decoder, requests: Sequence[Request], dtype: torch.dtype) -> None:
        canvases = [decoder.canvas(request) for request in requests]
        self._lengths = [
            positions_needed(decoder, request, canvas) for request, canvas in zip(requests, canvases, strict=True)
        ]
        self._decoder = decoder
        num_stops = max(len(request.stop_token_ids or ()) for request in requests)
        state = begin(
            decoder,
            [replace(request, stop_token_ids=request.stop_token_ids or ()) for request in requests],
            canvases,
            max(self._lengths),
            pad_token_id=network.pad_token_id,
            num_stop_tokens=max(1, num_stops),
        )
        self.first = _Seen.of(state)
        self._one = state.select(torch.tensor([0])).to(network.device)
        networks = {"target": network, **decoder.traits.companions}
        self._sizes = {name: Sizes.of(each.module, dtype) for name, each in networks.items()}
        self._plans: dict[Shape, tuple[str, int, int, int]] = {}

    def round(self, before: _Seen, after: _Seen) -> RoundWork:
        """The one between two states of the host's view."""
        live_r = (before.pending_R >= 0).nonzero()[:, 0]
        lengths_r = torch.full((len(live_r),), max(self._lengths))
        kinds, works = list[str](), list[Work]()
        for members, shapes in self._decoder.passes(before.pending_R[live_r], lengths_r):
            slots = live_r[members]
            for shape in shapes:
                kinds.append(shape.kind)
                works.append(self._work(shape, before.pending_R[slots], before.front_R[slots]))
        return RoundWork(" + ".join(dict.fromkeys(kinds)), works, before.num_open - after.num_open)

    def _work(self, shape: Shape, pending_r: Tensor, front_r: Tensor) -> Work:
        """Of a forward of these requests. Rows that are inert are no work, but for a draft's, which are not known."""
        network, num_requests, num_rows, num_scored = self._planned(shape)
        rows_r = torch.full_like(pending_r, num_rows)
        if not self._decoder.traits.cached:
            keys, pairs = 0, int((rows_r * rows_r).sum())
        else:
            active = num_rows - shape.width
            keys_r = front_r + active
            if network == "target":
                rows_r = rows_r.minimum(pending_r + active)
            keys, pairs = int(keys_r.sum()), int((rows_r * keys_r).sum())
        return self._sizes[network].forward(
            rows=num_requests * int(rows_r.sum()),
            scored=num_requests * num_scored * len(pending_r),
            keys=keys,
            pairs=num_requests * pairs,
        )

    def _planned(self, shape: Shape) -> tuple[str, int, int, int]:
        """Whose forward it is, how often each request is in it (twice with guidance), its rows and those scored."""
        if shape not in self._plans:
            plan = self._decoder.plan(self._one, replace(shape, rows=1))
            times = 1 if plan.guidance is None else 2
            self._plans[shape] = (plan.network, times, plan.tokens_RQ.shape[1], plan.scored_RS.shape[1])
        return self._plans[shape]
