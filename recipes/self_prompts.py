"""Prompts that a chat model writes itself: what it samples where a user's turn would begin (Magpie, arXiv 2406.08464).

    python recipes/self_prompts.py runs/smollm/smollm2 runs/chat/prompts.jsonl --count 8192

A model that was tuned on conversations has learnt what users say too. Its own prompts are what its Jacobi trajectories
can be made of (`fewstep collect`) where no prompts of its users are at hand. What the template says before the first
user, such as a system prompt, comes before them too. Kept are prompts that end within the limit, have at least three
words and repeat little, each once; the file has {"id", "prompt"} in each row.

`--after FILE` samples what users say next instead, after conversations (rows of prompt and completion, or of messages):
the file then has {"id", "messages"} in each row.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from run_recipe import run_recipe

from fewstep.decode.health import REPEATED_NGRAM, repetition
from fewstep.decode.loop import decode
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.engine.language_model import LanguageModel, load
from fewstep.errors import FewstepError
from fewstep.json_files import write_rows_whole
from fewstep.models.rows import split_row
from fewstep.models.text import Message, decode_text, encode_before_user
from fewstep.train.examples import numbered_training_rows

app = typer.Typer(pretty_exceptions_enable=False)

FEWEST_WORDS = 3
MOST_REPETITION = 0.2


def conversations_in(path: Path, limit: int) -> Iterator[list[Message]]:
    """The first rows of a file, each with its answer. FewstepError for a row without one."""
    for line, row in islice(numbered_training_rows(path), limit):
        prompt, answer = split_row(row, f"{path} line {line}")
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        yield [*asked, {"role": "assistant", "content": answer}]


def kept(lm: LanguageModel, outputs: Iterable[Output]) -> Iterator[tuple[int, str]]:
    """The texts that can be prompts, each once, and the places of their outputs."""
    seen: set[str] = set()
    for place, output in enumerate(outputs):
        text = decode_text(lm.network.tokenizer, output.token_ids).strip()
        whole = output.finish_reason == "stop" and len(text.split()) >= FEWEST_WORDS
        if whole and text not in seen and repetition(np.asarray(output.token_ids), REPEATED_NGRAM) <= MOST_REPETITION:
            seen.add(text)
            yield place, text


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
    said = [[]] if after is None else list(conversations_in(after, count))
    starts = [encode_before_user(lm.network.tokenizer, one) for one in said]
    if after is None:
        starts *= count
    sampling = Sampling(temperature=temperature, top_p=top_p)
    requests = [
        Request(prompt_ids=start, max_new_tokens=max_tokens, seed=seed + i, sampling=sampling)
        for i, start in enumerate(starts)
    ]
    decoder = lm.decoder(decoder="autoregressive")
    texts = list(kept(lm, decode(lm.network, requests, decoder, batch_size=batch_size)))
    if not texts:
        raise FewstepError(f"none of {len(requests)} samples can be a prompt; is {model} a chat model?")
    rows = (
        {"id": f"own-{i}", "prompt": text}
        if after is None
        else {"id": f"own-{i}", "messages": [*said[place], {"role": "user", "content": text}]}
        for i, (place, text) in enumerate(texts)
    )
    write_rows_whole(output, rows)
    print(f"{output}: {len(texts)} of {len(requests)} samples", flush=True)


if __name__ == "__main__":
    run_recipe(app)
