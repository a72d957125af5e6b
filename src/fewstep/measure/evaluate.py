"""Accuracy of a model on the problems of a task, with its passes, tokens and time."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fewstep.engine.answers import Answer, answer_all, check_prompts
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.made_by import made_by
from fewstep.engine.settings import GenerationSettings
from fewstep.errors import FewstepError
from fewstep.kept import Kept
from fewstep.measure.metrics import chrf_interval, wilson_interval
from fewstep.models.network import Network
from fewstep.tasks.problems import Problem
from fewstep.tasks.scoring import NUMBER, Metric

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

    `policy`: the rule that chose positions, if one was set other than by threshold, gaps, steps and order.

    `num_kept` of the answers come from an earlier run that was interrupted. `calibration`: what the checkpoint
    promises, if it was decoded as that says. `wall_seconds` is for all problems together, `step_ms` the median time
    between two rounds of the loop (at batch 1 one forward and what goes with it). `engine`: which one ran the passes,
    "off" for the plain path.
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
    num_kept: int = 0
    calibration: Mapping[str, Any] | None = None
    policy: str | None = None
    metric: str = NUMBER.name

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
        """The keys that `eval --json` promises; the policy if one was set, the passes of a draft network if there is
        one, how many answers are those of an earlier run, if any are, and where answers are texts the metric and chrF.

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
            **({"policy": self.policy} if self.policy else {}),
            **({"num_draft_forwards_mean": drafts} if drafts else {}),
            **({"calibration": dict(self.calibration)} if self.calibration else {}),
            **({"answered_earlier": self.num_kept} if self.num_kept else {}),
            **({} if self.metric == NUMBER.name else {"metric": self.metric, **self._chrf()}),
        }

    def _chrf(self) -> dict[str, Any]:
        """chrF, 0 to 100, of all texts with the right answers, and its interval."""
        found = chrf_interval([record.text for record in self.records], [record.answer for record in self.records])
        return {"chrf": found.estimate, "chrf_ci95": [found.low, found.high]}

    def records_json(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


def evaluate(
    model: LanguageModel,
    problems: Sequence[Problem],
    *,
    task: str = "gsm-symbolic",
    metric: Metric = NUMBER,
    batch_size: int = 32,
    progress: Callable[[], None] | None = None,
    kept: Kept | None = None,
    warm_up: bool = True,
    **settings: Any,
) -> Report:
    """Answer every problem and judge the answers by `metric`. Settings are those of `LanguageModel.generate`.

    `task` is the report's name for the source of the problems. At `batch_size` 1 the problems are asked one after
    another, so a record's `seconds` is the time of that problem alone; in a batch it counts from the common start and
    includes the wait for a free slot. `kept`: answers of an earlier run, which are not computed again; new answers are
    added to them. `progress` is called after each problem. FewstepError if there are no problems, or if the model
    cannot take one, before any is answered.
    """
    check_problems(model, problems, **settings)
    manner = model.manner(**settings)
    if warm_up and any(kept is None or kept.get(str(index)) is None for index in range(len(problems))):
        _warm_up(model, problems[0], settings)
    answered = answer_all(
        model,
        [problem.question for problem in problems],
        batch_size=batch_size,
        kept=kept,
        progress=progress,
        **settings,
    )
    return Report(
        model=model.network.name,
        role=model.role.name,
        decoder=manner.decoder,
        engine=manner.engine,
        task=task,
        **manner.rule,
        steps=settings.get("steps"),
        batch_size=batch_size,
        dtype=manner.dtype,
        device=str(model.network.device),
        records=[_record(problem, answer, metric) for problem, answer in zip(problems, answered.answers, strict=True)],
        wall_seconds=answered.wall_seconds,
        step_ms=answered.step_ms,
        num_kept=answered.num_kept,
        calibration=_calibration(model, manner.rule, settings),
        policy=manner.policy if GenerationSettings.of(**settings).sets_policy else None,
        metric=metric.name,
    )


def solved_share(problems: Sequence[Problem], **settings: Any) -> Callable[[Network, int], dict[str, float]]:
    """What a training can be given as its `evaluate`: the share of the problems that the network solves, and its tokens
    per forward; settings are those of `evaluate`. All problems are answered at once, and one answer is printed.
    """

    def evaluate_network(network: Network, step: int) -> dict[str, float]:
        report = evaluate(LanguageModel(network), problems, batch_size=len(problems), warm_up=False, **settings)
        print(f"sample at step {step}: {report.records[0].text!r}", flush=True)
        return {"accuracy": report.accuracy, "tokens_per_forward": report.tokens_per_forward}

    return evaluate_network


def check_problems(
    model: LanguageModel, problems: Sequence[Problem], *, source: str | None = None, **settings: Any
) -> None:
    """FewstepError naming the first problem that the model cannot take, and the file `source` that it is from."""
    if not problems:
        raise FewstepError("there is nothing to evaluate: give at least one problem")
    where = "" if source is None else f"{source}, "
    names = [f"{where}problem {problem.id!r}" for problem in problems]
    check_prompts(model, [problem.question for problem in problems], names, **settings)


def sweep(
    model: LanguageModel,
    problems: Sequence[Problem],
    *,
    thresholds: Sequence[float] = (),
    steps: Sequence[int] = (),
    kept: Kept | None = None,
    source: str | None = None,
    **options: Any,
) -> list[Report]:
    """One report for each threshold, then one for each number of steps, on the same problems; see `evaluate` and
    `check_problems`.
    """
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
        # Refuse a bad value or problem before the first long run.
        check_problems(model, problems, source=source, **_decoder_settings(options), **settings)
    return [
        evaluate(
            model,
            problems,
            warm_up=index == 0,
            kept=None if kept is None else kept.under(f"{index}: "),
            **options,
            **settings,
        )
        for index, settings in enumerate(varied)
    ]


def _decoder_settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("task", "metric", "batch_size", "progress")}


def _calibration(model: LanguageModel, rule: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the checkpoint promises, unless its weights are others now, or are decoded otherwise."""
    promised = model.network.calibration
    if promised is None or settings.keys() - {"threshold", "gaps", "max_new_tokens", "engine"}:
        return None
    decoded = {"max_new_tokens": GenerationSettings.max_new_tokens, **settings, **rule}
    told = asdict(promised)
    same = all(told[name] == decoded[name] for name in ("threshold", "gaps", "max_new_tokens"))
    return told if same and promised.weights == made_by(model)["weights"] else None


def _warm_up(model: LanguageModel, problem: Problem, settings: dict[str, Any]) -> None:
    """Give a short answer, so that lazy initialisation does not count for the first problem."""
    short = {name: value for name, value in settings.items() if name not in ("steps", "canvas_length")}
    model.generate(problem.question, **{**short, "max_new_tokens": _WARM_UP_TOKENS})


def _record(problem: Problem, answer: Answer, metric: Metric) -> Record:
    return Record(
        id=problem.id,
        template=problem.template,
        answer=problem.answer,
        text=answer.text,
        correct=metric.is_correct(answer.text, problem.answer),
        num_tokens=answer.num_tokens,
        num_forwards=answer.num_forwards,
        seconds=answer.seconds,
        finish_reason=answer.finish_reason,
        num_draft_forwards=answer.num_draft_forwards,
    )
