"""Answers on their way from the engine to a client, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.requests import ClientDisconnect

from lolcats.inference.engine.request import Delta
from lolcats.inference.engine.request import Request as EngineRequest
from lolcats.inference.engine.worker import EngineBroken, QueueFull, Worker
from lolcats.inference.server.errors import ApiError
from lolcats.inference.server.metrics import Metrics
from lolcats.inference.server.replies import Reply

SHUT_DOWN = "The server shut down before the answer was complete."
LEFT = 499  # nobody reads this status
LARGE = 500  # log-probabilities
ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
T = TypeVar("T")


class Streams:
    """The open streams of a server, so that all can be ended before it stops."""

    def __init__(self, worker: Worker, metrics: Metrics) -> None:
        self.worker, self.metrics = worker, metrics
        self.open: set[Stream] = set()

    def start(self, requests: list[EngineRequest]) -> Stream:
        """Hand requests to the engine.

        Raises:
            ApiError: 429 if too many wait, 503 if the engine cannot run any more.
        """
        stream = Stream(self, requests)
        try:
            self.worker.submit(requests)
        except QueueFull:
            raise ApiError(429, "Too many requests are waiting; try again soon.", code="queue_full") from None
        except EngineBroken as error:
            raise ApiError(503, f"The engine has failed and cannot answer any more: {error}") from None
        self.open.add(stream)
        return stream

    def cut(self) -> None:
        """End all open streams with an error, as the server stops."""
        for stream in self.open:
            stream.cut = True
            stream.arrived.put_nowait((0, Delta("", [], [], "error", error=SHUT_DOWN)))


class Stream:
    """(choice, delta) of requests as they come, until every choice has ended. Closing it early frees their slots."""

    def __init__(self, streams: Streams, requests: list[EngineRequest]) -> None:
        self.streams, self.requests, self.left, self.cut = streams, requests, len(requests), False
        self.begun: set[int] = set()
        self.arrived, self.started = asyncio.Queue[tuple[int, Delta]](), time.monotonic()
        loop = asyncio.get_running_loop()
        for choice, request in enumerate(requests):
            request.on_delta = partial(self._forward, loop, choice)

    def _forward(self, loop: asyncio.AbstractEventLoop, choice: int, delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(self.arrived.put_nowait, (choice, delta))

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        """
        Raises:
            ApiError: a choice ended with an error.
        """
        if not self.left:
            raise StopAsyncIteration
        choice, delta = await self.arrived.get()
        if not self.cut:
            self.left -= delta.finish_reason is not None
            seconds, first = time.monotonic() - self.started, bool(delta.tokens) and choice not in self.begun
            self.begun.add(choice)
            self.streams.metrics.count(self.requests[choice], delta, seconds, first)
        if delta.finish_reason == "error":
            raise ApiError(503 if self.cut else 400 if delta.refused else 500, delta.error)
        return choice, delta

    def close(self) -> None:
        self.streams.open.discard(self)
        if self.left:
            self.streams.worker.cancel(self.requests)
            self.streams.metrics.left(self.left)
            self.left = 0


async def whole(request: Request, reply: Reply, stream: Stream) -> Response:
    """The answer in one piece, given up when the client goes away."""

    async def collect() -> None:
        async for choice, delta in stream:
            reply.add(choice, delta)

    try:
        await while_connected(request, collect())
        size = reply.entries
        body = await _apart(size, lambda: _encoded(reply.whole(), size))
        return Response(body, media_type="application/json")
    finally:
        stream.close()


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: the client has gone.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return await working
    finally:
        leaving.cancel()
        working.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of a stream, which is closed however the response ends, begun or not."""

    def __init__(self, reply: Reply, stream: Stream, usage: bool) -> None:
        super().__init__(self._events(reply, stream, usage), media_type="text/event-stream")
        self.stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.stream.close()

    async def _events(self, reply: Reply, stream: Stream, usage: bool) -> AsyncIterator[str]:
        try:
            for chunk in reply.opening():
                yield _event(chunk)
            async for choice, delta in stream:
                size = reply.entries_of(choice, delta)
                for event in await _apart(size, partial(_events_of, reply, choice, delta, size)):
                    yield event
        except ApiError as error:
            yield _event({"error": error.content()})
            return
        if usage:
            yield _event(reply.usage_chunk())
        yield "data: [DONE]\n\n"


async def _apart(entries: int, work: Callable[[], T]) -> T:
    """``work()``, in a thread where it has many log-probabilities to write: it would hold up everybody."""
    return await asyncio.to_thread(work) if entries > LARGE else work()


def _events_of(reply: Reply, choice: int, delta: Delta, entries: int) -> list[str]:
    return [_event(chunk, entries) for chunk in reply.chunks(choice, delta)]


def _event(data: dict[str, Any], entries: int = 0) -> str:
    return f"data: {_encoded(data, entries)}\n\n"


def _encoded(data: dict[str, Any], entries: int) -> str:
    """As JSON. What is large is written piece by piece: at once, it would hold Python's lock for seconds."""
    return "".join(ENCODER.iterencode(data)) if entries > LARGE else ENCODER.encode(data)
