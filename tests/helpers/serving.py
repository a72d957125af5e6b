"""A server in this process, on a free port, in a thread of its own; and HTTP by hand."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from fewstep.decode.loop import run_pass
from fewstep.engine.language_model import LanguageModel
from fewstep.engine.loops import Loops
from fewstep.models.network import Network
from fewstep.serve.catalogue import Catalogue, Entry
from fewstep.serve.run import HttpServer, bound_socket, make_server
from fewstep.serve.server import Server
from fewstep.serve.settings import ServerSettings
from fewstep.serve.votes import Votes

PASS_S = 0.01
"""What a pass of a slow model takes at least."""


def slow(network: Network, seconds: float = PASS_S) -> LanguageModel:
    """Answers as the plain path does, and takes its time."""

    def slowly(*arguments: Any) -> Any:
        time.sleep(seconds)
        return run_pass(*arguments)

    return LanguageModel(network, Loops(network, slowly))


def held(network: Network, passes: threading.Semaphore) -> LanguageModel:
    """Answers as the plain path does, in as many passes as are let go."""

    def when_told(*arguments: Any) -> Any:
        assert passes.acquire(timeout=30), "nobody lets the pass go"
        return run_pass(*arguments)

    return LanguageModel(network, Loops(network, when_told))


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until it holds; fail if that takes longer than anything should, on a busy machine too."""
    ends = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < ends, "it does not come to hold"
        time.sleep(0.01)


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    server: Server
    host: str
    port: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, **options)

    def post(self, path: str, body: Mapping[str, Any], **options: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=30, **options)

    def chat(self, content: str = "2+2=", **fields: Any) -> httpx2.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})

    def streamed(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """The events of an answer that streams."""
        return self.events(path, {**body, "stream": True})

    def events(self, path: str, body: Mapping[str, Any]) -> list[Any]:
        """What is sent as events, JSON where it is that."""
        with httpx2.stream("POST", self.url + path, json=body, timeout=30) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def raw(self, sent: bytes, *, timeout_s: float = 10) -> bytes:
        """What comes back for these bytes until the server closes, or has sent nothing for a while."""
        with self.connected(timeout_s) as connection:
            connection.sendall(sent)
            received = b""
            try:
                while part := connection.recv(65536):
                    received += part
            except (TimeoutError, ConnectionResetError):
                pass
            return received

    def connected(self, timeout_s: float = 10) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout_s)

    def until_closed(self, sent: bytes, *, timeout_s: float = 30) -> bytes:
        """What comes back for these bytes; TimeoutError if the server does not close the connection by itself."""
        with self.connected(timeout_s) as connection:
            connection.sendall(sent)
            received = b""
            while part := connection.recv(65536):
                received += part
            return received

    def wait_until_idle(self) -> None:
        """Until no request is queued or running; it fails if one stays."""

        def idle() -> bool:
            now = self.server.service.statistics()
            return not now.queued and not now.running

        until(idle)

    def counted(self, name: str) -> float:
        """A counter without labels, as /metrics tells it."""
        told = next(line for line in self.get("/metrics").text.splitlines() if line.startswith(f"{name} "))
        return float(told.split()[1])


@contextmanager
def running(
    models: Mapping[str, LanguageModel], *, entries: Sequence[Entry] = (), **settings: Any
) -> Iterator[Running]:
    """While it is entered, these models are served; at its end nothing is left of any request."""
    chosen = ServerSettings(port=0, **settings)
    served = [*entries, *(Entry(name=name, lm=lm, settings={}, created=1) for name, lm in models.items())]
    server = make_server(chosen, Catalogue(served), Votes(lambda count, n: (0.0, 1.0), chosen.votes), "0")
    with bound_socket(chosen) as listening:
        http = HttpServer(server)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not http.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.005)
        host, port = listening.getsockname()[:2]
        try:
            yield Running(server, host, port)
        finally:
            http.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server does not stop"
