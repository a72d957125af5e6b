"""The stream of packed batches that one process trains on. Axes as in `packing.py`."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fewstep.errors import FewstepError
from fewstep.train.documents import Batch
from fewstep.train.objectives import Objective, to_device
from fewstep.train.packing import best_fit, pack

TOKENS_PER_CANDIDATE = 128
"""Documents are drawn in portions of one for so many tokens of the batch, until they fill it."""


def check_examples(objective: Objective, *, row_length: int, vocab_size: int) -> None:
    """FewstepError naming the first example that is longer than a row, also where that depends on a draw, or that holds
    a token which the network does not have.
    """
    objective.examples.check_tokens(vocab_size)
    lengths_N = objective.segment_lengths(np.arange(objective.num_examples), None).sum(1)
    too_long = (lengths_N > row_length).nonzero()[0]
    if len(too_long):
        name, length = objective.examples.name(int(too_long[0])), lengths_N[too_long[0]]
        raise FewstepError(
            f"{name}: a document of {length} tokens does not fit a row of {row_length}; use longer rows (row_length), "
            "or leave out long examples"
        )


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
    ) -> None:
        """FewstepError if there are fewer examples than processes."""
        if objective.num_examples < process[1]:
            raise FewstepError(f"{objective.num_examples} examples are too few for {process[1]} processes")
        self._objective = objective
        self._rows, self._row_length = rows, row_length
        self._seed, self._process = seed, process
        self._epoch = self._cursor = 0
        self.num_tokens = 0
        self._order_N = self._order()

    def next_batch(self) -> Batch:
        """The next documents, packed. FewstepError if one is longer than a row."""
        rng = np.random.default_rng([self._seed, self._epoch, self._cursor, self._process[0]])
        candidates_N, lengths_NG = self._candidates(rng)
        try:
            starts_N = best_fit(lengths_NG.sum(1), self._rows, self._row_length)
        except ValueError as error:
            raise FewstepError(f"{error} (row_length), or leave out long examples") from None
        in_place_N = starts_N.argsort()
        chosen_N, lengths_NG = candidates_N[in_place_N], lengths_NG[in_place_N]
        self._advance(len(starts_N), int(lengths_NG.sum()))
        starts, segments = torch.from_numpy(starts_N[in_place_N]), torch.from_numpy(lengths_NG)
        return Batch(torch.from_numpy(chosen_N), segments, pack(starts, segments, self._rows, self._row_length))

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


class PreparedStream:
    """The batches of a BatchStream, prepared by the objective and on the device.

    A thread prepares `ahead` of them while the device computes; with 0 there is none. Noise is a function of the seed,
    the process and the number of the batch. What `state_dict` and `num_tokens` tell is about the batches handed out.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        rows: int,
        row_length: int,
        seed: int,
        process: tuple[int, int],
        device: torch.device,
        ahead: int = 0,
    ) -> None:
        self._objective, self._seed, self._process, self._device = objective, seed, process[0], device
        self._batches = BatchStream(objective, rows=rows, row_length=row_length, seed=seed, process=process)
        self._number = 0
        self._state = self._state_after()
        self._ahead = ahead
        self._thread = ThreadPoolExecutor(1) if ahead else None
        self._waiting: deque[Future[tuple[Any, dict[str, Any]]]] = deque()

    @property
    def num_tokens(self) -> int:
        """Tokens of the batches handed out, padding left out."""
        return int(self._state["num_tokens"])

    def next(self) -> Any:
        """FewstepError as from `BatchStream.next_batch`."""
        if self._thread is None:
            prepared, self._state = self._prepare()
            return prepared
        while len(self._waiting) <= self._ahead:
            self._waiting.append(self._thread.submit(self._prepare))
        prepared, self._state = self._waiting.popleft().result()
        return prepared

    def close(self) -> None:
        """Stop preparing; what was prepared and not handed out is dropped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    @torch.no_grad()
    def _prepare(self) -> tuple[Any, dict[str, Any]]:
        generator = torch.Generator()
        key = np.random.SeedSequence((self._seed, self._number, self._process))
        generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        batch = replace(self._batches.next_batch(), number=self._number)
        prepared = self._objective.prepare(batch, generator)
        self._number += 1
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            return to_device(prepared, self._device), self._state_after()

    def _state_after(self) -> dict[str, Any]:
        return {**self._batches.state_dict(), "number": self._number}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: where the next batch begins."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; before the first batch."""
        self._batches.load_state_dict(state)
        self._number = state["number"]
        self._state = self._state_after()
