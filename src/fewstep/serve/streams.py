"""Server-sent events: a response that ends its work when the client goes."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fewstep.serve.answering import ClientGoneError, watched
from fewstep.serve.errors import api_error
from fewstep.serve.logs import log_failure

DONE = "[DONE]"
"""The last event of a stream of OpenAI's."""

PING_S = 15.0
"""A stream without news sends a comment so often, lest something between here and the client closes it."""


async def until_gone(receive: Receive) -> None:
    """Until the client has closed the connection; to be asked for once the body is read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Mapping[str, Any] | str, name: str | None = None) -> bytes:
    """One event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name is not None else ""
    return f"{head}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends what a generator yields. An error on the way is told as an event, after which the stream ends."""

    media_type = "text/event-stream"

    def __init__(self, request: Request, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._request, self._events = request, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await watched(self._send_all(send), until_gone(receive))
        except ClientGoneError:
            self._request.state.logged["cancelled"] = True

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for data in _with_pings(events):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except Exception as error:  # the status is sent already, so that an event tells of it
                log_failure(error)
                told = api_error(error, self._request.state.given)
                self._request.state.logged |= {"failed": told.code}
                await send({"type": "http.response.body", "body": event(told.body()), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _with_pings(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    while True:
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while not (await asyncio.wait({coming}, timeout=PING_S))[0]:
                yield b": waiting\n\n"
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)
        data = coming.result()
        if data is None:
            return
        yield data
