"""``echo`` with log-probabilities: what lm-eval scores with. Piece by piece, and equal to one forward pass."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
from support.serving import serving, tiny_engine
from test_engine import ask, prompts, tokens
from test_kept_keys import assert_all_free, engine_for

from lolcats.inference.engine import Delta, Engine, Request, SamplingParams
from lolcats.inference.server import Limits

LONG = prompts(8)[7]  # 70 tokens: five pieces


def expected(engine: Engine, ids: list[int]) -> list[float]:
    """Log-probabilities of the tokens from the second on, by one forward pass."""
    with torch.inference_mode():
        logprobs = engine.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def score(engine: Engine, ids: list[int], **params: Any) -> Request:
    request = Request(ids, SamplingParams(**{"max_tokens": 0, "prompt_logprobs": 2, **params}), lambda _: None)
    engine.submit(request)
    engine.run()
    return request


@pytest.mark.parametrize("ids", prompts(8), ids=len)
def test_scores_are_those_of_one_forward_pass(ids: list[int], tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, stop_tokens=())
    entries = score(engine, ids).prompt_logprobs
    assert [entry.token for entry in entries] == ids[1:]
    torch.testing.assert_close([e.logprob for e in entries], expected(engine, ids), atol=1e-4, rtol=1e-4)
    assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.logprob for entry in entries)


def test_scores_do_not_need_what_the_prefix_cache_skips(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, stop_tokens=())
    ask(engine, LONG, max_tokens=2)
    engine.run()
    assert engine.prefixes.entries
    request = score(engine, LONG)
    assert (request.cached, len(request.prompt_logprobs)) == (0, len(LONG) - 1)


def test_scoring_is_prefill_and_never_holds_more_logits_than_a_piece(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=())
    running = ask(engine, [5, 6, 7], max_tokens=60)
    seen, forward = list[int](), engine._forward

    def watched(ids: Any, positions: Any, cache: Any, every: bool = False) -> Any:
        logits = forward(ids, positions, cache, every)
        seen.append(logits.shape[1])
        return logits

    engine._forward = watched  # type: ignore[method-assign]
    engine.submit(Request(LONG, SamplingParams(max_tokens=0, prompt_logprobs=0), lambda _: None))
    while engine.waiting:
        before = len(running)
        engine.step()
        assert len(running) == before + 1 + (before == 0)  # other answers go on between two pieces
    assert max(seen) == engine.piece


def test_scores_do_not_change_what_follows(tokenizer: Any) -> None:
    engine, deltas = tiny_engine(tokenizer, stop_tokens=(), prefix_bytes=0), list[Delta]()
    plain = ask(engine, LONG, max_tokens=9)
    engine.submit(Request(LONG, SamplingParams(max_tokens=9, prompt_logprobs=1), deltas.append))
    engine.run()
    assert [d.tokens for d in deltas] == [d.tokens for d in plain]


@pytest.mark.parametrize("kept", [None, "one head", "local layers and a head"])
@pytest.mark.parametrize("cached", [0, 1 << 20])
def test_a_request_for_no_tokens_can_leave_a_state(kept: str | None, cached: int, tokenizer: Any) -> None:
    if kept:
        engine = engine_for(tokenizer, kept, prefix_bytes=cached)
    else:
        engine = tiny_engine(tokenizer, stop_tokens=(), prefix_bytes=cached)
    whole = ask(engine, [*LONG, 7, 8], max_tokens=9)
    left = ask(engine, LONG, max_tokens=0)
    engine.run()
    (delta,) = left
    assert delta.snapshot is not None
    assert (delta.snapshot.tokens, delta.tokens, delta.finish_reason) == (tuple(LONG), [], "length")
    again = ask(engine, [7], delta.snapshot, max_tokens=0)
    engine.run()
    assert again[0].snapshot is not None
    follow = [ask(engine, [7, 8], delta.snapshot, max_tokens=9), ask(engine, [8], again[0].snapshot, max_tokens=9)]
    engine.run()
    assert [tokens(deltas) for deltas in follow] == [tokens(whole)] * 2
    assert ask(engine, LONG, max_tokens=0) == []
    if engine.kept is not None:
        engine.run()
        del whole, left, again, follow, delta
        while engine.prefixes.evict():
            pass
        assert_all_free(engine)


@pytest.fixture(scope="module")
def address(tokenizer: Any) -> Any:
    with serving(tiny_engine(tokenizer, stop_tokens=()), Limits(context=400)) as (address, service):
        yield address, service.engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("most", [0, 1, 5])
def test_echo(address: Any, stream: bool, most: int, tokenizer: Any) -> None:
    url, engine = address
    texts = ["the cat sat", "dogs like warm milk while birds sing"]
    body = {"model": "tiny", "prompt": texts, "echo": True, "logprobs": 1, "max_tokens": most, "temperature": 0}
    plain = httpx.post(f"{url}/v1/completions", json={**body, "echo": False, "max_tokens": 5}).json()["choices"]
    choices = answer(url, {**body, "stream": stream})
    for text, choice, other in zip(texts, choices, plain, strict=True):
        ids = tokenizer(text)["input_ids"]
        logprobs = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert logprobs["tokens"][: len(ids)] == [tokenizer.decode([token]) for token in ids]
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        torch.testing.assert_close(
            logprobs["token_logprobs"][1 : len(ids)], expected(engine, ids), atol=1e-4, rtol=1e-4
        )
        assert len(logprobs["tokens"]) == len(ids) + most
        assert logprobs["tokens"][len(ids) :] == other["logprobs"]["tokens"][:most]
        assert logprobs["text_offset"] == [len(tokenizer.decode(ids[:i])) for i in range(len(ids))] + [
            len(text) + offset for offset in other["logprobs"]["text_offset"][:most]
        ]
        assert choice["finish_reason"] == "length"


def answer(url: str, body: dict[str, Any]) -> list[Any]:
    """The choices, put together again where they were streamed."""
    import json

    if not body["stream"]:
        return list(httpx.post(f"{url}/v1/completions", json=body).json()["choices"])
    choices: list[Any] = [None] * len(body["prompt"])
    for line in httpx.post(f"{url}/v1/completions", json=body).text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        for new in json.loads(line[6:])["choices"]:
            old = choices[new["index"]]
            if old is None:
                choices[new["index"]] = new
                continue
            old["text"] += new["text"]
            old["finish_reason"] = new["finish_reason"]
            for name, values in (new["logprobs"] or {}).items():
                old["logprobs"][name] += values
    return choices


def test_echo_without_log_probabilities_and_of_token_ids(address: Any, tokenizer: Any) -> None:
    url, _ = address
    ids = tokenizer("the cat")["input_ids"]
    body = {"model": "tiny", "prompt": ids, "echo": True, "max_tokens": 0, "n": 2}
    reply = httpx.post(f"{url}/v1/completions", json=body).json()
    assert [(choice["text"], choice["logprobs"]) for choice in reply["choices"]] == [("the cat", None)] * 2
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (len(ids), 0)
