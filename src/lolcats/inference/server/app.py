"""An HTTP server in the shape of OpenAI's API over the engine, with metrics and a chat page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from lolcats.errors import LolcatsError
from lolcats.inference.engine import Engine
from lolcats.inference.engine.grammar import GrammarError
from lolcats.inference.engine.request import Request as EngineRequest
from lolcats.inference.engine.worker import Worker
from lolcats.inference.server.access import Access
from lolcats.inference.server.body import read_body
from lolcats.inference.server.compiling import Compiling
from lolcats.inference.server.errors import ApiError, bad_field
from lolcats.inference.server.grammar import Grammars
from lolcats.inference.server.limits import Limits
from lolcats.inference.server.metrics import Metrics
from lolcats.inference.server.page import add_page
from lolcats.inference.server.replies import Reply
from lolcats.inference.server.schema import ChatRequest, CompletionRequest, Generation
from lolcats.inference.server.stream import LEFT, SHUT_DOWN, EventStream, Streams, while_connected, whole
from lolcats.inference.server.tokenizing import Tokenizing
from lolcats.version import __version__

log = logging.getLogger(__name__)
READ = ["GET", "HEAD"]


class Service:
    """What the routes share."""

    def __init__(self, engine: Engine, name: str, limits: Limits, access: Access) -> None:
        context = min(limits.context, engine.room.context) if engine.room else limits.context
        limits = replace(limits, context=context, max_tokens=min(limits.max_tokens, context))
        self.engine, self.name, self.limits, self.access = engine, name, limits, access
        self.worker = Worker(engine, limits.waiting)
        self.metrics = Metrics(self.worker)
        self.streams = Streams(self.worker, self.metrics)
        self.tokenizing = Tokenizing(engine.tokenizer)
        self.compiling = Compiling(Grammars(engine.tokenizer, engine.vocabulary, engine.stop_tokens))

    def prepare(self) -> None:
        """Load now what the first grammar needs, which would hold up other answers for a second or two later."""
        with contextlib.suppress(GrammarError):  # llguidance is not installed: a request says so
            self.compiling.grammars.prepare()

    def close(self) -> None:
        self.worker.close()
        self.tokenizing.close()
        self.compiling.close()

    def check_name(self, name: str) -> None:
        """
        Raises:
            ApiError: 404, another model.
        """
        if name != self.name:
            raise ApiError(404, f"This server has the model {self.name!r}, not {name!r}.", "model", "model_not_found")

    def check(self, body: Generation, prompts: int) -> None:
        """What can be refused before anything is tokenized.

        Raises:
            ApiError: another model, or more than the limits allow.
        """
        self.check_name(body.model)
        if prompts * body.n > self.limits.choices:
            raise ApiError(400, f"At most {self.limits.choices} choices (prompts times n) in one request.", "n")
        field, wanted = body.tokens_field
        if wanted is not None and wanted > self.limits.max_tokens:
            raise bad_field(field, f"at most {self.limits.max_tokens}, got {wanted}.")

    async def requests(self, body: Generation, prompts: list[list[int]], default_tokens: int) -> list[EngineRequest]:
        """One request for each prompt and choice.

        Raises:
            ApiError: more tokens than the limits allow, or a grammar that is not accepted.
        """
        _, wanted = body.tokens_field
        matchers, result = await self.compiling.matchers(body.response_format, len(prompts) * body.n), []
        for tokens in prompts:
            room, least = self.limits.context - len(tokens), 1 if wanted is None else wanted
            if room < least:
                raise ApiError(
                    400, f"A prompt of {len(tokens)} tokens and {least} tokens to generate exceed the limit of "
                    f"{self.limits.context}.", "prompt", "context_length_exceeded",
                )  # fmt: skip
            for choice in range(body.n):
                params = body.sampling(min(default_tokens, room) if wanted is None else wanted, choice)
                anew = isinstance(body, ChatRequest)
                result.append(EngineRequest(tokens, params, lambda _: None, anew=anew, matcher=matchers.pop()))
        return result


def create_app(
    engine: Engine, name: str, limits: Limits | None = None, api_key: str = "", access: Access | None = None,
) -> FastAPI:  # fmt: skip
    """The application; its lifespan ends the engine's thread.

    access: who may use it; ``api_key`` is enough where only a key matters.
    """
    service = Service(engine, name, limits or Limits(), access or Access(api_key))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="lolcats", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url=None)  # fmt: skip
    app.state.service = service
    app.add_middleware(Failures)
    service.access.guard(app)
    _add_errors(app)
    add_page(app, service.access.authorize, service.limits)
    _add_information(app, service)
    _add_completions(app, service)
    return app


class Failures:
    """Turns what nobody expected into a 500, inside of what adds headers for pages of other origins."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:  # the server stops, and its deadline has passed
            if scope["type"] == "http" and not begun:
                await ApiError(503, SHUT_DOWN).response()(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http" or begun:
                raise
            log.exception("A request failed.")
            await ApiError(500, f"The server failed: {type(error).__name__}.").response()(scope, receive, send)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(LolcatsError)
    async def refused(_: Request, error: LolcatsError) -> Response:
        field, colon, _rest = str(error).partition(": ")
        return ApiError(400, str(error), field if colon and field.isidentifier() else None).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> Response:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)


def _add_information(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        failure, engine = service.worker.failure, service.engine
        state = {
            "status": "failed" if failure else "ok", "model": service.name, "slots": engine.table.slots,
            "running": len(engine.running), "waiting": service.worker.waiting, "state_bytes": engine.state_bytes,
            "token_bytes": engine.kept.token_bytes if engine.kept else 0,
            "window_bytes": engine.kept.window_bytes if engine.kept else 0,
            "context": service.limits.context, "max_tokens": service.limits.max_tokens,
        }  # fmt: skip
        return JSONResponse(state, 503 if failure else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        service.access.authorize(request)
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.api_route("/v1/models", methods=READ)
    async def models(request: Request) -> Response:
        service.access.authorize(request)
        return JSONResponse({"object": "list", "data": [_card(service.name, created)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.access.authorize(request)
        service.check_name(name)
        return JSONResponse(_card(service.name, created))


def _card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "lolcats"}


def _add_completions(app: FastAPI, service: Service) -> None:
    limits, tokenizing = service.limits, service.tokenizing

    async def answer(request: Request, body: Generation, reply: Reply) -> Response:
        stream = service.streams.start(reply.requests)
        if not body.stream:
            return await whole(request, reply, stream)
        return EventStream(reply, stream, body.stream_options.include_usage)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        service.access.authorize(request)
        body = await read_body(request, CompletionRequest, limits, tokenizing)
        service.check(body, len(body.prompts))
        prompts = [await tokenizing.prompt(prompt) for prompt in body.prompts]
        requests = await while_connected(request, service.requests(body, prompts, 16))
        reply = Reply(service.name, False, requests, body.n, service.engine.tokenizer)
        if body.echo:
            reply.echo(body.prompts)
        return await answer(request, body, reply)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        service.access.authorize(request)
        body = await read_body(request, ChatRequest, limits, tokenizing)
        service.check(body, 1)
        tools = body.tools if body.tool_choice != "none" else []
        prompt = await tokenizing.conversation(body.messages, tools)
        requests = await while_connected(request, service.requests(body, [prompt], limits.max_tokens))
        reply = Reply(service.name, True, requests, body.n, service.engine.tokenizer)
        return await answer(request, body, reply)
