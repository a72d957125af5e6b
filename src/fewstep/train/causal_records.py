"""What a causal network writes by itself, on disk: its Jacobi trajectories, which CLLM trains on (arXiv 2403.00835),
and its texts, greedy or sampled, which drafts learn from.

The shards are those of `records`. A record of a Jacobi trajectory is a prompt, the network's greedy answer, and the
states of each window of it: its tokens before the first pass and after each, the last being the fixed point. A record
of a text is a prompt and the answer, and, where the texts were decoded with a gated adapter, the places at which its
drafts began.

Axes: as in `decode.jacobi_windows`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder
from fewstep.decode.health import REPEATED_NGRAM, repetition
from fewstep.decode.jacobi import Jacobi
from fewstep.decode.jacobi_windows import JacobiTrajectory, jacobi_trajectories
from fewstep.decode.requests import Output
from fewstep.decode.sampling import GREEDY, Sampling
from fewstep.decode.self_speculative import SelfSpeculative, where_drafts_began
from fewstep.errors import FewstepError
from fewstep.models.load import network_hash, weights_hash
from fewstep.models.network import Network
from fewstep.train.cllm import JacobiTable
from fewstep.train.collect import CollectReport, collect_records, decode_with, requests_for, whenever
from fewstep.train.examples import Examples
from fewstep.train.records import (
    PromptRow,
    RecordShards,
    RecordStore,
    check_range,
    concatenated,
    list_column,
    list_column_of,
    ragged,
    references_of,
)


class JacobiShards(RecordShards[JacobiTrajectory]):
    """Records of a Jacobi decoding in windows of `window` tokens."""

    kind: ClassVar[str] = "jacobi trajectories"
    maker: ClassVar[str] = "model"
    counts: ClassVar[tuple[str, ...]] = ("num_positions", "num_windows", "num_state_tokens")

    def _describe(self, manifest: Mapping[str, Any]) -> None:
        self.window = manifest["window"]
        if type(self.window) is not int or self.window < 1:
            raise TypeError(f"window is {self.window!r:.40}, no number of tokens")

    @staticmethod
    def output_of(record: JacobiTrajectory) -> Output:
        return record.output

    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[JacobiTrajectory]
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


class TextShards(RecordShards[Output]):
    """Records of a causal decoding, of which only the tokens are kept."""

    kind: ClassVar[str] = "texts"
    maker: ClassVar[str] = "model"
    counts: ClassVar[tuple[str, ...]] = ("num_positions",)

    def _describe(self, manifest: Mapping[str, Any]) -> None:
        self.drafted = manifest["drafted"]
        if type(self.drafted) is not bool:
            raise TypeError(f"drafted is {self.drafted!r:.40}, neither true nor false")

    @staticmethod
    def output_of(record: Output) -> Output:
        return record

    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[Output]
    ) -> tuple[dict[str, pa.Array], dict[str, int]]:
        answers = [record.token_ids for record in records]
        columns = {"answer_ids": list_column(answers)}
        if self.drafted:
            columns["began_draft"] = list_column([where_drafts_began(record).int().tolist() for record in records])
        return columns, {"num_positions": sum(map(len, answers))}

    def _arrays(self, column: Mapping[str, pa.Array]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        answers = column["answer_ids"]
        arrays = {"answer_ids": answers.flatten().to_numpy(), "lengths": answers.value_lengths().to_numpy()}
        check_range("the lengths of texts", arrays["lengths"], 1)
        counted_by = {"answer_ids": "num_positions"}
        if self.drafted:
            arrays["began_draft"] = column["began_draft"].flatten().to_numpy()
            check_range("the marks of drafts", arrays["began_draft"], 0, 2)
            counted_by["began_draft"] = "num_positions"
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

    With `most_repetition` an answer is rejected if more than this share of its 4-grams occurred earlier in it: training
    on repetitive answers collapses. `on_output` is called as each prompt is decoded. FewstepError unless it lies
    between 0 and 1.
    """
    if most_repetition is not None and not 0 <= most_repetition <= 1:
        raise FewstepError(f"most_repetition must be a share between 0 and 1, got {most_repetition}; try 0.3")

    def decode(some: Sequence[PromptRow], seeds: Sequence[int]) -> list[JacobiTrajectory]:
        requests = requests_for(some, seeds, max_new_tokens=max_new_tokens, early_stop=early_stop)
        return jacobi_trajectories(network, requests, decoder, batch_size=batch_size, on_trajectory=whenever(on_output))

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


def collect_texts(
    network: Network,
    rows: Sequence[PromptRow],
    folder: str | Path,
    decoder: Decoder,
    *,
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling = GREEDY,
    early_stop: bool = True,
    settings: Mapping[str, Any],
    on_output: Callable[[], None] | None = None,
    **options: Any,
) -> CollectReport:
    """Decode `rows` by `decoder` and store the answers; other options are those of `collect_records`.

    `on_output` is called as each prompt is decoded.
    """
    drafts = isinstance(decoder, SelfSpeculative)
    if isinstance(decoder, SelfSpeculative):
        decoder = replace(
            decoder, cycle="two-pass", branches=None
        )  # its outputs say where drafts began; the texts are the same
    decode_rows = decode_with(
        network,
        decoder,
        batch_size=batch_size,
        on_output=on_output,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        early_stop=early_stop,
    )
    return collect_records(
        TextShards,
        decode_rows,
        rows,
        folder,
        maker_hash=_writer_hash(network),
        described={"drafted": drafts},
        settings=settings,
        stop_token_ids=network.stop_token_ids,
        **options,
    )


def _writer_hash(network: Network) -> str:
    """The hash of the network whose texts these are; with a gated adapter, that of its base."""
    return weights_hash(network) if network.adapter is None else network.adapter.base_hash


def read_jacobi_table(folder: str | Path, network: Network) -> tuple[JacobiTable, Examples | None]:
    """The trajectories in `folder`, and the reference answers stored beside them (None if there are none).

    FewstepError for a store that is damaged, unfinished, empty, of another kind or schema, or made by another network.
    """
    store = RecordStore(folder, JacobiShards, teacher_hash=network_hash(network))
    columns = _columns_of(store, ("prompt_ids", "answer_ids", "states", "reference_ids"), network)
    small = np.int16 if network.vocab_size <= 1 << 15 else np.int32
    try:
        table = JacobiTable(
            _examples(store, columns),
            store.files.window,
            torch.from_numpy(columns["states"].astype(small)),
            torch.from_numpy(columns["num_states"].astype(np.int64)),
        )
    except ValueError as error:
        raise FewstepError(f"the trajectories in {folder} are damaged: {error}; collect them again") from error
    return table, references_of(columns)


def read_texts(folder: str | Path, network: Network) -> tuple[Examples, Tensor | None]:
    """The prompts and texts in `folder`, and of each of their tokens whether a draft began at it, if that is known.

    FewstepError for a store that is damaged, unfinished, empty, of another kind or schema, or made by another network.
    """
    store = RecordStore(folder, TextShards, teacher_hash=_writer_hash(network))
    columns = _columns_of(store, ("prompt_ids", "answer_ids"), network)
    began = columns.get("began_draft")
    return _examples(store, columns), None if began is None else torch.from_numpy(began.astype(bool))


def _columns_of(store: RecordStore[Any], token_columns: Sequence[str], network: Network) -> dict[str, Any]:
    """FewstepError if nothing was kept, or if a shard is damaged or holds a token that the network does not have."""
    store.check_not_empty()

    def check(part: Mapping[str, Any]) -> None:
        for name in token_columns:
            check_range(name, part[name], 0, network.vocab_size - 1)

    return store.columns(check)


def _examples(store: RecordStore[Any], columns: Mapping[str, Any]) -> Examples:
    prompts = ragged(columns["prompt_ids"], columns["prompt_lengths"])
    return Examples(*prompts, *ragged(columns["answer_ids"], columns["lengths"]), store.origin(columns["ids"]))
