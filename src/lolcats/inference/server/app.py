"""An HTTP server in the shape of OpenAI's API over the engine, with metrics and a chat page."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lolcats import __version__
from lolcats.errors import LolcatsError
from lolcats.inference.engine import engine as engines
from lolcats.inference.engine.engine import Delta, Engine
from lolcats.inference.engine.worker import QueueFull, Worker
from lolcats.inference.generate import encode
from lolcats.inference.server.metrics import Metrics
from lolcats.inference.server.replies import Reply
from lolcats.inference.server.schema import ChatRequest, CompletionRequest, Generation, first_problem

Body = TypeVar("Body", CompletionRequest, ChatRequest)


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. ``context``: tokens of prompt and answer together."""

    context: int = 8192
    max_tokens: int = 4096
    body_bytes: int = 1 << 20
    waiting: int = 128
    choices: int = 16


class ApiError(Exception):
    """Ends a request with a status and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def response(self) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(self.status)
        return JSONResponse({"error": self.content()}, self.status, headers)

    def content(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


@dataclass
class Service:
    """What the routes share."""

    worker: Worker
    name: str
    limits: Limits
    api_key: str
    metrics: Metrics
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    def authorize(self, request: Request) -> None:
        given, expected = request.headers.get("authorization", ""), f"Bearer {self.api_key}"
        if self.api_key and not hmac.compare_digest(given.encode("latin-1"), expected.encode()):
            raise ApiError(401, "Missing or wrong API key: Authorization: Bearer KEY.", code="invalid_api_key")

    async def tokenize(self, prompt: Any) -> list[int]:
        """Token ids of a text, a conversation or a list of ids, off the event loop."""
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict)):
            return prompt
        try:
            return await asyncio.get_running_loop().run_in_executor(self.tokenizing, self._tokenize, prompt)
        except TemplateError as error:
            raise ApiError(400, f"The chat template refuses these messages: {error}", "messages") from None

    def _tokenize(self, prompt: Any) -> list[int]:
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        return [int(token) for token in encode(tokenizer, prompt)["input_ids"][0]]

    async def requests(self, body: Generation, prompts: list[Any], default_tokens: int) -> list[engines.Request]:
        """One request for each prompt and choice."""
        if len(prompts) * body.n > self.limits.choices:
            raise ApiError(400, f"At most {self.limits.choices} choices (prompts times n) in one request.", "n")
        wanted, result = body.wanted_tokens(), []
        if wanted is not None and wanted > self.limits.max_tokens:
            raise ApiError(400, f"max_tokens: at most {self.limits.max_tokens}, got {wanted}.", "max_tokens")
        for prompt in prompts:
            tokens = await self.tokenize(prompt)
            room = self.limits.context - len(tokens)
            if room < (wanted or 1):
                raise ApiError(
                    400, f"{len(tokens)} tokens of prompt and {wanted or 1} to generate are more than the limit of "
                    f"{self.limits.context}.", "prompt", "context_length_exceeded",
                )  # fmt: skip
            for choice in range(body.n):
                params = body.sampling(wanted or min(default_tokens, room), choice)
                result.append(engines.Request(tokens, params, lambda _: None))
        return result


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """The request's JSON, validated; an ApiError says what is wrong with it."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "Send JSON, with Content-Type: application/json.")
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise ApiError(413, f"The request is larger than {limit} bytes.")
    try:
        parsed = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
        return kind.model_validate(parsed)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The request is not valid UTF-8: {error.reason} at byte {error.start}.") from None
    except ValidationError as error:
        param, message = first_problem(list(error.errors()))
        raise ApiError(400, message, param or None) from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The request is not valid JSON: {error}.") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Stream:
    """(choice, delta) of requests as they come, until every choice has ended. Closing it early frees their slots."""

    def __init__(self, service: Service, requests: list[engines.Request]) -> None:
        self.service, self.requests, self.open = service, requests, len(requests)
        self.arrived, self.started = asyncio.Queue[tuple[int, Delta]](), time.monotonic()
        loop = asyncio.get_running_loop()
        for choice, request in enumerate(requests):
            request.on_delta = partial(self._forward, loop, choice)
        try:
            service.worker.submit(requests)
        except QueueFull:
            raise ApiError(429, "Too many requests are waiting; try again soon.", code="queue_full") from None

    def _forward(self, loop: asyncio.AbstractEventLoop, choice: int, delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(self.arrived.put_nowait, (choice, delta))

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Delta]:
        if not self.open:
            raise StopAsyncIteration
        choice, delta = await self.arrived.get()
        self.open -= delta.finish_reason is not None
        self.service.metrics.count(self.requests[choice], delta, time.monotonic() - self.started)
        return choice, delta

    def close(self) -> None:
        if self.open:
            self.service.worker.cancel(self.requests)
            self.service.metrics.left(self.open)
            self.open = 0


async def whole(request: Request, reply: Reply, stream: Stream) -> Response:
    """The answer in one piece, given up when the client goes away."""

    async def collect() -> None:
        async for choice, delta in stream:
            if delta.finish_reason == "error":
                raise ApiError(500, delta.error)
            reply.add(choice, delta)

    collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        await collecting
        return JSONResponse(reply.whole())
    except asyncio.CancelledError:  # the deadline after SIGTERM
        raise ApiError(503, "The server shut down before the answer was complete.") from None
    finally:
        leaving.cancel()
        collecting.cancel()
        stream.close()


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
        for chunk in reply.opening():
            yield _event(chunk)
        async for choice, delta in stream:
            if delta.finish_reason == "error":
                yield _event({"error": ApiError(500, delta.error).content()})
                return
            for chunk in reply.chunks(choice, delta):
                yield _event(chunk)
        if usage:
            yield _event(reply.usage_chunk())
        yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def create_app(
    engine: Engine, name: str, limits: Limits | None = None, api_key: str = "",
) -> FastAPI:  # fmt: skip
    """The application; its lifespan ends the engine's thread."""
    limits = limits or Limits()
    worker = Worker(engine, limits.waiting)
    service = Service(worker, name, limits, api_key, Metrics(worker))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(title="lolcats", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    _add_errors(app)
    _add_pages(app, service)
    _add_completions(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(LolcatsError)
    async def refused(_: Request, error: LolcatsError) -> Response:
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail)).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return ApiError(500, f"The server failed: {type(error).__name__}.").response()


def _add_pages(app: FastAPI, service: Service) -> None:
    page = resources.files("lolcats.inference.server").joinpath("chat.html").read_text("utf-8")
    created = int(time.time())
    policy = (
        "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
    )

    @app.get("/")
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health() -> Response:
        alive, engine = service.worker.thread.is_alive(), service.engine
        state = {
            "status": "ok" if alive else "failed", "model": service.name, "slots": engine.table.slots,
            "running": len(engine.running), "waiting": service.worker.waiting, "state_bytes": engine.state_bytes,
            "context": service.limits.context, "max_tokens": service.limits.max_tokens,
        }  # fmt: skip
        return JSONResponse(state, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.authorize(request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.authorize(request)
        return JSONResponse({"object": "list", "data": [_card(service.name, created)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.authorize(request)
        _check_name(service, name)
        return JSONResponse(_card(service.name, created))


def _card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lolcats"}


def _check_name(service: Service, name: str) -> None:
    if name != service.name:
        raise ApiError(404, f"This server has the model {service.name!r}, not {name!r}.", "model", "model_not_found")


def _add_completions(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, body: Generation, prompts: list[Any], chat: bool, default: int) -> Response:
        _check_name(service, body.model)
        requests = await service.requests(body, prompts, default)
        reply = Reply(f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", service.name, chat, requests, body.n,
                      service.engine.tokenizer)  # fmt: skip
        stream = Stream(service, requests)
        if not body.stream:
            return await whole(request, reply, stream)
        return EventStream(reply, stream, body.stream_options is not None and body.stream_options.include_usage)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        service.authorize(request)
        body = await read_body(request, CompletionRequest, service.limits.body_bytes)
        return await answer(request, body, body.prompts(), False, 16)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        service.authorize(request)
        body = await read_body(request, ChatRequest, service.limits.body_bytes)
        messages = [message.plain() for message in body.messages]
        return await answer(request, body, [messages], True, service.limits.max_tokens)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address (port 0: at a free port), whose connections wait until the application runs.

    Raises:
        LolcatsError: the address is in use, not of this machine, or not allowed.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # Python adds the address
        raise LolcatsError(f"Cannot listen on {host}, port {port}: {reason}. Use another --port or --host.") from None


def serve(app: FastAPI, listening: socket.socket, deadline: int) -> None:
    """Run until SIGTERM or SIGINT; requests that run then have ``deadline`` seconds to finish."""
    import uvicorn

    config = uvicorn.Config(app, timeout_graceful_shutdown=deadline, log_level="warning")
    with contextlib.suppress(KeyboardInterrupt):  # that uvicorn has handled
        uvicorn.Server(config).run([listening])
