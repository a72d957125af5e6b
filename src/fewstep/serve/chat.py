"""POST /v1/chat/completions"""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.decode.requests import Output
from fewstep.serve.answering import (
    Asked,
    Growing,
    TokenProbability,
    canvas_of,
    finish_reason,
    limit_for,
    merged,
    outputs_of,
    tokens_of,
    usage_of,
)
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import ChatBody, Extra, StreamBody, limit_of
from fewstep.serve.server import Server, note_usage, now
from fewstep.serve.streams import DONE, EventStream, event


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


def check_stream(body: StreamBody) -> None:
    """ApiError for fields that mean something in a stream alone."""
    for name in ("stream_options", "diffusing"):
        if getattr(body, name) and not body.stream:
            raise ApiError(f"{name} belongs to a stream; set stream to true, or leave it out", param=name)


def stop_setting(body: Any) -> dict[str, tuple[str, ...]]:
    """The stop texts of a body as a setting. ApiError for an empty one."""
    texts = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if "" in texts:
        raise ApiError("stop holds an empty text; leave it out, or give some text", param="stop", code="invalid_value")
    return {"stop": texts} if texts else {}


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer, or the whole of it, begin with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, kind: str, model: str, server: Server) -> "Head":
        return cls(f"{prefix}-{secrets.token_hex(12)}", kind, now(), model, f"fewstep-{server.version}")

    def fields(self) -> dict[str, Any]:
        return dict(vars(self))


def canvases(extra: Extra | None, growing: Sequence[Growing], outputs: Sequence[Output]) -> dict[str, Any]:
    """The finished canvas of the first answer, if the request wants it."""
    if extra is None or not extra.canvas:
        return {}
    return {"fewstep": canvas_of(growing[0].asked, outputs[0])}


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


Told = tuple[int, str, Sequence[TokenProbability], dict[str, Any], Output | None]
"""Index of the answer, what is sent of its text, tokens that are new, the canvas, and at last its output."""


async def told(body: StreamBody, growing: Sequence[Growing]) -> AsyncGenerator[Told, None]:
    """What each update of the answers makes a stream send."""
    wants_canvas = body.fewstep is not None and body.fewstep.canvas
    started_s = time.monotonic()
    shown = [""] * len(growing)
    async for index, new in merged([one.handle for one in growing]):
        one, output = growing[index], None if not isinstance(new, Output) else new
        delta = ""
        if not isinstance(new, Output):
            one.note(new)
            delta = new.delta
        if body.diffusing:
            now_shown = one.text_as_it_stands() if output is None else output.text
            text = now_shown if now_shown != shown[index] else ""
            shown[index] = now_shown
        else:
            text = delta
        # The most probable tokens are known at the end, and tokens are told with them.
        tells_tokens = one.log_probs == 0 or (one.log_probs is not None and output is not None)
        tokens = one.new_tokens(output) if tells_tokens else []
        canvas: dict[str, Any] = {}
        if wants_canvas:
            elapsed_s = time.monotonic() - started_s
            canvas = {"fewstep": one.canvas(elapsed_s) if output is None else canvas_of(one.asked, output)}
        yield index, text, tokens, canvas, output
