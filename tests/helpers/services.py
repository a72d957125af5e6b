"""Models of every decoder with settings that a batch mixes, and a service of them."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from golden_tokens import medusa_heads, tiny

from fewstep.decode.requests import Output
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.service import Handle, Service, Update
from helpers.networks import block_draft_of, disturbed, network, with_random_adapter

SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.5, "top_k": 9, "seed": 3},
    {"temperature": 0.7, "top_p": 0.9},
]
GREEDY: list[dict[str, Any]] = [{}, {"seed": 4}]
RULES: list[dict[str, Any]] = [{"threshold": 0.2}, {"threshold": 0.5, "gaps": 0}, {"threshold": 0.4, "gaps": 2}]

DECODERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "block": ({}, [one | rule for one in SAMPLED for rule in RULES]),
    "shifted block": ({}, [one | rule for one in SAMPLED for rule in RULES]),
    "diffusion": ({"block_size": 8}, [one | rule for one in SAMPLED for rule in RULES]),
    "steps": ({"block_size": 8, "steps": 9}, SAMPLED),
    "autoregressive": ({}, SAMPLED),
    "jacobi": ({"decoder": "jacobi", "window": 5}, GREEDY),
    "lookahead": ({"decoder": "lookahead", "window": 4}, GREEDY),
    "prompt-lookup": ({"decoder": "prompt-lookup"}, SAMPLED),
    "medusa": ({"decoder": "medusa", "window": 12}, GREEDY),
    "speculative": ({"decoder": "speculative", "draft": "draft", "window": 3}, SAMPLED),
    "block draft": ({"decoder": "speculative", "draft": "draft"}, SAMPLED),
    "self-speculative": ({"decoder": "self-speculative", "window": 4, "cycle": "fused"}, SAMPLED),
    "two-pass": ({"decoder": "self-speculative", "window": 4, "cycle": "two-pass"}, SAMPLED),
}
"""Settings that all requests share, and those of which no two have the same."""

PROMPTS = ["a", "what is 2+2?", "how many of them are left in the box, and how many not?", "x=1, y=2", "say it again"]


def model(name: str) -> LanguageModel:
    """A random model for one of `DECODERS`, with the draft that it needs."""
    match name:
        case "block":
            return LanguageModel(network("block_causal"))
        case "shifted block":
            return LanguageModel(network("shifted block_causal"))
        case "diffusion" | "steps":
            return LanguageModel(network("bidirectional"))
        case "self-speculative" | "two-pass":
            return LanguageModel(with_random_adapter(8))
        case "medusa":
            return LanguageModel(tiny("autoregressive").network)
    lm = LanguageModel(network("autoregressive"))
    if name == "speculative":
        lm._loops._drafts["draft"] = disturbed(network("autoregressive"))
    if name == "block draft":
        lm._loops._drafts["draft"] = block_draft_of(lm.network)
    return lm


def asked(name: str, count: int, **options: Any) -> list[tuple[str, dict[str, Any]]]:
    """Prompts with settings, mixed."""
    shared, mixed = DECODERS[name]
    if name == "medusa":
        shared = shared | {"heads": medusa_heads()}
    return [
        (
            PROMPTS[i % len(PROMPTS)] * (1 + i % 3),
            {**shared, **mixed[i % len(mixed)], "max_new_tokens": 5 + 7 * i % 19, **options},
        )
        for i in range(count)
    ]


def alone(lm: LanguageModel, several: list[tuple[str, dict[str, Any]]]) -> list[Output]:
    """What the plain path answers, one at a time."""
    return [lm.generate(prompt, engine="off", **settings) for prompt, settings in several]


def run_in(service: Callable[[], Service], program: Callable[[Service], Awaitable[Any]], seconds: float = 60) -> Any:
    """What the program returns, with a service that is stopped after it."""

    async def run() -> Any:
        async with service() as made:
            return await asyncio.wait_for(program(made), seconds)

    return asyncio.run(run())


async def read(handle: Handle) -> list[Update]:
    return [update async for update in handle]
