"""The log: one JSON object a line on standard error. It holds no key, and no prompt or answer unless asked for."""

import json
import logging
import sys
import time
import traceback
from typing import Any

from fewstep.engine.refusals import PassFailedError
from fewstep.errors import FewstepError

LOGGER = logging.getLogger("fewstep.serve")


class JsonLines(logging.Formatter):
    """A record as an object: `time` (UTC), `level`, `event`, and what was given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info is not None and record.exc_info[1] is not None:
            line |= _where(record.exc_info[1])
        return json.dumps(line, default=str)


def _where(error: BaseException) -> dict[str, Any]:
    """Kind and place of an error, without its text, which may hold a part of a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        "traceback": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def set_up_logs() -> None:
    """Let this server and uvicorn write JSON lines, and warnings of libraries and of decoders be such lines too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (
        ("fewstep.serve", logging.INFO),
        ("uvicorn", logging.WARNING),
        ("py.warnings", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.captureWarnings(True)


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """One line."""
    LOGGER.log(level, event, extra={"fields": fields}, exc_info=error)


def log_failure(error: Exception) -> None:
    """Of a request, if it is a fault of ours: what a client did wrong is told to the client alone."""
    if not isinstance(error, FewstepError) or isinstance(error, PassFailedError):
        log("failure", level=logging.ERROR, error=error.__cause__ if isinstance(error.__cause__, Exception) else error)
