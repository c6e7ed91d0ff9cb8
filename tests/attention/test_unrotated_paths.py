"""Feature maps that see other queries and keys than softmax does: all paths take both side by side."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.interpreted import DEVICE
from torch import Tensor
from torch.testing import assert_close

from lolcats.attention import (
    AttentionSpec,
    AttentionState,
    Documents,
    FeatureMap,
    Mixer,
    attention,
    extend,
    parallel_attention,
    step,
    use_backend,
)

B, H, G, T, D, SCALE = 2, 4, 2, 75, 16, 0.4


class Problem:
    """Random q and k for softmax, and different ones for the feature maps."""

    def __init__(self, maps: int = H, feature_map: str = "hedgehog") -> None:
        torch.manual_seed(0)
        shapes = ((B, heads, T, D) for heads in (H, G, G, H, G))
        self.q, self.k, self.v, self.plain_q, self.plain_k = (2 * torch.randn(x).to(DEVICE) for x in shapes)
        self.phi_q, self.phi_k = (FeatureMap(feature_map, n, D, 16).to(DEVICE) for n in (H, maps))
        self.gamma, self.maps = (torch.rand(H) * 0.5 + 0.05).to(DEVICE), maps

    def leaves(self) -> list[Tensor]:
        tensors = (self.q, self.k, self.v, self.plain_q, self.plain_k, self.gamma)
        return [x.requires_grad_() for x in (*tensors, *self.phi_q.parameters(), *self.phi_k.parameters())]

    def reference(self, spec: AttentionSpec, rows: slice | Tensor = slice(None)) -> Tensor:
        """The specification, which takes features."""
        q, k, v, plain_q, plain_k = (x[:, :, rows] for x in (self.q, self.k, self.v, self.plain_q, self.plain_k))
        return parallel_attention(q, k, v, self.phi_q(plain_q), self.phi_k(plain_k), self.gamma, spec, SCALE)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.cat([self.q, self.plain_q], -1), torch.cat([self.k, self.plain_k], -1), self.v

    def mixer(self, spec: AttentionSpec) -> Mixer:
        return Mixer(self.phi_q, self.phi_k, self.gamma, spec, SCALE)

    def empty(self, spec: AttentionSpec) -> AttentionState:
        _, k, v = self.inputs()
        return AttentionState.empty(k, v, self.maps, self.phi_k.num_features, spec)


def spec_of(kind: str = "hybrid", window: str = "terraced", sinks: int = 3) -> AttentionSpec:
    return AttentionSpec(kind, window, 16, sinks, unrotated=True)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
@pytest.mark.parametrize("kind", ["hybrid", "linear", "window", "remote"])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
def test_outputs_and_gradients_equal_the_reference(backend: str, kind: str, window: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    problem, spec = Problem(), spec_of(kind, window)
    leaves, expected = problem.leaves(), problem.reference(spec)
    with use_backend(backend):
        actual = attention(*problem.inputs(), problem.mixer(spec))[0]
        assert_close(actual, expected, atol=5e-5, rtol=1e-4)
        direction = torch.randn_like(expected)
        pairs = [torch.autograd.grad(y, leaves, direction, allow_unused=True) for y in (expected, actual)]
    for one, other in zip(*pairs, strict=True):
        other = torch.zeros_like(one) if one is not None and other is None else other
        if one is not None:
            assert_close(other, one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("maps", [H, G])
@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "exp", "elu"])
def test_every_feature_map(feature_map: str, maps: int) -> None:
    problem, spec = Problem(maps, feature_map), spec_of()
    assert_close(attention(*problem.inputs(), problem.mixer(spec))[0], problem.reference(spec), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["hybrid", "linear", "window"])
@pytest.mark.parametrize("window", ["terraced", "sliding"])
@pytest.mark.parametrize("cuts", [[0, 3, 15, 16, 17, 50, 75], [0, 40, *range(41, 76)], list(range(76))])
@torch.no_grad()
def test_prefill_in_pieces_and_decode(kind: str, window: str, cuts: list[int]) -> None:
    problem, spec = Problem(), spec_of(kind, window)
    state, outputs = problem.empty(spec), []
    for start, stop in pairwise(cuts):
        move = step if stop - start == 1 else extend
        y, state = move(state, *(x[:, :, start:stop] for x in problem.inputs()), problem.mixer(spec))
        outputs.append(y)
    assert_close(torch.cat(outputs, 2), problem.reference(spec), atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_kernels_go_on_from_a_state() -> None:
    pytest.importorskip("triton")
    problem, spec = Problem(), spec_of()
    state, outputs = problem.empty(spec), []
    with use_backend("triton"):
        for start, stop in pairwise([0, 40, 75]):
            y, state = extend(state, *(x[:, :, start:stop] for x in problem.inputs()), problem.mixer(spec))
            outputs.append(y)
    assert_close(torch.cat(outputs, 2), problem.reference(spec), atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_padding() -> None:
    problem, spec = Problem(), spec_of()
    mask = torch.ones(B, T, dtype=torch.bool, device=DEVICE)
    mask[:, :20] = False
    y, _ = extend(problem.empty(spec), *problem.inputs(), problem.mixer(spec), mask=mask)
    assert_close(y[:, :, 20:], problem.reference(spec, slice(20, None)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("maps", [H, G])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_documents(backend: str, maps: int) -> None:
    """Outputs and gradients equal those of separate documents."""
    if backend == "triton":
        pytest.importorskip("triton")
    problem, spec = Problem(maps), spec_of()
    leaves, documents = problem.leaves(), Documents(((30, 45), (30, 45)), problem.q.device)
    expected = torch.cat([problem.reference(spec, rows) for rows in (slice(30), slice(30, None))], 2)
    with use_backend(backend):
        y = attention(*problem.inputs(), problem.mixer(spec), documents=documents)[0]
        assert_close(y, expected, atol=5e-5, rtol=1e-4)
        direction = torch.randn_like(expected)
        for one, other in zip(*(torch.autograd.grad(x, leaves, direction) for x in (expected, y)), strict=True):
            assert_close(other, one, atol=1e-3, rtol=1e-3)
