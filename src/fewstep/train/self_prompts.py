"""Prompts that a chat model writes itself: what it samples where a user's turn begins (Magpie, arXiv 2406.08464)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fewstep.decode.health import REPEATED_NGRAM, repetition
from fewstep.decode.loop import decode
from fewstep.decode.requests import Output, Request
from fewstep.decode.sampling import Sampling
from fewstep.engine.language_model import LanguageModel
from fewstep.models.rows import split_row
from fewstep.models.text import Message, decode_text, encode_before_user
from fewstep.train.examples import numbered_training_rows

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


def sample_prompts(
    lm: LanguageModel,
    said: Sequence[Sequence[Message]],
    *,
    sampling: Sampling,
    max_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> Iterator[tuple[Sequence[Message], str]]:
    """What a user could say next after each of these conversations, which may be empty, with the conversation.

    Kept are prompts that end within `max_tokens`, have FEWEST_WORDS words and repeat little, each once. Sample i has
    the seed `seed` + i. FewstepError if the model has no chat template.
    """
    starts = {id(one): encode_before_user(lm.network.tokenizer, one) for one in said}
    requests = [
        Request(prompt_ids=starts[id(one)], max_new_tokens=max_tokens, seed=seed + i, sampling=sampling)
        for i, one in enumerate(said)
    ]
    outputs = decode(lm.network, requests, lm.decoder(decoder="autoregressive"), batch_size=batch_size)
    for place, text in kept(lm, outputs):
        yield said[place], text
