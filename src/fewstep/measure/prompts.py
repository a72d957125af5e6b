"""Prompts to measure with: real texts, or random tokens of a given number."""

from collections.abc import Sequence
from itertools import cycle, islice

import torch

from fewstep.engine.language_model import LanguageModel, Prompt
from fewstep.errors import FewstepError
from fewstep.models.network import Network


def random_prompts(network: Network, count: int, length: int, *, seed: int) -> list[list[int]]:
    """Tokens drawn evenly from those that a text may hold: no mask token, none that ends a text."""
    special = {*network.never_drawn.tolist(), *network.stop_token_ids, network.pad_token_id}
    ids = torch.tensor([one for one in range(network.end_of_tokens) if one not in special])
    if not len(ids):
        raise FewstepError(f"{network.name} has no tokens beside its special ones, so there are no random prompts")
    drawn = torch.randint(len(ids), (count, length), generator=torch.Generator().manual_seed(seed))
    return ids[drawn].tolist()


def real_prompts(lm: LanguageModel, prompts: Sequence[Prompt], count: int, length: int | None) -> list[list[int]]:
    """The first prompts, from the beginning again if there are too few, as the model reads them.

    With a `length` each has so many tokens: its own, behind those of as many others as are needed.
    """
    encoded = [lm.encode(prompt) for prompt in prompts[:count]]
    if length is not None:
        encoded = [_of_length(encoded[index:] + encoded[:index], length) for index in range(len(encoded))]
    return list(islice(cycle(encoded), count))


def _of_length(prompts: Sequence[list[int]], length: int) -> list[int]:
    """The end of the first prompt, which begins the answer, behind the others; the first token stays the first."""
    ids: list[int] = []
    for prompt in cycle(prompts):
        ids = [*prompt, *ids]
        if len(ids) >= length:
            return [ids[0], *ids[len(ids) - length + 1 :]]
    raise AssertionError("there is a prompt, which is not empty")
