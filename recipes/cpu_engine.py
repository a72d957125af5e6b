"""What the engine gains on this CPU: the student, the causal model against transformers, the first token of a process.

    python recipes/cpu_engine.py --output results/cpu_engine.json

All contenders answer each problem in turn, one prompt at a time; ratios are medians over the problems. Run it on a
machine that is idle otherwise.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from run_recipe import run_recipe
from task_options import Many

import fewstep
from fewstep.engine.language_model import LanguageModel
from fewstep.measure.timing import Timed, Timing, time_interleaved, write_figures
from fewstep.tasks.gsm_symbolic import problems as problems_of
from fewstep.tasks.scoring import NUMBER

app = typer.Typer(pretty_exceptions_enable=False)

FIRST_TOKEN = """
import fewstep
for event in fewstep.load("gsm-student", device="cpu").stream("Tom has 3 boxes of 12 pens. How many pens has he?"):
    break
"""

RATIOS = {
    "student: plain float32 / engine": ("student, plain float32", "student, engine"),
    "causal: transformers / plain": ("causal, transformers", "causal, plain"),
    "causal: transformers / engine": ("causal, transformers", "causal, engine"),
    "causal / the student drafts for it, both in the engine": ("causal, engine", "causal, engine, the student drafts"),
    "causal / drafter, both in the engine": ("causal, engine", "drafter, engine"),
}


@dataclass(frozen=True)
class _Answer:
    """Of transformers: a pass for each token."""

    seconds: float
    num_forwards: int
    num_tokens: int
    token_ids: list[int]
    text: str = ""


def of_transformers(lm: LanguageModel, question: str) -> _Answer:
    """Greedy decoding by the stock module's own `generate`, with its cache."""
    prompt = torch.tensor([lm.encode(question)])
    started_s = time.perf_counter()
    found = lm.network.module.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=256, do_sample=False
    )
    seconds = time.perf_counter() - started_s
    token_ids = found[0, prompt.shape[1] :].tolist()
    return _Answer(seconds, len(token_ids), len(token_ids), token_ids)


def first_token_seconds() -> float:
    """From the start of a process to its first token."""
    started_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST_TOKEN], check=True)
    return time.perf_counter() - started_s


@app.command()
def main(
    problems: Many = 30,
    starts: Annotated[int, typer.Option(min=1, help="processes started for the first token")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="of torch; by default as many as it takes")] = None,
    output: Path | None = None,
) -> None:
    """Print times and ratios, and write them as JSON."""
    if threads is not None:
        torch.set_num_threads(threads)
    student, causal, drafter = (fewstep.load(name, device="cpu") for name in ("gsm-student", "gsm-ar", "gsm-draft"))
    takers: dict[str, Callable[[Any], Timed]] = {
        "student, plain float32": partial(student.generate, engine="off"),
        "student, engine": student.generate,
        "causal, plain": partial(causal.generate, engine="off"),
        "causal, engine": causal.generate,
        "causal, transformers": partial(of_transformers, causal),
        "causal, engine, the student drafts": partial(causal.generate, decoder="speculative", draft="gsm-student"),
        "drafter, engine": drafter.generate,
    }
    kept: dict[str, list[Any]] = {name: [] for name in takers}

    def keeping(name: str, question: str) -> Timed:
        answer = takers[name](question)
        kept[name].append(answer)
        return answer

    asked = problems_of("dev", problems)
    timings = time_interleaved(
        {name: partial(keeping, name) for name in takers}, [problem.question for problem in asked]
    )
    answers = {name: several[1:] for name, several in kept.items()}  # the first warmed up
    ratios = {name: _ratio(timings[first], timings[second]) for name, (first, second) in RATIOS.items()}
    same = {name: _same(answers[name], answers[_reference(name)]) for name in takers}
    solved = {
        name: sum(NUMBER.is_correct(one.text, problem.answer) for one, problem in zip(several, asked, strict=True))
        for name, several in answers.items()
        if name != "causal, transformers"
    }
    starting_s = statistics.median(first_token_seconds() for _ in range(starts))
    for name, timing in timings.items():
        print(f"{name}: {timing.step_ms:.2f} ms a pass, {timing.seconds_median:.3f} s an answer, {same[name]} alike")
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    print(f"first token of a process: {starting_s:.2f} s")
    if output is not None:
        figures = {
            "problems": problems,
            "choices": {name: lm.choice().dtype for name, lm in (("student", student), ("causal", causal))},
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "ratios": ratios, "identical": same, "solved": solved, "first_token_seconds": starting_s,
        }  # fmt: skip
        write_figures(output, figures)


def _reference(name: str) -> str:
    """Whose texts it should write."""
    return "student, plain float32" if name.startswith("student") else "causal, plain"


def _ratio(first: Timing, second: Timing) -> float:
    """The median over the problems."""
    return statistics.median(one / other for one, other in zip(first.seconds, second.seconds, strict=True))


def _same(several: list[Any], others: list[Any]) -> int:
    return sum(one.token_ids == other.token_ids for one, other in zip(several, others, strict=True))


if __name__ == "__main__":
    run_recipe(app)
