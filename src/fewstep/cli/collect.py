"""`fewstep collect`: the trajectories of a diffusion teacher, or a causal model's Jacobi trajectories or texts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.extras import require
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, TeacherOptions
from fewstep.cli.report import note, progress_bar, write_report
from fewstep.cli.sources import Touches
from fewstep.errors import FewstepError
from fewstep.values import MOST_TOKENS, Count, Share, shown

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel
    from fewstep.engine.settings import GenerationSettings
    from fewstep.train.collect import CollectReport
    from fewstep.train.records import PromptRow

TOP = 64


def collect(
    model: TeacherOptions,
    decoding: DecodingOptions,
    data: Annotated[
        Path,
        typer.Option(metavar="FILE", help='JSONL or Parquet rows with "prompt" and optionally "id" and "completion".'),
        Touches.READS,
    ],
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", help="The folder for the shards; a repeated command makes only what is missing."
        ),
        Touches.FILLS,
    ],
    student: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Let this student decode, and store the teacher's distributions at the states that it visits. Train "
            "on them with --direction forward or reverse.",
        ),
        Touches.READS_MODEL,
    ] = None,
    distribution: Annotated[
        Literal["top_k", "hidden"],
        typer.Option(
            help="How the teacher's distributions are stored: their most probable tokens, or its hidden states."
        ),
    ] = "top_k",
    top: Annotated[Count | None, typer.Option(help=f"Tokens stored of each distribution ({TOP}).")] = None,
    most_repetition: Annotated[
        Share | None,
        typer.Option(
            metavar="SHARE", help="Causal models: reject an answer if more than this share of its 4-grams are repeated."
        ),
    ] = None,
    batch_size: Annotated[Count, typer.Option(help="Prompts decoded together.")] = 32,
    shard_size: Annotated[Count, typer.Option(help="Prompts in a shard.")] = 1024,
    worker: Annotated[
        str, typer.Option(metavar="K/N", help="Make every N-th shard only, beginning with shard K (counted from 0).")
    ] = "0/1",
    json: Json = None,
) -> None:
    """Decodes prompts and stores what training learns from, in shards; an interrupted run resumes.

    A diffusion teacher gives its trajectories (or labels those of a --student), a causal model its Jacobi trajectories,
    or with --decoder autoregressive its own texts.
    """
    worker_of = _parse_worker(worker)
    if top is not None and distribution == "hidden":
        raise FewstepError("--top has no effect with --distribution hidden, which keeps no tokens; leave one out")
    for name in (model.model, *([] if student is None else [student])):
        check_model_name(name)
    require("pyarrow")
    from fewstep.engine.settings import GenerationSettings
    from fewstep.train.collect import CollectReport

    settings = GenerationSettings.of(**decoding.given())
    teacher = model.load_model()
    is_causal = teacher.role.name == "autoregressive"
    if is_causal:
        if student is not None or top is not None or distribution != "top_k":
            raise FewstepError(
                "what is stored of a causal model is tokens only; leave out --student, --distribution and --top"
            )
    elif most_repetition is not None:
        raise FewstepError("--most-repetition has no effect with a diffusion teacher; leave it out")
    lm = teacher if student is None else model.load(student)
    rows = _read_rows(data, lm, _takes(lm, teacher, decoding.given()))
    of_worker = range(worker_of[0], -(-len(rows) // shard_size), worker_of[1])
    num_prompts = sum(len(rows[index * shard_size : (index + 1) * shard_size]) for index in of_worker)
    with _saying_what_is_kept(output), progress_bar("collecting", num_prompts) as advance:

        def skip(finished: CollectReport) -> None:
            if not finished.num_shards_made_now:
                advance(finished.num_prompts)

        run = _Run(
            rows=rows,
            output=output,
            settings=settings,
            batch_size=batch_size,
            on_output=advance,
            shards={"seed": settings.seed, "shard_size": shard_size, "worker": worker_of, "on_shard": skip},
        )
        if is_causal:
            report = run.causal(lm, decoding.given(), most_repetition)
        else:
            kept = TOP if top is None else top
            report = run.diffusion(teacher, lm, decoding.given(), distribution, kept)
    write_report(json, {"model": model.model, "student": student, "output": str(output), **asdict(report)})
    note(
        f"{output}: {report.num_shards} shards ({report.num_shards_made_now} made now), "
        f"{report.num_records} {report.kind}, {report.num_rejected} rejected, {report.num_forwards} passes"
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What trajectories and texts are collected from; `shards`: options of `train.collect.collect_records`."""

    rows: "list[PromptRow]"
    output: Path
    settings: "GenerationSettings"
    batch_size: int
    on_output: Callable[[], None]
    shards: dict[str, Any]

    def causal(self, lm: "LanguageModel", given: dict[str, Any], most_repetition: float | None) -> "CollectReport":
        """The states of a causal model's Jacobi windows, or the texts that it writes with another decoder."""
        from fewstep.decode.jacobi import Jacobi
        from fewstep.train.causal_records import collect_jacobi, collect_texts

        decoder = lm.decoder(**{"decoder": Jacobi.name, **given})
        options: dict[str, Any] = {
            "max_new_tokens": self.settings.max_new_tokens,
            "early_stop": self.settings.early_stop,
            "batch_size": self.batch_size,
            "settings": self._described(decoder.name),
            "on_output": self.on_output,
            **self.shards,
        }
        if isinstance(decoder, Jacobi):
            return collect_jacobi(
                lm.network, self.rows, self.output, decoder, most_repetition=most_repetition, **options
            )
        if most_repetition is not None:
            raise FewstepError("--most-repetition has no effect on texts, which are kept as they are; leave it out")
        return collect_texts(lm.network, self.rows, self.output, decoder, sampling=self.settings.sampling, **options)

    def diffusion(
        self,
        teacher: "LanguageModel",
        lm: "LanguageModel",
        given: dict[str, Any],
        distribution: Literal["top_k", "hidden"],
        top: int,
    ) -> "CollectReport":
        """What `lm` decodes, with the distributions of `teacher`, which may be the same model."""
        from fewstep.decode.decoder import threshold_rule
        from fewstep.train.collect import collect as collect_shards
        from fewstep.train.collect import decode_with, distribution_of, teacher_of
        from fewstep.train.relabel import labelled, labelling_for, of_student

        kept = distribution_of(teacher.network, distribution, top_k=top)
        decoder = lm.decoder(**given)
        # What the checkpoint said where nothing was given, since its hash leaves that out.
        described = {**self._described(decoder.name), **threshold_rule(decoder)}
        decode_rows = decode_with(
            lm.network,
            decoder,
            max_new_tokens=self.settings.max_new_tokens,
            sampling=self.settings.sampling,
            early_stop=self.settings.early_stop,
            batch_size=self.batch_size,
            distribution=kept,
            on_output=self.on_output,
        )
        if lm is not teacher:
            labelling = labelling_for(teacher.network, lm.network, kept, self.settings.max_new_tokens)
            decode_rows = labelled(decode_rows, teacher.network, labelling)
            described |= {"teacher_canvas_length": labelling.canvas_length, **of_student(lm.network)}
        return collect_shards(
            decode_rows,
            self.rows,
            self.output,
            teacher=teacher_of(teacher.network),
            settings=described,
            stop_token_ids=lm.network.stop_token_ids,
            distribution=kept,
            **self.shards,
        )

    def _described(self, decoder: str) -> dict[str, Any]:
        """The settings as the manifest keeps them."""
        values = self.settings.described
        return {name: value for name, value in values.items() if name not in ("seed", "stop")} | {"decoder": decoder}


@contextmanager
def _saying_what_is_kept(output: Path) -> Iterator[None]:
    """Let an interruption report the shards that are finished."""
    try:
        yield
    except KeyboardInterrupt:
        num_shards = len(list(output.glob("shard-*")))
        if not num_shards:
            raise
        raise KeyboardInterrupt(
            f"interrupted; finished shards kept in {output}: {num_shards}; repeat the command to go on"
        ) from None


def _parse_worker(text: str) -> tuple[int, int]:
    k, slash, n = text.partition("/")
    digits = len(str(MOST_TOKENS))
    if not (slash and k.isdecimal() and n.isdecimal() and len(k) <= digits >= len(n) and int(k) < int(n)):
        raise FewstepError(
            f"--worker must be K/N with K below N, such as 0/2 and 1/2 for two workers; got {shown(text)}"
        )
    return int(k), int(n)


def _takes(lm: "LanguageModel", teacher: "LanguageModel", given: dict[str, Any]) -> Callable[[list[int]], None]:
    """A check that raises FewstepError for a prompt that cannot be decoded with these settings, or whose answer the
    teacher cannot label.
    """
    from fewstep.decode.admission import check_request
    from fewstep.decode.jacobi import Jacobi
    from fewstep.decode.requests import Request
    from fewstep.engine.settings import GenerationSettings

    most = GenerationSettings.of(**given).max_new_tokens
    causal = {"decoder": Jacobi.name} if lm.role.name == "autoregressive" else {}
    deciders = {lm: lm.decoder(**{**causal, **given})}
    if teacher is not lm:
        deciders[teacher] = teacher.decoder(max_new_tokens=most)

    def check(prompt_ids: list[int]) -> None:
        for model, decoder in deciders.items():
            check_request(model.network, decoder, Request(prompt_ids=prompt_ids, max_new_tokens=most))

    return check


def _read_rows(path: Path, lm: "LanguageModel", check: Callable[[list[int]], None]) -> "list[PromptRow]":
    """Prompts of a training file, by the template of the teacher, with the completion as the reference answer.

    FewstepError naming file and line of one that is damaged, or that does not pass the `check`.
    """
    from fewstep.models.rows import id_text, row_id, split_prompt_row
    from fewstep.models.text import encode_completion
    from fewstep.train.examples import numbered_training_rows
    from fewstep.train.records import PromptRow

    rows = []
    for line, row in numbered_training_rows(path):
        where = f"{path} line {line}"
        prompt, completion = split_prompt_row(row, where)
        try:
            prompt_ids = lm.encode(prompt)
            check(prompt_ids)
        except FewstepError as error:
            raise FewstepError(f"{where}: {error}") from None
        reference_ids = None
        if completion is not None:
            reference_ids = encode_completion(lm.network.tokenizer, completion, lm.network.stop_token_ids)
        rows.append(PromptRow(id_text(row_id(row, line)), prompt_ids, reference_ids))
    return rows
