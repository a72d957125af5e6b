"""The web application: the table of endpoints, and the gate that every request passes."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.serve.answering import ClientGoneError, watched
from fewstep.serve.chat import chat_completions
from fewstep.serve.compare import add_vote, export_votes, tell_votes
from fewstep.serve.completions import completions, fim_completions
from fewstep.serve.edit import edit_completions
from fewstep.serve.errors import ApiError, api_error
from fewstep.serve.fields import (
    ChatBody,
    CompletionBody,
    EditBody,
    FimBody,
    LoadBody,
    Part,
    ResponsesBody,
    VoteBody,
    schema_of,
)
from fewstep.serve.logs import log, log_failure
from fewstep.serve.metrics import metrics
from fewstep.serve.models import health, list_models, load_model, ready, show_model
from fewstep.serve.page import show_page
from fewstep.serve.responses import responses
from fewstep.serve.server import Server
from fewstep.serve.streams import until_gone

Endpoint = Callable[[Server, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Route:
    """An endpoint. `body`: what it takes; `open`: whether it is answered without a key."""

    path: str
    endpoint: Endpoint
    body: type[Part] | None = None
    open: bool = False
    media_type: str = "application/json"

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"


ROUTES: Sequence[Route] = (
    Route("/health", health, open=True),
    Route("/ready", ready, open=True),
    Route("/metrics", metrics, media_type="text/plain"),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", show_model),
    Route("/v1/chat/completions", chat_completions, ChatBody),
    Route("/v1/completions", completions, CompletionBody),
    Route("/v1/fim/completions", fim_completions, FimBody),
    Route("/v1/edit/completions", edit_completions, EditBody),
    Route("/v1/responses", responses, ResponsesBody),
    Route("/load_model", load_model, LoadBody),
    Route("/compare/votes", add_vote, VoteBody),
    Route("/compare/votes", tell_votes),
    Route("/compare/votes.csv", export_votes, media_type="text/csv"),
    Route("/", show_page, open=True, media_type="text/html"),
    Route("/page/{name}", show_page, open=True, media_type="text/html"),
)

_REFUSALS = {
    400: "A field is wrong, or is not supported.",
    401: "The key is wrong or missing.",
    404: "There is no such model or page.",
    405: "The path takes another method.",
    408: "The body did not arrive in time.",
    413: "The body, or the request, is too large.",
    415: "The body is not JSON.",
    429: "Too many requests wait.",
    500: "The server failed.",
    503: "The server is being stopped.",
    504: "The answer took too long.",
}


def create_app(server: Server) -> FastAPI:
    """The application. The service runs from its start to its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with server.service:
            yield

    app = FastAPI(
        title="fewstep",
        version=server.version,
        description="OpenAI's API for models that decode in a few passes.",
        lifespan=lifespan,
        docs_url=None,  # these pages load code from another site
        redoc_url=None,
    )
    for route in ROUTES:
        _add(app, server, route)
    for kind in (HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(Gate, server=server)
    if server.settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add(app: FastAPI, server: Server, route: Route) -> None:
    async def answer(request: Request) -> Response:
        return await _answered(server, route, request)

    said: dict[str, Any] = {}
    if route.body is not None:
        said["requestBody"] = {"required": True, "content": {"application/json": {"schema": _inlined(route.body)}}}
    if "{name" in route.path:
        said["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
    if not route.open:
        said["security"] = [{}, {"key": []}]
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
        for status, text in _REFUSALS.items()
    }
    streams: dict[str, Any] = {"text/event-stream": {}} if route.body is not None else {}
    answered = {"description": "The answer.", "content": {route.media_type: {}, **streams}}
    app.add_api_route(
        route.path,
        answer,
        methods=[route.method],
        name=route.endpoint.__name__,
        operation_id=route.endpoint.__name__ + ("" if "{" not in route.path else "_by_name"),
        summary=(route.endpoint.__doc__ or route.path).split("\n")[0],
        openapi_extra=said,
        responses={200: answered, **refusals},
        response_class=Response,
    )


_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _inlined(kind: type[Part]) -> dict[str, Any]:
    """The schema with its definitions where they are used: a document has one place for all definitions."""
    schema = schema_of(kind)
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return inline(definitions[value["$ref"].rpartition("/")[2].removeprefix(f"{kind.__name__}_")])
            return {name: inline(one) for name, one in value.items()}
        return [inline(one) for one in value] if isinstance(value, list) else value

    inlined: dict[str, Any] = inline(schema)
    return inlined


async def _answered(server: Server, route: Route, request: Request) -> Response:
    """What the endpoint answers, or its refusal. Work that nobody waits for any more is given up."""
    try:
        if route.body is None:
            return await route.endpoint(server, request)
        return await _watching(server, route, request)
    except (ClientGoneError, ClientDisconnect):
        request.state.logged["cancelled"] = True
        return Response(status_code=499)
    except Exception as error:  # whatever a request makes of us, it is told in the shape that its client reads
        log_failure(error)
        return _told(api_error(error, request.state.given), request)


async def _watching(server: Server, route: Route, request: Request) -> Response:
    """Run the endpoint; once it has read the body, it is cancelled when the client goes."""
    body_read = request.state.body_read = asyncio.Event()
    receive = request.receive

    async def gone() -> None:
        await body_read.wait()
        await until_gone(receive)

    response: Response = await watched(route.endpoint(server, request), gone())
    return response


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        sentence, code = {
            404: ("there is no such path", "not_found"),
            405: (f"the path does not take {request.method}", "method_not_allowed"),
        }.get(error.status_code, (str(error.detail), None))
        return _told(ApiError(f"{sentence}; see /openapi.json", status=error.status_code, code=code), request)
    log_failure(error)
    return _told(api_error(error), request)


def _told(error: ApiError, request: Request) -> Response:
    request.state.logged |= {"code": error.code, "param": error.param}
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Gate:
    """Every request: its id, its key, its line in the log, its place in the counts."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self._app, self._server = app, server
        key = server.settings.api_key
        self._key_hash = None if key is None else hashlib.sha256(key.encode()).digest()
        self._open = {route.path for route in ROUTES if route.open}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        method = scope["method"]
        if method == "HEAD":  # answered as GET is; the connection, which keeps the method, leaves the body out
            scope = {**scope, "method": "GET"}
        logged: dict[str, Any] = {}
        status = 0
        request_id = secrets.token_hex(8)
        scope.setdefault("state", {}).update(logged=logged, given=())

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        request = Request(scope)
        try:
            if self._is_open(scope["path"]) or scope["method"] == "OPTIONS" or self._has_key(request):
                await self._app(scope, receive, sending)
            else:
                await _told(_wrong_key(request), request)(scope, receive, sending)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            self._server.counts.responses[path, status] += 1
            self._server.counts.cut += bool(logged.get("cancelled"))
            log(
                "request",
                id=request_id,
                method=method,
                path=path,
                status=status,
                seconds=round(time.monotonic() - started_s, 6),
                **{name: value for name, value in logged.items() if value is not None},
            )

    def _is_open(self, path: str) -> bool:
        return path in self._open or path.startswith("/page/")

    def _has_key(self, request: Request) -> bool:
        """Compared by hashes, in a time that tells nothing."""
        if self._key_hash is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        hashed = hashlib.sha256(given.strip().encode()).digest()
        return hmac.compare_digest(hashed, self._key_hash) and scheme.lower() == "bearer"


def _wrong_key(request: Request) -> ApiError:
    has_one = "authorization" in request.headers
    sentence = "the API key is wrong" if has_one else "there is no API key; send it as Authorization: Bearer KEY"
    return ApiError(sentence, status=401, code="invalid_api_key" if has_one else "missing_api_key")
