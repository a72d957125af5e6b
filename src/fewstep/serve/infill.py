"""Filling a gap of unknown length: several lengths are decoded as a batch, and the most probable text wins."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from fewstep.decode.requests import Output
from fewstep.serve.answering import LEAST_LOG_PROB, Asked, outputs_of
from fewstep.serve.catalogue import Entry
from fewstep.serve.errors import ApiError
from fewstep.serve.server import Server

DEFAULT_GAP_LIMIT = 32
"""Longest gap that is tried, where the request sets no limit."""

MOST_REFINED = 8
"""Lengths that are tried around the best of the first ones."""


@dataclass(frozen=True)
class Filled:
    """A filled gap: what was asked, what came out, and the mean log-probability of a token for each length tried."""

    asked: Asked
    output: Output
    scores: Mapping[int, float]
    num_forwards: int

    @property
    def told(self) -> dict[str, Any]:
        """For the usage."""
        candidates = [{"gap": length, "mean_logprob": round(score, 6)} for length, score in sorted(self.scores.items())]
        return {"gap": self.asked.num_open, "candidates": candidates}


def check_infills(server: Server, entry: Entry) -> None:
    """ApiError for a model that sees nothing behind a gap."""
    if entry.infills:
        return
    others = [other.name for other in server.catalogue.entries.values() if other.infills]
    advice = f"ask {' or '.join(others)}" if others else "serve a bidirectional model"
    raise ApiError(
        f"{entry.name} has the role {entry.lm.role.name}, which sees nothing behind a gap, so it takes no suffix; "
        f"{advice}, or leave the suffix out",
        param="suffix",
        code="unsupported_parameter",
    )


async def gap_between(
    server: Server,
    entry: Entry,
    prefix: str,
    suffix: str,
    settings: Mapping[str, Any],
    *,
    limit: tuple[str, int] | None,
    gap: int | None,
) -> tuple[Asked, list[int]]:
    """A request for the gap, without its canvas, and the ids of the suffix; the canvas is `with_gap`.

    `max_new_tokens` of its settings is the longest gap. ApiError if there is no room for it.
    """
    for name in ("canvas_length", "early_stop", "alg"):
        if name in settings:
            raise ApiError(f"a gap takes no {name}: it says itself what is filled; leave it out", param=name)
    prefix_ids = await server.encoder.continued(entry, prefix)
    suffix_ids = await server.encoder.continued(entry, suffix)
    given, most = len(prefix_ids) + len(suffix_ids), entry.lm.network.max_positions
    name = "prompt" if limit is None else limit[0]
    longest = gap or (max(1, min(DEFAULT_GAP_LIMIT, most - given)) if limit is None else limit[1])
    if given + longest > most:
        raise ApiError(
            f"a text of {given} tokens and a gap of {longest} exceed the {most} positions of {entry.name}; shorten "
            "one of them",
            param=name,
            code="context_length_exceeded",
        )
    if not prefix_ids and entry.lm.role.scores_next_token:
        raise ApiError(
            f"{entry.name} scores a token from the one before it, so a gap cannot come first; give a prompt",
            param="prompt",
            code="invalid_value",
        )
    own = {name: value for name, value in settings.items() if name != "max_new_tokens"}
    asked = Asked(entry=entry, prompt_ids=prefix_ids, settings={**own, "max_new_tokens": longest})
    return asked, suffix_ids


def with_gap(asked: Asked, suffix_ids: Sequence[int], length: int) -> Asked:
    """The request for a gap of this length."""
    mask_token_id = asked.entry.lm.role.mask_token_id
    assert mask_token_id is not None
    canvas = [*[mask_token_id] * length, *suffix_ids]
    return replace(asked, canvas=canvas, settings={**asked.settings, "max_new_tokens": len(canvas)})


async def fill(server: Server, request: Request, asked: Asked, suffix_ids: Sequence[int]) -> Filled:
    """The best filling of all lengths up to the limit: first lengths that grow like 1, 2, 3, 4, 6, 8, 12, 16, then
    those beside the best of them.
    """
    longest = asked.settings["max_new_tokens"]
    found: dict[int, tuple[Asked, Output]] = {}

    async def attempt(lengths: Sequence[int]) -> int:
        several = [with_gap(asked, suffix_ids, length) for length in lengths]
        outputs = await outputs_of(await server.begin(request, several))
        found.update(zip(lengths, zip(several, outputs, strict=True), strict=True))
        return max(found, key=lambda length: mean_log_prob(found[length][1], length))

    best = await attempt(first_lengths(longest))
    if beside := lengths_beside(best, sorted(found)):
        best = await attempt(beside)
    return Filled(
        *found[best],
        scores={length: mean_log_prob(output, length) for length, (_, output) in found.items()},
        num_forwards=sum(output.num_forwards for _, output in found.values()),
    )


async def fill_all(
    server: Server, request: Request, asked: Asked, suffix_ids: Sequence[int], seeds: Sequence[int]
) -> list[Filled]:
    """One filling for each seed."""
    several = [replace(asked, settings={**asked.settings, "seed": seed}) for seed in seeds]
    return list(await asyncio.gather(*(fill(server, request, one, suffix_ids) for one in several)))


def first_lengths(longest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24 ... and the longest."""
    lengths, step = [1, 2, 3], 4
    while step <= longest:
        lengths += [step, step * 3 // 2]
        step *= 2
    return sorted({*(length for length in lengths if length <= longest), longest})


def lengths_beside(best: int, tried: Sequence[int]) -> list[int]:
    """Lengths between the best and its neighbours, evenly spread if they are many."""
    place = tried.index(best)
    low = tried[place - 1] if place else 0
    high = tried[place + 1] if place + 1 < len(tried) else best
    between = [length for length in range(low + 1, high) if length != best]
    every = max(1, math.ceil(len(between) / MOST_REFINED))
    return between[::every]


def mean_log_prob(output: Output, length: int) -> float:
    """Of the tokens of the gap, when each became final."""
    probabilities = output.confidence_G[:length].double()
    return float(probabilities.log().clamp(min=LEAST_LOG_PROB).mean())
