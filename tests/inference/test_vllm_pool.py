"""The part of the vLLM plugin that knows nothing of vLLM: mixed batches, with states in pages that vLLM hands out."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support.interpreted import DEVICE
from torch import Tensor

from lolcats.attention import SlotState, step, use_backend
from lolcats.attention.state import Seen
from lolcats.config import AttentionConfig
from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec
from lolcats.vllm.attend import attend
from lolcats.vllm.batch import PADDING, Batch
from lolcats.vllm.pool import Layout, Pool

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 8, 0.4
SPECS = {
    "terraced": {"window_size": 4, "sinks": 2, "feature_dim": 4},
    "sliding": {"window": "sliding", "window_size": 5, "sinks": 0, "feature_dim": 4},
    "only window": {"kind": "window", "window_size": 4, "feature_dim": 4},
    "linear": {"kind": "linear", "feature_map": "t2r", "key_maps": "per_kv_head"},
    "before RoPE": {"window_size": 4, "sinks": 2, "feature_dim": 4, "feature_inputs": "unrotated"},
    "before RoPE, sliding": {"window": "sliding", "window_size": 5, "feature_dim": 4, "feature_inputs": "unrotated"},
    "supra": {"kind": "linear", "feature_map": "elu", "decay": "retnet", "normalizer": "group_norm"},
}


def made(name: str) -> LinearizedAttention:
    torch.manual_seed(0)
    config = AttentionConfig(**SPECS[name])
    layer = LinearizedAttention(
        Geometry(0, HEADS, KV_HEADS, DIM, DIM), config, layer_spec(config, config.kind), "sdpa"
    ).requires_grad_(False)  # fmt: skip
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


def pool_of(layer: LinearizedAttention, pages: int, sums: torch.dtype = torch.float32) -> Pool:
    """A pool whose memory is NaN in every dtype, with pages that are longer than a state."""
    place = layer.gate.device
    k, v = (torch.zeros(1, KV_HEADS, 0, channels, device=place) for channels in (layer.spec.channels(DIM), DIM))
    empty = layer.empty_state(k, v, dtype=sums)
    layout = Layout.of(empty)
    return Pool(layout, torch.full((pages, layout.nbytes + 48), 255, dtype=torch.uint8, device=place))


class Sequence:
    """Queries, keys and values of one sequence, and how many tokens the pool has seen of it."""

    def __init__(self, length: int, slot: int, channels: int = DIM, device: str = "cpu") -> None:
        shapes = ((length, HEADS, channels), (length, KV_HEADS, channels), (length, KV_HEADS, DIM))
        self.q, self.k, self.v = (torch.randn(shape).to(device) for shape in shapes)
        self.length, self.slot, self.seen, self.outputs = length, slot, 0, list[Tensor]()

    def whole(self, layer: LinearizedAttention) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (self.q, self.k, self.v))
        return layer(q, k, v, SCALE)[0].transpose(0, 1)


def one_step(layer: LinearizedAttention, pool: Pool, batch: list[tuple[Sequence, int]]) -> None:
    """``batch``: sequences, and how many new tokens of each."""
    lengths, seen = [count for _, count in batch], [x.seen for x, _ in batch]
    plan = Batch.of(lengths, seen, torch.tensor([x.slot for x, _ in batch], device=pool.pages.device))
    q, k, v = (torch.cat([getattr(x, name)[x.seen : x.seen + n] for x, n in batch]) for name in "qkv")
    out = torch.full_like(q[..., :DIM], torch.nan)
    attend(pool, layer, layer.mixer(SCALE), plan, q, k, v, out)
    for (sequence, count), y in zip(batch, out.split(lengths), strict=True):
        sequence.outputs.append(y)
        sequence.seen += count


@pytest.mark.parametrize("name", SPECS)
def test_mixed_batches_are_whole_sequences(name: str) -> None:
    """In any order: sequences that begin (one with a single token), that go on in pieces, and that decode."""
    layer, choose = made(name), random.Random(3)
    pool, channels = pool_of(layer, 12), layer.spec.channels(DIM)
    sequences = [
        Sequence(length, slot, channels)
        for length, slot in zip((1, 3, 17, 40, 41, 5, 33), (7, 2, 9, 0, 4, 11, 5), strict=True)
    ]
    running = list(sequences)
    while running:
        chosen = choose.sample(running, choose.randint(1, len(running)))
        counts = [choose.choice((1, 1, 2, 7, 13)) for _ in chosen]
        one_step(layer, pool, [(x, min(n, x.length - x.seen)) for x, n in zip(chosen, counts, strict=True)])
        running = [x for x in running if x.seen < x.length]
    for sequence in sequences:
        torch.testing.assert_close(torch.cat(sequence.outputs), sequence.whole(layer), atol=2e-5, rtol=1e-4)


def test_rows_do_not_depend_on_others_or_on_what_was_in_a_slot() -> None:
    layer = made("terraced")
    pool, first, second = pool_of(layer, 3), Sequence(20, 1), Sequence(20, 1)
    one_step(layer, pool, [(first, 20)])
    for count in (1, 18, 1):  # the slot is used again, beginning with a single token
        one_step(layer, pool, [(second, count)])
    torch.testing.assert_close(torch.cat(second.outputs), second.whole(layer), atol=2e-5, rtol=1e-4)


def test_torchs_default_dtype_changes_no_state() -> None:
    """vLLM sets it to the model's dtype while it builds a model."""
    layer, (k, v) = made("terraced"), torch.zeros(2, 1, KV_HEADS, 0, DIM)
    usual = Layout.of(layer.empty_state(k, v))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Layout.of(layer.empty_state(k, v)) == usual
    finally:
        torch.set_default_dtype(torch.float32)


def test_lengths_alike_are_padded_together_and_others_are_not() -> None:
    plan = Batch.of([1, 9, 16, 17, 0, 1, 12], [4, 0, 0, 0, 3, 0, 8], torch.arange(7))
    assert plan.decodes is not None
    assert plan.decodes.slots.tolist() == [0, 5]
    assert plan.decodes.fresh is not None
    assert plan.decodes.fresh.tolist() == [5]
    assert [rows.slots.tolist() for rows in plan.prefills] == [[1, 2], [3], [6]]
    assert [rows.begin for rows in plan.prefills] == [True, True, False]
    assert [rows.mask is None for rows in plan.prefills] == [False, True, True]


def test_positions_are_those_in_each_sequence() -> None:
    plan = Batch.of([1, 3, 0, 2, 1], [4, 0, 9, 7, 0], torch.arange(5))
    assert plan.positions.tolist() == [4, 0, 1, 2, 7, 8, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_the_pool_is_a_step_of_slots(dtype: torch.dtype) -> None:
    """Bit for bit, with sums that are rounded stochastically, too."""
    layer = made("terraced")
    pool, sequence = pool_of(layer, 4, dtype), Sequence(60, 2)
    one_step(layer, pool, [(sequence, 30)])
    slots = torch.tensor([2])
    state: Any = SlotState.of(pool.rows(slots, Seen(torch.tensor([30]), 30)))
    for place in range(30, 60):
        one_step(layer, pool, [(sequence, 1)])
        q, k, v = (x[place][None, :, None] for x in (sequence.q, sequence.k, sequence.v))
        y, state = step(state, q, k, v, layer.mixer(SCALE))
        assert torch.equal(y[0, :, 0], sequence.outputs[-1][0])
    stored = pool.rows(slots, Seen(torch.tensor([60]), 60)).tensors()
    assert stored["S"].dtype == dtype
    for name, x in state.tensors().items():
        assert torch.equal(x, stored[name]), name


@pytest.mark.parametrize("count", [4, 8])
def test_sums_in_bf16_are_right_on_average_however_a_prompt_is_cut(count: int) -> None:
    """Rounded to the nearest, they would stop growing: each piece adds less than half of their spacing."""
    layer, length = made("linear"), 4096
    torch.manual_seed(1)
    sequence, sums = Sequence(length, 1), dict[torch.dtype, Tensor]()
    sequence.v += 1
    for dtype in (torch.float32, torch.bfloat16):
        pool, sequence.seen, sequence.outputs = pool_of(layer, 2, dtype), 0, []
        for _ in range(length // count):
            one_step(layer, pool, [(sequence, count)])
        sums[dtype] = pool.parts["S"][1].float()
    exact, kept = sums.values()
    assert abs((kept - exact).mean()) < 0.01 * exact.mean()


IN_PLACE = ["terraced", "sliding", "only window", "before RoPE"]


@pytest.mark.parametrize("name", IN_PLACE)
@torch.no_grad()
def test_a_step_of_one_token_each_writes_only_the_states_of_its_rows(name: str) -> None:
    """By the kernel. One sequence begins so, and there are rows of padding."""
    pytest.importorskip("triton", reason="triton is not installed")
    layer = made(name).to(DEVICE)
    pool, channels = pool_of(layer, 6), layer.spec.channels(DIM)
    sequences = [Sequence(length, slot, channels, DEVICE) for length, slot in ((11, 4), (9, 2), (4, 5))]
    for sequence, count in zip(sequences, (7, 5, 0), strict=True):
        if count:
            one_step(layer, pool, [(sequence, count)])
    used, others = [4, 2, 5], [0, 1, 3]
    before = pool.pages.clone()
    for _ in range(4):
        seen = torch.tensor([*(x.seen for x in sequences), PADDING, PADDING], device=DEVICE)
        q, k, v = (torch.stack([getattr(x, part)[x.seen] for x in sequences]) for part in "qkv")
        q, k, v = (torch.cat([x, torch.full_like(x[:2], 9)]) for x in (q, k, v))
        out = torch.full_like(q[..., :DIM], torch.nan)
        batch = Batch.decoding(seen, torch.tensor([*used, 0, 3], device=DEVICE))
        with use_backend("triton"):
            attend(pool, layer, layer.mixer(SCALE), batch, q, k, v, out)
        assert not out[3:].any()
        for sequence, y in zip(sequences, out[:3], strict=True):
            sequence.outputs.append(y[None])
            sequence.seen += 1
    assert torch.equal(pool.pages[others], before[others])
    for sequence in sequences:
        torch.testing.assert_close(torch.cat(sequence.outputs), sequence.whole(layer), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_step_of_one_token_each_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: nothing reads one on the host, or makes a shape of it."""
    pytest.importorskip("triton", reason="triton is not installed")
    import lolcats.attention.kernels.decode as kernels

    launches = list[Any]()
    monkeypatch.setattr(kernels, "decode_kernel", {(3, KV_HEADS): lambda *args, **_: launches.append(args)})
    monkeypatch.setattr(kernels, "choose_splits", lambda *_: 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else kernels are refused for tensors that are not on a GPU
    layer = made(name)
    pool = Pool(pool_of(layer, 1).layout, torch.empty(5, pool_of(layer, 1).layout.nbytes, device="meta").byte())
    layer.to("meta")
    with torch.device("meta"):
        channels = layer.spec.channels(DIM)
        q, k, v = (torch.empty(3, n, size) for n, size in ((HEADS, channels), (KV_HEADS, channels), (KV_HEADS, DIM)))
        batch, out = Batch.decoding(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.int32)), q[..., :DIM]
        with use_backend("triton"), torch.no_grad():
            attend(pool, layer, layer.mixer(SCALE), batch, q, k, v, out)
        assert batch.positions.shape == (3,)
    (launch,) = launches
    given = {id(x) for x in launch if isinstance(x, Tensor)}
    assert given >= {id(x) for x in (*pool.parts.values(), batch.decodes.slots, batch.decodes.seen.rows)}  # type: ignore[union-attr]
