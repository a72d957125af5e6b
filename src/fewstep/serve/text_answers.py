"""What the endpoints share whose answers are texts: fields that they check, the head of an answer, and what a stream
tells of it.
"""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.decode.requests import Output
from fewstep.serve.answering import Growing, TokenProbability, canvas_of, merged
from fewstep.serve.errors import ApiError
from fewstep.serve.fields import CanvasExtra, StreamBody
from fewstep.serve.server import Server, now


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


def canvases(extra: CanvasExtra | None, growing: Sequence[Growing], outputs: Sequence[Output]) -> dict[str, Any]:
    """The finished canvas of the first answer, if the request wants it."""
    if extra is None or not extra.canvas:
        return {}
    return {"fewstep": canvas_of(growing[0].asked, outputs[0])}


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
