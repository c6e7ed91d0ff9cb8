"""The chat page: its files, and the HTML of the answers that it shows."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lolcats.inference.server import markdown
from lolcats.inference.server.body import parsed_json, read_bytes
from lolcats.inference.server.errors import ApiError, bad_field
from lolcats.inference.server.limits import Limits

TYPES = {"chat.html": "text/html", "chat.css": "text/css", "chat.js": "text/javascript"}
THREADS = 2  # that render
WAITING = 64  # texts to render at most; the page shows the others as they are
POLICY = (
    "default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'; img-src data:; "
    "form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, authorize: Callable[[Request], None], limits: Limits) -> None:
    """Adds the page at ``/``, its files below ``/static/``, and ``POST /markdown``.

    Args:
        authorize: raises an ApiError for a request without the key. The page and its files need none.
        limits: size of a text to render, as JSON, and how long it may take to arrive.
    """
    folder = resources.files("lolcats.inference.server").joinpath("static")
    files = {name: folder.joinpath(name).read_bytes() for name in TYPES}
    renderer = _Renderer()

    @app.api_route("/", methods=["GET", "HEAD"])
    async def chat_page(request: Request) -> Response:
        return _file(request, "chat.html", files["chat.html"])

    @app.get("/static/{name}")
    async def static_file(request: Request, name: str) -> Response:
        if name not in files:
            raise ApiError(404, "This file does not exist.")
        return _file(request, name, files[name])

    @app.post("/markdown")
    async def rendered(request: Request) -> Response:
        authorize(request)
        return JSONResponse({"html": await renderer.render(await _text(request, limits))})


def _file(request: Request, name: str, content: bytes) -> Response:
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=TYPES[name])


class _Renderer:
    """Renders in threads of its own: neither the event loop nor the tokenizer waits for it."""

    def __init__(self) -> None:
        self.threads, self.waiting = ThreadPoolExecutor(THREADS, "markdown"), 0

    async def render(self, text: str) -> str:
        if self.waiting >= WAITING:
            raise ApiError(429, "Too many texts are waiting to be rendered; try again soon.", code="queue_full")
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, markdown.render, text)
        finally:
            self.waiting -= 1


async def _text(request: Request, limits: Limits) -> str:
    """The field ``text`` of the request's JSON; an ApiError says what is wrong with it."""
    given = parsed_json(await read_bytes(request, limits))
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise bad_field("text", 'expected a string, as in {"text": "..."}.')
    return given["text"]
