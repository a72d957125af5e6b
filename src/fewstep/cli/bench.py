"""`fewstep bench`: step times against what the device allows, tokens a second, memory, power."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from annotated_types import Ge, Le

from fewstep.cli.decoding import DecodingOptions
from fewstep.cli.extras import require
from fewstep.cli.generate import read_prompts
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, PlaceOptions, written_file_check
from fewstep.cli.report import deliver, note, progress_bar
from fewstep.cli.sources import STANDARD_OUTPUT, Touches, plot_stem
from fewstep.decode.registry import DECODERS, check_registered
from fewstep.errors import FewstepError, suggestion
from fewstep.values import Count, fitted

if TYPE_CHECKING:
    from fewstep.cli.bench_variants import Acceptance, Asked
    from fewstep.engine.language_model import LanguageModel
    from fewstep.measure.bench import Variant
    from fewstep.models.roles import RoleName

_WHAT, _DECODED, _RUN = "Model", "What is decoded", "Measurement"
_ENGINES = ("auto", "compiled", "off")
_DEFAULT_CONTEXT = 256
_DEFAULT_TOKENS_PER_STEP = 6
_DEFAULT_MODEL = "gsm-student"


@dataclass(frozen=True)
class BenchDecodingOptions(DecodingOptions):
    """All but those that are varied here."""

    without = ("decoder", "engine", "block_size", "max_new_tokens", "canvas_length", "steps")


def bench(
    place: PlaceOptions,
    decoding: BenchDecodingOptions,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"A bundled name, a folder, or a hub id; {_DEFAULT_MODEL} unless --shape is given.",
            rich_help_panel=_WHAT,
        ),
        Touches.READS_MODEL,
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Random weights of a named shape, such as dream-7b, llada-8b, qwen2.5-7b, llama-3.1-8b or "
            "smollm2-135m, or of the shape of a bundled model or a folder.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    role: Annotated[
        str | None,
        typer.Option(
            help="Role of the model; by default the checkpoint's, and of a shape one that the decoder runs.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Decoders, such as block,autoregressive,diffusion. Of {', '.join(DECODERS)}.",
            rich_help_panel=_DECODED,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(metavar="LIST", help="Of auto, compiled and off.", rich_help_panel=_DECODED),
    ] = "auto",
    batch_size: Annotated[
        str, typer.Option(metavar="LIST", help="Requests at once, such as 1,8,32.", rich_help_panel=_DECODED)
    ] = "1",
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Tokens per block, such as 16,32; as the model says.", rich_help_panel=_DECODED
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help=f"Tokens of a prompt, such as 256,2048; {_DEFAULT_CONTEXT} for random tokens, else as long as the "
            "prompts are.",
            rich_help_panel=_DECODED,
        ),
    ] = None,
    max_new_tokens: Annotated[Count, typer.Option(help="New tokens of an answer.", rich_help_panel=_DECODED)] = 256,
    prompts: Annotated[
        Literal["real", "random"] | None,
        typer.Option(
            help="Problems of gsm-symbolic, or random tokens; real for a model, random for a shape.",
            rich_help_panel=_DECODED,
        ),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help='Real prompts: JSON lines {"prompt"} or {"messages"}, optionally with "id".',
            rich_help_panel=_DECODED,
        ),
        Touches.READS,
    ] = None,
    tokens_per_step: Annotated[
        Count | None,
        typer.Option(
            help="Let each step finalise at most this many tokens of a block, split evenly, whatever the weights say "
            f"({_DEFAULT_TOKENS_PER_STEP} for a shape).",
            rich_help_panel=_DECODED,
        ),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Let steps finalise as many tokens as those of a real model did; see --record.",
            rich_help_panel=_DECODED,
        ),
        Touches.READS,
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write how many tokens the steps of these answers finalised, for --schedule.",
            callback=written_file_check("--record"),
            rich_help_panel=_RUN,
        ),
        Touches.WRITES,
    ] = None,
    answers: Annotated[Count, typer.Option(help="Answers of each variant that are timed.", rich_help_panel=_RUN)] = 3,
    warm_up: Annotated[
        Count, typer.Option(help="Answers of each variant before these, which are not.", rich_help_panel=_RUN)
    ] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a trace of the first steps of the first variant, for chrome://tracing.",
            callback=written_file_check("--profile"),
            rich_help_panel=_RUN,
        ),
        Touches.WRITES,
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="STEM",
            help="Draw causal, block and full-canvas decoding over batch sizes: what the device allows, and what was "
            "measured. STEM.png and STEM.svg.",
            rich_help_panel=_RUN,
        ),
        Touches.DRAWS,
    ] = None,
    price_per_hour: Annotated[
        Annotated[float, Ge(0), Le(1e9)] | None,
        typer.Option(
            help="What an hour of this machine costs, for the cost of a million tokens.", rich_help_panel=_RUN
        ),
    ] = None,
    json: Json = None,
) -> None:
    """Measures how long steps and answers take, against what the memory and the arithmetic of the device allow."""
    if model is not None and shape is not None:
        raise FewstepError("--model has weights, and --shape random ones; give one of them")
    decoders = _names(decoder, "decoder", DECODERS)
    engines = _names(engine, "engine", _ENGINES)
    sizes = {
        option: _counts(text, option)
        for option, text in (("--batch-size", batch_size), ("--block-size", block_size), ("--context", context))
    }
    _check_acceptance(tokens_per_step, schedule, decoding)
    if prompts == "random" and input_file is not None:
        raise FewstepError("--input has real prompts, and --prompts says random; leave one of them out")
    if STANDARD_OUTPUT in (record, profile):
        raise FewstepError("--record and --profile write files; name one")
    if plot is not None:
        require("matplotlib")
    if shape is None:
        check_model_name(_DEFAULT_MODEL if model is None else model)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else prints when it starts and stops
    texts = None if input_file is None else [prompt for _, prompt in read_prompts(input_file)]
    from fewstep.cli.bench_report import show
    from fewstep.cli.bench_variants import Asked, check_effect, measured_rates, without_repetition
    from fewstep.measure.bench import report, run_variants
    from fewstep.measure.decoding_limits import DecodingLimits
    from fewstep.measure.timing import describe_machine

    acceptance = _acceptance(tokens_per_step, schedule, is_fixed=shape is not None)
    started_s = time.perf_counter()
    lm = _loaded(place, model, shape, cast("RoleName | None", role))
    load_seconds = time.perf_counter() - started_s
    is_random = prompts == "random" or (prompts is None and texts is None and shape is not None)
    asked = Asked(
        lm=lm,
        told={"model": lm.network.name if shape is None else None, "shape": shape, "quantize": place.quantize},
        texts=None if is_random else texts or _questions(answers * max(sizes["--batch-size"])),
        acceptance=acceptance,
        role_is_free=shape is not None and role is None,
        settings={**decoding.given(), "max_new_tokens": max_new_tokens},
        num_answers=answers,
    )
    variants = without_repetition(_asked_for(asked, decoders, engines, sizes))
    if acceptance.schedule is not None:
        check_effect("--schedule", "tokens_per_step_at_most", variants)
    if tokens_per_step is not None:
        check_effect("--tokens-per-step", "tokens_per_step_at_most", variants)
    if block_size is not None:
        check_effect("--block-size", "block_size", variants)
    if record is not None:
        _check_recording(variants)
    for variant in variants:
        variant.check()
    rates = measured_rates(variants)
    with progress_bar("measuring", len(variants) * (1 + answers)) as advance:
        run_variants(variants, answers=answers, warm_up=warm_up, trace=profile, progress=advance)
    about = {"load_seconds": load_seconds, "machine": describe_machine()}
    figures = [
        {**report(variant, rates[variant.choice.dtype], price_per_hour=price_per_hour), **about} for variant in variants
    ]
    if record is not None:
        _record(variants[0], record)
    limits = DecodingLimits.of(variants[0], figures, rates, tokens_per_pass=_DEFAULT_TOKENS_PER_STEP)
    figures = [{**figure, "roofline": limits.to_json()} for figure in figures]

    def show_all() -> None:
        if plot is not None:
            note(f"drawn: {', '.join(map(str, limits.draw(figures, plot_stem(plot))))}")
        show(figures)
        print()
        print(limits.sentence())

    deliver(json, figures if len(figures) > 1 else figures[0], show=show_all)


def _acceptance(tokens_per_step: int | None, schedule: Path | None, *, is_fixed: bool) -> "Acceptance":
    from fewstep.cli.bench_variants import Acceptance
    from fewstep.measure.schedule import read_schedule

    return Acceptance(
        is_fixed=is_fixed or tokens_per_step is not None or schedule is not None,
        tokens_per_step=tokens_per_step,
        by_default=_DEFAULT_TOKENS_PER_STEP,
        schedule=None if schedule is None else read_schedule(schedule),
    )


def _asked_for(
    asked: "Asked", decoders: Sequence[str], engines: Sequence[str], sizes: Mapping[str, Sequence[int]]
) -> "list[Variant]":
    """A variant for each combination of what was listed."""
    blocks: list[int | None] = [*sizes["--block-size"]] or [None]
    contexts: list[int | None] = [*sizes["--context"]] or [_DEFAULT_CONTEXT if asked.texts is None else None]
    by_decoder: list[str | None] = [*decoders] or [asked.default_decoder]
    return [
        asked.variant(decoder, engine, batch, block, context)
        for batch, block, context, decoder, engine in product(
            sizes["--batch-size"], blocks, contexts, by_decoder, engines
        )
    ]


def _check_recording(variants: "Sequence[Variant]") -> None:
    """FewstepError unless it is one variant, whose decoder has blocks."""
    from fewstep.measure.schedule import check_recordable

    if len(variants) > 1:
        raise FewstepError("--record writes the schedule of one variant; ask for one decoder, engine and size")
    check_recordable(variants[0].decoder)


def _record(variant: "Variant", path: Path) -> None:
    """Write how many tokens the steps of its answers finalised."""
    from fewstep.json_files import write_json_whole
    from fewstep.measure.schedule import recorded

    made = recorded(variant.decoder, variant.answered)
    write_json_whole(path, {"model": variant.lm.network.name, "decoder": variant.decoder.name, **made.to_json()})
    note(f"recorded: {len(made.blocks)} blocks of {made.block_size}, {made.tokens_per_pass:.2f} tokens a step")


def _loaded(place: PlaceOptions, model: str | None, shape: str | None, role: "RoleName | None") -> "LanguageModel":
    if shape is None:
        return place.load(_DEFAULT_MODEL if model is None else model, role)
    from fewstep.cli.bench_variants import playing
    from fewstep.engine.language_model import LanguageModel
    from fewstep.models.importers.shapes import random_network
    from fewstep.models.quantize import quantize

    network = random_network(shape, dtype=place.dtype, device=place.device)
    if place.quantize is not None:
        quantize(network, place.quantize)
    return LanguageModel(network if role is None else playing(network, role))


def _questions(count: int) -> list[Any]:
    from fewstep.tasks.registry import task_named

    problems = task_named("gsm-symbolic").problems()
    return [problem.question for problem in problems[:count]]


def _names(text: str | None, what: str, known: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """The names of a list. FewstepError for one that is unknown."""
    names = [] if text is None else text.split(",")
    for name in names:
        if what == "decoder":
            check_registered(what, name, DECODERS)
        elif name not in known:
            raise FewstepError(f"unknown {what} {name!r}; {suggestion(name, known)}")
    return names


def _counts(text: str | None, option: str) -> list[int]:
    from fewstep.cli.evaluate import numbers

    return [fitted(number, Count, option) for number in numbers(text, int, option)]


def _check_acceptance(tokens_per_step: int | None, schedule: Path | None, decoding: DecodingOptions) -> None:
    if tokens_per_step is not None and schedule is not None:
        raise FewstepError("--tokens-per-step and --schedule both say how many tokens a step finalises; give one")
    given = decoding.given()
    of_policies = [name for name in ("policy", "threshold", "gaps", "margin", "entropy", "factor") if name in given]
    if of_policies and (tokens_per_step is not None or schedule is not None):
        raise FewstepError(
            f"{of_policies[0]} lets the network decide how many tokens a step finalises, which "
            f"{'--schedule' if tokens_per_step is None else '--tokens-per-step'} replaces; give one of them"
        )
