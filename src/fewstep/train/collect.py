"""Collecting what a model decodes, as trajectories or texts: prompts in fixed shards, whose bytes depend neither on the
number of workers nor on interruptions.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.decode.decoder import Decoder
from fewstep.decode.loop import decode
from fewstep.decode.requests import Output, Record, Request
from fewstep.errors import FewstepError
from fewstep.json_files import read_json
from fewstep.models.load import network_hash
from fewstep.models.network import Network
from fewstep.shards import MANIFEST_NAME, Shards
from fewstep.train.records import SCHEMA_VERSION, PromptRow, RecordShards, RecordT
from fewstep.train.trajectories import Distribution, Teacher, TrajectoryShards


@dataclass(frozen=True, kw_only=True)
class CollectReport:
    """What the finished shards of one worker hold, those of earlier runs included; `kind`: what the records are, such
    as "diffusion trajectories" or "texts".
    """

    kind: str
    num_shards: int = 0
    num_shards_made_now: int = 0
    num_prompts: int = 0
    num_records: int = 0
    num_rejected: int = 0
    num_positions: int = 0
    num_forwards: int = 0

    def plus(self, facts: Mapping[str, int], *, made_now: bool) -> "CollectReport":
        """The report with one more shard."""
        return replace(
            self,
            num_shards=self.num_shards + 1,
            num_shards_made_now=self.num_shards_made_now + made_now,
            num_prompts=self.num_prompts + facts["num_prompts"],
            num_records=self.num_records + facts["num_records"],
            num_rejected=self.num_rejected + facts["num_prompts"] - facts["num_records"],
            num_positions=self.num_positions + facts["num_positions"],
            num_forwards=self.num_forwards + facts["num_forwards"],
        )


Decode = Callable[[Sequence[PromptRow], Sequence[int]], Sequence[Output]]
"""Rows and their seeds -> one output each, in the same order, with the distribution recorded."""


def distribution_of(network: Network, kind: Literal["top_k", "hidden"] = "top_k", *, top_k: int = 64) -> Distribution:
    """How to store the distributions of this network: its `top_k` best tokens, or its hidden rows in 16 bits."""
    if kind == "hidden":
        dtype: Literal["float16", "bfloat16"] = "bfloat16" if network.dtype == torch.bfloat16 else "float16"
        return Distribution(kind=kind, width=network.module.config.hidden_size, dtype=dtype)
    return Distribution(kind=kind, width=min(top_k, network.most_recorded))


def requests_for(rows: Sequence[PromptRow], seeds: Sequence[int], **asked: Any) -> list[Request]:
    """One request a row, with its seed; `asked`: fields of each, such as `max_new_tokens`."""
    return [
        Request(prompt_ids=list(row.prompt_ids), **{**asked, "seed": seed})
        for row, seed in zip(rows, seeds, strict=True)
    ]


def whenever(call: Callable[[], None] | None) -> Callable[[int, object], None]:
    """A callback of `decode` that calls `call`, if there is one, each time a request completes."""

    def completed(_index: int, _output: object) -> None:
        if call is not None:
            call()

    return completed


def decode_with(
    network: Network,
    decoder: Decoder,
    *,
    batch_size: int,
    distribution: Distribution | None = None,
    on_output: Callable[[], None] | None = None,
    **asked: Any,
) -> Decode:
    """The `decode_rows` of `collect` that runs a decoder of ours and records `distribution` (None: tokens only).

    `on_output` is called as each prompt is decoded. `asked`: fields of each Request, such as `max_new_tokens`.
    """
    record = None
    if distribution is not None:
        hidden = distribution.kind == "hidden"
        record = Record(hidden=hidden, top_k=None if hidden else distribution.width)

    def run(rows: Sequence[PromptRow], seeds: Sequence[int]) -> Sequence[Output]:
        requests = requests_for(rows, seeds, **asked)
        return decode(network, requests, decoder, batch_size=batch_size, record=record, on_output=whenever(on_output))

    return run


def teacher_of(network: Network) -> Teacher:
    """FewstepError if the network has no mask token, so that it cannot teach."""
    if network.role.mask_token_id is None:
        raise FewstepError(f"{network.name} has no mask token, so it has no diffusion trajectories to collect")
    return Teacher(
        hash=network_hash(network),
        vocab_size=network.vocab_size,
        mask_token_id=network.role.mask_token_id,
        stop_token_ids=network.stop_token_ids,
    )


def row_seed(prompt_id: str, seed: int) -> int:
    """The seed of one prompt, below 2**31: the same on every machine and whichever worker decodes it."""
    digest = hashlib.blake2b(f"{seed}\n{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**31


def collect(
    decode_rows: Decode,
    rows: Sequence[PromptRow],
    folder: str | Path,
    *,
    teacher: Teacher,
    distribution: Distribution,
    **options: Any,
) -> CollectReport:
    """A diffusion teacher's trajectories: see `collect_records`, whose other options it takes. If a student decodes,
    its `stop_token_ids` are among them.
    """
    described = {
        "vocab_size": teacher.vocab_size,
        "mask_token_id": teacher.mask_token_id,
        "distribution": asdict(distribution),
    }
    options = {"stop_token_ids": teacher.stop_token_ids, **options}
    return collect_records(
        TrajectoryShards, decode_rows, rows, folder, maker_hash=teacher.hash, described=described, **options
    )


def collect_top(
    network: Network,
    decoder: Decoder,
    rows: Sequence[PromptRow],
    folder: str | Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    **options: Any,
) -> CollectReport:
    """Let a diffusion teacher decode, and collect its trajectories with the best tokens of each position; see
    `collect`, whose other options it takes.
    """
    top = distribution_of(network)
    decoding = decode_with(network, decoder, max_new_tokens=max_new_tokens, batch_size=batch_size, distribution=top)
    return collect(decoding, rows, folder, teacher=teacher_of(network), distribution=top, **options)


def collect_records(
    kind: type[RecordShards[RecordT]],
    decode_rows: Callable[[Sequence[PromptRow], Sequence[int]], Sequence[RecordT]],
    rows: Sequence[PromptRow],
    folder: str | Path,
    *,
    maker_hash: str,
    described: Mapping[str, Any],
    settings: Mapping[str, Any],
    stop_token_ids: Sequence[int],
    seed: int = 0,
    shard_size: int = 1024,
    worker: tuple[int, int] = (0, 1),
    keep: Callable[[PromptRow, Output], bool] | None = None,
    on_shard: Callable[[CollectReport], None] | None = None,
) -> CollectReport:
    """Decode `rows` and store the records in `folder`; a rerun makes only the shards that are missing.

    Shard s holds rows s * shard_size onwards and is decoded in one call by worker k of n if s % n == k; seeds depend on
    the prompt's id and `seed` only, so the files do not depend on the number of workers or on interruptions. `settings`
    describes how `decode_rows` decodes, `stop_token_ids` which tokens end its answers, and `described` is what `kind`
    needs to know; all are written into the manifest, and a folder begun with other values or rows is refused. `keep`
    returns False for a record to be rejected (a wrong answer, for example); the shard and the report count rejections.
    The next shard is decoded while the last one is written. `on_shard` is called once for all shards that were finished
    before, and once for each that is made now.

    FewstepError for no rows, ids that occur twice, a bad worker, other settings, or a full disk.
    """
    if not rows:
        raise FewstepError(f"there are no prompts to collect {kind.kind} from")
    if shard_size < 1:
        raise FewstepError(f"a shard holds at least one prompt, got shard_size {shard_size}; try 1024")
    name, occurrences = Counter(row.id for row in rows).most_common(1)[0]
    if occurrences > 1:
        raise FewstepError(
            f"the prompt id {name!r} occurs {occurrences} times; ids must differ, as each seeds its own noise"
        )
    shards = Shards.create(
        folder,
        num_shards=-(-len(rows) // shard_size),
        suffix=".parquet",
        settings={
            "schema_version": SCHEMA_VERSION,
            "kind": kind.kind,
            "teacher_hash": maker_hash,
            **described,
            **_named_ends(Path(folder), stop_token_ids),
            "decoding": dict(settings),
            "seed": seed,
            "prompts_hash": prompts_hash(rows),
            "num_prompts": len(rows),
            "shard_size": shard_size,
            "filtered": keep is not None,
        },
    )
    files = kind(shards)
    missing = shards.unfinished(worker)
    report = CollectReport(kind=kind.kind)
    for index in range(worker[0], shards.num_shards, worker[1]):
        if index not in missing:
            report = report.plus(files.facts(index), made_now=False)
    if on_shard is not None and report.num_shards:
        on_shard(report)

    def written(writing: Future[dict[str, int]]) -> None:
        nonlocal report
        report = report.plus(writing.result(), made_now=True)
        if on_shard is not None:
            on_shard(report)

    # One writing thread: the next shard is decoded meanwhile. Leaving the block, also by Ctrl-C, waits for the write.
    with ThreadPoolExecutor(max_workers=1) as writer:
        writing: Future[dict[str, int]] | None = None
        for index in missing:
            of_shard = rows[index * shard_size : (index + 1) * shard_size]
            records = decode_rows(of_shard, [row_seed(row.id, seed) for row in of_shard])
            pairs = list(zip(of_shard, records, strict=True))
            kept = [(row, record) for row, record in pairs if keep is None or keep(row, kind.output_of(record))]
            if writing is not None:
                written(writing)
            num_forwards = sum(kind.output_of(record).num_forwards for record in records)
            writing = writer.submit(files.write, index, kept, num_prompts=len(pairs), num_forwards=num_forwards)
        if writing is not None:
            written(writing)
    return report


def _named_ends(folder: Path, stop_token_ids: Sequence[int]) -> dict[str, list[int]]:
    """The manifest's entry of end tokens; empty if an older version, which knew one end token at most, began the
    folder.
    """
    manifest = folder / MANIFEST_NAME
    if len(stop_token_ids) <= 1 and manifest.exists():
        begun = read_json(manifest)
        if isinstance(begun, dict) and "stop_token_ids" not in begun:
            return {}
    return {"stop_token_ids": list(stop_token_ids)}


def prompts_hash(rows: Sequence[PromptRow]) -> str:
    """sha256 over ids, prompts and reference answers, in order."""
    digest = hashlib.sha256()
    for row in rows:
        reference = None if row.reference_ids is None else list(map(int, row.reference_ids))
        digest.update(json.dumps([row.id, list(map(int, row.prompt_ids)), reference]).encode())
    return digest.hexdigest()
