"""POST /v1/completions and /v1/fim/completions"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.decode.requests import Output
from fewstep.models.text import before_stop
from fewstep.serve.answering import (
    Asked,
    Growing,
    TokenProbability,
    canvas_of,
    finish_reason,
    gap_text,
    limit_for,
    outputs_of,
    tokens_of,
    usage_of,
)
from fewstep.serve.catalogue import Entry
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import MOST_CHOICES, CompletionBody, Fields, FimBody, StreamBody, limit_of
from fewstep.serve.infill import Filled, check_infills, fill_all, gap_between, with_gap, with_seeds
from fewstep.serve.server import Server, note_usage
from fewstep.serve.streams import DONE, EventStream, event
from fewstep.serve.text_answers import Head, canvases, check_stream, stop_setting, told


async def completions(server: Server, request: Request) -> Response:
    body, fields, entry = await server.read_asking(request, CompletionBody)
    if body.suffix is not None:
        return await _infilled(server, request, body, fields, entry, body.logprobs)
    return await _continued(server, request, body, fields, entry, body.logprobs)


async def fim_completions(server: Server, request: Request) -> Response:
    """The same with one text as prompt; without a suffix, or with an empty one, the text goes on."""
    body, fields, entry = await server.read_asking(request, FimBody)
    if body.suffix:
        return await _infilled(server, request, body, fields, entry, None)
    return await _continued(server, request, body, fields, entry, None)


# A text that goes on


async def _continued(
    server: Server,
    request: Request,
    body: CompletionBody | FimBody,
    fields: Fields,
    entry: Entry,
    log_probs: int | None,
) -> Response:
    check_stream(body)
    if body.fewstep is not None and body.fewstep.gap is not None:
        raise ApiError("fewstep.gap needs a suffix, before which the gap is; give one", param="fewstep.gap")
    prompts = await _prompts(server, entry, body.prompt)
    if len(prompts) * body.num_choices > MOST_CHOICES:
        raise ApiError(
            f"{len(prompts)} prompts with {body.num_choices} answers each are more than the {MOST_CHOICES} answers "
            "that a request may ask for; send several requests",
            param="n" if len(prompts) == 1 else "prompt",
            code="invalid_value",
        )
    several = [
        Asked(
            entry=entry,
            prompt_ids=prompt_ids,
            settings={
                **fields.settings,
                "max_new_tokens": limit_for(entry, len(prompt_ids), limit_of(body)),
                **stop_setting(body),
                "seed": seed,
            },
            top_log_probs=bool(log_probs),
        )
        for prompt_ids in prompts
        for seed in fields.seeds(body.num_choices)
    ]
    growing = [
        Growing(asked, handle, log_probs)
        for asked, handle in zip(several, await server.begin(request, several), strict=True)
    ]
    num_prompt_tokens = sum(map(len, prompts))
    head = Head.new("cmpl", "text_completion", entry.name, server)
    if body.stream:
        return EventStream(request, _chunks(request, head, body, growing, num_prompt_tokens))
    outputs = await outputs_of([one.handle for one in growing])
    usage = usage_of(num_prompt_tokens, outputs)
    note_usage(request, usage)
    choices = [
        _choice(index, output.text, finish_reason(output), _log_probs(one.log_probs, tokens_of(one.lm, output)))
        for index, (one, output) in enumerate(zip(growing, outputs, strict=True))
    ]
    return JSONResponse(
        {**head.fields(), "choices": choices, "usage": usage, **canvases(body.fewstep, growing, outputs)}
    )


async def _prompts(server: Server, entry: Entry, prompt: Any) -> list[list[int]]:
    """The ids of each prompt."""
    if isinstance(prompt, str):
        prompt = [prompt]
    if not prompt:
        raise ApiError("prompt is empty; give some text", param="prompt", code="invalid_value")
    several = [prompt] if isinstance(prompt[0], int) else prompt
    if len(several) > MOST_CHOICES:
        raise ApiError(
            f"{len(several)} prompts are more than the {MOST_CHOICES} that a request may hold; send several requests",
            param="prompt",
            code="invalid_value",
        )
    found = []
    for one in several:
        if not one:
            raise ApiError("a prompt is empty; give some text", param="prompt", code="invalid_value")
        found.append(await server.encoder.text(entry, one) if isinstance(one, str) else _checked(entry, one))
    return found


def _checked(entry: Entry, ids: list[int]) -> list[int]:
    entry.lm.network.check_ids(ids)
    if entry.lm.role.mask_token_id in ids:
        raise ApiError("the token ids hold the mask token; a gap is made by a suffix", param="prompt")
    return ids


def _choice(index: int, text: str, finish: str | None, log_probs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": finish}


def _log_probs(num_top: int | None, tokens: Sequence[TokenProbability], offset: int = 0) -> dict[str, Any] | None:
    """As the older interface tells them."""
    if num_top is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    top = [dict(token.top[:num_top]) for token in tokens] if num_top else None
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }


async def _chunks(
    request: Request, head: Head, body: StreamBody, growing: Sequence[Growing], num_prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    pending = {"usage": None} if body.includes_usage else {}
    outputs: dict[int, Output] = {}
    offsets = [0] * len(growing)
    async for index, text, tokens, canvas, output in told(body, growing):
        log_probs = _log_probs(growing[index].log_probs, tokens, offsets[index]) if tokens else None
        offsets[index] += sum(len(token.text) for token in tokens)
        if text or log_probs or canvas:
            yield event({**head.fields(), "choices": [_choice(index, text, None, log_probs)], **pending, **canvas})
        if output is not None:
            outputs[index] = output
            yield event({**head.fields(), "choices": [_choice(index, "", finish_reason(output))], **pending})
    usage = usage_of(num_prompt_tokens, list(outputs.values()))
    note_usage(request, usage)
    if body.includes_usage:
        yield event({**head.fields(), "choices": [], "usage": usage})
    yield event(DONE)


# A gap


async def _infilled(
    server: Server,
    request: Request,
    body: CompletionBody | FimBody,
    fields: Fields,
    entry: Entry,
    log_probs: int | None,
) -> Response:
    check_stream(body)
    check_infills(server, entry)
    if not isinstance(body.prompt, str):
        raise ApiError("with a suffix the prompt must be one text; send several requests", param="prompt")
    gap = None if body.fewstep is None else body.fewstep.gap
    seeds, stops = fields.seeds(body.num_choices), stop_setting(body).get("stop", ())
    settings = {**fields.settings, "seed": seeds[0]}
    asked, suffix_ids = await gap_between(
        server, entry, body.prompt, body.suffix or "", settings, limit=limit_of(body), gap=gap
    )
    asked = replace(asked, top_log_probs=bool(log_probs))
    head = Head.new("cmpl", "text_completion", entry.name, server)
    num_prompt_tokens = len(asked.prompt_ids) + len(suffix_ids)
    if body.stream and gap is not None and len(seeds) == 1 and log_probs is None:
        asked = with_gap(asked, suffix_ids, gap)
        handles = await server.begin(request, [asked])
        growing = Growing(asked, handles[0])
        return EventStream(request, _gap_chunks(request, head, body, growing, stops, num_prompt_tokens))
    if gap is None:
        filled = await fill_all(server, request, asked, suffix_ids, seeds)
    else:
        filled = await _of_one_length(server, request, with_gap(asked, suffix_ids, gap), seeds)
    usage = usage_of(num_prompt_tokens, [one.output for one in filled], **filled[0].told)
    usage["fewstep"]["num_forwards_of_candidates"] = sum(one.num_forwards for one in filled)
    note_usage(request, usage)
    choices = [_filled_choice(index, one, stops, log_probs) for index, one in enumerate(filled)]
    whole: dict[str, Any] = {**head.fields(), "choices": choices, "usage": usage}
    if body.fewstep is not None and body.fewstep.canvas:
        whole["fewstep"] = canvas_of(filled[0].asked, filled[0].output)
    if not body.stream:
        return JSONResponse(whole)
    return EventStream(request, _at_once(body, whole))


async def _of_one_length(server: Server, request: Request, asked: Asked, seeds: Sequence[int]) -> list[Filled]:
    several = with_seeds(asked, seeds)
    outputs = await outputs_of(await server.begin(request, several))
    return [Filled(*one, scores={}, num_forwards=one[1].num_forwards) for one in zip(several, outputs, strict=True)]


def _filled_choice(index: int, filled: Filled, stops: Sequence[str], log_probs: int | None) -> dict[str, Any]:
    text = gap_text(filled.asked, filled.output)
    cut = before_stop(text, stops)
    told = None
    if log_probs is not None:
        output = filled.output
        of_gap = tokens_of(filled.asked.entry.lm, output, length=filled.asked.num_open)
        told = _log_probs(log_probs, of_gap)
    return _choice(index, cut, "stop", told)


async def _at_once(body: StreamBody, whole: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """A whole answer as a stream."""
    usage = whole.pop("usage")
    pending = {"usage": None} if body.includes_usage else {}
    choices = whole.pop("choices")
    for choice in choices:
        yield event({**whole, "choices": [{**choice, "finish_reason": None}], **pending})
        yield event({**whole, "choices": [_choice(choice["index"], "", choice["finish_reason"])], **pending})
    if body.includes_usage:
        yield event({**whole, "choices": [], "usage": usage})
    yield event(DONE)


async def _gap_chunks(
    request: Request, head: Head, body: StreamBody, growing: Growing, stops: Sequence[str], num_prompt_tokens: int
) -> AsyncGenerator[bytes, None]:
    """A gap of known length as it forms: its text when it is whole, or all of it in each chunk if it diffuses."""
    pending = {"usage": None} if body.includes_usage else {}
    async for _, shown, _, canvas, output in told(body, [growing]):
        text = shown if output is None and body.diffusing else ""
        if output is not None:
            text = before_stop(gap_text(growing.asked, output), stops)
            usage = usage_of(num_prompt_tokens, [output], gap=growing.asked.num_open, candidates=[])
            note_usage(request, usage)
        if text or canvas:
            yield event({**head.fields(), "choices": [_choice(0, text, None)], **pending, **canvas})
        if output is not None:
            yield event({**head.fields(), "choices": [_choice(0, "", "stop")], **pending})
            if body.includes_usage:
                yield event({**head.fields(), "choices": [], "usage": usage})
    yield event(DONE)
