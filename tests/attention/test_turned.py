"""Kernels that get only rotated q and k, and turn them back for feature maps: outputs and gradients equal the
reference, which sees what RoPE turned."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from support.interpreted import add_bf16_products
from test_kernels import DEVICE, SCALE, Problem, close
from test_seen import projections

from lolcats.attention import AttentionSpec, parallel_attention
from lolcats.attention.kernels import triton_attention, unrotate
from lolcats.attention.kernels.layout import Tiling, choose_blocks
from lolcats.attention.turning import Turning

SMALL = Tiling(16, 16, 2, 1, see=False)
HYBRID = AttentionSpec("hybrid", "terraced", 16, 4)
SLIDING = dataclasses.replace(HYBRID, window="sliding")
REMOTE = dataclasses.replace(HYBRID, kind="remote")
NAMES = ("q", "k", "v", "gamma", "phi_q", "phi_k")


Tables = tuple[Tensor, Tensor]


def tables(length: int, dim: int, batch: int = 1, scale: float = 1.3) -> Tables:
    """cos and sin (batch, T, D) as a model gives them, scaled as YaRN does."""
    angles = 3 * torch.randn(batch, length, dim // 2, device=DEVICE).repeat(1, 1, 2)
    return scale * angles.cos(), scale * angles.sin()


def turned_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification: what maps see of x (B, heads, T, D)."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([b, -a], -1) * sin) / (cos.square() + sin.square())


def reference(problem: Problem, leaves: list[Tensor], spec: AttentionSpec, rotation: Tables) -> Tensor:
    q, k, v = (x.float() for x in leaves[:3])
    fq, fk = problem.phi_q(turned_back(q, *rotation)), problem.phi_k(turned_back(k, *rotation))
    return parallel_attention(q, k, v, fq, fk, leaves[3], spec, SCALE)


def compare(
    problem: Problem, spec: AttentionSpec, rotation: Tables, tiling: Tiling = SMALL, tolerance: float = 1e-4,
    inputs: bool = True, weights: bool = True, bounds: list[int] | None = None,
) -> None:  # fmt: skip
    """Outputs, and gradients of q, k, v (inputs), of γ and maps (weights). bounds: of sequences packed into a row."""
    results = []
    wanted = [*problem.phi_q.parameters(), *problem.phi_k.parameters()]
    for kernels in (False, True):
        leaves = problem.leaves()
        for x in leaves[:3]:
            x.requires_grad_(inputs)
        for x in (leaves[3], *wanted):
            x.requires_grad_(weights)
        if kernels:
            mixer = problem.mixer(leaves[3], spec)
            y = triton_attention(
                *leaves[:3], mixer, tiling=tiling, turning=Turning.of(*rotation, problem.dtype), cu_seqlens=bounds
            )[0].float()
        else:
            cuts = [0, problem.q.shape[2]] if bounds is None else bounds
            parts = []
            for a, b in itertools.pairwise(cuts):
                part = rotation[0][:, a:b], rotation[1][:, a:b]
                parts.append(reference(problem, [*(x[:, :, a:b] for x in leaves[:3]), leaves[3]], spec, part))
            y = torch.cat(parts, 2)
        direction = torch.linspace(-1, 2, y.numel(), device=DEVICE).view_as(y).sin()
        given = [x if x.requires_grad else None for x in (*leaves, *wanted)]
        grads = iter(torch.autograd.grad(y, [x for x in given if x is not None], direction, allow_unused=True))
        results.append([y, *(None if x is None else next(grads) for x in given)])
    for name, a, b in zip(("outputs", *NAMES), *results, strict=True):
        if a is not None and a.norm() > 1e-3:  # a gradient of zero is only rounding in both
            assert b is not None, name
            close(b, a, tolerance, name)


@pytest.mark.parametrize(
    ("spec", "maps", "see"),
    [
        (HYBRID, "per_query_head", False), (HYBRID, "per_query_head", True), (HYBRID, "per_kv_head", False),
        (HYBRID, "per_kv_head", True), (SLIDING, "per_query_head", True), (REMOTE, "per_kv_head", True),
        (AttentionSpec("linear"), "per_kv_head", True), (AttentionSpec("linear"), "per_query_head", False),
    ],
)  # fmt: skip
def test_equals_the_reference(spec: AttentionSpec, maps: str, see: bool) -> None:
    problem = Problem(38, maps=maps, batch=1, heads=2, kv_heads=1)
    compare(problem, spec, tables(38, 16), dataclasses.replace(SMALL, see=see))


@pytest.mark.parametrize(
    ("spec", "see", "apart"), [(HYBRID, True, []), (SLIDING, True, ["k"]), (HYBRID, False, ["q", "k"])]
)
def test_products_inside(spec: AttentionSpec, see: bool, apart: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what does not fit inside is projected. The final state is that of maps that see other keys."""
    problem, names = Problem(38, batch=1, heads=2, kv_heads=1), projections(monkeypatch)
    rotation, tiling = tables(38, 16), dataclasses.replace(SMALL, see=see)
    tensors = problem.q, problem.k, problem.v, problem.mixer(problem.gamma, spec)
    with torch.no_grad():
        turning = Turning.of(*rotation, problem.dtype)
        actual = triton_attention(*tensors, turning=turning, tiling=tiling, final=True)
        assert names == apart
        seen = turned_back(problem.q, *rotation), turned_back(problem.k, *rotation)
        expected = triton_attention(*tensors, seen=seen, tiling=tiling, final=True)
    for a, b in zip(actual, expected, strict=True):
        assert a is not None
        assert b is not None
        close(a, b, 1e-5, "outputs and state")


@pytest.mark.parametrize(("dim", "f", "rotations", "see"), [(24, 16, 2, True), (40, 24, 1, False)])
def test_heads_of_other_sizes(dim: int, f: int, rotations: int, see: bool) -> None:
    """Halves of 12 and 20 channels; one rotation for each row of the batch, or one for all."""
    problem = Problem(35, dim, f, maps="per_kv_head", heads=2, kv_heads=1)
    compare(problem, HYBRID, tables(35, dim, rotations), dataclasses.replace(SMALL, see=see))


def test_wide_heads() -> None:
    """Products over halves of 80 channels, in two chunks."""
    problem = Problem(35, 160, 32, maps="per_kv_head", batch=1, heads=2, kv_heads=1)
    compare(problem, HYBRID, tables(35, 160))


@pytest.mark.parametrize("inputs", [True, False])
def test_gradients_of_inputs_or_maps_alone(inputs: bool) -> None:
    """As stage 2 and stage 1 need them."""
    problem = Problem(38, maps="per_kv_head", batch=1, heads=2, kv_heads=1)
    compare(problem, HYBRID, tables(38, 16), inputs=inputs, weights=not inputs)


@pytest.mark.parametrize("see", [False, True])
def test_packed_sequences(see: bool) -> None:
    problem = Problem(59, batch=1, heads=2, kv_heads=1)
    compare(problem, HYBRID, tables(59, 16), dataclasses.replace(SMALL, see=see), bounds=[0, 3, 37, 38, 59])


def test_gradients_in_slices_of_the_values() -> None:
    """Gradients of q and k are then sums in fp32, and the maps' are added after them."""
    problem = Problem(34, batch=1, heads=1, kv_heads=1)
    problem.v = torch.randn(1, 1, 34, 300, device=DEVICE)
    compare(problem, HYBRID, tables(34, 16))


@pytest.mark.parametrize("see", [False, True])
@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own, with its missing products put in")
def test_bf16_in_the_interpreter(see: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    add_bf16_products(monkeypatch)
    problem = Problem(70, 128, 64, maps="per_kv_head", batch=1, heads=2, kv_heads=1, dtype=torch.bfloat16)
    spec = AttentionSpec("hybrid", "terraced", 64, 4)
    compare(problem, spec, tables(70, 128), Tiling(64, 64, see=see), tolerance=3e-2)


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("see", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "f"), [(128, 64), (64, 32), (80, 64), (256, 64)])
def test_half_precision(dim: int, f: int, dtype: torch.dtype, see: bool) -> None:
    if dtype == torch.float16 and dim == 256:
        pytest.skip("not a geometry that the dispatcher gives to the kernels")
    for maps in ("per_query_head", "per_kv_head"):
        problem = Problem(300, dim, f, maps=maps, dtype=dtype)
        tiling = Tiling(64, 64, see=see)
        for spec in (dataclasses.replace(HYBRID, window_size=64), SLIDING):
            compare(problem, spec, tables(300, dim, 2), tiling, tolerance=1.5e-2)


def test_rows_of_other_lengths() -> None:
    """Nothing depends on what is after the end of a row, where a table that was laid out has zeros."""
    problem, turning = Problem(24, heads=1, kv_heads=1), Turning.of(*tables(24, 16, 2), torch.float32)
    zeros = Turning(turning.table.clone())
    zeros.table[1, 20:] = 0
    results = []
    for each in (turning, zeros):
        leaves = problem.leaves()
        y = triton_attention(
            *leaves[:3], problem.mixer(leaves[3], HYBRID), lengths=[24, 20], turning=each, tiling=SMALL
        )[0]
        grads = torch.autograd.grad(y.square().sum(), [*leaves, *problem.phi_q.parameters()])
        results.append([y, *grads])
        assert all((x[1, :, 20:] == 0).all() for x in (y, *grads[:3]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("feature_map", "turn", "calls"), [("hedgehog", True, 0), ("hedgehog", False, 1), ("exp", True, 1)]
)
def test_where_it_is_used(feature_map: str, turn: bool, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, and for maps that the kernels do not know, q and k are turned back before the kernels."""
    asked: list[Any] = []
    append = unrotate.append_unrotated
    monkeypatch.setattr(unrotate, "append_unrotated", lambda *args: (asked.append(args), append(*args))[1])
    problem = Problem(40, batch=1, heads=2, kv_heads=1, feature_map=feature_map)
    compare(problem, HYBRID, tables(40, 16), dataclasses.replace(SMALL, turn=turn))
    assert len(asked) == calls


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured to be fastest: q and k are turned back on chip, and products are inside where W fits."""
    monkeypatch.setattr(unrotate, "append_unrotated", None)
    problem, names = Problem(40, batch=1, heads=1, kv_heads=1), projections(monkeypatch)
    turning = Turning.of(*tables(40, 16), problem.dtype)
    spec = dataclasses.replace(HYBRID, window_size=64)
    with torch.no_grad():
        triton_attention(problem.q, problem.k, problem.v, problem.mixer(problem.gamma, spec), turning=turning)
    assert names == []


def test_blocks_of_halves() -> None:
    """At least as wide as products need, see LOG.md."""
    sizes = {
        (dim, itemsize): choose_blocks(dim, 16, itemsize).half for dim in (16, 80, 128, 256) for itemsize in (2, 4)
    }
    assert sizes == {
        (16, 2): 64, (16, 4): 16, (80, 2): 64, (80, 4): 64, (128, 2): 64, (128, 4): 64, (256, 2): 128, (256, 4): 128,
    }  # fmt: skip
