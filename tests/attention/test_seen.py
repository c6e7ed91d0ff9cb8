"""Forward kernels that multiply what maps see by W inside, although softmax sees something else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.interpreted import add_bf16_products
from test_kernels import DEVICE, Problem, close, compare

from lolcats.attention import AttentionSpec
from lolcats.attention.chunked import Context
from lolcats.attention.kernels import function, triton_attention
from lolcats.attention.kernels.launcher import Launcher
from lolcats.attention.kernels.layout import Tiling, fits_twice

TILING = Tiling(16, 16, 2, 1)
HYBRID = AttentionSpec("hybrid", "terraced", 16, 4)
SLIDING = dataclasses.replace(HYBRID, window="sliding")


def projections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are projected from here on."""
    names: list[str] = []
    project = function.project

    def counting(launcher: Launcher, name: str, *rest: Any) -> Any:
        names.append(name)
        return project(launcher, name, *rest)

    monkeypatch.setattr(function, "project", counting)
    return names


@pytest.mark.parametrize("maps", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize(("spec", "apart"), [(HYBRID, []), (SLIDING, ["x_k"]), (AttentionSpec("linear"), ["x_k"])])
def test_is_what_projections_give(
    spec: AttentionSpec, apart: list[str], maps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are projected where some that are older than a window are not in a state."""
    problem, names = Problem(50, maps=maps, batch=1, heads=2, kv_heads=1), projections(monkeypatch)
    tensors = problem.q, problem.k, problem.v, problem.mixer(problem.gamma, spec)
    seen = torch.randn_like(problem.q), torch.randn_like(problem.k)
    with torch.no_grad():
        actual = triton_attention(*tensors, seen=seen, tiling=TILING, final=True)
        assert names == apart
        expected = triton_attention(*tensors, seen=seen, tiling=dataclasses.replace(TILING, see=False), final=True)
        assert names == [*apart, "x_q", "x_k"]
    for a, b in zip(actual, expected, strict=True):
        assert a is not None
        assert b is not None
        close(a, b, 1e-6, "outputs and state")


def test_gradients_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass reads projections."""
    names = projections(monkeypatch)
    compare(Problem(52, maps="per_kv_head", batch=1, heads=2, kv_heads=1), HYBRID, tiling=TILING, projected=True)
    assert names == ["x_q", "x_k"]


def test_context_and_rows_of_other_lengths() -> None:
    problem = Problem(45, maps="per_kv_head", heads=2, kv_heads=1)
    features, values = torch.rand(2, 1, 20, 32, device=DEVICE), torch.randn(2, 1, 20, 16, device=DEVICE)
    sinks = (torch.randn(2, 1, 4, 16, device=DEVICE) for _ in range(2))
    context = Context(torch.tensor([32, 48], device=DEVICE), *sinks, features.mT @ values, features.sum(2))
    tensors = problem.q, problem.k, problem.v, problem.mixer(problem.gamma, HYBRID)
    seen = torch.randn_like(problem.q), torch.randn_like(problem.k)
    tilings = TILING, dataclasses.replace(TILING, see=False)
    with torch.no_grad():
        for where in ({"context": context}, {"lengths": [45, 20]}):
            a, b = (triton_attention(*tensors, seen=seen, tiling=t, **where)[0] for t in tilings)
            close(a, b, 1e-6, "outputs")


def test_which_weights_fit() -> None:
    assert fits_twice(128, 64, 2)
    assert fits_twice(16, 16, 4)
    assert not any(fits_twice(*sizes) for sizes in ((128, 128, 2), (256, 64, 2), (128, 64, 4)))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's own, with its missing products put in")
def test_both_parts_of_weights_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """With bf16 inputs, as if weights had 16 bits: closer to those of fp32 weights than one part would be."""
    add_bf16_products(monkeypatch)
    problem = Problem(150, 64, 32, maps="per_kv_head", batch=1, heads=2, kv_heads=1, dtype=torch.bfloat16)
    weights = [phi.weight for phi in (problem.phi_q, problem.phi_k)]
    tensors = problem.q, problem.k, problem.v, problem.mixer(problem.gamma, AttentionSpec("linear"))
    results = []
    with torch.no_grad():
        for weight in weights:
            assert weight is not None
            weight *= 20  # as trained maps: φ is an exponential of large numbers
        for rounded, see in ((False, False), (False, True), (True, True)):
            for weight in weights:
                assert weight is not None
                weight.copy_(weight.bfloat16().float() if rounded else weight)
            tiling = Tiling(64, 64, see=see)
            results.append(triton_attention(*tensors, seen=(problem.q, problem.k), tiling=tiling)[0].float())
    right, both, one = results
    assert (both - right).norm() < 0.3 * (one - right).norm()
