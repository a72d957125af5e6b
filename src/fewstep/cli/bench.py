"""`fewstep bench`: step times against what the device allows, tokens a second, memory, power."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from fewstep.cli.report import deliver, note, print_table, progress_bar
from fewstep.cli.sources import STANDARD_OUTPUT, Touches, plot_stem
from fewstep.decode.declarations import declared_settings
from fewstep.decode.registry import DECODERS, check_registered
from fewstep.errors import FewstepError, suggestion
from fewstep.values import Count, fitted

if TYPE_CHECKING:
    from fewstep.decode.policies import Scheduled
    from fewstep.decode.requests import Request
    from fewstep.engine.language_model import LanguageModel
    from fewstep.measure.bandwidth import DeviceRates
    from fewstep.measure.bench import Variant
    from fewstep.measure.roofline import Analysis, Rates, Setting, Sizes
    from fewstep.measure.schedule import AcceptanceSchedule
    from fewstep.models.network import Network
    from fewstep.models.roles import RoleName

_WHAT, _DECODED, _RUN = "Model", "What is decoded", "Measurement"
_ENGINES = ("auto", "off")
_DEFAULT_CONTEXT = 256
_DEFAULT_TOKENS_PER_STEP = 6
_DEFAULT_MODEL = "gsm-student"


@dataclass(frozen=True)
class BenchDecodingOptions(DecodingOptions):
    """All but those that are varied here."""

    without = ("decoder", "engine", "block_size", "max_new_tokens", "canvas_length", "steps")


@dataclass(frozen=True, kw_only=True)
class _Acceptance:
    """How many tokens of a block a step accepts: as the network decides, or fixed by a number or a schedule."""

    is_fixed: bool
    tokens_per_step: int | None
    schedule: "AcceptanceSchedule | None"

    def policies(self, block_size: int, count: int) -> "list[Scheduled]":
        """One for each request. FewstepError for blocks that they are not made for."""
        from fewstep.decode.policies import evenly, scheduled

        if self.schedule is not None:
            if self.schedule.block_size != block_size:
                raise FewstepError(
                    f"the schedule is for blocks of {self.schedule.block_size} tokens, and these have {block_size}; "
                    "set --block-size, or record another"
                )
            return self.schedule.policies(count)
        if self.tokens_per_step is None:
            return [scheduled(evenly(block_size, min(block_size, _DEFAULT_TOKENS_PER_STEP)))] * count
        if self.tokens_per_step > block_size:
            raise FewstepError(
                f"--tokens-per-step {self.tokens_per_step} is more than a block has, which is {block_size}; lower it, "
                "or raise --block-size"
            )
        return [scheduled(evenly(block_size, self.tokens_per_step))] * count


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
        str, typer.Option(metavar="LIST", help="auto, off, or auto,off to time both.", rich_help_panel=_DECODED)
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
        check_model_name(model or _DEFAULT_MODEL)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler else prints when it starts and stops
    texts = None if input_file is None else [prompt for _, prompt in read_prompts(input_file)]
    from fewstep.measure.bench import report, run_variants
    from fewstep.measure.schedule import check_recordable, read_schedule, recorded

    wanted = _Acceptance(
        is_fixed=not (shape is None and tokens_per_step is None and schedule is None),
        tokens_per_step=tokens_per_step,
        schedule=None if schedule is None else read_schedule(schedule),
    )
    started_s = time.perf_counter()
    lm = _loaded(place, model, shape, cast("RoleName | None", role))
    load_seconds = time.perf_counter() - started_s
    is_random = prompts == "random" or (prompts is None and texts is None and shape is not None)
    asked = _Asked(
        lm=lm,
        told={"model": lm.network.name if shape is None else None, "shape": shape},
        texts=None if is_random else texts or _questions(answers * max(sizes["--batch-size"])),
        acceptance=wanted,
        role_is_free=shape is not None and role is None,
        settings={**decoding.given(), "max_new_tokens": max_new_tokens},
        num_answers=answers,
    )
    blocks: list[int | None] = [*sizes["--block-size"]] or [None]
    contexts: list[int | None] = [*sizes["--context"]] or [_DEFAULT_CONTEXT if is_random else None]
    by_decoder: list[str | None] = [*decoders] or [asked.default_decoder]
    asked_for = [
        asked.variant(name, one_engine, batch, block, length)
        for batch, block, length, name, one_engine in product(
            sizes["--batch-size"], blocks, contexts, by_decoder, engines
        )
    ]
    variants = _without_repetition(asked_for)
    for option, is_given, key in (
        ("--tokens-per-step", tokens_per_step is not None, "tokens_per_step_at_most"),
        ("--schedule", schedule is not None, "tokens_per_step_at_most"),
        ("--block-size", block_size is not None, "block_size"),
    ):
        if is_given and all(variant.told[key] is None for variant in variants):
            named = sorted({variant.told["decoder"] for variant in variants})
            raise FewstepError(f"{option} has no effect on the decoder {' or '.join(named)}; leave it out")
    if record is not None:
        if len(variants) > 1:
            raise FewstepError("--record writes the schedule of one variant; ask for one decoder, engine and size")
        check_recordable(variants[0].decoder)
    for variant in variants:
        variant.check()
    rates = _measured_rates(variants)
    with progress_bar("measuring", len(variants) * (1 + answers)) as advance:
        run_variants(variants, answers=answers, warm_up=warm_up, trace=profile, progress=advance)
    from fewstep.measure.timing import describe_machine

    machine = describe_machine()
    figures = [
        {
            **report(variant, rates[variant.choice.dtype], price_per_hour=price_per_hour),
            "load_seconds": load_seconds,
            "machine": machine,
        }
        for variant in variants
    ]
    if record is not None:
        from fewstep.json_files import write_json_whole

        (only,) = variants
        made = recorded(only.decoder, only.answered)
        write_json_whole(record, {"model": lm.network.name, "decoder": only.decoder.name, **made.to_json()})
        note(f"recorded: {len(made.blocks)} blocks of {made.block_size}, {made.tokens_per_pass:.2f} tokens a step")
    bound = _Bound.of(variants[0], figures, rates)
    figures = [{**figure, "roofline": bound.to_json()} for figure in figures]

    def show() -> None:
        if plot is not None:
            note(f"drawn: {', '.join(map(str, bound.draw(figures, plot_stem(plot))))}")
        _show(figures)
        print()
        print(bound.sentence())

    deliver(json, figures if len(figures) > 1 else figures[0], show=show)


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """What the device allows the kinds of decoding over batch sizes, for the first variant's network and sizes."""

    name: str
    sizes: "Sizes"
    setting: "Setting"
    rates: "Rates"
    of_kinds: "Sequence[Analysis]"

    @classmethod
    def of(
        cls, variant: "Variant", figures: Sequence[Mapping[str, Any]], rates: "Mapping[str, DeviceRates]"
    ) -> "_Bound":
        from fewstep.measure.roofline import Setting, Sizes, analysed

        choice, network = variant.choice, variant.lm.network
        in_blocks = next((one for one in figures if one["block_size"]), None)
        block_size = in_blocks["block_size"] if in_blocks else network.role.block_size
        tokens_per_pass = min(block_size, _DEFAULT_TOKENS_PER_STEP)
        if in_blocks:
            answers = in_blocks["answers"]
            tokens_per_pass = answers["num_tokens_mean"] / answers["passes_mean"] / in_blocks["batch_size"]
        setting = Setting(
            context=figures[0]["context"],
            canvas=figures[0]["max_new_tokens"],
            block_size=block_size,
            tokens_per_pass=tokens_per_pass,
        )
        sizes, limits = Sizes.of(network.module, choice.network.dtype), rates[choice.dtype].limits
        return cls(
            name=f"{network.name}, {choice.dtype}, {figures[0]['machine']['gpu'] or figures[0]['machine']['cpu']}",
            sizes=sizes,
            setting=setting,
            rates=limits,
            of_kinds=analysed(sizes, setting, limits),
        )

    def to_json(self) -> dict[str, Any]:
        kinds = [asdict(one) for one in self.of_kinds]
        return {**asdict(self.setting), "ridge": self.rates.ridge, "kinds": kinds}

    def draw(self, figures: Sequence[Mapping[str, Any]], stem: Path) -> list[Path]:
        from fewstep.measure.plots import plot_roofline

        return plot_roofline(
            figures, stem, sizes=self.sizes, setting=self.setting, rates=self.rates, title=self.name
        )  # fmt: skip

    def sentence(self) -> str:
        from fewstep.measure.roofline import MOST_REQUESTS

        def up_to(batch: int | None) -> str:
            if batch is None:
                return "at no batch size"
            return f"up to batch {batch}" if batch < MOST_REQUESTS else "at every batch size"

        told = [
            f"{one.kind} decoding waits for the memory {up_to(one.memory_bound_up_to)}"
            + ("" if one.kind == "causal" else f" and may beat causal decoding {up_to(one.pays_up_to)}")
            for one in self.of_kinds
        ]
        return (
            f"By the measured rates, at {self.setting.tokens_per_pass:.1f} tokens a pass in blocks of "
            f"{self.setting.block_size}: {'; '.join(told)}."
        )


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What all variants share. `texts`: real prompts; None for random ones."""

    lm: "LanguageModel"
    told: Mapping[str, Any]
    texts: Sequence[Any] | None
    acceptance: _Acceptance
    role_is_free: bool
    settings: Mapping[str, Any]
    num_answers: int

    @property
    def default_decoder(self) -> str | None:
        """Of a shape the one that few-pass decoding is about; None is what the model picks."""
        if not self.role_is_free or self.lm.role.name == "autoregressive":
            return None
        return "block"

    def variant(
        self, decoder: str | None, engine: str, batch_size: int, block_size: int | None, context: int | None
    ) -> "Variant":
        """FewstepError if the settings do not go together."""
        from fewstep.measure.bench import Variant, check_fits

        lm = self._playing(decoder)
        settings: dict[str, Any] = {**self.settings, "decoder": decoder, "engine": engine}
        name = decoder or lm.decoder(**self.settings).name
        taken = declared_settings(DECODERS[name])
        if block_size is not None and "block_size" in taken:
            settings["block_size"] = self._possible(block_size)
        # Real prompts differ, so each is asked once if there are enough; random ones are as good again.
        num_batches = 1 if self.texts is None else max(1, min(self.num_answers, len(self.texts) // batch_size))
        policies: list[Any] = [None] * (num_batches * batch_size)
        if self.acceptance.is_fixed and "policy" in taken:
            policies = self.acceptance.policies(lm.decoder(**settings).block_size, len(policies))
            settings["policy"] = policies[0]
        started_s = time.perf_counter()
        lm.choice(**settings)  # an engine may prepare itself when it is first asked for
        engine_seconds = time.perf_counter() - started_s
        (sample,) = self._prompts(lm, 1, context)
        check_fits(lm, settings, self._request(sample, policies[0], settings), batch_size)  # before so many are made
        prompts = self._prompts(lm, len(policies), context)
        made = lm.decoder(**settings)
        requests = [self._request(ids, policy, settings) for ids, policy in zip(prompts, policies, strict=True)]
        return Variant(
            lm=lm,
            settings=settings,
            batches=[requests[start : start + batch_size] for start in range(0, len(requests), batch_size)],
            told={
                "device": str(lm.network.device),
                **self.told,
                "role": lm.role.name,
                "decoder": made.name,
                "batch_size": batch_size,
                "block_size": made.block_size if made.block_size > 1 else None,
                "context": context or round(sum(map(len, prompts)) / len(prompts)),
                "max_new_tokens": settings["max_new_tokens"],
                "prompts": "random" if self.texts is None else "real",
                "tokens_per_step_at_most": max(policies[0].counts)
                if self.acceptance.is_fixed and policies[0]
                else None,
            },
            engine_seconds=engine_seconds,
            is_fixed=not self._stops and (policies[0] is not None or made.name == "autoregressive"),
        )

    def _possible(self, block_size: int) -> int:
        """FewstepError for one that no answer fills; a note for one that the model was not trained with."""
        most, role = self.settings["max_new_tokens"], self.lm.role
        if block_size > most:
            raise FewstepError(
                f"--block-size {block_size} is more than the {most} new tokens of an answer; lower it, or raise "
                "--max-new-tokens"
            )
        if self.told["shape"] is None and role.name == "block_causal" and block_size != role.block_size:
            note(
                f"{self.lm.network.name} was trained with blocks of {role.block_size}: with {block_size} it finalises "
                "other tokens, and more or fewer of them in a step"
            )
        return block_size

    def _playing(self, decoder: str | None) -> "LanguageModel":
        """Random weights play any role."""
        from fewstep.engine.language_model import LanguageModel
        from fewstep.engine.settings import DEFAULT_DECODER

        network = self.lm.network
        if not self.role_is_free or decoder is None:
            return self.lm
        fitting = {name: role for role, name in DEFAULT_DECODER.items()}.get(decoder, "autoregressive")
        if network.role.name == fitting:
            return self.lm
        return LanguageModel(_playing(network, fitting))

    def _prompts(self, lm: "LanguageModel", count: int, context: int | None) -> list[list[int]]:
        from fewstep.measure.prompts import random_prompts, real_prompts

        if context is not None and context > lm.network.max_positions:
            raise FewstepError(
                f"--context {context} exceeds the {lm.network.max_positions} positions of {lm.network.name}; lower it"
            )
        if self.texts is None:
            return random_prompts(lm.network, count, context or _DEFAULT_CONTEXT, seed=self.settings.get("seed", 0))
        return real_prompts(lm, self.texts, count, context)

    def _request(self, ids: list[int], policy: "Scheduled | None", settings: Mapping[str, Any]) -> "Request":
        """Fixed acceptance and random weights do not stop: an end-of-text would be one by chance."""
        from fewstep.engine.settings import GenerationSettings

        request = replace(GenerationSettings.of(**settings).request(ids), policy=policy)
        return request if self._stops else replace(request, early_stop=False, stop_token_ids=())

    @property
    def _stops(self) -> bool:
        """Whether an end-of-text ends an answer."""
        stops: bool = self.settings.get("early_stop", not (self.acceptance.is_fixed or self.told["shape"]))
        return stops


def _playing(network: "Network", role: "RoleName") -> "Network":
    """The same random weights in a role, with the tokenizer's mask token if theirs had none."""
    own = network.role
    if own.mask_token_id is None:
        own = replace(own, mask_token_id=network.tokenizer.mask_token_id)
    return network.with_role(own.playing(role))


def _without_repetition(variants: "Sequence[Variant]") -> "list[Variant]":
    """A decoder without blocks is the same for every size of them, and the plain path whoever asked for it."""
    kept: dict[Any, Variant] = {}
    for variant in variants:
        told = {**variant.told, "engine": variant.choice.engine}
        kept.setdefault(tuple(map(str, told.values())), variant)
    return list(kept.values())


def _measured_rates(variants: "Sequence[Variant]") -> "dict[str, DeviceRates]":
    """By the numbers in which the passes of some variant are computed."""
    from fewstep.measure.bandwidth import measure_device
    from fewstep.measure.roofline import Sizes

    rates: dict[str, Any] = {}
    for variant in variants:
        choice = variant.choice
        if choice.dtype not in rates:
            weight_bytes = Sizes.of(variant.lm.network.module, choice.network.dtype).weight_bytes
            rates[choice.dtype] = measure_device(variant.device, choice.network.dtype, weight_bytes=weight_bytes)
    return rates


def _loaded(place: PlaceOptions, model: str | None, shape: str | None, role: "RoleName | None") -> "LanguageModel":
    if shape is None:
        return place.load(model or _DEFAULT_MODEL, role)
    from fewstep.engine.language_model import LanguageModel
    from fewstep.models.importers.shapes import random_network

    network = random_network(shape, dtype=place.dtype, device=place.device)
    return LanguageModel(network if role is None else _playing(network, role))


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


# What people read


def _show(figures: Sequence[Mapping[str, Any]]) -> None:
    first = figures[0]
    for figure in {figure["dtype"]: figure for figure in figures}.values():
        measured = figure["measured"]
        print(
            f"{first['machine']['gpu'] or first['machine']['cpu']}: reads {measured['read_gb_s']:,.0f} GB/s, copies "
            f"{measured['copy_gb_s']:,.0f} GB/s, multiplies {measured['matrix_tflops']:,.3g} TFLOP/s in "
            f"{figure['dtype']}"
        )
    first_token_s = first["engine_seconds"] + first["answers"]["first_round_seconds"]
    print(
        f"{first['shape'] or first['model']}: loaded in {first['load_seconds']:.1f} s, first tokens after "
        f"{first_token_s:.1f} s more"
    )
    print()
    print_table(
        [
            "decoder",
            "engine",
            "step",
            "batch",
            "block",
            "context",
            "steps",
            "ms",
            "floor ms",
            "of floor",
            "matrix",
            "tok/s",
        ],
        [
            [
                row["decoder"],
                row["engine"],
                row["kind"],
                row["batch_size"],
                row["block_size"] or "",
                row["context"],
                row["num_steps"],
                f"{row['step_ms_median']:.2f}",
                f"{row['floor_ms']:.2f}",
                f"{row['step_ms_median'] / row['floor_ms']:.2f}x",
                f"{row['matrix_share']:.0%}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            for figure in figures
            for row in figure["steps"]
        ],
        num_texts=3,
    )
    print()
    print_table(
        [
            "decoder",
            "engine",
            "batch",
            "block",
            "context",
            "answer ms",
            "passes",
            "ms/pass",
            "host ms",
            "tok/s",
            "GB",
            "warm-up s",
        ],
        [
            [
                figure["decoder"],
                figure["engine"],
                figure["batch_size"],
                figure["block_size"] or "",
                figure["context"],
                f"{figure['answers']['answer_ms_median']:.1f}",
                f"{figure['answers']['passes_mean']:.1f}",
                f"{figure['answers']['ms_per_pass']:.2f}",
                _or_none(figure["answers"]["host_ms_per_answer"], ".1f"),
                f"{figure['tokens_per_second']:,.0f}",
                f"{figure['peak_memory_bytes'] / 1e9:.2f}",
                f"{figure['answers']['warm_up_seconds']:.1f}",
            ]
            for figure in figures
        ],
        num_texts=2,
    )
    _show_power(figures)
    for sentence in dict.fromkeys(figure["engine_note"] for figure in figures if figure["engine_note"]):
        note(f"the plain path runs: {sentence}")


def _show_power(figures: Sequence[Mapping[str, Any]]) -> None:
    print()
    for figure in figures:
        answers = figure["answers"]
        power = "power: not reported by this device"
        if answers["watts"] is not None:
            power = f"{answers['watts']:.0f} W, {answers['joules_per_token']:.3g} J per token"
        cost = answers["cost_per_million_tokens"]
        told = power if cost is None else f"{power}; {cost:,.3g} for a million tokens"
        if answers["watts"] is None and cost is None:
            print(told)
            return
        print(f"{figure['decoder']}, engine {figure['engine']}, batch {figure['batch_size']}: {told}")


def _or_none(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
