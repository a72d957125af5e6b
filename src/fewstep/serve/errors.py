"""Errors as clients of OpenAI's API know them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import re
from collections.abc import Iterable
from typing import Any

from fewstep.engine.refusals import PassFailedError, QueueFullError, StoppingError, TimeLimitError, TooLargeError
from fewstep.errors import FewstepError

RETRY_S = 5.0
"""When to try again while the server stops, in seconds: a new one is likely to be up by then."""

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(FewstepError):
    """A refusal with its status. `param`: the field of the request that was wrong. `code`: for programs to read."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"Retry-After": f"{self.retry_after_s:.0f}"}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception, given: Iterable[str] = ()) -> ApiError:
    """The error of a service or a setting as one of the API. `given`: the fields of the request, of which the sentence
    may name one.

    What is no FewstepError is a fault of ours: it is told without its text, which may hold parts of a prompt.
    """
    sentence = str(error)
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(sentence, status=429, code="queue_full", retry_after_s=error.retry_after_s)
        case TooLargeError():
            return ApiError(sentence, status=413, code="request_too_large")
        case StoppingError():
            return stopping()
        case TimeLimitError():
            return ApiError(sentence, status=504, code="time_limit")
        case PassFailedError():
            return ApiError(sentence, status=500, code="pass_failed")
        case FewstepError():
            named = (name for name in given if re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", sentence))
            return ApiError(sentence, code="invalid_value", param=next(named, None))
    return ApiError("the server failed on this request; its log says why", status=500, code="internal_error")


def stopping() -> ApiError:
    """For requests that come after SIGTERM."""
    sentence = "the server is being stopped and takes no more requests; try again once it is back"
    return ApiError(sentence, status=503, code="stopping", retry_after_s=RETRY_S)
