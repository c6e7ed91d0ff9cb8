"""The forward kernel that carries states from tile to tile, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.interpreted import add_bf16_products
from test_kernels import DEVICE, SMALL, Problem, close, compare, on_gpu

from lolcats.attention import AttentionSpec
from lolcats.attention.chunked import Context
from lolcats.attention.kernels import launcher, triton_attention
from lolcats.attention.kernels.call import Call
from lolcats.attention.kernels.function import TENSORS
from lolcats.attention.kernels.function import Problem as Launched
from lolcats.attention.kernels.layout import (
    BEST_WALKS,
    Tiling,
    Walk,
    choose_tiling,
    dense_rows,
    fitting_walk,
    make_stretches,
    near_end,
    walk_lag,
)

WALK = Walk(tile=16, heads=2, keys=16, stretch=2, num_warps=4)
HYBRID = AttentionSpec("hybrid", "terraced", 16, 4)


def walking(span: int = 16, **changes: Any) -> Tiling:
    return Tiling(16, span, 2, 1, dataclasses.replace(WALK, **changes))


CASES: list[tuple[AttentionSpec, dict[str, Any]]] = [
    (HYBRID, {}),
    (HYBRID, {"stretch": None}),
    (HYBRID, {"stretch": 3, "parts": 2}),
    (HYBRID, {"tile": 32, "stretch": 1}),
    (dataclasses.replace(HYBRID, window_size=8), {"heads": 1}),
    (dataclasses.replace(HYBRID, window="sliding"), {}),
    (dataclasses.replace(HYBRID, window="sliding", window_size=20), {"tile": 32, "heads": 4}),
    (AttentionSpec("linear"), {"tile": 32, "stretch": 1}),
    (AttentionSpec("remote", "terraced", 16, 4), {}),
    (AttentionSpec("remote", "sliding", 16, 0), {"heads": 1}),
]


@pytest.mark.parametrize(
    ("spec", "changes", "maps"),
    [*((*case, "per_kv_head") for case in CASES), *((*case, "per_query_head") for case in CASES[2:8])],
)
def test_outputs_equal_the_reference(spec: AttentionSpec, changes: dict[str, Any], maps: str) -> None:
    problem = Problem(75, maps=maps, batch=1, heads=4, kv_heads=1)
    with torch.no_grad():
        expected = problem.reference(problem.leaves(), spec)
        actual = walked(problem, spec, walking(**changes))
    close(actual, expected, 1e-5, "outputs")


def walked(
    problem: Problem, spec: AttentionSpec, tiling: Tiling, softcap: float | None = None, **arguments: Any
) -> Any:
    """Outputs by the kernel under test; fails if the stored states were used instead."""
    assert fitting_walk(spec, tiling, problem.q.shape[1], problem.maps) is not None
    mixer = problem.mixer(problem.gamma, spec, softcap)
    return triton_attention(problem.q, problem.k, problem.v, mixer, tiling=tiling, **arguments)[0]


@pytest.mark.parametrize(
    ("window", "maps", "projected"), [("terraced", "per_kv_head", True), ("sliding", "per_query_head", False)]
)
def test_gradients_equal_the_reference(window: str, maps: str, projected: bool) -> None:
    spec = AttentionSpec("hybrid", window, 16, 4)
    compare(Problem(52, maps=maps, batch=1, heads=2, kv_heads=1), spec, tiling=walking(), projected=projected)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 49])
def test_lengths(length: int) -> None:
    problem = Problem(length, maps="per_kv_head", batch=1, heads=2, kv_heads=1)
    with torch.no_grad():
        close(walked(problem, HYBRID, walking()), problem.reference(problem.leaves(), HYBRID), 1e-5, "outputs")


def test_softcap() -> None:
    problem = Problem(50, maps="per_kv_head", batch=1, heads=2, kv_heads=1)
    with torch.no_grad():
        expected = problem.reference(problem.leaves(), HYBRID, softcap=1.5)
        close(walked(problem, HYBRID, walking(), softcap=1.5), expected, 1e-5, "outputs")


@pytest.mark.parametrize("feature_map", ["hedgehog", "exp"])
def test_maps_of_other_queries_and_keys(feature_map: str) -> None:
    """Hedgehog's weights are used inside, in two parts; the features of other maps are given."""
    problem = Problem(50, maps="per_kv_head", batch=1, heads=2, kv_heads=1, feature_map=feature_map)
    x_q, x_k = torch.randn_like(problem.q), torch.randn_like(problem.k)
    both = {"seen": (x_q, x_k)}
    mixer = problem.mixer(problem.gamma, HYBRID)
    with torch.no_grad():
        expected = triton_attention(problem.q, problem.k, problem.v, mixer, tiling=SMALL, **both)[0]
        close(walked(problem, HYBRID, walking(), **both), expected, 1e-5, "outputs")


@pytest.mark.parametrize("where", [{"cu_seqlens": [0, 3, 40, 41, 75]}, {"lengths": [75, 41]}])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_documents_and_padding(where: dict[str, Any], window: str) -> None:
    problem = Problem(75, maps="per_kv_head", batch=len(where.get("lengths", [1])), heads=2, kv_heads=1)
    spec = AttentionSpec("hybrid", window, 16, 4)
    mixer = problem.mixer(problem.gamma, spec)
    with torch.no_grad():
        expected = triton_attention(problem.q, problem.k, problem.v, mixer, tiling=SMALL, **where)[0]
        close(walked(problem, spec, walking(), **where), expected, 1e-5, "outputs")


@pytest.mark.parametrize("stretch", [1, None])
def test_context(stretch: int | None) -> None:
    """After a state, with rows at different positions."""
    problem = Problem(45, maps="per_kv_head", heads=2, kv_heads=1)
    features = torch.rand(2, 1, 20, 32, device=DEVICE)
    sinks = (torch.randn(2, 1, 4, 16, device=DEVICE) for _ in range(2))
    values = torch.randn(2, 1, 20, 16, device=DEVICE)
    context = Context(torch.tensor([32, 48], device=DEVICE), *sinks, features.mT @ values, features.sum(2))
    mixer = problem.mixer(problem.gamma, HYBRID)
    with torch.no_grad():
        expected = triton_attention(problem.q, problem.k, problem.v, mixer, context=context, tiling=SMALL)[0]
        close(walked(problem, HYBRID, walking(stretch=stretch), context=context), expected, 1e-5, "outputs")


@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_what_backward_reads(window: str) -> None:
    """1 / d, c and the key of c are those of the kernel that reads stored states, ties included."""
    problem = Problem(50, maps="per_kv_head", batch=1, heads=2, kv_heads=1)
    problem.k[:, :, 1::2] = problem.k[:, :, ::2]  # every logit twice
    spec = AttentionSpec("hybrid", window, 16, 3)
    results = []
    for tiling in (SMALL, walking()):
        weights = (problem.phi_q.weight, problem.phi_k.weight)
        call = Call(spec, 0.4, None, dense_rows(1, 50), tiling=tiling)
        tensors = {"q": problem.q, "k": problem.k, "v": problem.v, "gamma": problem.gamma}
        tensors |= dict(zip(("wq", "wk"), (w.detach() for w in weights), strict=True))  # type: ignore[union-attr]
        launched = Launched.of(call, tuple(tensors.get(name) for name in TENSORS))
        assert launched.walks == (tiling is not SMALL)
        results.append(launched.forward(save=True, peaks=True)[2])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected, 1e-6, "per query")


def test_falls_back_to_stored_states() -> None:
    """Where what enters S differs from tile to tile, and for calls that return a state."""
    tiling = Tiling(carry=Walk())
    fits = {
        (kind, window, size): fitting_walk(AttentionSpec(kind, window, size), tiling, 8, 2) is not None
        for kind, window, size in itertools.product(("hybrid", "window"), ("terraced", "sliding"), (32, 64, 96, 128))
    }
    assert [key for key, value in fits.items() if value] == [
        ("hybrid", "terraced", 32), ("hybrid", "terraced", 64), *(("hybrid", "sliding", n) for n in (32, 64, 96, 128))
    ]  # fmt: skip
    assert fitting_walk(HYBRID, Tiling(), 8, 2) is None
    problem = Problem(50, batch=1, heads=2, kv_heads=1)
    tensors = problem.q, problem.k, problem.v, problem.mixer(problem.gamma, HYBRID)
    with torch.no_grad():
        for a, b in zip(*(triton_attention(*tensors, final=True, tiling=t) for t in (SMALL, walking())), strict=True):
            close(a, b, 1e-6, "state")


def test_a_measured_walk_becomes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """For 16-bit heads of a size that it fits."""
    walk = Walk(heads=2)
    assert choose_tiling(2, 128, 64, shared=True).carry is None
    monkeypatch.setitem(BEST_WALKS, True, walk)
    monkeypatch.setattr(launcher, "_launchers", {})
    assert choose_tiling(2, 128, 64, shared=True).carry == walk
    others = [(2, 128, 64, False), (2, 256, 64, True), (2, 128, 128, True), (4, 64, 32, True)]
    assert [choose_tiling(*sizes).carry for sizes in others] == [None] * 4
    problem = Problem(4, 64, 32, maps="per_kv_head", heads=4, kv_heads=2, dtype=torch.bfloat16)
    tensors = dict.fromkeys(TENSORS) | {"q": problem.q, "k": problem.k, "v": problem.v, "wk": problem.phi_k.weight}
    assert launcher.find_launcher(AttentionSpec(), "inside", False, None, False, tensors).walk == walk


@pytest.mark.parametrize(("heads", "maps", "expected"), [(8, 2, 4), (8, 8, 1), (12, 2, 2), (8, 4, 2)])
def test_heads_of_a_program_share_a_map(heads: int, maps: int, expected: int) -> None:
    walk = fitting_walk(AttentionSpec(), Tiling(carry=Walk(heads=4)), heads, maps)
    assert walk is not None
    assert walk.heads == expected


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("tile", "lag", "stretch"), [(64, 64, 2), (128, 64, 1), (64, 0, 3), (64, 128, 1)])
def test_every_key_enters_once(tile: int, lag: int, stretch: int, parts: int) -> None:
    """Each stretch's state holds all keys before ``tile - lag``: the sums between stretches leave out none."""
    rows = ((0, 0, 1000), (0, 1000, 1), (0, 1001, 700))
    stretches = make_stretches(rows, Walk(tile, stretch=stretch, parts=parts), lag, 64, 2, 2, torch.device("cpu"))
    tiles, keys = stretches.tiles.tolist(), stretches.keys.tolist()
    for n, (_, _, length) in enumerate(rows):
        a, b = stretches.ranges[n : n + 2].tolist()
        own = tiles[a // parts : b // parts]
        assert [x for _, *x in own] == [
            [i, min(i + stretch, -(-length // tile))] for i in range(0, -(-length // tile), stretch)
        ]
        assert keys[a][1] == 0
        assert all(high == low for (_, _, high), (_, low, _) in itertools.pairwise(keys[a:b]))
        starts = [low for _, low, _ in keys[a:b:parts]]
        assert starts == [max(begin * tile - lag, 0) // 64 for _, begin, _ in own]


def test_where_the_window_of_the_last_query_starts() -> None:
    for spec, tile in itertools.product((HYBRID, dataclasses.replace(HYBRID, window="sliding")), (16, 32, 64)):
        walk, at = Walk(tile, keys=16), 2 * tile
        assert near_end(spec, walk) == spec.window_start(at + tile - 1) - at
        assert (walk_lag(spec, walk) or 0) >= at - spec.window_start(at)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own, with its missing products put in")
def test_bf16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    add_bf16_products(monkeypatch)
    problem = Problem(150, 64, 32, maps="per_kv_head", batch=1, heads=2, kv_heads=1, dtype=torch.bfloat16)
    spec = AttentionSpec("hybrid", "terraced", 64, 4)
    seen = {"seen": (problem.q, problem.k)}
    with torch.no_grad():
        expected = problem.reference(problem.leaves(), spec)
        for arguments in ({}, seen):
            actual = walked(problem, spec, Tiling(64, 64, carry=Walk(64, 2, stretch=1)), **arguments)
            close(actual, expected, 1e-2, "outputs")


@on_gpu
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("walk", [Walk(heads=2), Walk(tile=128), Walk(heads=2, stretch=2)])
def test_half_precision(walk: Walk, seen: bool) -> None:
    problem = Problem(1000, 128, 64, maps="per_kv_head", heads=8, kv_heads=2, dtype=torch.bfloat16)
    compare(problem, AttentionSpec("hybrid", "terraced", 64, 4), 1.5e-2, tiling=Tiling(carry=walk), projected=seen)


def test_compiles_and_fits_on_hopper() -> None:
    script = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    command = [sys.executable, str(script), "hybrid", "terraced", "64", "128", "64", "bfloat16", "walk"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    shared = json.loads(result.stdout.splitlines()[-1])
    assert {"walk_kernel", "state_kernel"} <= shared.keys()
    assert max(shared.values()) <= 232448  # bytes that a program may have
