"""What a run measures of itself between two lines of its log: means of its figures, and tokens per second."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Means:
    """Figures of this process averaged over steps, kept on the device: nobody waits for them before they are logged."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, parts: Mapping[str, Tensor]) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value.float() for name, value in parts.items()}
        self._count += 1

    @property
    def means(self) -> dict[str, Tensor]:
        return {name: value / self._count for name, value in self._sums.items()}

    def clear(self) -> None:
        self._sums, self._count = {}, 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: value.item() for name, value in self._sums.items()}, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any], *, device: torch.device) -> None:
        self._sums = {name: torch.tensor(value, device=device) for name, value in state["sums"].items()}
        self._count = state["count"]


class Speed:
    """Tokens per second of this process since the last time it was asked."""

    def __init__(self, num_tokens: int) -> None:
        self._start, self._num_tokens = time.monotonic(), num_tokens

    def rate(self, num_tokens: int) -> float:
        now = time.monotonic()
        rate = (num_tokens - self._num_tokens) / max(now - self._start, 1e-9)
        self._start, self._num_tokens = now, num_tokens
        return rate
