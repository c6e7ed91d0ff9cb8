"""The HTTP connections: uvicorn's, with limits on their number and on the time that clients may take."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from functools import partial
from logging import CRITICAL, getLogger
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from lolcats.errors import LolcatsError
from lolcats.inference.server.limits import Limits

GRACE = 2  # seconds between cutting the open streams and cancelling what is left


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


class Protocol(H11Protocol):
    """A connection that is closed when its client takes too long, or when there are too many."""

    def __init__(self, limits: Limits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.reading: asyncio.TimerHandle | None = None
        self.writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse("429 Too Many Requests")
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self.reading, self.writing)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._expect_head()
        else:
            self._stop(self.reading)
            self.reading = None

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
            self.reading = self.loop.call_later(self.limits.read_seconds, self._refuse, "408 Request Timeout")

    def _refuse(self, status: str) -> None:
        self.transport.write(f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode())
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
        print("Stopping at once: answers that are not complete are cut.", file=sys.stderr, flush=True)
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
