"""Models that keep heads or layers, in the engine: what generate gives, in blocks that all come back."""

from __future__ import annotations

import gc
import logging
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from support.interpreted import interpreted
from support.tiny import tiny
from test_engine import Ahead, alone, ask, prompts, tokens

import lolcats
from lolcats.attention import use_backend
from lolcats.attention.subset import side_by_side
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request, Snapshot
from lolcats.inference.engine.room import state_bytes
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.modeling import interface

WINDOW: dict[str, Any] = {"window_size": 8, "sinks": 2, "feature_dim": 8}
HEADS = {"0": [1]}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one head": (lambda: tiny_model(), {"softmax_heads": HEADS}),
    "a layer and a head": (lambda: tiny_model(), {"softmax_heads": {"0": [0, 1], "1": [0]}}),
    "all heads": (lambda: tiny_model(), {"softmax_heads": {"0": [0, 1], "1": [0, 1]}}),
    "the last layer": (lambda: tiny_model("qwen2"), {"layers": {"1": "softmax"}}),
    "unrotated maps": (lambda: tiny_model(), {"softmax_heads": HEADS, "feature_inputs": "unrotated"}),
    "no linear term": (lambda: tiny_model(), {"softmax_heads": HEADS, "kind": "window"}),
    "window of the base, local layers": (lambda: tiny_model("gemma3"), {}),
    "all layers, some local": (lambda: tiny_model("gemma3"), {"kind": "softmax"}),
    "local layers and a head": (lambda: tiny_model("gemma3"), {"softmax_heads": {"1": [1]}}),
    "softcap": (lambda: tiny("gemma2"), {"softmax_heads": {"1": [0]}}),
    "chunks": (lambda: tiny("llama4_text"), {}),
    "chunks and a head": (
        lambda: tiny("llama4_text"),
        {"layers": {"0": "hybrid"}, "softmax_heads": {"0": [1]}},
    ),
    "learned sinks": (lambda: tiny("gpt_oss"), {"kind": "softmax"}),
    "compressed keys": (lambda: tiny("minicpm3"), {"kind": "softmax"}),
    "shared keys": (lambda: tiny("gemma4_text"), {"kind": "softmax"}),
    "learned positions": (lambda: tiny("gpt2"), {"kind": "softmax"}),
}


def engine_for(tokenizer: Any, name: str = "a layer and a head", slots: int = 4, **options: Any) -> Engine:
    make, attention = MODELS[name]
    torch.manual_seed(3)
    model = lolcats.convert(make(), AttentionConfig(**{**WINDOW, **attention}))
    options = {"piece": 16, "stop_tokens": (), "block": 8, "prefix_bytes": 0, "context": 256, **options}
    return Engine(model, tokenizer, slots, **options)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    said: list[int] = out[0, len(prompt) :].tolist()
    return said


def held(engine: Engine) -> int:
    """Blocks in use of the layers that see all keys."""
    assert engine.kept is not None
    return engine.kept.groups[0].blocks.held


def assert_all_free(engine: Engine) -> None:
    assert engine.kept is not None
    assert engine.kept.free == [group.blocks.count for group in engine.kept.groups]
    assert set(engine.table.tables) == {None}


@pytest.mark.parametrize("name", MODELS)
def test_equals_generate(name: str, tokenizer: Any) -> None:
    """Pieces, rows of different lengths, slots that empty, move and are filled again."""
    engine = engine_for(tokenizer, name, slots=3)
    asked = [(prompt, ask(engine, prompt, max_tokens=10 + 3 * i)) for i, prompt in enumerate(prompts(8))]
    engine.run()
    for i, (prompt, deltas) in enumerate(asked):
        assert tokens(deltas) == generated(engine.model, prompt, 10 + 3 * i)
    del asked, deltas
    assert_all_free(engine)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.3}])
@pytest.mark.parametrize("name", ["a layer and a head", "local layers and a head"])
def test_a_request_does_not_depend_on_its_batch_mates(name: str, sampling: dict[str, Any], tokenizer: Any) -> None:
    engine = engine_for(tokenizer, name, slots=8)
    many = prompts(8)
    asked = [ask(engine, prompt, max_tokens=20, **sampling) for prompt in many]
    engine.run()
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(engine, prompt, max_tokens=20, **sampling)


def test_log_probabilities_of_prompts_are_those_without_a_cache(tokenizer: Any) -> None:
    engine, prompt = engine_for(tokenizer), prompts(8)[7]
    request = Request(prompt, SamplingParams(max_tokens=0, prompt_logprobs=0), lambda _: None)
    engine.submit(request)
    engine.run()
    with torch.inference_mode():
        logits = engine.model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([x.logprob for x in request.prompt_logprobs]), expected, atol=1e-4, rtol=0)
    assert_all_free(engine)


@pytest.mark.parametrize("name", ["a layer and a head", "all heads", "local layers and a head"])
def test_a_saved_state_goes_on_forks_and_survives_a_file(name: str, tokenizer: Any, tmp_path: Path) -> None:
    engine, prompt = engine_for(tokenizer, name), prompts(8)[6]
    assert engine.kept is not None
    deltas = ask(engine, prompt, max_tokens=10)
    engine.run()
    snapshot, said = deltas[-1].snapshot, tokens(deltas)
    assert snapshot is not None
    assert snapshot.nbytes >= engine.state_bytes + len(snapshot.tokens) * engine.kept.token_bytes
    assert held(engine) == 6  # 42 tokens
    snapshot.save(tmp_path / "state.safetensors")
    loaded = Snapshot.load(tmp_path / "state.safetensors")
    assert loaded.tokens == snapshot.tokens
    turns = [[said[-1], 9, 10], [said[-1], 20, 21, 22]]
    forks = [ask(engine, turn, start, max_tokens=25) for turn in turns for start in (snapshot, loaded)]
    engine.run()
    for turn, pair in zip(turns, (forks[:2], forks[2:]), strict=True):
        expected = generated(engine.model, prompt + said[:-1] + turn, 25)
        assert [tokens(fork) for fork in pair] == [expected, expected]
    elsewhere = engine_for(tokenizer, name)
    assert tokens(ask_and_run(elsewhere, turns[0], snapshot, max_tokens=25)) == tokens(forks[0])
    del snapshot, deltas, forks, pair
    assert_all_free(engine)


def ask_and_run(engine: Engine, prompt: list[int], start: Snapshot | None = None, **params: Any) -> list[Delta]:
    deltas = ask(engine, prompt, start, **params)
    engine.run()
    return deltas


def test_a_state_of_a_model_with_other_heads_is_refused(tokenizer: Any) -> None:
    snapshot = ask_and_run(engine_for(tokenizer, "one head"), [5, 6], max_tokens=2)[-1].snapshot
    for other in (engine_for(tokenizer), Engine(lolcats.convert(tiny_model(), AttentionConfig(**WINDOW)), tokenizer)):
        with pytest.raises(LolcatsError, match="of another model"):
            ask(other, [7], snapshot)


@pytest.mark.parametrize("block", [8, 64])  # pieces end with a block, and in the middle of one
def test_shared_prefixes_share_blocks(block: int, tokenizer: Any) -> None:
    engine = engine_for(tokenizer, prefix_bytes=1 << 20, block=block)
    assert engine.kept is not None
    shared = prompts(8)[7]
    for tail in ([7], [8, 9], list(range(10, 50))):
        request = Request([*shared, *tail], SamplingParams(max_tokens=20), lambda _: None)
        engine.submit(request)
        engine.run()
        assert request.cached == (0 if tail == [7] else 64)
        assert request.generated == generated(engine.model, request.prompt, 20)
    entries = engine.prefixes.entries.values()
    assert engine.prefixes.nbytes == sum(entry.nbytes for entry in entries)
    lengths = [len(entry.tokens) for entry in entries]
    if block == 8:
        assert held(engine) < sum(length // block for length in lengths)
    while engine.prefixes.evict():
        pass
    assert engine.prefixes.nbytes == 0
    del entries
    assert_all_free(engine)


def small(tokenizer: Any, blocks: int, **options: Any) -> Engine:
    """An engine with room for so many blocks of 8 tokens."""
    engine = engine_for(tokenizer, **options)
    assert engine.kept is not None
    made = engine_for(tokenizer, kept_bytes=blocks * engine.kept.groups[0].block_bytes, **{"context": 0, **options})
    assert made.kept is not None
    assert [group.blocks.count for group in made.kept.groups] == [blocks]
    return made


def queue(engine: Engine, prompt: list[int], start: Snapshot | None = None, **params: Any) -> list[Delta]:
    """Like ``ask``, without a snapshot at the end, which would hold blocks."""
    deltas: list[Delta] = []
    engine.submit(Request(prompt, SamplingParams(**params), deltas.append, start))
    return deltas


def queue_and_run(engine: Engine, prompt: list[int], start: Snapshot | None = None, **params: Any) -> list[Delta]:
    deltas = queue(engine, prompt, start, **params)
    engine.run()
    return deltas


def test_a_prompt_waits_until_there_are_blocks_for_it_and_nobody_overtakes_it(tokenizer: Any) -> None:
    engine = small(tokenizer, 12)
    first = queue(engine, prompts(8)[6], max_tokens=20)  # 33 tokens: 5 blocks
    while not first:
        engine.step()
    long, short = queue(engine, prompts(8)[7], max_tokens=5), queue(engine, [5, 6], max_tokens=5)  # 9 blocks, and one
    while first[-1].finish_reason is None:
        engine.step()
        assert not long
        assert not short
    engine.run()
    assert tokens(long) == generated(engine.model, prompts(8)[7], 5)
    assert tokens(short) == generated(engine.model, [5, 6], 5)
    assert_all_free(engine)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_newest_request_is_paused_and_goes_on_where_it_was(sampling: dict[str, Any], tokenizer: Any) -> None:
    engine, roomy = small(tokenizer, 12, state_dtype=torch.bfloat16), engine_for(tokenizer, state_dtype=torch.bfloat16)
    many, paused = prompts(4), set[int]()
    asked = [queue(engine, prompt, max_tokens=60, **sampling) for prompt in many]
    while not engine.idle:
        engine.step()
        for request in engine.slots.paused:
            paused.add(request.number)
            assert request.number > max((other.number for other in engine.running), default=0)
    assert paused == {2, 3, 4}
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(roomy, prompt, max_tokens=60, **sampling)
        assert deltas[-1].finish_reason == "length"
    assert_all_free(engine)


def test_a_prompt_that_is_only_begun_gives_its_blocks_to_running_requests(tokenizer: Any) -> None:
    engine, prompt = small(tokenizer, 14, piece=4), prompts(8)[7]
    first = queue(engine, [5, 6, 7], max_tokens=90)
    while len(tokens(first)) < 25:  # 4 blocks
        engine.step()
    long = Request(prompt, SamplingParams(max_tokens=20, prompt_logprobs=0), (deltas := list[Delta]()).append)
    engine.submit(long)  # 9 blocks, for which it has 18 steps
    seen = list[int]()
    while not engine.idle:
        engine.step()
        seen.append(long.prefilled)
    again = next(i for i in range(1, len(seen)) if seen[i] < seen[i - 1])
    assert seen[again - 1] > 16
    assert seen[again] == 0
    assert tokens(first) == generated(engine.model, [5, 6, 7], 90)
    assert tokens(deltas) == generated(engine.model, prompt, 20)
    assert len(long.prompt_logprobs) == len(prompt) - 1
    assert_all_free(engine)


def test_what_never_fits_is_refused_and_what_saved_states_displace_fails(tokenizer: Any) -> None:
    engine = small(tokenizer, 12)
    assert engine.room is not None
    assert engine.room.context == 88
    with pytest.raises(
        LolcatsError, match=r"prompt: a prompt of 70 tokens and 19 tokens to generate exceed the context"
    ):
        ask(engine, prompts(8)[7], max_tokens=19)
    snapshot = ask_and_run(engine, prompts(8)[7], max_tokens=2)[-1].snapshot  # 9 blocks
    with pytest.raises(LolcatsError, match="of 88 tokens"):
        ask(engine, [5, 6], snapshot, max_tokens=16)
    displaced = [queue(engine, prompts(8)[6], max_tokens=2), queue(engine, prompts(8)[4], max_tokens=20)]
    engine.run()  # the first never begins; the second finds no fourth block
    assert [deltas[-1].finish_reason for deltas in displaced] == ["error", "error"]
    assert "saved states or cached prefixes that are still in use hold 9 of 12 blocks." in displaced[0][-1].error
    assert 0 < len(tokens(displaced[1])) < 20
    more = tokens(queue_and_run(engine, [9, 10], snapshot, max_tokens=8))  # shares its blocks
    assert more == generated(engine.model, [*snapshot.tokens, 9, 10], 8)
    del snapshot
    assert len(tokens(ask_and_run(engine, prompts(8)[6], max_tokens=2))) == 2
    with pytest.raises(LolcatsError, match=r"A sequence of 256 tokens takes .* there is room for"):
        engine_for(tokenizer, kept_bytes=1 << 10)
    with pytest.raises(LolcatsError, match="--max-context"):
        engine_for(tokenizer, context=0, kept_bytes=1 << 10)


def test_the_states_of_all_slots_are_counted_before_blocks_are(tokenizer: Any) -> None:
    engine = engine_for(tokenizer)
    assert state_bytes(engine.model) == engine.state_bytes


def test_cached_prefixes_make_room(tokenizer: Any) -> None:
    engine = small(tokenizer, 24, prefix_bytes=1 << 20)
    assert engine.kept is not None
    for seed in range(4):
        prompt = prompts(8, seed)[7]
        request = Request([*prompt, 7], SamplingParams(max_tokens=3), lambda _: None)
        engine.submit(request)
        engine.run()
        assert request.generated == generated(engine.model, request.prompt, 3)
    assert 8 <= held(engine) <= 24
    assert len(engine.prefixes.entries) >= 3
    request = Request(prompts(8, 3)[7] + [9], SamplingParams(max_tokens=3), lambda _: None)
    engine.submit(request)
    engine.run()
    assert request.cached == 64


def test_prompts_leave_no_cache_to_the_garbage_collector(tokenizer: Any) -> None:
    engine, seen = engine_for(tokenizer), weakref.WeakSet[Any]()
    forward = engine._forward

    def watched(ids: Any, positions: Any, cache: Any, every: bool = False) -> Any:
        seen.add(cache)
        return forward(ids, positions, cache, every)

    engine._forward = watched  # type: ignore[method-assign]
    gc.disable()
    try:
        for prompt in prompts(4):
            queue_and_run(engine, prompt, max_tokens=2)
        assert list(seen) == [engine.table.cache]
    finally:
        gc.enable()


def test_no_block_is_lost_in_300_requests_that_end_in_every_way(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "lolcats")  # pytest keeps tracebacks, whose frames hold snapshots
    engine = small(tokenizer, 16, slots=6, prefix_bytes=1 << 16)
    assert engine.kept is not None
    rng, many, kept = random.Random(0), prompts(8), list[Snapshot]()
    forward, requests, left, paused, ends = engine._forward, list[Request](), 300, 0, list[str]()

    def failing(*args: Any) -> Any:
        if rng.random() < 0.01:
            raise RuntimeError("as if something had failed")
        return forward(*args)

    def told(delta: Delta) -> None:
        if delta.snapshot is not None and len(kept) < 2:
            kept.append(delta.snapshot)
        gone = delta.finish_reason != "cancelled" and rng.random() < 0.01
        if delta.finish_reason or gone:
            ends.append(delta.finish_reason or "gone")
        if gone:
            raise RuntimeError("as if the client had gone")

    engine._forward = failing  # type: ignore[method-assign]
    while left or not engine.idle:
        for _ in range(min(left, rng.randint(0, 3))):
            start = kept.pop() if kept and rng.random() < 0.5 else None
            prompt = rng.choice(many) if start is None else [7, 8]
            asks = SamplingParams(max_tokens=rng.randint(0, 20), prompt_logprobs=0 if rng.random() < 0.1 else None)
            requests = [*requests[-8:], Request(prompt, asks, told, start, keep_state=rng.random() < 0.2)]
            engine.submit(requests[-1])
            left -= 1
        engine.step()
        paused += len(engine.slots.paused)
        if rng.random() < 0.05 and requests:
            engine.cancel(rng.choice(requests))
    assert {"length", "error", "cancelled", "gone"} == set(ends)
    assert len(ends) == 300
    assert paused > 5
    kept.clear()
    requests, start = [], None
    while engine.prefixes.evict():
        pass
    assert_all_free(engine)
    engine.abort("over")
    engine._forward = forward  # type: ignore[method-assign]
    assert tokens(queue_and_run(engine, many[4], max_tokens=5)) == generated(engine.model, many[4], 5)


@pytest.mark.parametrize("name", ["a layer and a head", "all heads", "local layers and a head", "softcap"])
def test_steps_about_which_only_the_device_knows_change_no_token(name: str, tokenizer: Any) -> None:
    """What CUDA graphs replay, launched ahead."""
    engine = engine_for(tokenizer, name, slots=3, block=16)
    engine.graphs = ahead = Ahead(engine)  # type: ignore[assignment]
    many = prompts(8)
    seen: list[list[Delta]] = [[] for _ in many]
    for i, (prompt, deltas) in enumerate(zip(many, seen, strict=True)):
        engine.submit(Request(prompt, SamplingParams(max_tokens=6 + 2 * i), deltas.append, keep_state=i == 4))
    engine.run()
    assert ahead.runs > 5
    for i, (prompt, deltas) in enumerate(zip(many, seen, strict=True)):
        assert tokens(deltas) == generated(engine.model, prompt, 6 + 2 * i)
    snapshot, said = seen[4][-1].snapshot, tokens(seen[4])
    assert snapshot is not None
    follow = tokens(ask_and_run(engine, [said[-1], 9], snapshot, max_tokens=9))
    assert follow == generated(engine.model, [*many[4], *said, 9], 9)
    del snapshot, seen, deltas
    assert_all_free(engine)


@interpreted
def test_the_kernel_gives_the_same_tokens(tokenizer: Any) -> None:
    """In triton's interpreter; rows of different lengths, a local layer, a block that fills."""
    pytest.importorskip("triton")
    engine, many = engine_for(tokenizer, "all layers, some local", slots=2), prompts(7)[5:]
    engine.graphs = Ahead(engine)  # type: ignore[assignment]
    asked = [queue(engine, prompt, max_tokens=3 + i) for i, prompt in enumerate(many)]
    with use_backend("triton"):
        engine.run()
    for i, (prompt, deltas) in enumerate(zip(many, asked, strict=True)):
        assert tokens(deltas) == generated(engine.model, prompt, 3 + i)


@interpreted
@pytest.mark.parametrize("name", ["a layer and a head", "unrotated maps", "no linear term"])
def test_kernels_of_kept_and_other_heads_run_side_by_side(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of a layer with both; in triton's interpreter."""
    pytest.importorskip("triton")
    engine, prompt, steps = engine_for(tokenizer, name, slots=1), prompts(7)[6], []
    engine.graphs = ahead = Ahead(engine)  # type: ignore[assignment]
    monkeypatch.setattr(interface, "side_by_side", lambda *args: (steps.append(args), side_by_side(*args)))
    asked, own = set(), interface.as_attended
    monkeypatch.setattr(interface, "as_attended", lambda *args: (asked.add(args[4:]), own(*args))[1])
    deltas = queue(engine, prompt, max_tokens=4)
    with use_backend("triton"):
        engine.run()
    assert asked == {("triton",)}, "RoPE is undone as the call was asked to"
    assert tokens(deltas) == generated(engine.model, prompt, 4)
    assert ahead.runs
    assert len(steps) == 4  # the first token comes from the prompt, and one is computed too many


def test_steps_launched_ahead_find_blocks_or_pause_a_request(tokenizer: Any) -> None:
    engine = small(tokenizer, 12)
    engine.graphs = Ahead(engine)  # type: ignore[assignment]
    many, paused = prompts(4), 0
    asked = [queue(engine, prompt, max_tokens=60) for prompt in many]
    while not engine.idle:
        engine.step()
        paused += len(engine.slots.paused)
    assert paused > 5
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == generated(engine.model, prompt, 60)
    assert_all_free(engine)


def test_a_step_without_kept_heads_runs_none_of_their_code(tokenizer: Any) -> None:
    """And computes as many tensors as before there were kept heads, which was compared by hand."""
    engine = Engine(lolcats.convert(tiny_model(), AttentionConfig(**WINDOW)), tokenizer, 2, stop_tokens=())
    for prompt in prompts(8)[5:7]:
        queue(engine, prompt, max_tokens=20)
    while len(engine.running) < 2:
        engine.step()
    files = [sys.modules[f"lolcats.{name}"].__file__ for name in (
        "inference.engine.kept", "inference.engine.blocks", "inference.engine.room", "attention.paged",
        "modeling.heads")]  # fmt: skip
    ran = list[str]()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            ran.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        engine.step()
        without, ran = ran, list[str]()
        kept = engine_for(tokenizer)
        queue(kept, prompts(8)[5], max_tokens=2)
        kept.step()
    finally:
        sys.setprofile(None)
    assert not without
    assert ran


@pytest.mark.parametrize("name", ["chunks", "chunks and a head", "learned sinks", "compressed keys"])
def test_families_that_blocks_do_not_know_decode_without_graphs(name: str, tokenizer: Any) -> None:
    engine = engine_for(tokenizer, name)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="keys in blocks does not support"):
        engine._decode_rows(*torch.zeros(2, 4, 1, dtype=torch.long), 4)
    assert alone(engine, prompts(8)[6], max_tokens=5) == generated(engine.model, prompts(8)[6], 5)
