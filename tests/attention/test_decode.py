"""The decode kernel against the PyTorch step and the reference: on a GPU if there is one, else interpreted (fp32)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from support.interpreted import add_bf16_products

import lolcats.attention.advance as advance
import lolcats.attention.kernels.decode as kernel
from lolcats.attention import (
    AttentionSpec,
    AttentionState,
    FeatureMap,
    Mixer,
    SlotState,
    extend,
    parallel_attention,
    step,
    use_backend,
)
from lolcats.attention.path import backend as asked
from lolcats.attention.path import choose_decode_path
from lolcats.attention.rounding import stochastic
from lolcats.attention.subset import HeadSubset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.4


class Decoding:
    """Rows of different lengths in a batch that decode together, by the kernel or by PyTorch.

    For the kernel, empty slots of the ring are NaN, so that no result can depend on them.
    """

    def __init__(self, spec: AttentionSpec, lengths: list[int], new: int, dim: int = 16, f: int = 16, heads: int = 4,
                 kv_heads: int = 2, shared: bool = False, softcap: float | None = None,
                 state_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> None:  # fmt: skip
        torch.manual_seed(sum(lengths) + dim)
        self.spec, self.lengths, self.softcap, total = spec, lengths, softcap, max(lengths) + new
        keys = spec.channels(dim)
        shapes = ((len(lengths), n, total, d) for n, d in ((heads, keys), (kv_heads, keys), (kv_heads, dim)))
        self.q, self.k, self.v = (torch.randn(shape, device=DEVICE) for shape in shapes)
        self.q, self.k, self.v = (2 * self.q).to(dtype), (2 * self.k).to(dtype), self.v.to(dtype)
        maps = kv_heads if shared else heads
        self.phi_q = FeatureMap("hedgehog", heads, dim, f).to(DEVICE).requires_grad_(False)
        self.phi_k = FeatureMap("hedgehog", maps, dim, f).to(DEVICE).requires_grad_(False)
        gamma = torch.rand(heads, device=DEVICE) * 0.5 + 0.05
        self.mixer = Mixer(self.phi_q, self.phi_k, gamma, spec, SCALE, softcap)
        self.new, self.state_dtype = new, state_dtype
        self.empty = AttentionState.empty(self.k, self.v, maps, 2 * f, spec, state_dtype)

    def prefilled(self, poisoned: bool) -> AttentionState:
        mask = torch.arange(max(self.lengths), device=DEVICE) < torch.tensor(self.lengths, device=DEVICE)[:, None]
        tensors = (x[:, :, : max(self.lengths)] for x in (self.q, self.k, self.v))
        state = extend(self.empty, *tensors, self.mixer, mask)[1] if max(self.lengths) else self.empty
        state = SlotState.of(state.map(lambda x: x.clone().contiguous()))
        if poisoned:
            for x in state.ring:
                x.transpose(1, 2)[state.ring_positions() < 0] = torch.nan
        return state

    @torch.no_grad()
    def run(self, backend: str) -> tuple[Tensor, AttentionState]:
        """Outputs (B, H, new, D) and the last state."""
        state, outputs, rows = self.prefilled(backend == "triton"), [], torch.arange(len(self.lengths), device=DEVICE)
        for i in range(self.new):
            at = torch.tensor(self.lengths, device=DEVICE) + i
            token = (x[rows, :, at][:, :, None] for x in (self.q, self.k, self.v))
            with use_backend(backend):
                y, after = step(state, *token, self.mixer)
            assert after is state
            outputs.append(y.float())
        return torch.cat(outputs, 2), state

    def reference(self, row: int) -> Tensor:
        end = self.lengths[row] + self.new
        q, k, v = (x[row : row + 1, :, :end].float() for x in (self.q, self.k, self.v))
        mixer = self.mixer
        softmax = self.spec.rotated(q), self.spec.rotated(k)
        return parallel_attention(
            *softmax, v, mixer.phi_q(q), mixer.phi_k(k), mixer.gamma, mixer.spec, mixer.scale, mixer.softcap
        )[0, :, self.lengths[row] :]

    def check(self, tolerance: float = 2e-5) -> None:
        y, state = self.run("triton")
        expected, other = self.run("chunked")
        close(y, expected, tolerance, "step")
        for name, x in state.tensors().items():
            if name == "seen":
                assert x.tolist() == [length + self.new for length in self.lengths]
            else:
                close(x.where(~x.isnan(), other.tensors()[name]), other.tensors()[name], tolerance, name)
        for row in range(len(self.lengths)):
            close(y[row], self.reference(row), tolerance, f"reference of row {row}")


def spread(x: Tensor, heads: list[int], count: int) -> Tensor:
    """x (B, heads, ...) as these of ``count`` heads; the others are NaN."""
    whole = x.new_full((len(x), count, *x.shape[2:]), torch.nan)
    whole[:, heads] = x
    return whole


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    error = (actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-6)
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize(
    ("kind", "window"),
    [("linear", "terraced"), *((k, w) for k in ("hybrid", "window", "remote") for w in ("terraced", "sliding"))],
)
@pytest.mark.parametrize("shared", [False, True])
def test_equals_step_and_reference(kind: Any, window: Any, shared: bool) -> None:
    Decoding(AttentionSpec(kind, window, 8, 3), [4, 13], 14, heads=2, kv_heads=1, shared=shared).check()


@pytest.mark.parametrize(
    ("dim", "f", "size"), [(64, 32, 32), (80, 64, 16), (96, 32, 16), (128, 64, 64), (256, 128, 16), (8, 6, 5)]
)
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_geometries(dim: int, f: int, size: int, window: Any) -> None:
    spec, lengths = AttentionSpec("hybrid", window, size, 4), [2 * size - 1, 3 * size - 2]
    Decoding(spec, lengths, 3, dim, f, heads=2, kv_heads=1).check()


@pytest.mark.parametrize(
    ("kind", "window"),
    [("linear", "terraced"), *((k, w) for k in ("hybrid", "remote") for w in ("terraced", "sliding"))],
)
@pytest.mark.parametrize("shared", [False, True])
def test_feature_maps_of_other_queries_and_keys(kind: Any, window: Any, shared: bool) -> None:
    spec = AttentionSpec(kind, window, 8, 3, unrotated=True)
    Decoding(spec, [4, 13], 14, heads=2, kv_heads=1, shared=shared).check()
    Decoding(replace(spec, window_size=5), [9], 3, 24, 6, heads=4, kv_heads=2, shared=shared).check()


@pytest.mark.parametrize("sinks", [0, 9, 16])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_sinks_beyond_a_window(sinks: int, window: Any) -> None:
    Decoding(AttentionSpec("hybrid", window, 4, sinks), [0, 7], 13, heads=2, kv_heads=1).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (20, 1)])
def test_groups(heads: int, kv_heads: int) -> None:
    for shared in (False, True):
        Decoding(AttentionSpec("hybrid", "terraced", 8, 2), [1, 15], 2, 16, 16, heads, kv_heads, shared).check()


def test_softcap() -> None:
    Decoding(AttentionSpec("hybrid", "terraced", 8, 2), [3, 14], 6, softcap=1.5).check()


@pytest.mark.parametrize("window", ["terraced", "sliding"])
@pytest.mark.parametrize("shared", [False, True])
def test_states_in_bf16_round_alike(window: Any, shared: bool) -> None:
    """The kernel's bf16 state is that of the PyTorch step, within one bf16 step where fp32 sums differ in the last
    bit."""
    spec, bf16 = AttentionSpec("hybrid", window, 8, 3), torch.bfloat16
    decoding = Decoding(spec, [4, 13], 14, heads=2, kv_heads=1, shared=shared, state_dtype=bf16)
    y, state = decoding.run("triton")
    expected, other = decoding.run("chunked")
    assert state.sums.S.dtype == torch.bfloat16
    assert (state.sums.S == other.sums.S).float().mean() > 0.99
    close(y, expected, 1e-4, "step")
    close(y[0], decoding.reference(0), 1e-2, "reference")


@pytest.mark.parametrize(("kind", "window"), [("hybrid", "terraced"), ("hybrid", "sliding"), ("linear", "terraced"),
                                              ("window", "terraced"), ("window", "sliding")])  # fmt: skip
@pytest.mark.parametrize(("splits", "unrotated"), [(1, False), (2, True), (4, False)])
def test_programs_that_share_a_head(
    kind: Any, window: Any, splits: int, unrotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window is read by several, over a chunk's end and the ring's, before one of them overwrites its oldest key."""
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    spec = AttentionSpec(kind, window, 4, 3, unrotated=unrotated)
    Decoding(spec, [0, 7], 6, 16, 16, heads=12, kv_heads=3).check()


@pytest.mark.parametrize("splits", [1, 2])
def test_states_in_bf16_do_not_depend_on_the_programs(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    decoding = Decoding(AttentionSpec("hybrid", "terraced", 4, 1), [7], 6, state_dtype=torch.bfloat16)
    state, other = decoding.run("triton")[1], decoding.run("chunked")[1]
    assert (state.sums.S == other.sums.S).float().mean() > 0.99


def test_how_many_programs_share_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as run at once; a batch that is large enough has one for each."""
    monkeypatch.setattr(kernel, "multiprocessors", lambda device: 132)
    device = torch.device("cpu")
    assert [kernel.choose_splits(rows * 8, 4, device) for rows in (1, 16, 17, 33, 34, 500)] == [4, 4, 2, 2, 1, 1]
    assert [kernel.choose_splits(rows, 6, device) for rows in (1, 100, 132, 200, 528)] == [6, 3, 3, 2, 1]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_out_of_a_whole_layer(splits: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other heads hold is neither read nor written."""
    if not shared:
        monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    decoding = Decoding(AttentionSpec("hybrid", "terraced", 8, 2), [4, 15], 3, shared=shared)
    expected, other = decoding.run("triton")
    state, kv, queries = decoding.prefilled(True), [0, 3], [0, 1, 6, 7]
    for i in range(decoding.new):
        at = torch.tensor(decoding.lengths, device=DEVICE) + i
        q, k, v = (x[torch.arange(2), :, at][:, :, None] for x in (decoding.q, decoding.k, decoding.v))
        out = torch.full((2, 10, 16), torch.nan, device=DEVICE)
        with use_backend("triton"), torch.no_grad():
            step(
                state, spread(q, queries, 10), spread(k, kv, 5), spread(v, kv, 5), decoding.mixer,
                subset=HeadSubset(torch.tensor(kv, device=DEVICE), out),
            )  # fmt: skip
        torch.testing.assert_close(out, spread(expected[:, :, i], queries, 10), atol=0, rtol=0, equal_nan=True)
    for name, x in state.tensors().items():
        torch.testing.assert_close(x, other.tensors()[name], atol=0, rtol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own, with its missing products put in")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_bf16_in_the_interpreter(state_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only there, shared key maps are read by products of bf16 parts."""
    add_bf16_products(monkeypatch)
    monkeypatch.setattr(advance, "choose_decode_path", lambda *_: "kernels" if asked() == "triton" else "chunked")
    spec = AttentionSpec("hybrid", "terraced", 16, 2)
    decoding = Decoding(spec, [0, 47], 4, 32, 16, 4, 2, True, None, state_dtype, torch.bfloat16)
    decoding.check(2e-2)


def test_stochastic_rounding_is_right_on_average_and_never_farther_than_one_step() -> None:
    x = torch.tensor(1.0 + 0.3 * 2**-7).expand(1, 200_000).contiguous()
    rounded = stochastic(x, torch.tensor([5]))
    assert set(rounded.float().unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert (rounded.float().mean() - x[0, 0]).abs() < 2e-5
    assert torch.equal(rounded, stochastic(x, torch.tensor([5])))
    assert not torch.equal(rounded, stochastic(x, torch.tensor([6])))
    exact = torch.tensor([[0.0, -1.5, 3e38, 2**-100]])
    assert torch.equal(stochastic(exact.bfloat16().float(), torch.tensor([1])), exact.bfloat16())


def test_who_computes_a_step() -> None:
    q, phi = torch.randn(1, 2, 1, 16, device=DEVICE), FeatureMap("hedgehog", 2, 16, 16)
    spec = AttentionSpec("hybrid", "terraced", 8, 2)

    def path(phi: FeatureMap = phi, spec: AttentionSpec = spec) -> str:
        return choose_decode_path(q, Mixer(phi, phi, torch.ones(2), spec, SCALE))

    with torch.no_grad():
        assert path() == ("kernels" if DEVICE == "cuda" else "chunked")
        with use_backend("triton"):
            assert path() == "kernels"
            assert path(FeatureMap("t2r", 2, 16, 16)) == "chunked"
            assert path(spec=AttentionSpec("hybrid", "terraced", 8, 17)) == "chunked"
        with use_backend("chunked"):
            assert path() == "chunked"
    with use_backend("triton"):
        assert path() == "chunked"


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device; the interpreter has no bf16 products")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
@pytest.mark.parametrize(("dim", "f"), [(64, 32), (80, 64), (128, 64), (256, 64)])
@pytest.mark.parametrize("splits", [1, 4])
def test_half_precision(
    splits: int, dim: int, f: int, window: Any, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    spec, lengths = AttentionSpec("hybrid", window, 64, 4), [0, 127, 200, 300]
    for state_dtype in (torch.float32, torch.bfloat16):
        decoding = Decoding(spec, lengths, 140, dim, f, 8, 2, shared, None, state_dtype, torch.bfloat16)
        decoding.check(1.5e-2)


@pytest.mark.parametrize(
    ("kind", "window", "splits", "shared", "sums"),
    [
        ("hybrid", "terraced", 1, False, torch.float32), ("hybrid", "terraced", 2, False, torch.bfloat16),
        ("hybrid", "sliding", 1, True, torch.bfloat16),
        ("linear", "terraced", 1, False, torch.float32), ("window", "terraced", 2, False, torch.float32),
    ],
)  # fmt: skip
@torch.no_grad()
def test_states_in_slots_of_a_larger_memory(
    kind: Any, window: Any, splits: int, shared: bool, sums: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit those of a table with a row for each. One begins in memory that is NaN, and one row is padding."""
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    decoding = Decoding(
        AttentionSpec(kind, window, 4, 3), [0, 3, 7], 2, heads=2, kv_heads=1, shared=shared, state_dtype=sums
    )
    expected, last = decoding.run("triton")
    slots, untouched = torch.tensor([5, 1, 3, 2], device=DEVICE), [0, 2, 4, 6]
    memory = {name: spaced(x, 7) for name, x in decoding.prefilled(True).tensors().items() if name != "seen"}
    for name, x in decoding.prefilled(True).tensors().items():
        if name != "seen":
            memory[name][slots[1:3]] = x[1:]
    rows = torch.arange(3, device=DEVICE)
    for i in range(decoding.new):
        seen = torch.tensor([*(length + i for length in decoding.lengths), -1], device=DEVICE)
        token = (x[rows, :, seen[:3]][:, :, None] for x in (decoding.q, decoding.k, decoding.v))
        state = SlotState.of_tensors({**memory, "seen": seen.clone()}, None)
        padded = (torch.cat([x, torch.full_like(x[:1], 7)]) for x in token)
        with use_backend("triton"):
            y, after = step(state, *padded, decoding.mixer, slots=slots)
        assert torch.equal(y[:3, :, 0], expected[:, :, i])
        assert not y[3].any()
        assert torch.equal(after.seen.rows, seen)
    for name, x in memory.items():
        stored, wanted = x[slots[:3]], last.tensors()[name]
        assert name not in ("S", "z") or not stored.isnan().any()
        assert torch.equal(stored.nan_to_num(0), wanted.nan_to_num(0)), name  # ring and sinks: places not written yet
        assert x[untouched].isnan().all()


def spaced(x: Tensor, rows: int) -> Tensor:
    """Like x (B, ...), with so many rows that do not touch, and all of it NaN."""
    memory = torch.full((rows, x[0].numel() + 3), torch.nan, dtype=x.dtype, device=x.device)
    return memory[:, : x[0].numel()].unflatten(1, x.shape[1:]) if x.numel() else x.new_empty(rows, *x.shape[1:])
