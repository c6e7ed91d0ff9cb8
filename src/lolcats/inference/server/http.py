"""The HTTP connections: uvicorn's, with limits on their number and on the time that clients may take."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from logging import CRITICAL, getLogger
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lolcats.errors import LolcatsError
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.limits import Limits

GRACE = 2  # seconds between cutting the open streams and cancelling what is left
LINGER = 2  # seconds in which the rest of a request is read and thrown away, so that its client sees the answer
SPARE = 256  # connections over the limit that may send their request before they are refused
REFUSED = 1  # seconds that they have for it
TOO_MANY = ApiError(429, "Too many connections are open; try again soon.", code="too_many_connections")


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address (port 0: at a free port), whose connections wait until the application runs.

    Raises:
        LolcatsError: the address is in use, not of this machine, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # socket.create_server leaves the protocol at 0, and asyncio then leaves Nagle's algorithm on: 40 ms an answer
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
        raise LolcatsError(f"Cannot listen on {host}, port {port}: {reason}. Use another --port or --host.") from None
    return listening


class Lingering:
    """A transport that is closed in two steps while its client may still be sending.

    A socket that is closed with unread data is reset, and the client may lose the answer: a router then counts a
    failure of the server (500) where it should have read a 429.
    """

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, sending: Callable[[], bool]
    ) -> None:
        self.transport, self.loop, self.sending, self.closing = transport, loop, sending, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if not self.closing:
            self.transport.write(data)

    def is_closing(self) -> bool:
        return self.closing or self.transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        self.closing = True
        if not self.sending():
            return self.transport.close()
        self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(LINGER, self.transport.close)


class Protocol(H11Protocol):
    """A connection that is closed when its client takes too long, or when there are too many."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits, self.refused = limits, False
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        lingering = Lingering(transport, self.loop, self._sending)
        super().connection_made(lingering)  # type: ignore[arg-type] # has all methods of one
        most = self.limits.connections
        self.refused = sum(not getattr(other, "refused", False) for other in self.connections) > most
        if not self.refused:
            self._expect_head()
        elif len(self.connections) > most + SPARE:
            self._refuse(TOO_MANY)
        else:  # routers and clients take an answer that comes before their request for a failure
            self.reading = self.loop.call_later(REFUSED, self._refuse, TOO_MANY)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self.reading, self.writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.refused:
            return self._refuse(TOO_MANY)
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_head()
        else:
            self._stop(self.reading)
            self.reading = None
        return None

    def on_response_complete(self) -> None:
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if unread:  # answered before it was read: nobody waits for the rest
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.writing = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop(self.writing)
        super().resume_writing()

    def _should_upgrade(self) -> bool:
        return False  # without uvicorn's advice to install a package for WebSockets, which nothing here uses

    def _expect_head(self) -> None:
        if self.reading is None:
            late = ApiError(408, f"The request did not arrive within {self.limits.read_seconds:g} seconds.")
            self.reading = self.loop.call_later(self.limits.read_seconds, self._refuse, late)

    def _sending(self) -> bool:
        """Whether the client may be sending what nobody is going to read."""
        return self.refused or self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def _refuse(self, error: ApiError) -> None:
        response, self.refused = error.response(), True
        head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode(), b"connection: close"]
        head += [b"%s: %s" % header for header in response.raw_headers if header[0] != b"connection"]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + response.body)
        self.transport.close()

    @staticmethod
    def _stop(*timers: asyncio.TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()


class Server(uvicorn.Server):
    """Cuts the streams that are still open ``deadline`` seconds after a signal, or at a second Ctrl-C: each gets an
    error event."""

    def __init__(self, app: FastAPI, deadline: int) -> None:
        self.service, self.deadline, self.hurried = app.state.service, deadline, False
        limits: Limits = self.service.limits
        super().__init__(uvicorn.Config(
            app, http=partial(Protocol, limits), ws="none",  # type: ignore[arg-type] # called like a class
            log_level="warning", timeout_keep_alive=limits.idle_seconds,
            timeout_graceful_shutdown=deadline + GRACE,
        ))  # fmt: skip

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.loop.call_soon_threadsafe(self._hurry)
        else:
            super().handle_exit(sig, frame)

    def _hurry(self) -> None:
        """Cut the open streams now, and leave after ``GRACE`` seconds, or at once when called again."""
        if self.hurried:
            self.force_exit = True
            return
        self.hurried = True
        print("Stopping now: unfinished answers are cut off.", file=sys.stderr, flush=True)
        getLogger("uvicorn.error").setLevel(CRITICAL)  # requests that are cut would be logged as errors
        self.service.streams.cut()
        self.loop.call_later(GRACE, self._hurry)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cutting = self.loop.call_later(self.deadline, self.service.streams.cut)
        try:
            await super().shutdown(sockets)
        finally:
            cutting.cancel()
        if self.force_exit:  # uvicorn leaves this out then, and a traceback of its cancellation is logged
            await self.lifespan.shutdown()


def settle_heap() -> None:
    """Have the garbage collector leave out what is there: a million objects, of torch and transformers for the most.

    A request of many small lists makes it look through all of them, which takes up to a second and stops every thread.
    """
    gc.collect()
    gc.freeze()


def serve(app: FastAPI, listening: socket.socket, deadline: int) -> None:
    """Run until SIGTERM or SIGINT; requests that run then have ``deadline`` seconds to finish."""
    settle_heap()
    with contextlib.suppress(KeyboardInterrupt):  # that uvicorn has handled
        Server(app, deadline).run([listening])
