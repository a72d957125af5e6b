"""How long the passes of decoders take, and how near that is to what the device allows.

A *variant* is requests of one size with one decoder, engine and batch size. Its rounds are driven as users drive them:
requests are submitted to the generator that the model makes, which then runs round after round. First every batch is
answered once with a listener, which says what the rounds were made of; then once more without it; then it is timed,
variants of one batch size in turn, so that drift of the machine falls on all of them alike.
"""

import gc
import math
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from fewstep.decode.admission import check_memory, check_request, positions_needed
from fewstep.decode.decoder import Decoder
from fewstep.decode.generator import Generator, submit_all
from fewstep.decode.loop import Listener, loop_for
from fewstep.decode.requests import Output, Request
from fewstep.engine.captured import CapturedLoop
from fewstep.engine.choice import Choice
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.files import write_whole
from fewstep.measure.bandwidth import DeviceRates, wait_for
from fewstep.measure.energy import sampled_power
from fewstep.measure.passes import RoundWork, Watch

_POWER_SECONDS = 3.0
_PROFILED_ROUNDS = 12
_MOST_AHEAD = 2
"""Rounds that an engine may have begun when the last request turns out to be done."""


@dataclass(frozen=True)
class Answer:
    """A batch of requests, answered: seconds in all, those of each round, and the outputs in the order of the requests.

    The first round begins with the submission, and brings the prefill.
    """

    seconds: float
    round_seconds: Sequence[float]
    outputs: Sequence[Output]

    @property
    def num_tokens(self) -> int:
        return sum(output.num_tokens for output in self.outputs)


@dataclass
class Variant:
    """What is measured: `batches` of requests, each answered together, with these settings.

    `told`: what reports say of it beside the figures. `engine_seconds`: what its engine took to prepare itself.
    `is_fixed`: the rounds are the same whatever tokens the network gives.
    """

    lm: LanguageModel
    settings: Mapping[str, Any]
    batches: Sequence[Sequence[Request]]
    told: Mapping[str, Any]
    engine_seconds: float = 0.0
    is_fixed: bool = False

    rounds: list[list[RoundWork]] = field(default_factory=list, init=False)  # of each batch
    answers: list[list[Answer]] = field(init=False)  # of each batch, timed
    warm_up_seconds: float = field(default=0.0, init=False)
    warm_up_answers: int = field(default=0, init=False)
    first_round_seconds: float = field(default=0.0, init=False)
    host_seconds: float | None = field(default=None, init=False)
    watts: float | None = field(default=None, init=False)
    peak_memory_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.answers = [[] for _ in self.batches]
        self._generator: Generator | None = None

    @property
    def device(self) -> torch.device:
        return self.lm.network.device

    @property
    def batch_size(self) -> int:
        return len(self.batches[0])

    @property
    def choice(self) -> Choice:
        return self.lm.choice(**self.settings)

    @property
    def decoder(self) -> Decoder:
        return self.lm.decoder(**self.settings)

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]

    @property
    def answered(self) -> list[tuple[Request, Output]]:
        """Every request with its output, each time that it was timed."""
        return [
            pair
            for batch, answers in zip(self.batches, self.answers, strict=True)
            for answer in answers
            for pair in zip(batch, answer.outputs, strict=True)
        ]

    # Before it runs

    def check(self) -> None:
        """FewstepError if a request cannot be decoded, or if so many do not fit in the memory."""
        network, decoder = self.lm.network, self.decoder
        for request in self.requests:
            check_request(network, decoder, request)
        check_fits(self.lm, self.settings, max(self.requests, key=lambda one: len(one.prompt_ids)), self.batch_size)

    # Running

    def prepare(self, warm_up: int) -> None:
        """Watch what each batch is made of, then answer each once without a listener, and some more up to `warm_up`."""
        watch, decoder, dtype = Watch(), self.decoder, self.choice.network.dtype
        before, started_s = _allocated(self.device), time.perf_counter()

        def answered(batch: Sequence[Request], *listeners: Listener) -> None:
            answer = self._answer(batch, *listeners)
            self.first_round_seconds = self.first_round_seconds or answer.round_seconds[0]
            self.warm_up_answers += 1

        for batch in self.batches:
            if self.is_fixed:  # a listener keeps an engine from running ahead, and would have it prepare other passes
                self._answer(batch, watch, engine="off")
            else:
                answered(batch, watch)
            self.rounds.append(watch.rounds(self.lm.network, decoder, batch, dtype))
        if self.is_fixed:
            self.close()
            before, started_s = _allocated(self.device), time.perf_counter()
        for index in range(max(warm_up, len(self.batches))):
            answered(self.batches[index % len(self.batches)])
        generator = self._generator
        if self.settings.get("engine") == "compiled" and isinstance(generator, CapturedLoop):
            generator.compile_passes()  # prefills too
            answered(self.batches[0])
        self.warm_up_seconds = time.perf_counter() - started_s
        self.peak_memory_bytes = self._peak_since(before)

    def _peak_since(self, before: int) -> int:
        """Most bytes at once: on a GPU of the network and what was added when `before` were allocated; on a CPU of the
        process, ever.
        """
        if self.device.type != "cuda":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        weights = sum(each.numel() * each.element_size() for each in self.lm.network.module.parameters())
        return weights + torch.cuda.max_memory_allocated(self.device) - before

    def time(self, index: int) -> None:
        """Answer a batch once more."""
        self.answers[index].append(self._answer(self.batches[index]))

    def close(self) -> None:
        """Give its memory back."""
        self._generator = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ready(self, *listeners: Listener, **settings: Any) -> Generator:
        """What answers the requests, chosen anew as for every call of a user's; `settings`: others than its own."""
        options: dict[str, Any] = {"batch_size": self.batch_size, "listeners": listeners, **self.settings, **settings}
        self._generator = self.lm.generator(self.requests, kept=self._generator, **options)
        return self._generator

    def _answer(self, batch: Sequence[Request], *listeners: Listener, **settings: Any) -> Answer:
        generator = self._ready(*listeners, **settings)
        wait_for(self.device)
        marks = [time.perf_counter()]
        index_of = submit_all(generator, batch)
        outputs: dict[int, Output] = {}
        while generator.busy:
            outputs |= {index_of[number]: output for number, output in generator.step()}
            marks.append(time.perf_counter())
        wait_for(self.device)
        marks[-1] = time.perf_counter()
        seconds = [later - earlier for earlier, later in pairwise(marks)]
        return Answer(marks[-1] - marks[0], seconds, [outputs[index] for index in range(len(batch))])

    def measure_power(self) -> None:
        """The power drawn during answers of the first batch, if the device says."""
        if self.device.type != "cuda":
            return
        with sampled_power(self.device) as power:
            started_s = time.perf_counter()
            while time.perf_counter() - started_s < _POWER_SECONDS:
                self._answer(self.batches[0])
        self.watts = power.watts

    def measure_host(self) -> None:
        """The time of an answer of the first batch, prefill apart, in which no pass runs: in which a GPU has nothing to
        do, and on a CPU what lies outside of the passes.
        """
        if self.device.type == "cuda":
            self._measure_idle_device()
        else:
            self._measure_outside_passes()

    def _measure_outside_passes(self) -> None:
        choice, pass_seconds = self.choice, list[float]()

        def timed(*given: Any) -> Any:
            started_s = time.perf_counter()
            result = choice.run_pass(*given)
            pass_seconds.append(time.perf_counter() - started_s)
            return result

        how: dict[str, Any] = {"batch_size": self.batch_size, "run_pass": timed, "companions": choice.companions}
        loop = loop_for(choice.network, self.decoder, self.requests, **how)
        submit_all(loop, self.batches[0])
        loop.step()
        pass_seconds.clear()
        started_s = time.perf_counter()
        while loop.busy:
            loop.step()
        self.host_seconds = time.perf_counter() - started_s - sum(pass_seconds)

    def _measure_idle_device(self) -> None:
        profiled, count = self._profiled([ProfilerActivity.CUDA], skip=1)
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in profiled.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        if not spans:  # a driver may not let programs trace it
            return
        decoding = statistics.median(answer.seconds - answer.round_seconds[0] for answer in self.answers[0])
        num_rounds = len(self.answers[0][0].round_seconds) - 1
        self.host_seconds = max(0.0, decoding - num_rounds * busy_time(spans) / 1e6 / count)

    def write_trace(self, path: Path) -> None:
        """A trace of the first rounds of the first batch, for chrome://tracing or Perfetto."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        profiled, _ = self._profiled(activities, skip=0)
        with tempfile.TemporaryDirectory() as folder, write_whole(path) as temporary:
            trace = Path(folder) / "trace.json"  # its writer makes other names of unusual ones
            profiled.export_chrome_trace(str(trace))
            shutil.copyfile(trace, temporary)

    def _profiled(self, activities: Sequence[ProfilerActivity], *, skip: int) -> tuple[profile, int]:
        """A profile of the first rounds of the first batch, and how many they are; `skip` of them are left out."""
        generator = self._ready()
        left = set(submit_all(generator, self.batches[0]))

        def one_round() -> None:
            left.difference_update(number for number, _ in generator.step())

        for _ in range(skip):
            one_round()
        count = 0
        with profile(activities=activities) as profiled:
            while left and count < _PROFILED_ROUNDS:
                one_round()
                count += 1
            wait_for(self.device)
        for number in left:
            generator.cancel(number)
        return profiled, count


def check_fits(lm: LanguageModel, settings: Mapping[str, Any], request: Request, batch_size: int) -> None:
    """FewstepError if so many requests like this one, and their passes, do not fit in the free memory."""
    decoder, choice = lm.decoder(**settings), lm.choice(**settings)
    length = positions_needed(decoder, request, check_request(lm.network, decoder, request))
    num_rows = (len(request.prompt_ids) if decoder.traits.cached else length) + decoder.traits.pass_length
    check_memory(choice.network, decoder, batch_size, length, choice.companions, num_rows=num_rows)


def busy_time(spans: Sequence[tuple[float, float]]) -> float:
    """How much of time some spans cover, which may overlap."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


def _allocated(device: torch.device) -> int:
    """On a GPU; from here on the most is counted anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def run_variants(
    variants: Sequence[Variant],
    *,
    answers: int,
    warm_up: int = 1,
    trace: Path | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Time so many answers of every variant, its batches in turn. FewstepError if one does not fit in the memory.

    Variants that follow each other and have batches of one size, and as many of them, take turns. `trace`: a file for
    the trace of the first. `progress` is called after each answer.
    """
    for variant in variants:
        variant.check()
    for _, group in groupby(variants, lambda one: (one.batch_size, len(one.batches), one.told.get("context"))):
        together = list(group)
        for variant in together:
            with _telling_of_memory(variant):
                variant.prepare(warm_up)
            progress()
        num_batches = len(together[0].batches)
        for turn in range(max(answers, num_batches)):
            first = turn % len(together)
            for variant in together[first:] + together[:first]:
                with _telling_of_memory(variant):
                    variant.time(turn % num_batches)
                progress()
        for variant in together:
            variant.measure_host()
            variant.measure_power()
            if trace is not None and variant is variants[0]:
                variant.write_trace(trace)
            variant.close()


@contextmanager
def _telling_of_memory(variant: Variant) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise FewstepError(
            f"{variant.batch_size} requests at once do not fit in the memory of {variant.device} beside the weights of "
            f"{variant.lm.network.name}; choose a smaller batch or a shorter context"
        ) from None


# Reports


def report(variant: Variant, rates: DeviceRates, *, price_per_hour: float | None = None) -> dict[str, Any]:
    """The figures of a variant, as `bench --json` has them: those of its most frequent kind of step, and beside them
    `steps` (every kind) and `answers` (whole ones).
    """
    steps = step_rows(variant, rates)
    main = max(steps, key=lambda row: (row["kind"] != "prefill", row["num_steps"]))
    answers = _answers(variant, price_per_hour)
    return {
        **main,
        "tokens_per_second": answers["tokens_per_second"],
        "steps": steps,
        "answers": answers,
        "engine_note": variant.choice.note,
        "engine_seconds": variant.engine_seconds,
        "measured": {
            "read_gb_s": rates.read_bytes_per_second / 1e9,
            "read_bytes": rates.read_bytes,
            "copy_gb_s": rates.copy_bytes_per_second / 1e9,
            "matrix_tflops": rates.flops_per_second / 1e12,
        },
    }


def step_rows(variant: Variant, rates: DeviceRates) -> list[dict[str, Any]]:
    """The figures of each kind of step, in the order in which they first came."""
    limits, choice = rates.limits, variant.choice
    seconds, rounds = dict[str, list[float]](), dict[str, list[RoundWork]]()
    for watched, answers in zip(variant.rounds, variant.answers, strict=True):
        for answer in answers:
            told_apart = _told_apart(watched, len(answer.round_seconds))
            for one, one_seconds in zip(told_apart, answer.round_seconds, strict=False):
                seconds.setdefault(one.kind, []).append(one_seconds)
                rounds.setdefault(one.kind, []).append(one)
    rows = []
    for kind, taken in seconds.items():
        median_s = statistics.median(taken)
        floor_s = statistics.median(one.floor_seconds(limits) for one in rounds[kind])
        flops = statistics.median(one.flops for one in rounds[kind])
        rows.append(
            {
                **variant.told,
                "engine": choice.engine,
                "dtype": choice.dtype,
                "kind": kind,
                "num_steps": len(taken),
                "step_ms_median": 1000 * median_s,
                "step_ms_p90": 1000 * _ninth_decile(taken),
                "floor_ms": 1000 * floor_s,
                "roofline_share": floor_s / median_s,
                "bytes_read": statistics.median(one.bytes_read for one in rounds[kind]),
                "flops": flops,
                "matrix_share": flops / median_s / limits.flops_per_second,
                "tokens_per_step": statistics.fmean(one.tokens for one in rounds[kind]),
                "tokens_per_second": sum(one.tokens for one in rounds[kind]) / sum(taken),
                "peak_memory_bytes": variant.peak_memory_bytes,
                "measured_bandwidth_gb_s": limits.bytes_per_second / 1e9,
            }
        )
    return rows


def _told_apart(rounds: Sequence[RoundWork], count: int) -> Sequence[RoundWork]:
    """The rounds of an answer as they were watched, without those that an engine ran ahead. An answer that took quite
    another number of rounds, as near ties in bfloat16 may make it, is told by its commonest kind after the first round.
    """
    if len(rounds) <= count <= len(rounds) + _MOST_AHEAD:
        return rounds
    kinds = [one.kind for one in rounds[1:]] or [rounds[0].kind]
    common = next(one for one in reversed(rounds) if one.kind == statistics.mode(kinds))
    return [rounds[0], *[common] * (count - 1)]


def _ninth_decile(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def _answers(variant: Variant, price_per_hour: float | None) -> dict[str, Any]:
    """Of whole batches of requests, prefill included."""
    answers = [answer for of_batch in variant.answers for answer in of_batch]
    num_tokens, seconds = sum(answer.num_tokens for answer in answers), sum(answer.seconds for answer in answers)
    num_passes = sum(max(output.num_forwards for output in answer.outputs) for answer in answers)
    host_s, rate = variant.host_seconds, num_tokens / seconds
    median_s = statistics.median(answer.seconds for answer in answers)
    return {
        "n": len(answers),
        "answer_ms_median": 1000 * median_s,
        "passes_mean": num_passes / len(answers),
        "ms_per_pass": 1000 * seconds / num_passes,
        "prefill_ms": 1000 * statistics.median(answer.round_seconds[0] for answer in answers),
        "host_ms_per_answer": None if host_s is None else 1000 * host_s,
        "num_tokens_mean": num_tokens / len(answers),
        "tokens_per_second": rate,
        "warm_up_seconds": variant.warm_up_seconds,
        "compile_and_capture_seconds": max(0.0, variant.warm_up_seconds - variant.warm_up_answers * median_s),
        "first_round_seconds": variant.first_round_seconds,
        "watts": variant.watts,
        "joules_per_token": None if variant.watts is None else variant.watts / rate,
        "cost_per_million_tokens": None if price_per_hour is None else price_per_hour / 3600 / rate * 1e6,
    }
