"""The server with a model that keeps heads: what does not fit, what waits, and what it says of its memory."""

from __future__ import annotations

from typing import Any

import httpx
from conftest import tiny_model
from support.serving import serving, wait_until
from test_server import CHAT, assert_error, slow_down

import lolcats
from lolcats.config import AttentionConfig
from lolcats.inference.engine import Engine
from lolcats.inference.server import Limits

KEPT = AttentionConfig(window_size=8, sinks=2, feature_dim=8, softmax_heads={"1": [0]})


def kept_engine(tokenizer: Any, blocks: int, **options: Any) -> Engine:
    """With room for so many blocks of 8 tokens; a token takes 2 × 8 channels of 4 bytes."""
    model = lolcats.convert(tiny_model(), KEPT)
    return Engine(model, tokenizer, 4, piece=16, block=8, kept_bytes=blocks * 8 * 64, stop_tokens=(), **options)


def test_what_exceeds_the_context_that_memory_allows_is_400(tokenizer: Any) -> None:
    with serving(kept_engine(tokenizer, 9)) as (address, _):
        state = httpx.get(f"{address}/health").json()
        assert (state["context"], state["max_tokens"], state["token_bytes"]) == (64, 64, 64)
        body = {"model": "tiny", "prompt": [5] * 40, "max_tokens": 25}
        reply = httpx.post(f"{address}/v1/completions", json=body)
        assert_error(reply, 400, "A prompt of 40 tokens and 25 tokens to generate exceed the limit of 64")
        assert reply.json()["error"]["code"] == "context_length_exceeded"
        reply = httpx.post(f"{address}/v1/completions", json={**body, "max_tokens": 24})
        assert reply.json()["usage"]["completion_tokens"] == 24
        assert "lolcats_kept_limit_bytes 4608.0" in httpx.get(f"{address}/metrics").text


def test_a_request_without_blocks_waits_and_one_more_is_429(tokenizer: Any) -> None:
    engine = kept_engine(tokenizer, 14, prefix_bytes=0)
    slow_down(engine)
    body = {"model": "tiny", "prompt": [5] * 60, "max_tokens": 40, "stream": True}
    with serving(engine, Limits(waiting=1)) as (address, service), httpx.Client(base_url=address, timeout=20) as http:
        requests = [http.build_request("POST", "/v1/completions", json=body) for _ in range(2)]
        running = http.send(requests[0], stream=True)
        wait_until(lambda: len(engine.running) == 1)
        waiting = http.send(requests[1], stream=True)
        wait_until(lambda: engine.room.short)
        assert len(engine.running) == 1  # of four slots
        assert_error(http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5}), 429, "waiting")
        before = engine.kept.held_bytes
        held = int(float(httpx.get(f"{address}/metrics").text.split("\nlolcats_kept_bytes ")[1].split()[0]))
        assert 60 * 64 < before <= held <= engine.kept.held_bytes, "the running one may take a block meanwhile"
        running.close()
        wait_until(lambda: len(engine.running) == 1 and not engine.waiting)
        waiting.close()
        wait_until(lambda: engine.idle and service.worker.open == 0)
    assert engine.kept.free == [14]
