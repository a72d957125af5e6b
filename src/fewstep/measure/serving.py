"""Load on a server of OpenAI's API: how long answers take, and how many are right in time, while others are answered.

Requests are streams. They begin at a rate, whatever is under way (open loop), or so many are under way (closed loop).
"""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx2
import numpy as np
from annotated_types import Ge, Gt, Le

from fewstep.engine.language_model import LanguageModel
from fewstep.errors import FewstepError
from fewstep.values import Count, Share, check_fields

CONNECT_S, ANSWER_S = 10.0, 600.0
"""How long a client of ours waits for a connection, and for the next bytes."""

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Load:
    """`concurrency`: so many requests at a time; or `rate`: so many begin in each second, at random times. Requests go
    on until `num_requests` have begun, or for `seconds`. `cut`: the share of them whose client goes before the end.

    `goal_s`: an answer within it counts for the goodput. FewstepError unless exactly one of each pair is given.
    """

    concurrency: Count | None = None
    rate: Annotated[float, Gt(0), Le(1e6)] | None = None
    num_requests: Count | None = None
    seconds: Annotated[float, Gt(0), Le(1e6)] | None = None
    cut: Share = 0.0
    goal_s: Annotated[float, Gt(0)] = 10.0
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for pair in (("concurrency", "rate"), ("num_requests", "seconds")):
            if sum(getattr(self, name) is not None for name in pair) != 1:
                raise FewstepError(f"a load has either {pair[0]} or {pair[1]}; give one of them")


@dataclass(frozen=True, kw_only=True)
class Asker:
    """Where requests go: the address of the server, and the fields of each besides its messages."""

    url: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = None

    def client(self) -> httpx2.AsyncClient:
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
        return httpx2.AsyncClient(base_url=self.url, headers=headers, limits=limits, timeout=timeout)


@dataclass
class Sent:
    """What became of one request. `outcome`: completed, cut, refused (429 or 503) or failed. Times in seconds from its
    beginning.
    """

    prompt: int
    outcome: str = "failed"
    first_text_s: float | None = None
    seconds: float = 0.0
    num_tokens: int = 0
    num_forwards: int = 0
    text: str = ""
    error: str | None = None


async def ask(
    client: httpx2.AsyncClient, asker: Asker, prompts: Sequence[Any], prompt: int, *, cut_after: int | None = None
) -> Sent:
    """Ask one of the prompts. `cut_after`: so many chunks with text are read, then the client goes."""
    sent, started_s = Sent(prompt), time.perf_counter()
    asked = prompts[prompt]
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    body = {**asker.fields, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                sent.error = f"status {response.status_code}: {_said(await response.aread())}"
                sent.outcome = "refused" if response.status_code in (429, 503) else "failed"
                return sent
            await _read(sent, response, started_s, cut_after)
    except httpx2.HTTPError as error:
        sent.error = f"{type(error).__name__}: {error}"
    finally:
        sent.seconds = time.perf_counter() - started_s
    return sent


def _said(body: bytes) -> str:
    """The sentence of an error in OpenAI's shape, or else how the body begins."""
    try:
        return str(json.loads(body)["error"]["message"])[:300]
    except (ValueError, TypeError, LookupError):
        return body[:300].decode(errors="replace")


async def _read(sent: Sent, response: httpx2.Response, started_s: float, cut_after: int | None) -> None:
    num_chunks = 0
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            sent.outcome = "completed"
        elif line.startswith("data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                sent.error = str(chunk["error"])[:300]
                return
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    num_chunks += 1
                    sent.text += text
                    if sent.first_text_s is None:
                        sent.first_text_s = time.perf_counter() - started_s
            if usage := chunk.get("usage"):
                sent.num_tokens = usage["completion_tokens"]
                sent.num_forwards = usage.get("fewstep", {}).get("num_forwards", 0)
        if cut_after is not None and num_chunks >= cut_after:
            sent.outcome = "cut"
            return


async def put_load(asker: Asker, prompts: Sequence[Any], load: Load) -> tuple[list[Sent], float]:
    """Send the requests, prompts in turn; what became of each, and how long all took in seconds."""
    draw = random.Random(load.seed)
    numbers = range(load.num_requests) if load.num_requests is not None else itertools.count()
    started_s = time.perf_counter()
    sent: list[Sent] = []

    def goes_on() -> bool:
        return load.seconds is None or time.perf_counter() - started_s < load.seconds

    async with asker.client() as client:

        async def one(number: int) -> None:
            cut_after = draw.randint(1, 8) if draw.random() < load.cut else None
            sent.append(await ask(client, asker, prompts, number % len(prompts), cut_after=cut_after))

        if load.concurrency is not None:
            waiting = iter(numbers)

            async def worker() -> None:
                for number in waiting:
                    if not goes_on():
                        return
                    await one(number)

            await asyncio.gather(*(worker() for _ in range(load.concurrency)))
        else:
            assert load.rate is not None
            tasks = []
            for number in numbers:
                if not goes_on():
                    break
                tasks.append(asyncio.create_task(one(number)))
                await asyncio.sleep(draw.expovariate(load.rate))
            await asyncio.gather(*tasks)
    return sent, time.perf_counter() - started_s


def answers_alone(asker: Asker, prompts: Sequence[Any]) -> list[Sent]:
    """Each prompt asked while nothing else is. FewstepError if one is not answered."""

    async def run() -> list[Sent]:
        async with asker.client() as client:
            return [await ask(client, asker, prompts, number) for number in range(len(prompts))]

    sent = asyncio.run(run())
    for one in sent:
        if one.outcome != "completed":
            raise FewstepError(
                f"the server at {asker.url} did not answer: {one.error or one.outcome}; start fewstep serve, or "
                "correct the address, the model or its settings"
            )
    return sent


def measured(asker: Asker, prompts: Sequence[Any], load: Load, *, alone: Sequence[str] | None = None) -> dict[str, Any]:
    """The report on a load. `alone`: the answer to each prompt alone, with which those under load are compared."""
    sent, wall_s = asyncio.run(put_load(asker, prompts, load))
    return summary(sent, wall_s, load, alone=alone)


def streamed_here(lm: LanguageModel, prompts: Sequence[Any], **settings: Any) -> dict[str, Any]:
    """What the model does without a server: the prompts are streamed one after another in this process, after one that
    is not counted. A row as of `summary`, whose `concurrency` is "alone".
    """
    lm.generate(prompts[0], **settings)
    first_text_s, seconds, num_tokens, num_forwards = list[float](), list[float](), 0, 0
    for prompt in prompts:
        started_s = time.perf_counter()
        stream, has_text = lm.stream(prompt, **settings), False
        for _ in stream:
            if not has_text and stream.answer_text():
                first_text_s.append(time.perf_counter() - started_s)
                has_text = True
        seconds.append(time.perf_counter() - started_s)
        assert stream.output is not None
        num_tokens += stream.output.num_tokens
        num_forwards += stream.output.num_forwards
    return {
        "concurrency": "alone",
        "n": len(prompts),
        "completed": len(prompts),
        "wall_seconds": sum(seconds),
        "tokens_per_second": num_tokens / sum(seconds),
        "answers_per_second": len(prompts) / sum(seconds),
        "tokens_per_forward": num_tokens / num_forwards,
        "first_text_ms": percentiles(first_text_s),
        "answer_ms": percentiles(seconds),
    }


def summary(sent: Sequence[Sent], wall_s: float, load: Load, *, alone: Sequence[str] | None = None) -> dict[str, Any]:
    """Percentiles over completed answers, in milliseconds; rates over the wall time. `different`: completed answers
    that are not what the prompt gets alone, and cut ones that do not begin so; None if nobody has looked.
    """
    done = [one for one in sent if one.outcome == "completed"]
    outcomes = Counter(one.outcome for one in sent)
    num_tokens = sum(one.num_tokens for one in done)
    num_forwards = sum(one.num_forwards for one in done)
    return {
        "concurrency": load.concurrency,
        "rate": load.rate,
        "n": len(sent),
        **{name: outcomes[name] for name in ("completed", "cut", "refused", "failed")},
        "different": None if alone is None else sum(_differs(one, alone[one.prompt]) for one in sent),
        "errors": sorted({one.error for one in sent if one.error is not None and one.outcome == "failed"})[:5],
        "wall_seconds": wall_s,
        "tokens_per_second": num_tokens / wall_s,
        "answers_per_second": len(done) / wall_s,
        "goodput_per_second": sum(one.seconds <= load.goal_s for one in done) / wall_s,
        "tokens_per_forward": num_tokens / num_forwards if num_forwards else 0.0,
        "first_text_ms": percentiles([one.first_text_s for one in done if one.first_text_s is not None]),
        "answer_ms": percentiles([one.seconds for one in done]),
    }


def _differs(one: Sent, expected: str) -> bool:
    if one.outcome == "completed":
        return one.text != expected
    return one.outcome == "cut" and not expected.startswith(one.text)


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds; None where there are none."""
    found = np.percentile(seconds, PERCENTILES).tolist() if seconds else [None] * len(PERCENTILES)
    return {f"p{share}": None if one is None else 1000 * one for share, one in zip(PERCENTILES, found, strict=True)}
