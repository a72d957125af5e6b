"""A causal network's own texts on disk, greedy or sampled: what drafts learn from.

The shards are those of `record_shards`; a record is a prompt and the answer, and, where the texts were decoded with a
gated adapter, the places at which its drafts began.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import GREEDY, Sampling
from fewstep.decode.self_speculative import SelfSpeculative, where_drafts_began
from fewstep.models.load import weights_hash
from fewstep.models.network import Network
from fewstep.train.collect import CollectReport, collect_records
from fewstep.train.examples import Examples, Origin
from fewstep.train.record_shards import (
    PromptRow,
    RecordShards,
    RecordStore,
    check_range,
    list_column,
    offsets_of,
)


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
    """Decode `rows` by `decoder` and store the answers; other options are those of `collect.collect_records`.

    `on_output` is called as each prompt is decoded.
    """

    def run(some: Sequence[PromptRow], seeds: Sequence[int]) -> list[Output]:
        requests = [
            Request(
                prompt_ids=list(row.prompt_ids),
                max_new_tokens=max_new_tokens,
                seed=seed,
                sampling=sampling,
                early_stop=early_stop,
            )
            for row, seed in zip(some, seeds, strict=True)
        ]

        def announce(_: int, __: Output) -> None:
            if on_output is not None:
                on_output()

        return decode(network, requests, decoder, batch_size=batch_size, on_output=announce)

    return collect_records(
        TextShards,
        run,
        rows,
        folder,
        maker_hash=_writer_hash(network),
        described={"drafted": isinstance(decoder, SelfSpeculative)},
        settings=settings,
        stop_token_ids=network.stop_token_ids,
        **options,
    )


def _writer_hash(network: Network) -> str:
    """Whose texts they are: with a gated adapter they are its base's."""
    return weights_hash(network) if network.adapter is None else network.adapter.base_hash


def read_texts(folder: str | Path, network: Network) -> tuple[Examples, Tensor | None]:
    """The prompts and texts in `folder`, and of each of their tokens whether a draft began at it, if that is known.

    FewstepError for a store that is damaged, unfinished, empty, of another kind or schema, or made by another network.
    """
    store = RecordStore(folder, TextShards, teacher_hash=_writer_hash(network))
    store.check_not_empty()
    parts = [store.files.read(index) for index in store.finished]

    def joined(values: str, lengths: str) -> tuple[torch.Tensor, torch.Tensor]:
        flat = np.concatenate([part[values] for part in parts])
        return torch.from_numpy(flat), torch.from_numpy(offsets_of(np.concatenate([part[lengths] for part in parts])))

    names = [name for part in parts for name in part["ids"]]
    origin = Origin(str(folder), "record", names)
    texts = Examples(*joined("prompt_ids", "prompt_lengths"), *joined("answer_ids", "lengths"), (origin,))
    texts.check_tokens(network.vocab_size)
    if not store.files.drafted:
        return texts, None
    return texts, torch.from_numpy(np.concatenate([part["began_draft"] for part in parts]).astype(bool))
