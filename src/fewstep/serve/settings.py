"""Settings of the server. Nothing here loads torch or a web framework: the command line reads them for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le

from fewstep.errors import FewstepError
from fewstep.values import Count, check_fields

_Seconds = Annotated[float, Gt(0), Le(1e6)]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The server. FewstepError for a value that is none."""

    host: Annotated[str, "Address to listen on; 0.0.0.0 is every one of this machine."] = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535), "Port to listen on; 0 takes a free one."] = 8000
    api_key: Annotated[
        str | None, "Key that clients must send; by default that of FEWSTEP_API_KEY, if it is set, else none."
    ] = None
    max_concurrent: Annotated[Count, "Requests of one model and decoder that share passes."] = 8
    max_queued: Annotated[Count, "Requests that may wait for a slot; further ones get status 429."] = 256
    memory_gb: Annotated[
        float | None, Gt(0), Le(1e6), "What the slots of all models may take up; by default half of what is free."
    ] = None
    time_limit: Annotated[_Seconds, "Seconds that a request may take, its wait included."] = 600.0
    drain_time: Annotated[_Seconds, "Seconds that running answers have to finish after SIGTERM."] = 60.0
    read_time: Annotated[_Seconds, "Seconds that a client may take to send a request, or not read its answer."] = 30.0
    max_body_mb: Annotated[float, Gt(0), Le(1024), "Largest body of a request."] = 4.0
    max_connections: Annotated[Count, "Connections at a time; further ones get status 503."] = 1024
    strict: Annotated[bool, "Give each request the same tokens in any company in bfloat16 too; slower."] = False
    cors: Annotated[
        tuple[str, ...], "Origins whose pages may call the server from a browser, such as [https://example.org]."
    ] = ()
    votes: Annotated[Path | None, "File in which the votes of the comparison page are kept; else in memory."] = None
    log_prompts: Annotated[bool, "Write the bodies of requests, prompts among them, into the log."] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.isprintable()):
            raise FewstepError("api_key must be printable ASCII characters, which a header can carry; choose another")
        if self.api_key is not None and not self.api_key.strip():
            raise FewstepError("api_key is empty; give some characters, or leave it out to ask for no key")

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)
