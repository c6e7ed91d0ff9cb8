"""An error ends the requests whose work it was, and no other: one is injected at each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from support.serving import serving, tiny_engine, wait_until
from test_engine import Ahead, alone, prompts, tokens

from lolcats.inference.engine import Delta, Engine, Request, SamplingParams
from lolcats.inference.engine import engine as engine_module
from lolcats.inference.engine.sampling import BatchSampler, Sampler

PARAMS: dict[str, Any] = {"max_tokens": 12, "logprobs": 1, "temperature": 1.0, "seed": 3, "repetition_penalty": 1.2}


def make(tokenizer: Any, **options: Any) -> Engine:
    return tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0, **options)


def submit(engine: Engine, prompt: list[int], on_delta: Callable[[Delta], None] | None = None, **params: Any) -> Any:
    """A request and its deltas."""
    deltas: list[Delta] = []
    request = Request(prompt, SamplingParams(**params), on_delta or deltas.append)
    engine.submit(request)
    return request, deltas


class Failing:
    """Stands in for a method; raises in the calls of one request."""

    def __init__(self, real: Any, fails: Callable[..., bool]) -> None:
        self.real, self.fails, self.raised = real, fails, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fails(*args):
            self.raised += 1
            raise RuntimeError("injected")
        return self.real(*args, **kwargs)


def break_begin(engine: Engine, request: Request) -> None:
    request.begin = Failing(request.begin, lambda *_: True)  # type: ignore[method-assign]


def break_prefill(engine: Engine, request: Request) -> None:
    engine._prefill_piece = Failing(engine._prefill_piece, lambda r: r is request)  # type: ignore[method-assign]


def break_state(engine: Engine, request: Request) -> None:
    put = engine.table.put
    engine.table.put = Failing(put, lambda slot, _: engine.running[slot] is request)  # type: ignore[method-assign]


def break_uniform(engine: Engine, request: Request) -> None:
    request.sampler.generator = "none"  # type: ignore[assignment]


def break_detokenizer(engine: Engine, request: Request) -> None:
    add = request.detokenizer.add
    request.detokenizer.add = Failing(add, lambda _: len(request.generated) > 4)  # type: ignore[method-assign]


def break_penalty(engine: Engine, request: Request) -> None:
    request.sampler.seen = {10**9: None}  # a token that no row of logits has


STEPS = [break_prefill, break_state, break_uniform, break_detokenizer, break_penalty]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_request_that_fails_leaves_the_others_their_tokens(step: Any, tokenizer: Any) -> None:
    engine, plain, many = make(tokenizer), make(tokenizer), prompts(5)
    asked = [submit(engine, prompt, **PARAMS) for prompt in many]
    step(engine, asked[2][0])
    engine.run()
    assert asked[2][1][-1].finish_reason == "error"
    assert asked[2][1][-1].error
    for prompt, (_, deltas) in [pair for i, pair in enumerate(zip(many, asked, strict=True)) if i != 2]:
        assert deltas[-1].finish_reason == "length"
        assert tokens(deltas) == alone(plain, prompt, **PARAMS)
    assert engine.idle
    assert alone(engine, many[1], **PARAMS) == alone(plain, many[1], **PARAMS)


def test_a_request_that_cannot_begin_or_be_told_anything_ends(tokenizer: Any) -> None:
    engine, plain, many = make(tokenizer), make(tokenizer), prompts(3)
    first = submit(engine, many[0], **PARAMS)

    def deaf(delta: Delta) -> None:
        raise ValueError("nobody listens")

    request, _ = submit(engine, many[1], deaf, **PARAMS)
    broken = Request(many[2], SamplingParams(**PARAMS), (seen := list[Delta]()).append)
    break_begin(engine, broken)
    engine.submit(broken)
    assert seen[-1].finish_reason == "error"
    engine.run()
    assert tokens(first[1]) == alone(plain, many[0], **PARAMS)
    assert len(request.generated) == 1


@pytest.mark.parametrize("launched_ahead", [False, True])
def test_a_decode_step_that_fails_ends_its_batch_and_the_next_request_works(
    launched_ahead: bool, tokenizer: Any
) -> None:
    engine, plain, many = make(tokenizer), make(tokenizer), prompts(6)
    if launched_ahead:
        engine.graphs = Ahead(engine)  # type: ignore[assignment]
    params = {**PARAMS, "logprobs": None}
    asked = [submit(engine, prompt, **params) for prompt in many]
    while len(engine.running) < 3:
        engine.step()
    running, rows = list[Request](), engine._decode_rows

    def fails(*_: Any) -> bool:
        running.extend(engine.running)
        return True

    engine._decode_rows = Failing(rows, fails)  # type: ignore[method-assign]
    engine.step()
    engine._decode_rows = rows  # type: ignore[method-assign]
    assert len(running) >= 3
    assert not engine.running
    assert all(not x.any() for state in engine.table.states for x in state.tensors().values())
    engine.run()
    for prompt, (request, deltas) in zip(many, asked, strict=True):
        if request in running:
            assert (deltas[-1].finish_reason, deltas[-1].error) == ("error", "RuntimeError: injected")
        else:
            assert tokens(deltas) == alone(plain, prompt, **params)


def test_sampling_that_fails_in_a_step_launched_ahead_is_done_again_row_by_row(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain, many = make(tokenizer), make(tokenizer), prompts(4)
    engine.graphs = Ahead(engine)  # type: ignore[assignment]
    params = {**PARAMS, "logprobs": None}
    asked = [submit(engine, prompt, **params) for prompt in many]
    failing = Failing(BatchSampler.choose, lambda *_: failing.raised < 3 and engine.flying is not None)
    monkeypatch.setattr(BatchSampler, "choose", lambda *args: failing(*args))
    engine.run()
    assert failing.raised == 3
    for prompt, (_, deltas) in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(plain, prompt, **params)


def test_log_probabilities_that_fail_draw_nothing_twice(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain, many = make(tokenizer), make(tokenizer), prompts(3)
    asked = [submit(engine, prompt, **PARAMS) for prompt in many]
    failing = Failing(BatchSampler._logprobs, lambda _, logits, *__: len(logits) > 1)
    monkeypatch.setattr(BatchSampler, "_logprobs", lambda *args: failing(*args))
    engine.run()
    assert failing.raised > 5
    for prompt, (_, deltas) in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(plain, prompt, **PARAMS)


@pytest.mark.parametrize("wrong", [{"top_k": 2**31}, {"top_k": 2**63}, {"repetition_penalty": 1e-39}, {"seed": 2**70}])
def test_numbers_out_of_bounds_never_reach_the_engine(wrong: dict[str, Any], tokenizer: Any) -> None:
    from lolcats.errors import LolcatsError

    with pytest.raises(LolcatsError, match=next(iter(wrong))):
        SamplingParams(**wrong)
    with serving(make(tokenizer)) as (address, _):
        body = {"model": "tiny", "prompt": "cat", **wrong}
        reply = httpx.post(f"{address}/v1/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, next(iter(wrong)))


@pytest.mark.parametrize("temperature", [1e-307, 5e-324, 1e-5])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    samplers = [Sampler(SamplingParams(temperature=temperature, top_p=top_p), []) for top_p in (1, 1e-300, 0.5, 1)]
    assert BatchSampler().sample(logits, samplers)[0] == logits.argmax(-1).tolist()


def test_a_broken_device_ends_everything_and_shows_in_health(tokenizer: Any) -> None:
    engine = make(tokenizer)

    def illegal(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with serving(engine) as (address, service):
        assert httpx.get(f"{address}/health").status_code == 200
        engine._decode_rows = illegal  # type: ignore[method-assign]
        body = {"model": "tiny", "prompt": "cat"}
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 500
        state = httpx.get(f"{address}/health")
        assert (state.status_code, state.json()["status"]) == (503, "failed")
        refused = httpx.post(f"{address}/v1/completions", json=body)
        assert refused.status_code == 503
        assert "illegal memory access" in refused.json()["error"]["message"]
        wait_until(lambda: service.worker.open == 0)


def test_out_of_memory_is_not_a_broken_device() -> None:
    assert not engine_module.broke_the_device(torch.OutOfMemoryError("CUDA error: out of memory"))
    assert engine_module.broke_the_device(RuntimeError("CUDA error: device-side assert triggered"))
