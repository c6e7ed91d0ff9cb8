"""Prompts of one length, prefilled in one batch: each gets what it gets when it is prefilled by itself."""

from __future__ import annotations

from typing import Any

import pytest
from support.serving import tiny_engine
from test_engine import alone, ask, prompts, tokens
from test_kept_keys import assert_all_free, engine_for, generated


def test_prompts_of_one_length_can_be_prefilled_together(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0, prefill_rows=3)
    single = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0)
    many = [[5 + i, 6, 7 + i] for i in range(5)] + [[9, 8], *prompts(8)[6:]]
    asked = [ask(engine, prompt, max_tokens=20) for prompt in many]
    engine.step()
    assert len(engine.running) == 4  # the shortest, then three of one length together
    engine.run()
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(single, prompt, max_tokens=20)


def test_slots_can_be_refilled_several_at_a_time(tokenizer: Any) -> None:
    """Prompts of one length after one state, in as few passes as slots and lengths allow; the last ones end, too."""
    engine = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0, prefill_rows=4, refill=3)
    single = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0)
    first = ask(engine, prompts(8)[5], max_tokens=0)
    engine.run()
    rows: list[int] = []
    forward = engine._forward_new
    engine._forward_new = lambda tokens, *more: rows.append(len(tokens)) or forward(tokens, *more)  # type: ignore
    asked = [ask(engine, [5 + i, 6, 7], first[-1].snapshot, max_tokens=3 + i) for i in range(9)]
    engine.run()
    assert rows == [4, 3, 2]
    for i, deltas in enumerate(asked):
        prompt = [*prompts(8)[5], 5 + i, 6, 7]
        assert tokens(deltas) == alone(single, prompt, max_tokens=3 + i)


@pytest.mark.parametrize("first", [True, False])
def test_a_request_for_no_tokens_is_not_prefilled_with_others(first: bool, tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0, prefill_rows=3)
    wanted = [0, 6, 6] if first else [6, 0, 6]
    asked = [ask(engine, [5 + i, 6, 7], max_tokens=count) for i, count in enumerate(wanted)]
    engine.run()
    assert [len(tokens(deltas)) for deltas in asked] == wanted
    assert all(deltas[-1].finish_reason == "length" for deltas in asked)


def test_prompts_of_one_length_with_kept_keys(tokenizer: Any) -> None:
    engine = engine_for(tokenizer, prefill_rows=3)
    many = [[5 + i, 6, 7 + i] for i in range(5)] + prompts(8)[6:]
    asked = [ask(engine, prompt, max_tokens=20) for prompt in many]
    engine.step()
    assert len(engine.running) == 3
    engine.run()
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == generated(engine.model, prompt, 20)


@pytest.mark.parametrize("name", ["a layer and a head", "all heads", "local layers and a head"])
def test_prompts_after_one_state_can_be_prefilled_together(name: str, tokenizer: Any) -> None:
    """The state ends within a block of kept keys, which each of them must copy."""
    engine, begun = engine_for(tokenizer, name, prefill_rows=3), prompts(8)[5][:27]
    first = ask(engine, begun, max_tokens=0)
    engine.run()
    start = first[-1].snapshot
    assert start is not None
    many = [[5 + i, 6, 7 + i] for i in range(3)] + [[9, 8]]
    asked = [ask(engine, prompt, start, max_tokens=20) for prompt in many[:3]]
    asked.append(ask(engine, many[3], max_tokens=20))
    engine.step()
    engine.step()
    assert len(engine.running) == 4
    engine.run()
    for prompt, deltas in zip(many[:3], asked, strict=False):
        assert tokens(deltas) == generated(engine.model, begun + prompt, 20)
    assert tokens(asked[3]) == generated(engine.model, many[3], 20)
    again = ask(engine, many[0], start, max_tokens=20)
    engine.run()
    assert tokens(again) == tokens(asked[0]), "the state is as it was"
    del first, start, again, asked, deltas
    assert_all_free(engine)
