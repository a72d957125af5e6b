"""From what a request asks for to the handles that answer it, and what is told of them while they grow."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fewstep.decode.requests import Event, Output, Record
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.service import Handle, Service, Update
from fewstep.errors import FewstepError
from fewstep.models.text import decode_text
from fewstep.serve.catalogue import Entry
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import MOST_TOP

DEFAULT_LIMIT = 256
"""New tokens of an answer, where the request sets no limit and the model has room for them."""

OPEN_MARK = "\N{LIGHT SHADE}"
"""Stands for a token that is still open, where a text is shown as it forms."""

LEAST_LOG_PROB = -9999.0
"""Of a token whose probability is 0; JSON has no infinity."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One answer to give. `settings`: of generation, by name. `canvas`: for infilling, ids with mask ids to fill.

    `top_log_probs`: whether the most probable tokens are told too.
    """

    entry: Entry
    prompt_ids: list[int]
    settings: Mapping[str, Any]
    canvas: list[int] | None = None
    top_log_probs: bool = False

    @property
    def num_open(self) -> int:
        """Tokens to fill in, of an infill."""
        mask_token_id = self.entry.lm.role.mask_token_id
        return sum(token == mask_token_id for token in self.canvas or ())


class Encoder:
    """Encodes prompts in a thread of its own, so that the event loop waits for none."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fewstep-encode")

    async def __call__(self, encode: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, encode)

    async def chat(self, entry: Entry, messages: list[dict[str, str]], *, field: str = "messages") -> list[int]:
        """Through the chat template. ApiError, naming the `field` that they came in, if it refuses the messages."""
        if not any(message["content"] for message in messages):
            raise ApiError(f"{field} is empty; give some text", param=field, code="invalid_value")
        _check_length(entry, sum(len(message["content"]) for message in messages), field)
        try:
            return await self(partial(entry.lm.encode, messages, literal=entry.literal))
        except FewstepError as error:
            raise ApiError(str(error), param=field, code="invalid_value") from error

    async def text(self, entry: Entry, text: str) -> list[int]:
        """As it is, but for the mask token: its name is text."""
        _check_length(entry, len(text), "prompt")
        return await self(partial(entry.lm.encode, text, raw=True, literal=_mask(entry)))

    async def continued(self, entry: Entry, text: str) -> list[int]:
        """A text that stands behind something else; it may be empty."""
        if not text:
            return []
        _check_length(entry, len(text), None)
        return await self(partial(entry.lm.encode_part, text, literal=_mask(entry)))


def _check_length(entry: Entry, num_characters: int, param: str | None) -> None:
    """ApiError for a text that cannot fit, before it is encoded: megabytes take seconds, for which others wait."""
    if num_characters > entry.most_characters:
        raise ApiError(
            f"a text of {num_characters} characters exceeds the {entry.lm.network.max_positions} positions of "
            f"{entry.name}; shorten it",
            code="context_length_exceeded",
            param=param,
        )


def _mask(entry: Entry) -> tuple[int, ...]:
    mask_token_id = entry.lm.role.mask_token_id
    return () if mask_token_id is None else (mask_token_id,)


def limit_for(entry: Entry, num_prompt_tokens: int, given: tuple[str, int] | None) -> int:
    """The limit of new tokens: the one that was given, or else what the model has room for.

    ApiError if there is no room for it.
    """
    most = entry.lm.network.max_positions
    default = int(entry.settings.get("max_new_tokens", DEFAULT_LIMIT))
    name, limit = given or (None, min(default, most - num_prompt_tokens))
    if num_prompt_tokens + limit > most or limit < 1:
        more = f" and {limit} new ones exceed" if name else " exceeds"
        raise ApiError(
            f"a prompt of {num_prompt_tokens} tokens{more} the {most} positions of {entry.name}; shorten the "
            f"prompt{f' or lower {name}' if name else ''}",
            code="context_length_exceeded",
            param=name,
        )
    return limit


async def begin(service: Service, several: Sequence[Asked]) -> list[Handle]:
    """Queue the requests; if one is refused, those before it are given up."""
    handles: list[Handle] = []
    try:
        for asked in several:
            handles.append(
                await service.submit(
                    asked.prompt_ids,
                    model=asked.entry.name,
                    canvas=asked.canvas,
                    record=Record(top_k=MOST_TOP) if asked.top_log_probs else None,
                    **asked.settings,
                )
            )
    except BaseException:
        give_up(handles)
        raise
    return handles


def give_up(handles: Sequence[Handle]) -> None:
    """Cancel what has not ended."""
    for handle in handles:
        handle.cancel()


async def outputs_of(handles: Sequence[Handle]) -> list[Output]:
    """Of all; if one fails, or nobody waits any longer, the others are given up."""
    try:
        return list(await asyncio.gather(*(handle.output() for handle in handles)))
    finally:
        give_up(handles)


News = tuple[int, Update | Output | Exception]


async def merged(handles: Sequence[Handle]) -> AsyncIterator[tuple[int, Update | Output]]:
    """What is new of all answers, each with its index: updates, and at last its output. The error of one that fails.

    Who reads slowly gets fewer and larger updates.
    """
    news: asyncio.Queue[News] = asyncio.Queue(maxsize=1)

    async def tell(index: int, handle: Handle) -> None:
        try:
            async for update in handle:
                await news.put((index, update))
            await news.put((index, await handle.output()))
        except Exception as error:  # goes to the reader, who raises it
            await news.put((index, error))

    tasks = [asyncio.create_task(tell(index, handle)) for index, handle in enumerate(handles)]
    try:
        ended = 0
        while ended < len(handles):
            index, new = await news.get()
            if isinstance(new, Exception):
                raise new
            ended += isinstance(new, Output)
            yield index, new
    finally:
        for task in tasks:
            task.cancel()
        give_up(handles)


# What is told of an answer


@dataclass
class Growing:
    """One answer as a stream tells of it. `gap`: of an infill, how many tokens are filled in."""

    asked: Asked
    handle: Handle
    log_probs: int | None = None
    steps: int = field(init=False, default=0)
    _told: int = field(init=False, default=0)
    _shown: str = field(init=False, default="")

    @property
    def lm(self) -> LanguageModel:
        return self.asked.entry.lm

    def text_as_it_stands(self) -> str:
        """With a mark for each open token."""
        return self.handle.forming_text(OPEN_MARK)

    def note(self, update: Update) -> None:
        self.steps = max([self.steps, *(event.step for event in update.events)])

    def canvas(self, seconds: float) -> dict[str, Any]:
        """Every token up to the last final one, with the step that fixed it; null and provisional while it is open."""
        final = self.handle.final
        return {
            "step": self.steps,
            "tokens": [_token(self.lm, final.get(position)) for position in range(max(final, default=-1) + 1)],
            "num_forwards": self.steps,
            "num_tokens": len(final),
            "seconds": round(seconds, 6),
        }

    def new_tokens(self, output: Output | None = None) -> list["TokenProbability"]:
        """Tokens of the text that was told, which have not been told yet."""
        chosen = tokens_so_far(self.lm, self.handle.final) if output is None else tokens_of(self.lm, output)
        length, new = len(self.handle.text), list[TokenProbability]()
        for token in chosen[self._told :]:
            if output is None and len(self._shown) + len(token.text) > length:
                break  # it may be a part of a stop text
            self._shown += token.text
            new.append(token)
        self._told += len(new)
        return new


def canvas_of(asked: Asked, output: Output) -> dict[str, Any]:
    """The finished canvas; of an infill what was filled in."""
    lm, length = asked.entry.lm, len(output.token_ids) if asked.canvas is None else asked.num_open
    ids, steps = output.token_ids[:length], output.step_G[:length].tolist()
    events = [Event(position, *one, 1.0) for position, one in enumerate(zip(ids, steps, strict=True))]
    return {
        "step": max(steps, default=0),
        "tokens": [_token(lm, one) for one in events],
        "num_forwards": output.num_forwards,
        "num_tokens": output.num_tokens,
        "seconds": round(output.seconds, 6),
    }


def _token(lm: LanguageModel, event: Event | None) -> dict[str, Any]:
    if event is None:
        return {"text": OPEN_MARK, "step": None, "provisional": True}
    return {"text": plain_text(lm, event.token_id), "step": event.step, "provisional": False}


def plain_text(lm: LanguageModel, token_id: int) -> str:
    """Of a token alone; a special token has none in an answer."""
    return str(lm.network.tokenizer.decode([token_id], skip_special_tokens=True))


@dataclass(frozen=True)
class TokenProbability:
    """A token with the logarithm of its probability when it became final, and of the most probable ones there."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...] = ()

    def described(self, num_top: int) -> dict[str, Any]:
        """As a chat completion tells it."""
        top = self.top[:num_top]
        return {**_spelt(self.text, self.log_prob), "top_logprobs": [_spelt(*one) for one in top]}


def _spelt(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


def tokens_so_far(lm: LanguageModel, final: Mapping[int, Event]) -> list[TokenProbability]:
    """The tokens before the first open position, without what ends the answer."""
    found: list[TokenProbability] = []
    while (event := final.get(len(found))) is not None and event.token_id not in lm.network.stop_token_ids:
        found.append(TokenProbability(plain_text(lm, event.token_id), _log(event.confidence)))
    return found


def tokens_of(lm: LanguageModel, output: Output, *, length: int | None = None) -> list[TokenProbability]:
    """The tokens of an answer, without what ends it: a token, or those of a stop text. `length`: of a gap, which is all
    tokens.
    """
    ends = lm.network.stop_token_ids
    found: list[TokenProbability] = []
    num_characters = 0
    for position, token_id in enumerate(output.token_ids[:length]):
        if length is None and (token_id in ends or num_characters >= len(output.text)):
            break
        text = plain_text(lm, token_id)
        num_characters += len(text)
        top: tuple[tuple[str, float], ...] = ()
        if output.top_k is not None:
            ids, logs = output.top_k.ids_GK[position].tolist(), output.top_k.log_probs_GK[position].tolist()
            top = tuple(
                (str(lm.network.tokenizer.decode([one])), max(log, LEAST_LOG_PROB))
                for one, log in zip(ids, logs, strict=True)
            )
        found.append(TokenProbability(text, _log(float(output.confidence_G[position])), top))
    return found


def _log(probability: float) -> float:
    return max(math.log(min(probability, 1.0)), LEAST_LOG_PROB) if probability > 0 else LEAST_LOG_PROB


def usage_of(num_prompt_tokens: int, outputs: Sequence[Output], **more: Any) -> dict[str, Any]:
    """Real tokens: the end-of-text counts, and nothing behind it. `fewstep`: passes, and tokens for each of them."""
    num_tokens = sum(output.num_tokens for output in outputs)
    num_forwards = sum(output.num_forwards for output in outputs)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
        "fewstep": {
            "num_forwards": num_forwards,
            "num_draft_forwards": sum(output.num_draft_forwards for output in outputs),
            "tokens_per_forward": round(num_tokens / num_forwards, 4) if num_forwards else 0.0,
            "seconds": round(max((output.seconds for output in outputs), default=0.0), 6),
            **more,
        },
    }


def finish_reason(output: Output) -> str:
    return "length" if output.finish_reason == "length" else "stop"


def gap_text(asked: Asked, output: Output) -> str:
    """What was filled in between the prompt and what was given behind it."""
    tokenizer, prefix = asked.entry.lm.network.tokenizer, asked.prompt_ids
    whole = decode_text(tokenizer, [*prefix, *output.token_ids[: asked.num_open]])
    before = decode_text(tokenizer, prefix)
    return whole[len(before) :] if whole.startswith(before) else whole


async def watched(work: Awaitable[Any], gone: Awaitable[None]) -> Any:
    """The result of the work, unless the client goes first: then it is cancelled. ClientGone then."""
    doing, going = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({doing, going}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        for task in (doing, going):
            if not task.done():
                task.cancel()
        await asyncio.gather(doing, going, return_exceptions=True)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""
