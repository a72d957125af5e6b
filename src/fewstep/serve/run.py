"""Listening, signals and the end: uvicorn, with a patience of its own and a stop that lets running answers finish."""

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fewstep.engine.service import Service
from fewstep.errors import FewstepError
from fewstep.serve.app import create_app
from fewstep.serve.catalogue import Catalogue
from fewstep.serve.logs import log, set_up_logs
from fewstep.serve.server import Server
from fewstep.serve.settings import ServerSettings
from fewstep.serve.votes import Votes

BACKLOG = 1024
"""Connections that the system keeps until they are accepted."""

LAST_WORDS_S = 5.0
"""What connections have to take their last bytes, once all answers are whole."""


def bound_socket(settings: ServerSettings) -> socket.socket:
    """A socket that has the address, before anything long is done; it does not listen yet.

    FewstepError if the address is taken or is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise FewstepError(f"host {settings.host!r} is no address of this machine: {error}; choose another") from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        raise FewstepError(
            f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}; choose another port, or stop "
            "what listens there"
        ) from None
    return made


def make_server(settings: ServerSettings, catalogue: Catalogue, votes: Votes, version: str) -> Server:
    """What answers. All models are under one memory limit."""
    service = Service(
        {name: entry.lm for name, entry in catalogue.entries.items()},
        num_slots=settings.max_concurrent,
        max_queued=settings.max_queued,
        memory_bytes=None if settings.memory_gb is None else int(settings.memory_gb * 1e9),
        time_limit_s=settings.time_limit,
        strict=settings.strict,
    )
    return Server(settings, catalogue, service, votes, version)


def run_server(server: Server, listening: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C, let running answers finish, and return."""
    set_up_logs()
    settings = server.settings
    host, port = listening.getsockname()[:2]
    log(
        "listening",
        url=f"http://{f'[{host}]' if ':' in host else host}:{port}",
        models=list(server.catalogue.entries),
        asks_for_key=settings.api_key is not None,
    )
    if settings.api_key is None and not _is_loopback(host):
        log("anybody who reaches this address can use the server; set an API key", level=logging.WARNING)
    HttpServer(server).run(sockets=[listening])
    log("stopped")


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


class HttpServer(uvicorn.Server):
    """Stops when all answers are whole, and returns: a stop that was asked for is no failure."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            create_app(server),
            http=_protocol(server.settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=server.settings.max_connections,
            backlog=BACKLOG,
            timeout_graceful_shutdown=int(LAST_WORDS_S),
        )
        super().__init__(config)
        self._server = server
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone hears signals
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(number: int, _: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._stop, number)

        before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def _stop(self, number: int) -> None:
        """The first signal lets answers finish; a second one does not wait for them."""
        if self._server.draining:
            self.should_exit = self.force_exit = True
            return
        self._server.draining = True
        log("draining", signal=signal.Signals(number).name)
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        settings = self._server.settings
        if not await self._server.service.drain(settings.drain_time):
            log("answers were given up, which did not end in time", level=logging.WARNING)
            await self._server.service.stop()
        self.should_exit = True


def _protocol(settings: ServerSettings) -> type[H11Protocol]:
    """HTTP/1.1 that waits for no client for ever: neither for a request that does not come, nor for one that does not
    read its answer.
    """

    class Patient(H11Protocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._coming: asyncio.TimerHandle | None = None
            self._reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._coming = self.loop.call_later(settings.read_time, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Once the head of a request is there, its body has a time limit of its own.
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel(self._coming)
                self._coming = None
            elif self._coming is None:
                self._coming = self.loop.call_later(settings.read_time, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reading = self.loop.call_later(settings.read_time, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel(self._reading)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel(self._coming)
            self._cancel(self._reading)
            super().connection_lost(exc)

        @staticmethod
        def _cancel(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Patient
