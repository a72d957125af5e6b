"""How often a gap of unknown length is filled at its true length, and with its true text, by a running server.

    fewstep serve gsm-teacher,threshold=0.9
    python recipes/infill_lengths.py http://127.0.0.1:8000 --problems 40 --output results/infill_lengths.json

The model answers a problem; a span of 1 to 12 tokens of its answer is cut out, at places drawn by the seed, and asked
for again as a gap between what stands before it (with the question) and behind it.
"""

from run_recipe import run_recipe  # isort: skip  (before what takes long to import)

import random
from pathlib import Path
from typing import Annotated, Any

import httpx2
import typer
from task_options import Many

import fewstep
from fewstep.errors import FewstepError
from fewstep.json_files import write_json_whole
from fewstep.measure.metrics import wilson_interval
from fewstep.tasks.gsm_symbolic import problems as problems_of

app = typer.Typer(pretty_exceptions_enable=False)

LONGEST_SPAN = 12


def completed(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """FewstepError if the server does not answer."""
    try:
        response = httpx2.post(f"{url}/v1/completions", json=body, timeout=600)
        response.raise_for_status()
    except httpx2.HTTPError as error:
        raise FewstepError(f"the server at {url} did not fill a gap: {error}; is it running?") from None
    answer: dict[str, Any] = response.json()
    return answer


@app.command()
def main(
    url: str,
    problems: Many = 40,
    model: str = "gsm-teacher",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest gap that is tried")] = 16,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Print the shares of gaps that come back with their length, and with their text."""
    lm, draw = fewstep.load(model), random.Random(seed)
    decode = lm.network.tokenizer.decode
    lengths, texts = 0, 0
    for problem in problems_of("dev", problems):
        prompt_ids = lm.encode(problem.question)
        answer_ids = lm.generate(problem.question, max_new_tokens=128, threshold=0.9).token_ids
        span = draw.randint(1, min(LONGEST_SPAN, len(answer_ids) - 2))
        start = draw.randrange(1, len(answer_ids) - span)
        gap = answer_ids[start : start + span]
        body = {
            "model": model,
            "prompt": decode([*prompt_ids, *answer_ids[:start]]),
            "suffix": decode(answer_ids[start + span :]),
            "max_tokens": max_tokens,
        }
        filled = completed(url, body)
        lengths += filled["usage"]["fewstep"]["gap"] == span
        texts += filled["choices"][0]["text"] == decode(gap)
    report = {"model": model, "n": problems, "longest_gap": max_tokens, "seed": seed}
    for name, count in (("exact_length", lengths), ("exact_text", texts)):
        share = wilson_interval(count, problems)
        report |= {name: share.estimate, f"{name}_ci95": [share.low, share.high]}
        print(f"{name.replace('_', ' ')}: {count} of {problems} ({share.low:.2f} to {share.high:.2f})")
    if output is not None:
        write_json_whole(output, report)


if __name__ == "__main__":
    run_recipe(app)
