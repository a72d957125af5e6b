"""The stream of packed batches that one process trains on. Axes as in `packing.py`."""

from typing import Any

import numpy as np
import torch

from fewstep.errors import FewstepError
from fewstep.train.objectives import Batch, Objective
from fewstep.train.packing import best_fit, pack

TOKENS_PER_CANDIDATE = 128
"""Documents are drawn in portions of one for so many tokens of the batch, until they fill it."""


class BatchStream:
    """Endless shuffled epochs. A batch is a function of the seed, the process, the epoch and the cursor alone.

    Process k of n reads every n-th example of an epoch's order. `rows` rows of `row_length` tokens are packed for each
    batch; what no longer fits comes first in the next.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        rows: int,
        row_length: int,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
        device: torch.device | None = None,
    ) -> None:
        """FewstepError if there are fewer examples than processes."""
        if objective.num_examples < process[1]:
            raise FewstepError(f"{objective.num_examples} examples are too few for {process[1]} processes")
        self._objective = objective
        self._rows, self._row_length = rows, row_length
        self._seed, self._process, self._device = seed, process, device
        self._epoch = self._cursor = 0
        self.num_tokens = 0
        self._order_N = self._order()

    def next_batch(self) -> Batch:
        """The next documents, packed on the device. FewstepError if one is longer than a row."""
        rng = np.random.default_rng([self._seed, self._epoch, self._cursor, self._process[0]])
        candidates_N, lengths_NG = self._candidates(rng)
        try:
            starts_N = best_fit(lengths_NG.sum(1), self._rows, self._row_length)
        except ValueError as error:
            raise FewstepError(f"{error} (row_length), or leave out long examples") from None
        in_place_N = starts_N.argsort()
        chosen_N, lengths_NG = candidates_N[in_place_N], lengths_NG[in_place_N]
        self._advance(len(starts_N), int(lengths_NG.sum()))
        examples, starts, segments = (
            torch.from_numpy(part).to(self._device, non_blocking=True)
            for part in (chosen_N, starts_N[in_place_N], lengths_NG)
        )
        return Batch(examples, segments, pack(starts, segments, self._rows, self._row_length))

    def _candidates(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The next examples and their segment lengths, enough to fill the rows or all that the epoch has left."""
        capacity = self._rows * self._row_length
        portion = max(16, capacity // TOKENS_PER_CANDIDATE)
        end, total = self._cursor, 0
        lengths: list[np.ndarray] = []
        while total <= capacity and end < len(self._order_N):
            examples = self._order_N[end : end + portion]
            lengths.append(self._objective.segment_lengths(examples, rng))
            end, total = end + len(examples), total + int(lengths[-1].sum())
        return self._order_N[self._cursor : end], np.concatenate(lengths)

    def _advance(self, num_documents: int, num_tokens: int) -> None:
        self._cursor += num_documents
        self.num_tokens += num_tokens
        if self._cursor >= len(self._order_N):
            self._epoch, self._cursor = self._epoch + 1, 0
            self._order_N = self._order()

    def _order(self) -> np.ndarray:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._objective.num_examples)
        return order[self._process[0] :: self._process[1]]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the next batch begins."""
        return {"epoch": self._epoch, "cursor": self._cursor, "num_tokens": self.num_tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self.num_tokens = state["num_tokens"]
        self._order_N = self._order()
