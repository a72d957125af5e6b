"""Bodies of requests: JSON objects of a limited size that arrive in a limited time."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from fewstep.errors import FewstepError
from fewstep.json_files import parse_json
from fewstep.serve.errors import ApiError

MOST_DISCARDED = 64_000_000
"""Bytes beyond the limit that are still read, and thrown away: a client that is answered while it sends may miss the
answer.
"""


async def read_object(request: Request, *, most_bytes: int, time_limit_s: float) -> dict[str, Any]:
    """The JSON object in the body. ApiError if there is none, if it is too large, or too slow."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    # A page of another site can send other types without asking the browser's leave.
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(
            f"the body is {kind or 'of no type'}, and must be JSON; send the header Content-Type: application/json",
            status=415,
            code="unsupported_media_type",
        )
    try:
        async with asyncio.timeout(time_limit_s):
            body = await _read(request, most_bytes)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {time_limit_s:g} seconds; send it faster", status=408, code="too_slow"
        ) from None
    return _object(body)


async def _read(request: Request, most_bytes: int) -> bytes:
    parts, size = list[bytes](), 0
    async for part in request.stream():
        size += len(part)
        if size <= most_bytes:
            parts.append(part)
        elif size > most_bytes + MOST_DISCARDED:
            break
    if size > most_bytes:
        raise ApiError(
            f"the body is larger than the {most_bytes / 1e6:g} MB that this server takes; shorten it",
            status=413,
            code="request_too_large",
        )
    return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = parse_json(body.decode("utf-8"), "the body", parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise _broken("the body is not UTF-8; encode it so") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise _broken(f"the body is not valid JSON: {error.msg} at {where}; correct it") from None
    except FewstepError as error:
        raise _broken(str(error)) from None
    if not isinstance(value, dict):
        raise _broken("the body must be a JSON object, such as {}; it holds another value")
    return value


def _broken(sentence: str) -> ApiError:
    return ApiError(sentence, code="invalid_json")


def _refuse_constant(name: str) -> NoReturn:
    raise _broken(f"the body is not valid JSON: {name} is no number of JSON; leave it out")
