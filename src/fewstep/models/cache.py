"""A key/value cache in which every request of a batch stands at its own position.

Axes: R = requests, H = key/value heads, Q = rows of this forward, K = slots, E = head width.
"""

from copy import copy

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from fewstep.models.roles import INVISIBLE


class KVCache(Cache):
    """Keys and values of R requests, allocated once; slot p holds position p, the last slot is scratch.

    A forward first says where its rows go (`place`), then each layer's attention calls `update`, which writes the
    rows' keys and values (the rotary embedding already applied) into their slots and returns all slots. What a row may
    see is decided by the slots' block numbers: unwritten slots and the scratch slot are INVISIBLE to every real row.
    """

    def __init__(
        self, config: PreTrainedConfig, num_requests: int, length: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(layers=[])
        self.num_slots = length + 1
        self.scratch = length
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (config.num_hidden_layers, num_requests, num_heads, self.num_slots, head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.all_blocks = torch.full((num_requests, self.num_slots), INVISIBLE, device=device)
        self._slots_RQ = torch.zeros((num_requests, 0), dtype=torch.long, device=device)
        self._request_R1 = torch.arange(num_requests, device=device)[:, None]
        self._subset: Tensor | None = None
        self._picked: Tensor | slice = slice(None)  # the same requests, as they are read fastest
        self._alone = False  # one request alone is written with less work
        self._length = self.num_slots

    def view(self, requests_r: Tensor | None, length: int, *, looks: bool = True) -> "KVCache":
        """The same memory for a forward of these requests (None = all), none of which has a row at or past `length`.

        Attention then reads `length` slots only; for a subset of the requests it reads a copy, unless they are
        neighbours, as one request always is, on a CPU. `looks`: whether it may look at which ones they are; a trace
        cannot.
        """
        view = copy(self)
        if requests_r is not None:
            view._subset = view._picked = requests_r
            if looks and requests_r.device.type == "cpu" and bool((requests_r.diff() == 1).all()):
                view._picked = slice(int(requests_r[0]), int(requests_r[-1]) + 1)
            view._request_R1 = requests_r[:, None]
        view._length = min(length, self.num_slots)
        return view

    @property
    def blocks_RK(self) -> Tensor:
        """Block numbers of the slots that this view reads."""
        return self._read(self.all_blocks)

    def place(self, slots_RQ: Tensor, blocks_RQ: Tensor) -> None:
        """Announce the rows of the next forward: their slots and block numbers."""
        self._slots_RQ = slots_RQ
        self._alone = self._subset is None and len(slots_RQ) == 1
        self.all_blocks[self._request_R1, slots_RQ] = blocks_RQ
        self.all_blocks[:, self.scratch] = INVISIBLE

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [R, H, Q, E] into a layer's announced slots; returns the keys and values of the view [R, H, K, E]."""
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._alone:
            keys[0].index_copy_(1, self._slots_RQ[0], key_states[0])
            values[0].index_copy_(1, self._slots_RQ[0], value_states[0])
        else:
            keys.transpose(1, 2)[self._request_R1, self._slots_RQ] = key_states.transpose(1, 2)
            values.transpose(1, 2)[self._request_R1, self._slots_RQ] = value_states.transpose(1, 2)
        if self._subset is None:
            return keys[:, :, : self._length], values[:, :, : self._length]
        return self._read(keys.transpose(1, 2)).transpose(1, 2), self._read(values.transpose(1, 2)).transpose(1, 2)

    def _read(self, slots_RK: Tensor) -> Tensor:
        slots_RK = slots_RK[:, : self._length]
        return slots_RK if self._subset is None else slots_RK[self._picked]

    def with_blocks(self, all_blocks: Tensor) -> "KVCache":
        """The same memory, with the slots' block numbers in another tensor."""
        view = copy(self)
        view.all_blocks = all_blocks
        return view

    @property
    def placed(self) -> tuple[Tensor, Tensor | None, int]:
        """Of the forward that was announced: its slots, its requests (None for all), and the length that it reads."""
        return self._slots_RQ, self._subset, self._length

    def of_layer(
        self, keys_RHKE: Tensor, values_RHKE: Tensor, slots_RQ: Tensor, requests_r: Tensor | None, length: int
    ) -> "KVCache":
        """The part of one layer for such a forward, on these tensors; its layer's index is 0."""
        view = self.view(requests_r, length, looks=False)
        view.keys, view.values, view._slots_RQ = keys_RHKE[None], values_RHKE[None], slots_RQ
        view._alone = False
        if requests_r is None:
            view._request_R1 = torch.arange(len(slots_RQ), device=slots_RQ.device)[:, None]
        return view

    def reset(self, requests_R: Tensor) -> None:
        """Forget the requests marked True."""
        self.all_blocks.masked_fill_(requests_R[:, None], INVISIBLE)

    def copy_first(self, source: int, target: int, count: int) -> None:
        """Give one request the keys and values of the first slots of another; `number` makes them visible."""
        self.keys[:, target, :, :count] = self.keys[:, source, :, :count]
        self.values[:, target, :, :count] = self.values[:, source, :, :count]

    def number(self, request: int, blocks_K: Tensor) -> None:
        """The first slots of a request hold rows of these blocks."""
        self.all_blocks[request, : len(blocks_K)] = blocks_K

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in all: positions are always given explicitly, so nothing is derived from this."""
        return self.num_slots


def bytes_per_position(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What the keys and values of a position take up in all layers."""
    slot = KVCache(config, 1, 0, device=torch.device("meta"), dtype=dtype)
    return slot.keys.nbytes + slot.values.nbytes
