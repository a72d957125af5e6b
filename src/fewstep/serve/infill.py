"""Filling a gap of unknown length: several lengths are decoded as a batch, and the most probable text wins.

How probable the gap itself is says little: a text that only goes on from what stands before is probable at any length.
Therefore the first tokens behind the gap count too. They are masked once more, and scored in the filled text.
"""

import asyncio
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from fewstep.decode.decoder import whole_blocks
from fewstep.decode.requests import Output
from fewstep.serve.answering import LEAST_LOG_PROB, Asked, outputs_of
from fewstep.serve.catalogue import Entry
from fewstep.serve.errors import ApiError
from fewstep.serve.server import Server

DEFAULT_GAP_LIMIT = 32
"""Longest gap that is tried, where the request sets no limit."""

MOST_FILLED_AT_ONCE = 4
"""Answers to one request for a gap that are worked on at a time."""

TRIED_ONE_BY_ONE = 16
"""Every length up to this one is tried; of longer ones some, and then those around the best."""

MOST_REFINED = 8
"""Lengths that are tried around the best of the first ones."""

SEAM = 4
"""Tokens behind the gap that are scored with it."""

SEAM_BUCKET = 64
"""Texts are scored in blocks of a multiple of this length."""


@dataclass(frozen=True)
class Filled:
    """A filled gap: what was asked, what came out, and for each length tried the mean log-probability of its tokens and
    of the first ones behind it.
    """

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
    if gap is not None and limit is not None and gap > limit[1]:
        raise ApiError(
            f"fewstep.gap asks for {gap} tokens, and {limit[0]} allows {limit[1]}; lower the one or raise the other",
            param="fewstep.gap",
            code="invalid_value",
        )
    name = "fewstep.gap" if gap is not None else "prompt" if limit is None else limit[0]
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


def with_seeds(asked: Asked, seeds: Sequence[int]) -> list[Asked]:
    """The same request once for each seed."""
    return [replace(asked, settings={**asked.settings, "seed": seed}) for seed in seeds]


async def fill(server: Server, request: Request, asked: Asked, suffix_ids: Sequence[int]) -> Filled:
    """The best filling of all lengths up to the limit: first short lengths and some longer ones, then those beside the
    best of them.
    """
    longest = asked.settings["max_new_tokens"]
    found: dict[int, tuple[Asked, Output]] = {}
    scores: dict[int, float] = {}
    num_forwards = 0

    async def attempt(lengths: Sequence[int]) -> int:
        nonlocal num_forwards
        several = [with_gap(asked, suffix_ids, length) for length in lengths]
        outputs = await outputs_of(await server.begin(request, several))
        seams = [seam_of(one, output, suffix_ids, longest) for one, output in zip(several, outputs, strict=True)]
        scored = await outputs_of(await server.begin(request, seams)) if suffix_ids else [None] * len(lengths)
        for length, one, output, seam in zip(lengths, several, outputs, scored, strict=True):
            found[length] = one, output
            scores[length] = mean_log_prob(output, seam, length, suffix_ids)
            num_forwards += output.num_forwards + (0 if seam is None else seam.num_forwards)
        return max(scores, key=lambda length: scores[length])

    best = await attempt(first_lengths(longest))
    if beside := lengths_beside(best, sorted(found)):
        best = await attempt(beside)
    return Filled(*found[best], scores=scores, num_forwards=num_forwards)


def seam_of(asked: Asked, output: Output, suffix_ids: Sequence[int], longest: int) -> Asked:
    """A request that scores the first tokens behind the filled gap: they are masked, and become final in one pass.

    The whole text is one block for it, whose length is that of the longest gap and one of few, so that the requests of
    all lengths share passes.
    """
    length, width = asked.num_open, min(SEAM, len(suffix_ids))
    mask_token_id = asked.entry.lm.role.mask_token_id
    assert mask_token_id is not None
    canvas = [*output.token_ids[:length], *[mask_token_id] * width, *suffix_ids[width:]]
    one_block = whole_blocks(len(asked.prompt_ids) + longest + len(suffix_ids), SEAM_BUCKET)
    settings = {"policy": "fixed", "tokens_per_pass": max(1, width), "block_size": one_block}
    return replace(asked, canvas=canvas, settings=settings, top_log_probs=True)


async def fill_all(
    server: Server, request: Request, asked: Asked, suffix_ids: Sequence[int], seeds: Sequence[int]
) -> list[Filled]:
    """One filling for each seed, a few at a time: each has requests of many lengths, and all of them at once would be
    more than may wait. If one fails, or nobody waits any longer, the others are given up.
    """
    places = asyncio.Semaphore(MOST_FILLED_AT_ONCE)

    async def filled(one: Asked) -> Filled:
        async with places:
            return await fill(server, request, one, suffix_ids)

    doing = [asyncio.ensure_future(filled(one)) for one in with_seeds(asked, seeds)]
    try:
        return list(await asyncio.gather(*doing))
    finally:
        for task in doing:
            task.cancel()
        await asyncio.gather(*doing, return_exceptions=True)


def first_lengths(longest: int) -> list[int]:
    """1 to 16, then 24, 32, 48, 64 ... and the longest."""
    lengths, step = list(range(1, TRIED_ONE_BY_ONE + 1)), TRIED_ONE_BY_ONE
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


def mean_log_prob(output: Output, seam: Output | None, length: int, suffix_ids: Sequence[int]) -> float:
    """Of the tokens of the gap, when each became final, and of the first tokens behind it, given the filled gap.

    Of a token that is not among the most probable ones, the probability of the last of these is taken.
    """
    of_gap = output.confidence_G[:length].double().log().clamp(min=LEAST_LOG_PROB).tolist()
    of_seam = []
    if seam is not None:
        assert seam.top_k is not None
        for place, token_id in enumerate(suffix_ids[:SEAM], start=length):
            ids, log_probs = seam.top_k.ids_GK[place].tolist(), seam.top_k.log_probs_GK[place].tolist()
            found = log_probs[ids.index(token_id)] if token_id in ids else log_probs[-1]
            of_seam.append(max(found, LEAST_LOG_PROB))
    return float(statistics.fmean([*of_gap, *of_seam]))
