"""Prompts that a chat model writes itself: what it samples where a user's turn would begin (Magpie, arXiv 2406.08464).

    python recipes/self_prompts.py runs/smollm/smollm2 runs/chat/prompts.jsonl --count 8192

A model that was tuned on conversations has learnt what users say too. Its own prompts are what its Jacobi trajectories
can be made of (`fewstep collect`) where no prompts of its users are at hand. What the template says before the first
user, such as a system prompt, comes before them too. Kept are prompts that end within the limit, have at least three
words and repeat little, each once; the file has {"id", "prompt"} in each row.

`--after FILE` samples what users say next instead, after conversations (rows of prompt and completion, or of messages):
the file then has {"id", "messages"} in each row.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from run_recipe import run_recipe

from fewstep.decode.sampling import Sampling
from fewstep.engine.language_model import load
from fewstep.errors import FewstepError
from fewstep.json_files import write_rows_whole
from fewstep.models.text import Message
from fewstep.train.self_prompts import conversations_in, sample_prompts

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="a chat model: a bundled name or a folder")],
    output: Annotated[Path, typer.Argument(help="JSONL file of the prompts")],
    count: Annotated[int, typer.Option(min=1, help="prompts sampled; fewer are kept")] = 8192,
    after: Annotated[Path | None, typer.Option(help="conversations that users go on with")] = None,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="of a prompt")] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 512,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Sample prompts and write them."""
    lm = load(model, "autoregressive", dtype, device)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    asked: dict[str, Any] = {"sampling": sampling, "max_tokens": max_tokens, "batch_size": batch_size, "seed": seed}
    said: list[list[Message]] = [[]] * count if after is None else list(conversations_in(after, count))
    found = list(sample_prompts(lm, said, **asked))
    if not found:
        raise FewstepError(f"none of {len(said)} samples can be a prompt; is {model} a chat model?")
    rows = (
        {"id": f"own-{i}", "prompt": text}
        if after is None
        else {"id": f"own-{i}", "messages": [*before, {"role": "user", "content": text}]}
        for i, (before, text) in enumerate(found)
    )
    write_rows_whole(output, rows)
    print(f"{output}: {len(found)} of {len(said)} samples", flush=True)


if __name__ == "__main__":
    run_recipe(app)
