"""Time at batch 1: medians after a warm-up, several contenders interleaved in one run, and the machine they ran on.

Speeds of different runs or machines are not compared. `time_interleaved` lets every contender answer the same problem
before the next one comes, so drift of the machine falls on all of them alike.
"""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole


class Timed(Protocol):
    """An answer, or what is kept of one."""

    @property
    def seconds(self) -> float: ...

    @property
    def num_forwards(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass
class Timing:
    """What one contender needed for each problem, in the order of the problems."""

    seconds: list[float] = field(default_factory=list)
    num_forwards: list[int] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)

    def add(self, output: Timed) -> None:
        self.seconds.append(output.seconds)
        self.num_forwards.append(output.num_forwards)
        self.num_tokens.append(output.num_tokens)

    def at(self, indices: Sequence[int]) -> "Timing | None":
        """The part about the problems at these places; None for no place."""
        if not indices:
            return None
        return Timing(*([of[i] for i in indices] for of in (self.seconds, self.num_forwards, self.num_tokens)))  # type: ignore[arg-type]

    def over(self, other: "Timing") -> float:
        """How many times as long it took as the other: the median over the problems, which both had in one order."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))

    @property
    def seconds_median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def step_ms(self) -> float:
        """Milliseconds for one pass: the ratio of the sums."""
        return 1000 * sum(self.seconds) / sum(self.num_forwards)

    @property
    def tokens_per_forward(self) -> float:
        return sum(self.num_tokens) / sum(self.num_forwards)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.num_tokens) / sum(self.seconds)

    def to_json(self) -> dict[str, float]:
        return {
            "n": len(self.seconds),
            "seconds_median": self.seconds_median,
            "num_forwards_mean": statistics.fmean(self.num_forwards),
            "num_tokens_mean": statistics.fmean(self.num_tokens),
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
            "step_ms": self.step_ms,
        }


@dataclass(frozen=True)
class SpeedFactors:
    """Why the student is faster than the published teacher, at batch 1; the three factors multiply to `total`.

    `stopping`: teacher without early stop / with it, in seconds. `fewer_passes`: teacher's passes / student's, both
    stopping. `caching`: time of a teacher's pass / of a student's, which scores a block instead of the whole canvas.
    All are ratios of sums, or of medians, over the same problems; `median_total` is the ratio of the median seconds,
    for tables.
    """

    total: float
    stopping: float
    fewer_passes: float
    caching: float
    median_total: float


def speed_factors(
    published: Timing, stopping: Timing, student: Timing, *, of: Callable[[Sequence[float]], float] = sum
) -> SpeedFactors:
    """Factors of `published` (all passes, no cache) over `student`, by way of `stopping` (the same, stopping early).

    `of`: the sum of a list of seconds or passes, or its median, which one disturbed run among a few hardly moves.
    """
    fewer_passes = of(stopping.num_forwards) / of(student.num_forwards)
    return SpeedFactors(
        total=of(published.seconds) / of(student.seconds),
        stopping=of(published.seconds) / of(stopping.seconds),
        fewer_passes=fewer_passes,
        caching=of(stopping.seconds) / of(student.seconds) / fewer_passes,
        median_total=published.seconds_median / student.seconds_median,
    )


def time_interleaved(
    contenders: Mapping[str, Callable[[Any], Timed]],
    prompts: Sequence[Any],
    *,
    progress: Callable[[], None] | None = None,
    on_answer: Callable[[str, Any], None] | None = None,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Let every contender answer every prompt, one prompt after another; the first to go changes with the prompt.

    Before that each answers the first prompt once unmeasured, unless `warm_up` is off. `progress` is called after each
    prompt, and `on_answer` with the contender's name and each answer that is timed. A prompt is whatever the contenders
    take.
    """
    if not prompts or not contenders:
        raise FewstepError("there is nothing to time: give at least one prompt and one model")
    names = list(contenders)
    for name in names if warm_up else ():
        contenders[name](prompts[0])
    timings = {name: Timing() for name in names}
    for index, prompt in enumerate(prompts):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            answer = contenders[name](prompt)
            timings[name].add(answer)
            if on_answer is not None:
                on_answer(name, answer)
        if progress is not None:
            progress()
    return timings


def matmul_flops_per_second(
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 50,
    of: Callable[[Sequence[float]], float] = statistics.median,
) -> float:
    """The rate of size x size matrix products: 2 size^3 operations each, the median `of` five series."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    rates = []
    for _ in range(6):
        wait()
        started_s = time.perf_counter()
        for _ in range(repeats):
            a @ b
        wait()
        rates.append(repeats * 2 * size**3 / (time.perf_counter() - started_s))
    return of(rates[1:])  # the first series warms up


def this_command() -> str:
    """How this program was started, for a figure that names its source."""
    return shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def describe_machine() -> dict[str, Any]:
    """What a figure has to be printed with: processor, threads, GPU if there is one, versions."""
    return {
        "cpu": _processor_name(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON behind the command and the machine that they come from; figures of those names stand for
    them.
    """
    write_json_whole(path, {"command": this_command(), "machine": describe_machine(), **figures})


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()
