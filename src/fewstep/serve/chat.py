"""POST /v1/chat/completions"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.decode.requests import Output
from fewstep.serve.answering import (
    Asked,
    Growing,
    TokenProbability,
    finish_reason,
    limit_for,
    outputs_of,
    tokens_of,
    usage_of,
)
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import ChatBody, limit_of
from fewstep.serve.server import Server, note_usage
from fewstep.serve.streams import DONE, EventStream, event
from fewstep.serve.text_answers import Head, canvases, check_stream, stop_setting, told


async def chat_completions(server: Server, request: Request) -> Response:
    body, fields, entry = await server.read_asking(request, ChatBody)
    check_stream(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("top_logprobs needs logprobs to be true; set it, or leave both out", param="top_logprobs")
    prompt_ids = await server.encoder.chat(entry, [message.plain() for message in body.messages])
    settings = {
        **fields.settings,
        "max_new_tokens": limit_for(entry, len(prompt_ids), limit_of(body)),
        **stop_setting(body),
    }
    several = [
        Asked(
            entry=entry,
            prompt_ids=prompt_ids,
            settings={**settings, "seed": seed},
            top_log_probs=bool(body.top_logprobs),
        )
        for seed in fields.seeds(body.num_choices)
    ]
    growing = [
        Growing(asked, handle, (body.top_logprobs or 0) if body.logprobs else None)
        for asked, handle in zip(several, await server.begin(request, several), strict=True)
    ]
    head = Head.new("chatcmpl", "chat.completion", entry.name, server)
    if body.stream:
        return EventStream(request, _chunks(request, head, body, growing))
    outputs = await outputs_of([one.handle for one in growing])
    usage = usage_of(len(prompt_ids), outputs)
    note_usage(request, usage)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": _log_probs(one, tokens_of(one.lm, output)),
            "finish_reason": finish_reason(output),
        }
        for index, (one, output) in enumerate(zip(growing, outputs, strict=True))
    ]
    return JSONResponse(
        {**head.fields(), "choices": choices, "usage": usage, **canvases(body.fewstep, growing, outputs)}
    )


def _log_probs(one: Growing, tokens: Sequence[TokenProbability]) -> dict[str, Any] | None:
    if one.log_probs is None:
        return None
    return {"content": [token.described(one.log_probs) for token in tokens], "refusal": None}


async def _chunks(
    request: Request, head: Head, body: ChatBody, growing: Sequence[Growing]
) -> AsyncGenerator[bytes, None]:
    fields = {**head.fields(), "object": "chat.completion.chunk"}
    pending = {"usage": None} if body.includes_usage else {}

    def chunk(index: int, delta: dict[str, Any], *, finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": more.pop("logprobs", None), "finish_reason": finish}
        return event({**fields, "choices": [choice], **pending, **more})

    for index in range(len(growing)):
        yield chunk(index, {"role": "assistant", "content": ""})
    outputs: dict[int, Output] = {}
    async for index, text, tokens, canvas, output in told(body, growing):
        more: dict[str, Any] = {"logprobs": _log_probs(growing[index], tokens)} if tokens else {}
        if text or more or canvas:
            yield chunk(index, {"content": text}, **more, **canvas)
        if output is not None:
            outputs[index] = output
            yield chunk(index, {}, finish=finish_reason(output))
    usage = usage_of(growing[0].handle.num_prompt_tokens, list(outputs.values()))
    note_usage(request, usage)
    if body.includes_usage:
        yield event({**fields, "choices": [], "usage": usage})
    yield event(DONE)
