"""Kept layers that see a window (Gemma 3's local ones) give back the blocks that have wholly left it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from support.serving import serving
from test_engine import Ahead, alone, prompts, tokens
from test_kept_keys import assert_all_free, engine_for, generated, queue, queue_and_run

from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request, Snapshot
from lolcats.inference.engine.blocks import Blocks, Table
from lolcats.inference.engine.room import Share, split
from lolcats.inference.engine.sampling import SamplingParams

BOTH, LOCAL = "local layers and a head", "window of the base, local layers"  # a window of 24 keys
WINDOW_BLOCKS = 4
"""Of 8 tokens, that 24 keys lie in."""


def windows(engine: Engine) -> Blocks:
    assert engine.kept is not None
    pool = engine.kept.groups[-1].blocks
    assert pool.window == 24
    return pool


def long_prompt(seed: int = 0) -> list[int]:
    found: list[int] = torch.randint(6, 300, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def test_an_error_names_the_blocks_that_are_short(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, BOTH)
    assert engine.room is not None
    windows(engine).take(windows(engine).free)
    count = windows(engine).count
    assert f"hold {count} of {count} blocks of the layers that see a window of 24 tokens." in str(engine.room.taken())


@pytest.mark.parametrize("name", [BOTH, LOCAL])
@pytest.mark.parametrize("ahead", [False, True])
def test_blocks_in_use_do_not_grow_beyond_the_window(name: str, ahead: bool, tokenizer: Any) -> None:
    engine = engine_for(tokenizer, name, slots=2)
    if ahead:
        engine.graphs = Ahead(engine)  # type: ignore[assignment]
    assert engine.kept is not None
    asked = [queue(engine, prompt, max_tokens=90) for prompt in (long_prompt(), prompts(8)[4])]
    whole = most = most_running = 0
    while not engine.idle:
        engine.step()
        most = max(most, windows(engine).held)
        most_running = max(most_running, 0 if engine.waiting else windows(engine).held)
        whole = max(whole, engine.kept.groups[0].blocks.held)
    assert most_running <= 2 * WINDOW_BLOCKS
    assert most <= 2 * WINDOW_BLOCKS + 3  # a piece of the prompt has 16 tokens
    assert (whole >= 30) is (name == BOTH)  # 240 tokens
    assert tokens(asked[0]) == generated(engine.model, long_prompt(), 90)
    assert tokens(asked[1]) == generated(engine.model, prompts(8)[4], 90)
    assert_all_free(engine)


@pytest.mark.parametrize("name", [BOTH, LOCAL])
def test_shared_prefixes_beyond_the_window(name: str, tokenizer: Any) -> None:
    """The sequence that offered a prefix goes on in its own blocks, and those that begin with it move on from them."""
    engine, shared = engine_for(tokenizer, name, prefix_bytes=1 << 20), long_prompt()[:144]
    for tail in ([7], [8, 9], list(range(10, 60))):
        request = Request([*shared, *tail], SamplingParams(max_tokens=40), lambda _: None)
        engine.submit(request)
        engine.run()
        assert request.cached == (0 if tail == [7] else 144)
        assert request.generated == generated(engine.model, request.prompt, 40)
    entries = len(engine.prefixes.entries)
    assert 0 < windows(engine).held <= entries * WINDOW_BLOCKS
    assert engine.prefixes.nbytes == sum(entry.nbytes for entry in engine.prefixes.entries.values())
    while engine.prefixes.evict():
        pass
    assert_all_free(engine)


def test_a_prefix_is_not_kept_if_windows_have_no_blocks_for_it(tokenizer: Any) -> None:
    engine = scarce(tokenizer, prefix_bytes=1 << 20)
    held = Table(windows(engine))
    held.reserve(1)
    held.blocks += windows(engine).take(windows(engine).free - 7)
    prompt = long_prompt()
    assert tokens(queue_and_run(engine, prompt, max_tokens=5)) == generated(engine.model, prompt, 5)
    del held
    while engine.prefixes.evict():
        pass
    assert_all_free(engine)


@pytest.mark.parametrize("name", [BOTH, LOCAL])
@pytest.mark.parametrize("block", [8, 4, 32])
def test_a_saved_state_has_the_window_and_goes_on_elsewhere(
    name: str, block: int, tokenizer: Any, tmp_path: Path
) -> None:
    engine, prompt = engine_for(tokenizer, name), long_prompt()
    deltas: list[Delta] = []
    engine.submit(Request(prompt, SamplingParams(max_tokens=5), deltas.append, keep_state=True))
    engine.run()
    snapshot, said = deltas[-1].snapshot, tokens(deltas)
    assert snapshot is not None
    assert windows(engine).held == WINDOW_BLOCKS
    snapshot.save(tmp_path / "state.safetensors")
    loaded = Snapshot.load(tmp_path / "state.safetensors")
    lengths = {len(pair.k) for pair in loaded.kept.layers.values()}  # type: ignore[union-attr]
    assert min(lengths) < 40
    turn = [said[-1], 9, 10]
    expected = generated(engine.model, [*prompt, *said, 9, 10], 40)
    elsewhere = engine_for(tokenizer, name, block=block)
    for where, start in ((engine, snapshot), (engine, loaded), (elsewhere, snapshot), (elsewhere, loaded)):
        assert tokens(queue_and_run(where, turn, start, max_tokens=40)) == expected
    for pair in loaded.kept.layers.values():  # type: ignore[union-attr]
        if len(pair.k) < 40:
            loaded.kept.layers[0] = pair._replace(k=pair.k[-22:], v=pair.v[-22:])  # type: ignore[union-attr]
    with pytest.raises(LolcatsError, match="of another model"):
        queue(elsewhere, turn, loaded)
    del snapshot, deltas, start
    assert_all_free(engine)
    assert_all_free(elsewhere)


def scarce(tokenizer: Any, **options: Any) -> Engine:
    """An engine with room for about two long sequences."""
    roomy = engine_for(tokenizer, BOTH, context=128)
    assert roomy.kept is not None
    whole, local = (group.block_bytes for group in roomy.kept.groups)
    options = {"context": 0, **options}
    engine = engine_for(tokenizer, BOTH, kept_bytes=20 * whole + 20 * local, **options)
    assert engine.room is not None
    assert engine.room.context >= 100
    return engine


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_paused_requests_go_on_where_they_were(sampling: dict[str, Any], tokenizer: Any) -> None:
    engine, roomy, many, paused = scarce(tokenizer), engine_for(tokenizer, BOTH), prompts(4), 0
    asked = [queue(engine, prompt, max_tokens=60, **sampling) for prompt in many]
    while not engine.idle:
        engine.step()
        paused += len(engine.slots.paused)
    assert paused > 5
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(roomy, prompt, max_tokens=60, **sampling)
    assert_all_free(engine)


def test_no_block_is_lost_in_many_requests(tokenizer: Any) -> None:
    engine = scarce(tokenizer, slots=6, prefix_bytes=1 << 16)
    rng, many, kept, ends = random.Random(0), [*prompts(8), long_prompt()[:100]], list[Snapshot](), list[str]()

    def told(delta: Delta) -> None:
        if delta.snapshot is not None and not kept:
            kept.append(delta.snapshot)
        if delta.finish_reason:
            ends.append(delta.finish_reason)

    left, requests = 60, list[Request]()
    while left or not engine.idle:
        for _ in range(min(left, rng.randint(0, 3))):
            start = kept.pop() if kept and rng.random() < 0.5 and len(kept[0].tokens) < 60 else None
            prompt = rng.choice(many) if start is None else [7, 8]
            asks = SamplingParams(max_tokens=rng.randint(0, 5))
            requests = [*requests[-8:], Request(prompt, asks, told, start, keep_state=rng.random() < 0.2)]
            engine.submit(requests[-1])
            left -= 1
        engine.step()
        if rng.random() < 0.05 and requests:
            engine.cancel(rng.choice(requests))
    assert len(ends) == 60
    assert ends.count("length") > 40
    kept.clear()
    requests, start = [], None
    while engine.prefixes.evict():
        pass
    assert_all_free(engine)
    assert tokens(queue_and_run(engine, many[8], max_tokens=5)) == generated(engine.model, many[8], 5)


def test_the_server_tells_what_grows_and_what_does_not(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, BOTH)
    with serving(engine) as (address, _):
        health = httpx.get(f"{address}/health").json()
        metrics = httpx.get(f"{address}/metrics").text
    assert health["token_bytes"] == 2 * 16 * 4  # one head of 16 channels
    assert health["window_bytes"] == 24 * 2 * 2 * 16 * 4  # a layer of two heads
    assert engine.kept is not None
    assert f"lolcats_kept_limit_bytes {float(engine.kept.nbytes)}" in metrics


def test_windows_come_first_if_memory_is_scarce() -> None:
    whole, local = Share(101, 101, 10), Share(12, 101, 10)
    assert split([local], 600, 4) == [60]
    assert split([whole, local], 4 * (101 + 12) * 10, 4) == [404, 48]
    assert split([whole, local], 1200, 4) == [72, 48]
    assert split([whole, local], 400, 4) == [20, 20]


def test_tables_with_a_window_use_their_blocks_again() -> None:
    pool = Blocks(8, 4, window=6, piece=4)
    table = Table(pool)
    table.reserve(40)  # 10 blocks, of which 4 are enough
    assert (pool.held, table.lacking(0)) == (4, 0)
    for length in range(4, 41, 4):
        table.advance(4)
        assert (table.length, table.passed) == (length, max(0, (length - 5) // 4))
    assert table.passed + len(table.blocks) == 10
    assert pool.free == 6
    fork = table.fork()
    assert (fork.blocks, fork.passed, pool.free) == (table.blocks, 8, 6)
    del table, fork
    assert pool.free == 8


def grow(table: Table, tokens: int) -> None:
    """In pieces, if there is room for all."""
    if table.lacking(tokens) <= table.pool.free:
        table.reserve(tokens)
        for start in range(0, tokens, 5):
            piece = min(5, tokens - start)
            assert (table.passed + len(table.blocks)) * 4 >= table.length + piece
            assert table.passed * 4 <= max(0, table.length - 6)
            table.advance(piece)


def test_no_block_of_windows_is_lost_or_given_twice() -> None:
    rng, pool, tables = random.Random(0), Blocks(40, 4, window=7, piece=5), list[Table]()
    for _ in range(2000):
        if rng.random() < 0.3 or not tables:
            tables.append(rng.choice(tables).fork() if tables and rng.random() < 0.6 else Table(pool))
        elif rng.random() < 0.3:
            tables.pop(rng.randrange(len(tables)))
        else:
            grow(rng.choice(tables), rng.randint(1, 30))
        held = [block for table in tables for block in table.blocks]
        assert pool.free == 40 - len(set(held))
        assert pool.holders == [held.count(block) for block in range(40)]


def test_a_prefix_that_ends_in_a_block_goes_if_no_block_is_free_for_its_copy(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, LOCAL, block=32, prefix_bytes=1 << 20)
    pool, first = windows(engine), long_prompt()[:20]
    queue_and_run(engine, first, max_tokens=2)
    assert [len(entry.tokens) for entry in engine.prefixes.entries.values()] == [16]
    held = Table(pool, pool.take(pool.free - pool.added(0, 167)))
    prompt = [*first[:16], *long_prompt(1)]
    assert tokens(queue_and_run(engine, prompt, max_tokens=20)) == generated(engine.model, prompt, 20)
    del held
