"""Why a service does not answer a request: errors that a server turns into a status of HTTP."""

from fewstep.decode.requests import Output
from fewstep.errors import FewstepError


class QueueFullError(FewstepError):
    """Too many requests wait. `retry_after_s`: when a place is likely to be free (429, `Retry-After`)."""

    def __init__(self, num_queued: int, retry_after_s: float) -> None:
        super().__init__(
            f"{num_queued} requests are waiting, as many as may; try again in about {retry_after_s:.0f} seconds"
        )
        self.retry_after_s = retry_after_s


class StoppingError(FewstepError):
    """The service takes no more requests (503)."""


class TimeLimitError(FewstepError):
    """The request was not answered in its time (504). `output`: what was final by then."""

    def __init__(self, time_limit_s: float, output: Output) -> None:
        super().__init__(
            f"the request was not answered within its {time_limit_s:g} seconds, and was given up after "
            f"{output.num_tokens} tokens; allow more time or ask for fewer tokens"
        )
        self.output = output


class TooLargeError(FewstepError):
    """The request could never be answered here, however few others there are (413)."""


class PassFailedError(FewstepError):
    """A pass of the network raised an error: the requests of that pass are lost, the service goes on (500)."""
