"""What the endpoints share."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from fewstep.engine.service import Handle, Service
from fewstep.serve.answering import Asked, Encoder, begin
from fewstep.serve.bodies import read_object
from fewstep.serve.catalogue import Catalogue, Entry
from fewstep.serve.errors import stopping
from fewstep.serve.fields import Body, Fields, Part, read_fields
from fewstep.serve.settings import ServerSettings
from fewstep.serve.votes import Votes

_Read = TypeVar("_Read", bound=Part)
_ReadBody = TypeVar("_ReadBody", bound=Body)


@dataclass
class HttpCounts:
    """Responses by path and status, and those whose client closed the connection before their end."""

    responses: Counter[tuple[str, int]] = field(default_factory=Counter)
    cut: int = 0


@dataclass
class Server:
    """The models that are served, the service that answers with them, and what else outlasts a request.

    `version`: of this package. `draining`: the server has been told to stop; running answers end, and new requests are
    refused.
    """

    settings: ServerSettings
    catalogue: Catalogue
    service: Service
    votes: Votes
    version: str
    encoder: Encoder = field(default_factory=Encoder)
    counts: HttpCounts = field(default_factory=HttpCounts)
    draining: bool = False

    async def read(self, request: Request, kind: type[_Read]) -> tuple[_Read, Fields]:
        """The body of a request, checked. ApiError if it cannot be read or has a wrong field."""
        body = await read_object(request, most_bytes=self.settings.max_body_bytes, time_limit_s=self.settings.read_time)
        request.state.body_read.set()
        request.state.given = tuple(body)
        if self.settings.log_prompts:
            request.state.logged["body"] = body
        return read_fields(body, kind)

    async def read_asking(self, request: Request, kind: type[_ReadBody]) -> tuple[_ReadBody, Fields, Entry]:
        """The same, with the model that it names. ApiError if it is none of this server's, or if the server stops."""
        body, fields = await self.read(request, kind)
        if self.draining:
            raise stopping()
        entry = self.catalogue[body.model]
        request.state.logged["model"] = entry.name
        return body, Fields({**entry.settings, **fields.settings}), entry

    async def begin(self, request: Request, several: Sequence[Asked]) -> list[Handle]:
        """Queue the requests. The refusals of `Service.submit`."""
        handles = await begin(self.service, several)
        request.state.logged["prompt_tokens"] = sum(handle.num_prompt_tokens for handle in handles)
        return handles


def now() -> int:
    return int(time.time())


def note_usage(request: Request, usage: dict[str, Any]) -> None:
    """For the log."""
    request.state.logged |= {
        "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "passes": usage["fewstep"]["num_forwards"],
    }
