"""Accuracy of a model on problems with numeric answers, with its passes, tokens and time."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.decode.decoder import threshold_rule
from fewstep.decode.requests import Output
from fewstep.decode.state import State
from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.measure.gsm_solutions import is_correct
from fewstep.measure.gsm_symbolic import Problem
from fewstep.measure.metrics import wilson_interval
from fewstep.models.text import Message

PLAIN_ENGINE = "off"  # no captured steps
_WARM_UP_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Record:
    """One problem answered."""

    id: str
    template: int | None
    answer: str
    text: str
    correct: bool
    num_tokens: int
    num_forwards: int
    seconds: float
    finish_reason: str
    num_draft_forwards: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation: how it was run, and a record for each problem in order.

    `wall_seconds` is for all problems together, `step_ms` the median time between two rounds of the loop (at batch 1
    one forward and what goes with it).
    """

    model: str
    role: str
    decoder: str
    engine: str
    task: str
    threshold: float | None
    gaps: int | None
    block_size: int | None
    steps: int | None
    batch_size: int
    dtype: str
    device: str
    records: list[Record]
    wall_seconds: float
    step_ms: float

    @property
    def n(self) -> int:
        return len(self.records)

    @property
    def num_correct(self) -> int:
        return sum(record.correct for record in self.records)

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.n

    @property
    def tokens_per_forward(self) -> float:
        return sum(record.num_tokens for record in self.records) / sum(record.num_forwards for record in self.records)

    @property
    def tokens_per_forward_correct(self) -> float | None:
        """The ratio of the sums over the problems that were solved; None if none was."""
        solved = [record for record in self.records if record.correct]
        if not solved:
            return None
        return sum(record.num_tokens for record in solved) / sum(record.num_forwards for record in solved)

    def to_json(self) -> dict[str, Any]:
        """The keys that `eval --json` promises, and the passes of a draft network if there is one.

        The records are apart (`records_json`).
        """
        interval = wilson_interval(self.num_correct, self.n)
        drafts = statistics.fmean(record.num_draft_forwards for record in self.records)
        return {
            "model": self.model,
            "role": self.role,
            "decoder": self.decoder,
            "engine": self.engine,
            "task": self.task,
            "threshold": self.threshold,
            "gaps": self.gaps,
            "block_size": self.block_size,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "device": self.device,
            "n": self.n,
            "accuracy": self.accuracy,
            "accuracy_ci95": [interval.low, interval.high],
            "num_tokens_mean": statistics.fmean(record.num_tokens for record in self.records),
            "num_forwards_mean": statistics.fmean(record.num_forwards for record in self.records),
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_forward_correct": self.tokens_per_forward_correct,
            "seconds_median": statistics.median(record.seconds for record in self.records),
            "tokens_per_second": sum(record.num_tokens for record in self.records) / self.wall_seconds,
            "step_ms": self.step_ms,
            **({"num_draft_forwards_mean": drafts} if drafts else {}),
        }

    def records_json(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def evaluate(
    model: LanguageModel,
    problems: Sequence[Problem],
    *,
    task: str = "gsm-symbolic",
    batch_size: int = 32,
    progress: Callable[[], None] | None = None,
    warm_up: bool = True,
    **settings: Any,
) -> Report:
    """Answer every problem and compare the numbers. Settings are those of `LanguageModel.generate`.

    At `batch_size` 1 the problems are asked one after another, so a record's `seconds` is the time of that problem
    alone; in a batch it counts from the common start, waiting for a free slot included. `progress` is called after each
    problem. FewstepError if there are no problems.
    """
    if not problems:
        raise FewstepError("there is nothing to evaluate: give at least one problem")
    decoder = model.decoder(**settings)
    if warm_up:
        _warm_up(model, problems[0], settings)
    clock = _Rounds()
    started_s = time.perf_counter()
    outputs = _answer(model, [problem.question for problem in problems], batch_size, clock, progress, settings)
    wall_seconds = time.perf_counter() - started_s
    return Report(
        model=model.network.name,
        role=model.role.name,
        decoder=decoder.name,
        engine=PLAIN_ENGINE,
        task=task,
        **threshold_rule(decoder),
        steps=settings.get("steps"),
        batch_size=batch_size,
        dtype=str(model.network.dtype).removeprefix("torch."),
        device=str(model.network.device),
        records=[_record(problem, output) for problem, output in zip(problems, outputs, strict=True)],
        wall_seconds=wall_seconds,
        step_ms=clock.median_ms,
    )


def sweep(
    model: LanguageModel,
    problems: Sequence[Problem],
    *,
    thresholds: Sequence[float] = (),
    steps: Sequence[int] = (),
    **options: Any,
) -> list[Report]:
    """One report for each threshold, then one for each number of steps, on the same problems; see `evaluate`."""
    if not thresholds and not steps:
        raise FewstepError("a sweep needs at least one threshold or number of steps")
    for name, values in (("threshold", thresholds), ("steps", steps)):
        if values and options.get(name) is not None:
            raise FewstepError(f"{name} is both swept and set to {options[name]}; give one of the two")
    options = {
        name: value for name, value in options.items() if name not in ("threshold", "steps") or value is not None
    }
    varied: list[dict[str, Any]] = [{"threshold": value} for value in thresholds]
    varied += [{"steps": value} for value in steps]
    for settings in varied:
        model.decoder(**_decoder_settings(options), **settings)  # refuse a bad value before the first long run
    return [
        evaluate(model, problems, warm_up=index == 0, **options, **settings) for index, settings in enumerate(varied)
    ]


def _decoder_settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("task", "batch_size", "progress")}


def _warm_up(model: LanguageModel, problem: Problem, settings: dict[str, Any]) -> None:
    """A short answer, so that the first problem pays for no lazy initialisation."""
    short = {name: value for name, value in settings.items() if name not in ("steps", "canvas_length")}
    model.generate(problem.question, **{**short, "max_new_tokens": _WARM_UP_TOKENS})


def _answer(
    model: LanguageModel,
    questions: list[str | list[Message]],
    batch_size: int,
    clock: "_Rounds",
    progress: Callable[[], None] | None,
    settings: dict[str, Any],
) -> list[Output]:
    def count(_: int, __: Output) -> None:
        if progress is not None:
            progress()

    groups = [[question] for question in questions] if batch_size == 1 else [questions]
    outputs: list[Output] = []
    for group in groups:
        clock.start()
        outputs += model.generate(group, batch_size=batch_size, listeners=[clock], on_output=count, **settings)
    return outputs


class _Rounds:
    """A listener that notes how long each round of the loop took."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._last_s = 0.0

    def start(self) -> None:
        self._last_s = time.perf_counter()

    def __call__(self, _: State) -> None:
        now_s = time.perf_counter()
        self._seconds.append(now_s - self._last_s)
        self._last_s = now_s

    @property
    def median_ms(self) -> float:
        return 1000 * statistics.median(self._seconds)


def _record(problem: Problem, output: Output) -> Record:
    return Record(
        id=problem.id,
        template=problem.template,
        answer=problem.answer,
        text=output.text,
        correct=is_correct(output.text, problem.answer),
        num_tokens=output.num_tokens,
        num_forwards=output.num_forwards,
        seconds=output.seconds,
        finish_reason=output.finish_reason,
        num_draft_forwards=output.num_draft_forwards,
    )
