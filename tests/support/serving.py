"""A real server with a tiny linearized model, in a thread of this process or in one of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from conftest import tiny_model

import lolcats
from lolcats.config import AttentionConfig
from lolcats.inference.engine import Engine
from lolcats.inference.server import Access, Limits, Server, create_app, listen

CONFIG = AttentionConfig(window_size=8, sinks=2, feature_dim=8)


def tiny_engine(tokenizer: Any, slots: int = 8, **options: Any) -> Engine:
    return Engine(lolcats.convert(tiny_model(), CONFIG), tokenizer, slots, piece=16, **options)


@contextmanager
def serving(
    engine: Engine, limits: Limits | None = None, api_key: str = "", access: Access | None = None, deadline: int = 3
) -> Iterator[tuple[str, Any]]:
    """(address, service) of a running server."""
    app = create_app(engine, "tiny", limits, api_key, access)
    server, listening = Server(app, deadline), listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    app.state.service.stop = lambda: setattr(server, "should_exit", True)
    try:
        yield address, app.state.service
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def wait_until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health").status_code == 200
    except httpx.TransportError:
        return False
