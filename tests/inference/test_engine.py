"""Continuous batching: a request's tokens are those of `generate`, whoever else is in the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model

import lolcats
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request
from lolcats.inference.sampling import SamplingParams
from lolcats.inference.states import Snapshot


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return lolcats.convert(tiny_model(), AttentionConfig(window_size=8, sinks=2, feature_dim=8)).eval()


class Client:
    """A request and what came of it."""

    def __init__(self, engine: Engine, prompt: list[int], start: Snapshot | None = None, keep: bool = False,
                 **params: Any) -> None:  # fmt: skip
        self.deltas: list[Delta] = []
        settings = SamplingParams(**{"max_tokens": 20, **params})
        self.request = Request(prompt, settings, self.deltas.append, start=start, keep_state=keep)
        engine.submit(self.request)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def reason(self) -> str | None:
        return self.deltas[-1].finish_reason


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    return [torch.randint(6, 300, (n,), generator=generator).tolist() for n in lengths]


def engine_of(model: Any, tokenizer: Any, **settings: Any) -> Engine:
    return Engine(model, tokenizer, **{"slots": 4, "piece": 16, "stop_tokens": (), **settings})


def greedy(model: Any, prompt: list[int], new: int = 20) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_generate_in_any_company(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, slots=3)
    clients = [Client(engine, prompt) for prompt in prompts(9)]
    engine.run()
    assert engine.idle
    for client, prompt in zip(clients, prompts(9), strict=True):
        assert client.tokens == greedy(model, prompt)
        assert client.reason == "length"


def test_alone_and_among_31_others(model: Any, tokenizer: Any) -> None:
    many = prompts(32)
    crowd = engine_of(model, tokenizer, slots=32)
    clients = [Client(crowd, prompt, temperature=0.0 if i % 2 else 0.9, seed=i) for i, prompt in enumerate(many)]
    crowd.run()
    for i in (0, 7, 31):
        alone = engine_of(model, tokenizer, slots=32)
        client = Client(alone, many[i], temperature=0.0 if i % 2 else 0.9, seed=i)
        alone.run()
        assert client.tokens == clients[i].tokens


def test_a_finished_slot_is_refilled_and_prefill_does_not_stall_others(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, slots=2)
    first = Client(engine, [7, 8, 9], max_tokens=100)
    long = Client(engine, [6 + i % 290 for i in range(200)], max_tokens=2)
    pieces = -(-len(long.request.prompt) // engine.piece)
    assert pieces > 5
    for _ in range(pieces - 1):
        before = len(first.tokens)
        engine.step()
        assert len(first.tokens) > before  # a token for the running stream with every piece of the other's prompt
    third = Client(engine, [5, 6], max_tokens=3)
    engine.run()
    assert [len(client.tokens) for client in (first, long, third)] == [100, 2, 3]


def test_cancelled_requests_free_their_slots(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, slots=2)
    clients = [Client(engine, prompt, max_tokens=50) for prompt in prompts(6)]
    for _ in range(12):
        engine.step()
    for client in clients[::3]:
        assert engine.cancel(client.request)
        assert not engine.cancel(client.request)
    engine.run()
    for i, (client, prompt) in enumerate(zip(clients, prompts(6), strict=True)):
        assert client.reason == ("cancelled" if i % 3 == 0 else "length")
        assert client.tokens == greedy(model, prompt, 50)[: len(client.tokens)]
    assert not engine.running


def test_prefix_states_are_used_and_change_nothing(model: Any, tokenizer: Any) -> None:
    shared = [6 + 7 * i % 290 for i in range(70)]
    engine = engine_of(model, tokenizer)
    for tail in ([11], [12, 13]):
        client = Client(engine, shared + tail)
        engine.run()
        assert client.tokens == greedy(model, shared + tail)
    assert engine.prefixes.hits == 1
    assert client.request.cached >= 32
    small = engine_of(model, tokenizer, prefix_bytes=engine.prefixes.nbytes // 2)
    for prompt in prompts(8):
        Client(small, prompt + shared)
    small.run()
    assert 0 < small.prefixes.nbytes <= small.prefixes.limit


def test_a_conversation_is_saved_restored_and_forked(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    prompt = prompts(2)[1] + [9]
    engine = engine_of(model, tokenizer)
    client = Client(engine, prompt, keep=True)
    engine.run()
    snapshot = client.deltas[-1].snapshot
    assert snapshot is not None
    assert list(snapshot.tokens) == (prompt + client.tokens)[:-1]
    snapshot.save(tmp_path / "state.safetensors")
    restored = Snapshot.load(tmp_path / "state.safetensors")
    continued = [client.tokens[-1], 17, 18]
    for start in (snapshot, restored):
        fork = Client(engine, continued, start=start)
        engine.run()
        assert fork.tokens == greedy(model, prompt + client.tokens + [17, 18])
    with pytest.raises(LolcatsError, match="no saved state"):
        Snapshot.load(tmp_path / "missing.safetensors")


def test_stop_strings_hide_what_follows(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer)
    whole = Client(engine, [7, 8, 9], max_tokens=30)
    engine.run()
    stop = whole.text[8:11]
    client = Client(engine, [7, 8, 9], max_tokens=30, stop=(stop, "never there"))
    engine.run()
    assert client.reason == "stop"
    assert client.text == whole.text[: whole.text.index(stop)]


def test_sampling(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, slots=16)
    common = {"temperature": 1.5, "max_tokens": 12}
    same = [Client(engine, [7, 8], seed=3, **common) for _ in range(2)]
    other = Client(engine, [7, 8], seed=4, **common)
    nearly_greedy = [
        Client(engine, [7, 8], seed=5, **common, **x) for x in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1})
    ]
    once = Client(engine, [7, 8], repetition_penalty=100.0, max_tokens=30)
    likely = Client(engine, [7, 8], logprobs=3, max_tokens=4)
    engine.run()
    assert same[0].tokens == same[1].tokens != other.tokens
    for client in nearly_greedy:
        assert client.tokens == greedy(model, [7, 8], 12)
    assert len(set(once.tokens)) == 30
    logits = model(torch.tensor([[7, 8]])).logits[0, -1]
    report = likely.deltas[0].logprobs[0]
    assert report.token == report.top[0][0] == int(logits.argmax())
    assert report.logprob == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)
    assert len(report.top) == 3


def test_refusals(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer)
    for prompt in ([], [-1], [10**6]):
        with pytest.raises(LolcatsError, match="prompt"):
            Client(engine, prompt)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_tokens": 0}, {"stop": ("",)}, {"logprobs": 21}):
        with pytest.raises(LolcatsError, match=next(iter(wrong))):
            SamplingParams(**wrong)
    with pytest.raises(LolcatsError, match="convert this one first"):
        Engine(tiny_model(), tokenizer)
    with pytest.raises(LolcatsError, match="cache grows"):
        Engine(lolcats.convert(tiny_model(), AttentionConfig(window_size=8, layers={"0": "softmax"})), tokenizer)


def test_state_does_not_grow(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, slots=1)
    size = engine.table.nbytes
    Client(engine, [7], max_tokens=500)
    engine.run()
    assert engine.table.nbytes == size == engine.state_bytes
