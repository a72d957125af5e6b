"""What the engine gains on this CPU: the student, the causal model against transformers, the first token of a process.

    python recipes/cpu_engine.py --output results/cpu_engine.json

All contenders answer each problem in turn, one prompt at a time; ratios are medians over the problems. Run it on a
machine that is idle otherwise.
"""

import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from run_recipe import run_recipe
from task_options import Many

import fewstep
from fewstep.decode.requests import Output
from fewstep.measure.agreement import same_answers
from fewstep.measure.stock import generate_with_transformers
from fewstep.measure.timing import time_interleaved, write_figures
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
    takers: dict[str, Any] = {
        "student, plain float32": partial(student.generate, engine="off"),
        "student, engine": student.generate,
        "causal, plain": partial(causal.generate, engine="off"),
        "causal, engine": causal.generate,
        "causal, transformers": partial(generate_with_transformers, causal),
        "causal, engine, the student drafts": partial(causal.generate, decoder="speculative", draft="gsm-student"),
        "drafter, engine": drafter.generate,
    }
    asked = problems_of("dev", problems)
    answers: dict[str, list[Output]] = {name: [] for name in takers}
    timings = time_interleaved(
        takers, [problem.question for problem in asked], on_answer=lambda name, answer: answers[name].append(answer)
    )
    ratios = {name: timings[first].over(timings[second]) for name, (first, second) in RATIOS.items()}
    plain = {"student": answers["student, plain float32"], "causal": answers["causal, plain"]}
    same = {
        name: same_answers(several, plain["student" if name.startswith("student") else "causal"])["same"]
        for name, several in answers.items()
    }
    solved = {
        name: sum(NUMBER.is_correct(one.text, problem.answer) for one, problem in zip(several, asked, strict=True))
        for name, several in answers.items()
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


if __name__ == "__main__":
    run_recipe(app)
