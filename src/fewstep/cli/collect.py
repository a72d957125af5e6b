"""`fewstep collect`: a teacher's decoding trajectories."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fewstep.cli.options import DecodingOptions, Json, TeacherOptions
from fewstep.cli.report import note, progress_bar, write_report
from fewstep.errors import FewstepError

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel
    from fewstep.train.trajectories import PromptRow

TOP = 64


def collect(
    model: TeacherOptions,
    decoding: DecodingOptions,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help='JSONL or Parquet rows with "prompt" and optionally "id" and "completion".'),
    ],
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the shards go; a rerun makes what is missing.")],
    distribution: Annotated[
        Literal["top_k", "hidden"], typer.Option(help="What is kept of the teacher's distributions.")
    ] = "top_k",
    top: Annotated[int | None, typer.Option(min=1, help=f"Tokens kept of each distribution ({TOP}).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Prompts in a shard.")] = 1024,
    worker: Annotated[
        str, typer.Option(metavar="K/N", help="Make every N-th shard, from the K-th (from 0) on.")
    ] = "0/1",
    json: Json = None,
) -> None:
    """Records a teacher's decoding trajectories as Parquet shards that resume."""
    worker_of = _parse_worker(worker)
    if top is not None and distribution == "hidden":
        raise FewstepError("--top has no effect with --distribution hidden, which keeps no tokens; leave one out")
    from fewstep.engine.settings import GenerationSettings
    from fewstep.train.collect import collect as collect_shards
    from fewstep.train.collect import decode_with, distribution_of, teacher_of

    settings = GenerationSettings.of(**decoding.given())
    lm = model.load_model()
    rows = _read_rows(data, lm)
    kept = distribution_of(lm.network, distribution, top_k=TOP if top is None else top)
    described = {name: value for name, value in asdict(settings).items() if name not in ("seed", "policy")}
    num_shards = len(range(worker_of[0], -(-len(rows) // shard_size), worker_of[1]))
    with progress_bar("collecting shards", num_shards) as advance:
        report = collect_shards(
            decode_with(
                lm.network,
                settings.decoder_for(lm.role),
                max_new_tokens=settings.max_new_tokens,
                batch_size=batch_size,
                distribution=kept,
            ),
            rows,
            output,
            teacher=teacher_of(lm.network),
            settings={**described, "decoder": lm.decoder(**decoding.given()).name},
            seed=settings.seed,
            distribution=kept,
            shard_size=shard_size,
            worker=worker_of,
            on_shard=lambda _: advance(),
        )
    note(
        f"{output}: {report.num_shards} shards ({report.num_shards_made_now} made now), "
        f"{report.num_records} trajectories, {report.num_forwards} passes"
    )
    write_report(json, {"model": model.model, "output": str(output), **asdict(report)})


def _parse_worker(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
        raise FewstepError(f"--worker is K/N, K below N, such as 0/2 and 1/2 for two workers; got {text!r}")
    return int(k), int(n)


def _read_rows(path: Path, lm: "LanguageModel") -> "list[PromptRow]":
    """Prompts of a training file, by the template of the teacher, with the completion as the reference answer."""
    from fewstep.train.examples import numbered_training_rows
    from fewstep.train.trajectories import PromptRow

    rows = []
    for line, row in numbered_training_rows(path):
        where = f"{path} line {line}"
        prompt, completion = _split(row, where)
        try:
            prompt_ids = lm.encode(prompt)
        except FewstepError as error:
            raise FewstepError(f"{where}: {error}") from None
        reference_ids = None
        if completion is not None:
            tokenizer = lm.network.tokenizer
            reference_ids = [*tokenizer.encode(completion, add_special_tokens=False), lm.network.eos_token_id]
        rows.append(PromptRow(str(row.get("id", line)), prompt_ids, reference_ids))
    return rows


def _split(row: Any, where: str) -> tuple[Any, str | None]:
    from fewstep.train.examples import split_row

    if "prompt" in row and "completion" not in row:
        return row["prompt"], None
    return split_row(row, where)
