"""The server's figures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lolcats.inference.engine.request import Delta, Request
from lolcats.inference.engine.worker import Worker


class Metrics:
    """Counters in a registry of their own, so that a process can have several servers."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()
        engine, kept = worker.engine, worker.engine.kept
        for name, about, read in (
            ("running", "Requests in a slot", lambda: len(engine.running)),
            ("waiting", "Requests that wait for a slot", lambda: worker.waiting),
            ("slots", "Slots of the engine", lambda: engine.table.slots),
            ("state_bytes", "Bytes of all slots' states", lambda: engine.table.nbytes),
            ("paused", "Requests that wait for blocks to go on", lambda: len(engine.slots.paused)),
            ("kept_bytes", "Bytes of kept heads' keys and values", lambda: kept.held_bytes if kept else 0),
            ("kept_limit_bytes", "Bytes that these may take", lambda: kept.nbytes if kept else 0),
            ("prefix_bytes", "Bytes of cached prefixes' states", lambda: engine.prefixes.nbytes),
            ("prefix_hits", "Prompts that began with a cached prefix", lambda: engine.prefixes.hits),
        ):
            Gauge(f"lolcats_{name}", about, registry=self.registry).set_function(read)
        self.requests = Counter("lolcats_requests", "Requests that ended", ["reason"], registry=self.registry)
        self.prompt_tokens = Counter("lolcats_prompt_tokens", "Tokens of prompts answered", registry=self.registry)
        self.new_tokens = Counter("lolcats_generated_tokens", "Tokens generated", registry=self.registry)
        self.first = Histogram("lolcats_first_token_seconds", "Until the first token", registry=self.registry)
        self.whole = Histogram("lolcats_request_seconds", "Until the last token", registry=self.registry)

    def count(self, request: Request, delta: Delta, seconds: float, first: bool) -> None:
        """A delta that came ``seconds`` after its request; ``first``: the first one with tokens."""
        self.new_tokens.inc(len(delta.tokens))
        if first:
            self.first.observe(seconds)
        if delta.finish_reason is not None:
            self.prompt_tokens.inc(len(request.prompt))
            self.requests.labels(delta.finish_reason).inc()
            self.whole.observe(seconds)

    def left(self, requests: int) -> None:
        """Requests whose client went away."""
        self.requests.labels("cancelled").inc(requests)

    def text(self) -> bytes:
        return generate_latest(self.registry)
