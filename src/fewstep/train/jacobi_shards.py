"""Jacobi trajectories of a causal network on disk, and the table of them that CLLM trains on (arXiv 2403.00835).

A record is a prompt, the network's greedy answer, and the states of each window of it: its tokens before the first pass
and after each, the last being the fixed point. The shards are those of `record_shards`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.decode.health import REPEATED_NGRAM, repetition
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.jacobi_windows import Trajectory, jacobi_trajectories
from fewstep.decode.requests import Output, Request
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.train.cllm import JacobiTable
from fewstep.train.collect import CollectReport, collect_records
from fewstep.train.examples import Examples, Origin
from fewstep.train.record_shards import (
    PromptRow,
    RecordShards,
    RecordStore,
    check_range,
    concatenated,
    list_column,
    list_column_of,
    offsets_of,
)


class JacobiShards(RecordShards[Trajectory]):
    """Records of a Jacobi decoding in windows of `window` tokens."""

    kind: ClassVar[str] = "jacobi trajectories"
    maker: ClassVar[str] = "model"
    counts: ClassVar[tuple[str, ...]] = ("num_positions", "num_windows", "num_state_tokens")

    def _describe(self, manifest: Mapping[str, Any]) -> None:
        self.window = manifest["window"]
        if type(self.window) is not int or self.window < 1:
            raise TypeError(f"window is {self.window!r:.40}, no number of tokens")

    @staticmethod
    def output_of(record: Trajectory) -> Output:
        return record.output

    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[Trajectory]
    ) -> tuple[dict[str, pa.Array], dict[str, int]]:
        answers = [record.output.token_ids for record in records]
        counts = [[len(window.states_PN) for window in record.windows] for record in records]
        flat = [np.concatenate([window.states_PN.flatten().numpy() for window in record.windows]) for record in records]
        columns = {
            "answer_ids": list_column(answers),
            "num_states": list_column(counts),
            "states": list_column_of(concatenated(flat, np.int64).astype(np.int32), [len(part) for part in flat]),
        }
        return columns, {
            "num_positions": sum(map(len, answers)),
            "num_windows": sum(map(len, counts)),
            "num_state_tokens": sum(map(len, flat)),
        }

    def _arrays(self, column: Mapping[str, pa.Array]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        arrays = {name: column[name].flatten().to_numpy() for name in ("answer_ids", "num_states", "states")}
        counted_by = {"answer_ids": "num_positions", "num_states": "num_windows", "states": "num_state_tokens"}
        arrays["lengths"] = column["answer_ids"].value_lengths().to_numpy()
        check_range("the lengths of answers", arrays["lengths"], 1)
        if (column["num_states"].value_lengths().to_numpy() != -(-arrays["lengths"] // self.window)).any():
            raise ValueError(f"an answer is not in windows of {self.window} tokens")
        check_range("num_states", arrays["num_states"], 2)
        for name in ("answer_ids", "states"):
            check_range(name, arrays[name], 0)
        return arrays, counted_by


def collect_jacobi(
    network: Network,
    rows: Sequence[PromptRow],
    folder: str | Path,
    decoder: Jacobi,
    *,
    max_new_tokens: int,
    batch_size: int,
    early_stop: bool = True,
    settings: Mapping[str, Any],
    most_repetition: float | None = None,
    keep: Callable[[PromptRow, Output], bool] | None = None,
    on_output: Callable[[], None] | None = None,
    **options: Any,
) -> CollectReport:
    """Decode `rows` by `decoder` and store the states of their windows; other options are those of `collect_records`.

    With `most_repetition` answers are rejected of whose 4-grams more than this share occurred in them before: training
    on repetitive answers collapses. `on_output` is called as each prompt is decoded. FewstepError for no such share.
    """
    if most_repetition is not None and not 0 <= most_repetition <= 1:
        raise FewstepError(f"most_repetition is a share between 0 and 1, got {most_repetition}; try 0.3")

    def decode(some: Sequence[PromptRow], seeds: Sequence[int]) -> list[Trajectory]:
        requests = [
            Request(prompt_ids=list(row.prompt_ids), max_new_tokens=max_new_tokens, seed=seed, early_stop=early_stop)
            for row, seed in zip(some, seeds, strict=True)
        ]

        def announce(_: int, __: Trajectory) -> None:
            if on_output is not None:
                on_output()

        return jacobi_trajectories(network, requests, decoder, batch_size=batch_size, on_trajectory=announce)

    def is_kept(row: PromptRow, output: Output) -> bool:
        share = repetition(np.asarray(output.token_ids), REPEATED_NGRAM)
        return (most_repetition is None or share <= most_repetition) and (keep is None or keep(row, output))

    return collect_records(
        JacobiShards,
        decode,
        rows,
        folder,
        maker_hash=network_hash(network),
        described={"window": decoder.window},
        settings={**settings, "most_repetition": most_repetition},
        stop_token_ids=network.stop_token_ids,
        keep=None if most_repetition is None and keep is None else is_kept,
        **options,
    )


def _read(store: RecordStore[JacobiShards], index: int, vocab_size: int) -> dict[str, Any]:
    """The columns of a shard. FewstepError if it is damaged, or holds a token that the network does not have."""
    arrays = store.files.read(index)
    try:
        for name in ("prompt_ids", "answer_ids", "states", "reference_ids"):
            check_range(name, arrays[name], 0, vocab_size - 1)
    except ValueError as error:
        raise store.files.damaged(index, error) from error
    return arrays


def _origin(folder: str | Path, parts: Sequence[Mapping[str, Any]]) -> tuple[Origin, ...]:
    return (Origin(str(folder), "record", [name for part in parts for name in part["ids"]]),)


def read_jacobi_table(folder: str | Path, network: Network) -> tuple[JacobiTable, Examples | None]:
    """The trajectories in `folder`, and the reference answers stored beside them (None if there are none).

    FewstepError for a store that is damaged, unfinished, empty, of another kind or schema, or made by another network.
    """
    store = RecordStore(folder, JacobiShards, teacher_hash=network_hash(network))
    store.check_not_empty()
    parts = [_read(store, index, network.vocab_size) for index in store.finished]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    def ragged(values: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(values), torch.from_numpy(offsets_of(lengths))

    prompt_ids, prompt_lengths = joined("prompt_ids"), joined("prompt_lengths")
    prompts = ragged(prompt_ids, prompt_lengths)
    small = np.int16 if network.vocab_size <= 1 << 15 else np.int32
    try:
        table = JacobiTable(
            Examples(*prompts, *ragged(joined("answer_ids"), joined("lengths")), _origin(folder, parts)),
            store.files.window,
            torch.from_numpy(joined("states").astype(small)),
            torch.from_numpy(joined("num_states").astype(np.int64)),
        )
    except ValueError as error:
        raise FewstepError(f"the trajectories in {folder} are damaged: {error}; collect them again") from error
    has_reference = joined("has_reference")
    if not has_reference.any():
        return table, None
    asked = ragged(prompt_ids[np.repeat(has_reference, prompt_lengths)], prompt_lengths[has_reference])
    answers = ragged(joined("reference_ids"), joined("reference_lengths")[has_reference])
    return table, Examples(*asked, *answers)
