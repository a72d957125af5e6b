"""POST /v1/responses: OpenAI's newer interface, without a memory: every request brings its whole conversation."""

import secrets
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.decode.requests import Output
from fewstep.serve.answering import Asked, Growing, limit_for, merged, outputs_of, usage_of
from fewstep.serve.errors import ApiError, api_error
from fewstep.serve.fields import ResponsesBody, limit_of, text_of
from fewstep.serve.logs import log_failure
from fewstep.serve.server import Server, note_usage, now
from fewstep.serve.streams import EventStream, event


async def responses(server: Server, request: Request) -> Response:
    body, fields, entry = await server.read_asking(request, ResponsesBody)
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            "stream_options belongs to a stream; set stream to true, or leave it out", param="stream_options"
        )
    prompt_ids = await server.encoder.chat(entry, _messages(body), field="input")
    limit = limit_for(entry, len(prompt_ids), limit_of(body))
    settings = {**fields.settings, "max_new_tokens": limit, "seed": fields.seeds(1)[0]}
    asked = Asked(entry=entry, prompt_ids=prompt_ids, settings=settings)
    handles = await server.begin(request, [asked])
    answer = _Answer(entry.name, body, settings)
    if body.stream:
        return EventStream(request, _events(request, answer, Growing(asked, handles[0])))
    output = (await outputs_of(handles))[0]
    note_usage(request, answer.usage(len(prompt_ids), output))
    return JSONResponse(answer.whole(len(prompt_ids), output))


def _messages(body: ResponsesBody) -> list[dict[str, str]]:
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    roles = {"developer": "system"}
    return [
        *messages,
        *({"role": roles.get(item.role, item.role), "content": text_of(item.content)} for item in body.input),
    ]


@dataclass
class _Answer:
    """One answer in the forms in which it is told."""

    model: str
    body: ResponsesBody
    settings: dict[str, Any]
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    item_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(16)}")
    created: int = field(default_factory=now)

    def begun(self, status: str = "in_progress", **more: Any) -> dict[str, Any]:
        """The response object with all its fields."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": self.body.metadata or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": self.settings.get("temperature", 0.0),
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": self.settings.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
            "user": self.body.user,
            **more,
        }

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def item(self, status: str, text: str | None) -> dict[str, Any]:
        content = [] if text is None else [self.part(text)]
        return {"id": self.item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def usage(self, num_prompt_tokens: int, output: Output) -> dict[str, Any]:
        usage = usage_of(num_prompt_tokens, [output])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
            "fewstep": usage["fewstep"],
        }

    def whole(self, num_prompt_tokens: int, output: Output) -> dict[str, Any]:
        status = _status(output)
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self.begun(
            status,
            incomplete_details=reason,
            output=[self.item(status, output.text)],
            usage=self.usage(num_prompt_tokens, output),
        )


def _status(output: Output) -> str:
    return "incomplete" if output.finish_reason == "length" else "completed"


async def _events(request: Request, answer: _Answer, growing: Growing) -> AsyncGenerator[bytes, None]:
    """In the documented order, each with the next number."""
    number = -1

    def told(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    place = {"item_id": answer.item_id, "output_index": 0, "content_index": 0}
    yield told("response.created", response=answer.begun())
    yield told("response.in_progress", response=answer.begun())
    yield told("response.output_item.added", output_index=0, item=answer.item("in_progress", None))
    yield told("response.content_part.added", **place, part=answer.part(""))
    output: Output | None = None
    try:
        async for _, new in merged([growing.handle]):
            if isinstance(new, Output):
                output = new
            elif new.delta:
                yield told("response.output_text.delta", **place, delta=new.delta, logprobs=[])
    except Exception as error:  # the status is sent already, so that an event tells of it
        log_failure(error)
        why = api_error(error)
        failed = {"code": "server_error", "message": str(why)}
        yield told("response.failed", response=answer.begun("failed", error=failed))
        return
    assert output is not None
    whole = answer.whole(growing.handle.num_prompt_tokens, output)
    note_usage(request, whole["usage"])
    yield told("response.output_text.done", **place, text=output.text, logprobs=[])
    yield told("response.content_part.done", **place, part=answer.part(output.text))
    yield told("response.output_item.done", output_index=0, item=answer.item(_status(output), output.text))
    yield told(f"response.{whole['status']}", response=whole)
