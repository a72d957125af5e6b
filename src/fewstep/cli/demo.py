"""`fewstep demo`: teacher and student side by side on the same problems, then the parts of the speed-up."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fewstep.cli.lanes import Lane, draw, drawn_live
from fewstep.cli.model_names import check_model_name
from fewstep.cli.options import Json, PlaceOptions, TaskOptions
from fewstep.cli.report import print_table, write_report
from fewstep.cli.sources import Touches
from fewstep.values import Count

if TYPE_CHECKING:
    from fewstep.engine.language_model import LanguageModel
    from fewstep.measure.timing import Timing
    from fewstep.tasks.problems import Problem
    from fewstep.tasks.task import Task

CANVAS_LENGTH = 256
NUM_TIMED = 3
"""How many problems all contestants solve in turn for the factors at the end: few, since the published teacher is slow.
"""

LANE_HEIGHT = 14


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model's answer to one problem."""

    problem: str
    num_tokens: int
    num_forwards: int
    seconds: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model, how it decodes here, and the task that it is given."""

    name: str
    lm: "LanguageModel"
    task: "Task"
    settings: dict[str, Any]

    def solve(self, problem: "Problem") -> Run:
        """Without showing it."""
        output = self.lm.generate(problem.question, **self.settings)
        return self.judge(problem, output, output.seconds)

    def judge(self, problem: "Problem", output: Any, seconds: float) -> Run:
        """The run that `output` makes."""
        return Run(
            problem=problem.id,
            num_tokens=output.num_tokens,
            num_forwards=output.num_forwards,
            seconds=seconds,
            right=self.task.is_correct(output.text, problem.answer),
        )

    def describe(self) -> str:
        """The model in words."""
        network = self.lm.network
        return f"{network.name}, {network.role.name}, {network.num_parameters / 1e6:.1f} M parameters, {network.device}"

    def warm_up(self, problem: "Problem") -> None:
        """Give a short answer that is not counted, since the first forwards of a process are slow."""
        self.lm.generate(problem.question, **{**self.settings, "max_new_tokens": 32, "early_stop": True})


def demo(
    place: PlaceOptions,
    problems: TaskOptions,
    teacher: Annotated[
        str, typer.Option(metavar="NAME", help="The diffusion teacher."), Touches.READS_MODEL
    ] = "gsm-teacher",
    student: Annotated[
        str, typer.Option(metavar="NAME", help="The block-causal student."), Touches.READS_MODEL
    ] = "gsm-student",
    causal: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A causal model for comparison; gsm-ar if it is bundled."),
        Touches.READS_MODEL,
    ] = None,
    num_problems: Annotated[Count, typer.Option(help="How many problems of the task to solve, from the first.")] = 5,
    threshold: Annotated[
        float | None, typer.Option(help="The student's threshold; by default that of its checkpoint.")
    ] = None,
    json: Json = None,
) -> None:
    """Lets the bundled teacher and student solve the same problems side by side, and ends with a table."""
    for name in (teacher, student, *([] if causal is None else [causal])):
        check_model_name(name)
    from fewstep.measure.evaluate import check_problems
    from fewstep.measure.timing import speed_factors, time_interleaved
    from fewstep.models.names import bundled_names

    task, chosen = problems.chosen, problems.read(num_problems)
    if causal is None and "gsm-ar" in bundled_names():
        causal = "gsm-ar"
    length = {"max_new_tokens": CANVAS_LENGTH}
    contestant_of = partial(Contestant, task=task)
    slow = contestant_of(name="teacher", lm=place.load(teacher), settings=length)
    faster = length if threshold is None else {**length, "threshold": threshold}
    fast = contestant_of(name="student", lm=place.load(student), settings=faster)
    published = contestant_of(name="teacher, no early stop", lm=slow.lm, settings={**length, "early_stop": False})
    extra = [] if causal is None else [contestant_of(name="causal, KV cache", lm=place.load(causal), settings=length)]
    for contestant in (slow, fast, *extra):
        check_problems(contestant.lm, chosen, source=problems.source, **contestant.settings)
        print(f"{contestant.name}: {contestant.describe()}")

    with _stage("warming up"):
        for contestant in (slow, fast, *extra):
            contestant.warm_up(chosen[0])
    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in (published, slow, *extra, fast)}
    for number, problem in enumerate(chosen, start=1):
        for contestant, run in zip((slow, fast), _race(number, problem, [slow, fast]), strict=True):
            runs[contestant.name].append(run)
        _print_outcome(number, runs[slow.name][-1], runs[fast.name][-1])
    for contestant in extra:
        with _stage("the same problems with the causal model"):
            runs[contestant.name] += [contestant.solve(problem) for problem in chosen]

    def as_published(problem: "Problem") -> Run:
        runs[published.name].append(published.solve(problem))
        return runs[published.name][-1]

    timed = chosen[:NUM_TIMED]
    told = "problem 1" if len(timed) == 1 else f"problems 1 to {len(timed)}"
    with _stage(f"{told} once more, in turns, also by the teacher as published: all {CANVAS_LENGTH} passes"):
        takers = {contestant.name: contestant.solve for contestant in (slow, *extra, fast)}
        timings = time_interleaved({published.name: as_published, **takers}, timed, warm_up=False)

    factors = asdict(speed_factors(*(timings[c.name] for c in (published, slow, fast)), of=statistics.median))
    write_report(
        json,
        {
            "runs": {name: [asdict(run) for run in of] for name, of in runs.items()},
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "factors": factors,
        },
    )
    _print_table(runs, timings, fast.name)
    print(
        f"\nOn {told}, by medians, the student is {factors['total']:.1f}x as fast as the teacher as published = "
        f"stopping {factors['stopping']:.1f}x * fewer passes {factors['fewer_passes']:.1f}x * "
        f"cheaper passes (cache) {factors['caching']:.1f}x."
    )


# The race


class _Racer:
    """A contestant under way, drawn on a lane. Its clock runs only while it computes."""

    def __init__(self, contestant: Contestant, problem: "Problem") -> None:
        self.contestant = contestant
        self.problem = problem
        self.lane = Lane(contestant.name, [None] * CANVAS_LENGTH)
        self.stream = contestant.lm.stream(problem.question, **contestant.settings)
        self._events = iter(self.stream)
        self.run: Run | None = None

    def advance(self) -> None:
        """Up to the next finalised token, or to the end."""
        started_s = time.perf_counter()
        event = next(self._events, None)
        self.lane.seconds += time.perf_counter() - started_s
        if event is None:
            assert self.stream.output is not None
            self.run = self.contestant.judge(self.problem, self.stream.output, self.lane.seconds)
            self.lane.num_forwards = self.run.num_forwards
            self.lane.verdict = "· right" if self.run.right else "· wrong"
            return
        is_end = event.token_id in self.contestant.lm.network.stop_token_ids
        self.lane.finalise(event.position, "" if is_end else event.text, event.step)
        self.lane.num_forwards = event.step


def _race(number: int, problem: "Problem", contestants: Sequence[Contestant]) -> list[Run]:
    """Let the contestants solve a problem; drawn live in a terminal.

    They take turns: the one whose own clock is behind computes next, so the picture shows true relative speed.
    """
    racers = [_Racer(contestant, problem) for contestant in contestants]
    with _screen(f"Problem {number}. {problem.last_turn}", [racer.lane for racer in racers]) as redraw:
        while running := [racer for racer in racers if racer.run is None]:
            min(running, key=lambda racer: racer.lane.seconds).advance()
            redraw()
    return [racer.run for racer in racers if racer.run is not None]


@contextmanager
def _screen(question: str, lanes: list[Lane]) -> Iterator[Callable[[], None]]:
    """Yields what to call after a change; it draws in a terminal only."""
    console = Console()
    if not console.is_terminal:
        print(question, flush=True)
        yield lambda: None
        return
    with drawn_live(console, lambda: draw(question, lanes, height=LANE_HEIGHT)) as redraw:
        yield redraw


@contextmanager
def _stage(what: str) -> Iterator[None]:
    """A spinner beside `what` in a terminal, a line elsewhere."""
    console = Console()
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        print(f"{what} ...", flush=True)
        yield


# What came out


def _print_outcome(number: int, slow: Run, fast: Run) -> None:
    def told(run: Run) -> str:
        return f"{run.num_forwards} passes, {run.seconds:.2f} s, {'right' if run.right else 'wrong'}"

    print(
        f"problem {number}: teacher {told(slow)} | student {told(fast)} | {slow.seconds / fast.seconds:.1f}x",
        flush=True,
    )


def _print_table(runs: dict[str, list[Run]], timings: "dict[str, Timing]", fastest: str) -> None:
    """What each contestant solved, and the median of its seconds where all took turns."""
    rows = []
    for name, of in runs.items():
        num_forwards = sum(run.num_forwards for run in of)
        seconds = timings[name].seconds_median
        rows.append(
            [
                name,
                f"{sum(run.right for run in of)} of {len(of)}",
                f"{num_forwards / len(of):.1f}",
                f"{seconds:.3f}",
                f"{sum(run.num_tokens for run in of) / num_forwards:.2f}",
                f"{seconds / timings[fastest].seconds_median:.1f}x",
            ]
        )
    print()
    print_table(["model", "right", "passes", "median s", "tok/pass", "vs. student"], rows)
