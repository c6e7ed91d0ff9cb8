"""The engine gives what Hugging Face's generate gives, whatever else it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from support.interpreted import interpreted
from support.serving import CONFIG, tiny_engine

import lolcats
from lolcats.attention import use_backend
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.errors import LolcatsError
from lolcats.inference.engine import Delta, Engine, Request
from lolcats.inference.engine import model as engine_model
from lolcats.inference.engine.sampling import SamplingParams
from lolcats.inference.engine.states import Snapshot
from lolcats.modeling.checkpoint import load
from lolcats.stages.finetune.stage import add_lora

VARIANTS = [
    CONFIG,
    AttentionConfig(window_size=8, sinks=0, feature_dim=8, window="sliding", key_maps="per_kv_head"),
    AttentionConfig(kind="linear", feature_dim=8),
    AttentionConfig(kind="linear", feature_map="t2r", decay="retnet", normalizer="group_norm"),
    AttentionConfig(kind="window", window_size=8, sinks=2, feature_dim=8),
]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of lengths below, at and above the pieces of prefill."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 5, 15, 16, 17, 32, 33, 70]
    return [torch.randint(6, 300, (lengths[i % 8],), generator=generator).tolist() for i in range(count)]


def ask(engine: Engine, prompt: list[int], start: Snapshot | None = None, **params: Any) -> list[Delta]:
    """Queue a prompt; its deltas, filled in as the engine runs."""
    deltas: list[Delta] = []
    engine.submit(Request(prompt, SamplingParams(**params), deltas.append, start, keep_state=True))
    return deltas


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def alone(engine: Engine, prompt: list[int], **params: Any) -> list[int]:
    deltas = ask(engine, prompt, **params)
    engine.run()
    return tokens(deltas)


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_equals_generate(family: str, config: AttentionConfig, tokenizer: Any) -> None:
    model = lolcats.convert(tiny_model(family), config)
    engine = Engine(model, tokenizer, slots=4, piece=16, stop_tokens=())
    asked = [(prompt, ask(engine, prompt, max_tokens=20 + i)) for i, prompt in enumerate(prompts(8))]
    engine.run()
    for i, (prompt, deltas) in enumerate(asked):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20 + i, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        assert tokens(deltas) == expected[0, len(prompt) :].tolist()
        assert [delta.finish_reason for delta in deltas] == [None] * (19 + i) + ["length"]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_request_does_not_depend_on_its_batch_mates(sampling: dict[str, Any], tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=32, stop_tokens=(), prefix_bytes=0)
    many = prompts(32)
    asked = [ask(engine, prompt, max_tokens=40, **sampling) for prompt in many]
    engine.run()
    for prompt, deltas in zip(many, asked, strict=True):
        assert tokens(deltas) == alone(engine, prompt, max_tokens=40, **sampling)


def test_rows_are_the_same_bits_with_one_batch_size(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=8, batch_sizes=[8], stop_tokens=(), prefix_bytes=0)
    many = prompts(8)
    asked = [ask(engine, prompt, max_tokens=30, logprobs=2) for prompt in many]
    engine.run()
    for prompt, deltas in zip(many, asked, strict=True):
        again = ask(engine, prompt, max_tokens=30, logprobs=2)
        engine.run()
        assert [d.logprobs for d in again] == [d.logprobs for d in deltas]


@interpreted
def test_the_decode_kernel_gives_the_same_tokens(tokenizer: Any) -> None:
    """In triton's interpreter; rows of different lengths, slots that empty and are filled again."""
    pytest.importorskip("triton")
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=(), prefix_bytes=0)
    many = prompts(4)[1:]
    expected = [alone(engine, prompt, max_tokens=5 + 2 * i) for i, prompt in enumerate(many)]
    with use_backend("triton"):
        asked = [ask(engine, prompt, max_tokens=5 + 2 * i) for i, prompt in enumerate(many)]
        engine.run()
    assert [tokens(deltas) for deltas in asked] == expected


def test_gates_are_computed_once_until_they_change(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=1, stop_tokens=(), prefix_bytes=0)
    layer, prompt = next(iter(engine.layers.values())), prompts(3)[2]
    with torch.no_grad():
        assert layer.gamma is layer.gamma
        torch.testing.assert_close(layer.gamma, layer.gate.sigmoid(), atol=0, rtol=0)
    assert layer.gamma.requires_grad
    before = alone(engine, prompt, max_tokens=20)
    with torch.no_grad():
        for each in engine.layers.values():
            each.gate.fill_(8.0)
        torch.testing.assert_close(layer.gamma, layer.gate.sigmoid(), atol=0, rtol=0)
    after = alone(engine, prompt, max_tokens=20)
    assert after != before
    engine.close()
    with torch.no_grad():
        assert layer.gamma is not layer.gamma
    assert alone(engine, prompt, max_tokens=20) == after


class Ahead:
    """Stands in for CUDA graphs where there are none: runs what they would replay."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runs = engine, 0
        self.inputs = torch.zeros(2, engine.table.slots, dtype=torch.long)

    def run(self, rows: int, inputs: torch.Tensor | None = None) -> torch.Tensor:
        if inputs is None:
            self.runs += 1
        else:
            self.inputs[:, :rows] = inputs
        return self.engine._decode_rows(*self.inputs[:, :rows, None], rows)

    def follow(self, tokens: torch.Tensor) -> Ahead:
        self.inputs[0, : len(tokens)] = tokens
        self.inputs[1, : len(tokens)] += 1
        self.tokens = tokens
        landing = Ahead.__new__(Ahead)
        landing.tokens = tokens.clone()
        return landing

    def wait(self) -> list[int]:
        return self.tokens.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3, "top_k": 40, "repetition_penalty": 1.3}])
def test_steps_that_are_launched_ahead_change_no_token(sampling: dict[str, Any], tokenizer: Any) -> None:
    """Ends by length and by a stop token, cancellations, refilled slots, and requests that need each step's tokens."""
    plain = tiny_engine(tokenizer, slots=4, prefix_bytes=0, stop_tokens=(40, 41, 42))
    engine = tiny_engine(tokenizer, slots=4, prefix_bytes=0, stop_tokens=(40, 41, 42))
    engine.graphs = ahead = Ahead(engine)  # type: ignore[assignment]
    many, results = prompts(12), []
    for which in (engine, plain):
        seen: list[list[Delta]] = [[] for _ in many]
        requests = [
            Request(prompt, SamplingParams(max_tokens=10 + 5 * i, **sampling), deltas.append, keep_state=i == 4)
            for i, (prompt, deltas) in enumerate(zip(many, seen, strict=True))
        ]
        for request in requests:
            which.submit(request)
        while not which.idle:
            which.step()
            if len(seen[5]) >= 7 and seen[5][-1].finish_reason is None:
                which.cancel(requests[5])
        results.append([(tokens(deltas)[: 7 if i == 5 else None], deltas[-1].finish_reason, deltas[-1].snapshot)
                        for i, deltas in enumerate(seen)])  # fmt: skip
    assert ahead.runs > 20
    assert engine.flying is None
    for got, expected in zip(*results, strict=True):
        assert got[:2] == expected[:2]
    assert results[0][4][2].tokens == results[1][4][2].tokens
    for a, b in zip(results[0][4][2].layers, results[1][4][2].layers, strict=True):
        torch.testing.assert_close(a.tensors(), b.tensors())


def test_a_short_prompt_does_not_wait_for_a_long_one(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=8, stop_tokens=(), prefix_bytes=0)
    plain = tiny_engine(tokenizer, slots=8, stop_tokens=(), prefix_bytes=0)
    long, short = [prompts(8)[7] * 10, prompts(8)[7] * 5], prompts(6)
    slow = [ask(engine, prompt, max_tokens=4) for prompt in long]
    for _ in range(3):
        engine.step()
    for prompt in short:
        deltas, steps = ask(engine, prompt, max_tokens=8), 0
        while not deltas:
            engine.step()
            steps += 1
        assert steps <= 2 * (1 + (len(prompt) - 1) // 16)  # its own pieces, and at most one of another before each
        assert not slow[0]
    engine.run()
    assert [tokens(deltas) for deltas in slow] == [alone(plain, prompt, max_tokens=4) for prompt in long]


def keep_busy(engine: Engine, awaited: list[Delta], steps: int) -> None:
    """Step, with short prompts always waiting, until ``awaited`` has something, at most ``steps`` times."""
    for _ in range(steps):
        if awaited:
            break
        if len(engine.waiting) < 5:
            ask(engine, prompts(8)[4], max_tokens=1)
        engine.step()


def test_a_long_prompt_does_not_starve_among_short_ones(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=(), prefix_bytes=0)
    long = ask(engine, prompts(8)[7] * 4, max_tokens=2)  # 18 pieces
    keep_busy(engine, long, 60)
    assert long
    engine.run()


def test_no_prompt_starves_between_a_long_one_and_short_ones(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0)
    long = ask(engine, prompts(8)[7] * 20, max_tokens=1)  # 88 pieces
    engine.step()
    medium = ask(engine, prompts(8)[7], max_tokens=1)  # 5 pieces
    keep_busy(engine, medium, 40)
    assert medium
    assert not long
    engine.run()


def test_prompts_begun_hold_no_more_states_than_there_are_slots(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=(), prefix_bytes=0)
    for size in (40, 30, 20, 10):
        ask(engine, prompts(8)[7] * size, max_tokens=1)
        for _ in range(3):
            engine.step()
        assert sum(request.cache is not None for request in engine.waiting) <= 2
    engine.run()


def test_states_in_bf16_take_half_and_go_on_from_a_snapshot(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, stop_tokens=(), state_dtype=torch.bfloat16)
    exact = tiny_engine(tokenizer, stop_tokens=())
    sums = sum(state.sums.S.nbytes for state in exact.table.states)
    assert exact.table.nbytes - engine.table.nbytes == sums // 2
    prompt = prompts(8)[6]
    deltas, expected = ask(engine, prompt, max_tokens=30), alone(exact, prompt, max_tokens=30)
    engine.run()
    assert tokens(deltas)[:8] == expected[:8]  # a random model's choices are close ones; they part at some point
    snapshot = deltas[-1].snapshot
    assert snapshot is not None
    assert {state.sums.S.dtype for state in snapshot.layers} == {torch.bfloat16}
    again = [ask(engine, [tokens(deltas)[-1], 7], snapshot, max_tokens=10) for _ in range(2)]
    engine.run()
    assert tokens(again[0]) == tokens(again[1])


def test_without_text_only_tokens_come(tokenizer: Any) -> None:
    engine, seen = tiny_engine(tokenizer, stop_tokens=()), list[Delta]()
    engine.submit(Request([5, 6], SamplingParams(max_tokens=9), seen.append, text=False))
    engine.run()
    assert tokens(seen) == alone(engine, [5, 6], max_tokens=9)
    assert {delta.text for delta in seen} == {""}


def test_a_finished_slot_is_refilled_at_once_and_streams_never_stall(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=())
    first, _ = ask(engine, [5, 6, 7], max_tokens=60), ask(engine, [8, 9], max_tokens=4)
    waiting, long = ask(engine, [10], max_tokens=4), ask(engine, prompts(8)[7], max_tokens=2)
    running = []
    while not engine.idle:
        before = len(first)
        engine.step()
        running.append(len(engine.running))
        assert len(first) > before or before == 60
    assert running[:3] == [2, 2, 1]  # four tokens: one of prefill, three of decode
    assert running[3:7] == [2, 2, 1, 1]  # the next one, in the very next step; then the long prompt's pieces
    assert len(waiting) == 4
    assert len(long) == 2


def test_cancelling_frees_the_slot_before_the_next_step(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=())
    requests, seen = [], []
    for prompt in prompts(3, seed=1):
        requests.append(Request(prompt, SamplingParams(max_tokens=50), seen.append))
        engine.submit(requests[-1])
    engine.step()
    engine.step()
    assert engine.running == requests[:2]
    assert engine.cancel(requests[0])
    assert engine.running == requests[1:2]
    assert seen[-1].finish_reason == "cancelled"
    assert engine.cancel(requests[2])
    assert not engine.cancel(requests[2])
    engine.run()
    expected = alone(engine, requests[1].prompt, max_tokens=50)
    assert requests[1].generated == expected  # it was moved to the other's slot on the way


def test_a_saved_state_goes_on_forks_and_survives_a_file(tokenizer: Any, tmp_path: Path) -> None:
    engine = tiny_engine(tokenizer, stop_tokens=())
    prompt = prompts(8)[6]
    deltas = ask(engine, prompt, max_tokens=10)
    engine.run()
    snapshot = deltas[-1].snapshot
    assert snapshot is not None
    said = tokens(deltas)
    assert list(snapshot.tokens) == prompt + said[:-1]
    snapshot.save(tmp_path / "state.safetensors")
    loaded = Snapshot.load(tmp_path / "state.safetensors")
    assert loaded.tokens == snapshot.tokens
    turns = [[said[-1], 9, 10], [said[-1], 20, 21, 22]]
    forks = [ask(engine, turn, start, max_tokens=25) for turn in turns for start in (snapshot, loaded)]
    engine.run()
    for turn, pair in zip(turns, (forks[:2], forks[2:]), strict=True):
        expected = alone(engine, prompt + said[:-1] + turn, max_tokens=25)
        assert [tokens(fork) for fork in pair] == [expected, expected]


def test_a_state_of_another_model_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    engine = tiny_engine(tokenizer)
    other = Engine(lolcats.convert(tiny_model(), AttentionConfig(window_size=16, feature_dim=8)), tokenizer, slots=1)
    deltas = ask(engine, [5, 6], max_tokens=2)
    engine.run()
    with pytest.raises(LolcatsError, match="of another model"):
        ask(other, [7], deltas[-1].snapshot)


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.pop("tokens"), lambda tensors: tensors.pop("0.seen"),
    lambda tensors: tensors.update(tokens=torch.tensor(3)), lambda tensors: tensors.update(tokens=torch.ones(2, 2)),
    lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith("0.")],
    lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}), lambda tensors: tensors.pop("kept.0.v"),
    lambda tensors: tensors.update({"kept.0.w": torch.ones(3)}),
])  # fmt: skip
def test_a_file_that_is_not_a_saved_state_is_refused(change: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = AttentionConfig(window_size=8, feature_dim=8, softmax_heads={"0": [1]})
    engine = Engine(lolcats.convert(tiny_model(), config), tokenizer, slots=1, context=64)
    deltas = ask(engine, [5, 6], max_tokens=1)
    engine.run()
    assert deltas[-1].snapshot is not None
    deltas[-1].snapshot.save(tmp_path / "state")
    assert Snapshot.load(tmp_path / "state").tokens == (5, 6)
    tensors = load_file(tmp_path / "state")
    change(tensors)
    save_file(tensors, tmp_path / "state")
    with pytest.raises(LolcatsError, match="state is not a saved state"):
        Snapshot.load(tmp_path / "state")
    (tmp_path / "state").write_text("no")
    with pytest.raises(LolcatsError, match="state is not a saved state"):
        Snapshot.load(tmp_path / "state")


def test_shared_prefixes_are_computed_once_and_stay_within_their_memory(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=1 << 20)
    plain = tiny_engine(tokenizer, slots=4, stop_tokens=(), prefix_bytes=0)
    shared = prompts(8)[7]
    for tail in ([7], [8, 9], list(range(10, 50))):
        request = Request([*shared, *tail], SamplingParams(max_tokens=20), lambda _: None)
        engine.submit(request)
        engine.run()
        assert request.cached == (0 if tail == [7] else 64)
        assert request.generated == alone(plain, request.prompt, max_tokens=20)
    assert plain.prefixes.entries == {}
    engine.prefixes.limit = 3 * engine.state_bytes
    for prompt in prompts(24, seed=5):
        alone(engine, prompt, max_tokens=1)
    entries = engine.prefixes.entries.values()
    assert len(entries) == 3
    assert sum(entry.nbytes for entry in entries) == engine.prefixes.nbytes <= engine.prefixes.limit


def test_memory_does_not_grow_with_length(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, slots=2, stop_tokens=())
    before, addresses = engine.table.nbytes, [s.sums.S.data_ptr() for s in engine.table.states]
    assert len(alone(engine, [5, 6, 7], max_tokens=300)) == 300
    assert engine.table.nbytes == before
    assert [s.sums.S.data_ptr() for s in engine.table.states] == addresses


def test_a_model_can_be_saved_after_it_was_in_an_engine(tokenizer: Any, tmp_path: Path) -> None:
    engine = tiny_engine(tokenizer)
    ids = torch.tensor([prompts(8)[7]])
    engine.model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, engine.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_end_of_sequence_and_stop_strings_end_a_request(tokenizer: Any) -> None:
    engine = tiny_engine(tokenizer, stop_tokens=())
    free = ask(engine, [5, 6, 7], max_tokens=40)
    engine.run()
    text, chosen = "".join(d.text for d in free), tokens(free)
    engine.stop_tokens = frozenset([chosen[12]])
    ended = ask(engine, [5, 6, 7], max_tokens=40)
    engine.run()
    assert tokens(ended) == chosen[: chosen.index(chosen[12]) + 1]
    assert ended[-1].finish_reason == "stop"
    engine.stop_tokens = frozenset()
    stopped = ask(engine, [5, 6, 7], max_tokens=40, stop=(text[14:17],))
    engine.run()
    assert "".join(d.text for d in stopped) == text[: text.index(text[14:17])]
    assert stopped[-1].finish_reason == "stop"


def test_a_single_stop_string_is_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    with pytest.raises(LolcatsError, match="stop: expected no empty strings"):
        SamplingParams(stop="")


SCRIPT = """
from conftest import tiny_model
from support.serving import CONFIG
import lolcats
from lolcats.inference.engine import Engine
engine = Engine(lolcats.convert(tiny_model(), CONFIG), type("Tokenizer", (), {"eos_token_id": 2}))
assert all(layer.constant for layer in engine.layers.values())
"""


def test_a_script_need_not_close_its_engine() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment())
    assert (run.returncode, "Exception ignored" in run.stderr, "Error" in run.stderr) == (0, False, False), run.stderr


def environment() -> dict[str, str]:
    tests = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, sys.path)])}


def test_a_model_that_liger_cannot_patch_runs_without(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def failing(*_: Any) -> Iterator[None]:
        raise LolcatsError("Turn it off: --set transfer.liger=off") from AttributeError("no norm")
        yield

    monkeypatch.setattr(engine_model, "fused_layers", failing)
    engine = tiny_engine(tokenizer)
    assert caplog.messages == ["Generating without liger-kernel, which cannot patch this model: no norm"]
    assert len(alone(engine, [5, 6, 7], max_tokens=3)) > 0


def test_refusals(tokenizer: Any) -> None:
    with pytest.raises(LolcatsError, match="linearized models"):
        Engine(tiny_model(), tokenizer)
    wrapped = add_lora(lolcats.convert(tiny_model(), CONFIG), FinetuneConfig(rank=4))
    with pytest.raises(
        LolcatsError, match=r"a wrapper of PEFT\. Merge its adapter first .* or pass get_base_model\(\)"
    ):
        Engine(wrapped, tokenizer)
    assert len(alone(Engine(wrapped.get_base_model(), tokenizer, slots=1), [5, 6, 7], max_tokens=3)) > 0
    engine = tiny_engine(tokenizer)
    for prompt in ([], [-1], [320]):
        with pytest.raises(LolcatsError, match="at least one token"):
            ask(engine, prompt)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"min_p": 2}, {"max_tokens": -1}, {"stop": ("",)}, {"top_k": -1}):
        with pytest.raises(LolcatsError, match=next(iter(wrong))):
            SamplingParams(**wrong)  # type: ignore[arg-type]
