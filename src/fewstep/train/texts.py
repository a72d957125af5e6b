"""A causal network's own texts on disk, greedy or sampled: what drafts learn from.

The shards are those of `record_shards`; a record is a prompt and the answer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import GREEDY, Sampling
from fewstep.models.load import network_hash
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
        """Nothing of its own."""

    @staticmethod
    def output_of(record: Output) -> Output:
        return record

    def _columns(
        self, index: int, names: Sequence[str], records: Sequence[Output]
    ) -> tuple[dict[str, pa.Array], dict[str, int]]:
        answers = [record.token_ids for record in records]
        return {"answer_ids": list_column(answers)}, {"num_positions": sum(map(len, answers))}

    def _arrays(self, column: Mapping[str, pa.Array]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        answers = column["answer_ids"]
        arrays = {"answer_ids": answers.flatten().to_numpy(), "lengths": answers.value_lengths().to_numpy()}
        check_range("the lengths of texts", arrays["lengths"], 1)
        return arrays, {"answer_ids": "num_positions"}


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
        maker_hash=network_hash(network),
        described={},
        settings=settings,
        stop_token_ids=network.stop_token_ids,
        **options,
    )


def read_texts(folder: str | Path, network: Network) -> Examples:
    """The prompts and texts in `folder`.

    FewstepError for a store that is damaged, unfinished, empty, of another kind or schema, or made by another network.
    """
    store = RecordStore(folder, TextShards, teacher_hash=network_hash(network))
    store.check_not_empty()
    parts = [store.files.read(index) for index in store.finished]

    def joined(values: str, lengths: str) -> tuple[torch.Tensor, torch.Tensor]:
        flat = np.concatenate([part[values] for part in parts])
        return torch.from_numpy(flat), torch.from_numpy(offsets_of(np.concatenate([part[lengths] for part in parts])))

    names = [name for part in parts for name in part["ids"]]
    origin = Origin(str(folder), "record", names)
    texts = Examples(*joined("prompt_ids", "prompt_lengths"), *joined("answer_ids", "lengths"), (origin,))
    texts.check_tokens(network.vocab_size)
    return texts
