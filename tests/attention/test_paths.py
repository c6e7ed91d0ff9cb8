"""Every path against the reference: outputs and every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lolcats.attention.advance as advance_module
from lolcats.attention import (
    AttentionSpec,
    AttentionState,
    FeatureMap,
    Mixer,
    SlotState,
    chunked_attention,
    extend,
    parallel_attention,
    recurrent_attention,
    step,
)

B, H, G, D, F_COLUMNS = 2, 4, 2, 8, 6
SCALE = 0.4
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 1000)
KINDS = ("hybrid", "linear", "window", "remote")
WINDOWS = ("terraced", "sliding")
MAPS = ("per_query_head", "per_kv_head")
VARIANTS = list(itertools.product(KINDS, WINDOWS, (0, 4), MAPS))


class Problem:
    """Random inputs and feature maps of one attention layer; peaked, so that window, sinks and old keys all matter."""

    def __init__(self, length: int, maps: str = "per_query_head", feature_map: str = "hedgehog", seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.q, self.k, self.v = (torch.randn(B, heads, length, D) for heads in (H, G, G))
        self.q, self.k = 2 * self.q, 2 * self.k
        self.groups = 1 if maps == "per_kv_head" else H // G
        self.phi_q = FeatureMap(feature_map, H, D, F_COLUMNS)
        self.phi_k = FeatureMap(feature_map, G * self.groups, D, F_COLUMNS)
        if feature_map == "t2r":  # features that overlap: where relu leaves nothing, the gradient is 0/0 in either path
            for phi in (self.phi_q, self.phi_k):
                phi.bias.data.fill_(1.0)
        self.gamma = torch.rand(H) * 0.5 + 0.05

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the references take."""
        return self.q, self.k, self.v, self.phi_q(self.q), self.phi_k(self.k), self.gamma

    def leaves(self) -> dict[str, Tensor]:
        """All tensors that have a gradient."""
        leaves = {"q": self.q, "k": self.k, "v": self.v, "gamma": self.gamma}
        for name, phi in (("q", self.phi_q), ("k", self.phi_k)):
            leaves |= {f"phi_{name}.{parameter}": x for parameter, x in phi.named_parameters()}
        return {name: x.requires_grad_() for name, x in leaves.items()}

    def reference(self, spec: AttentionSpec, rows: slice | Tensor = slice(None), row: slice = slice(None)) -> Tensor:
        q, k, v = (x[row, :, rows] for x in (self.q, self.k, self.v))
        return parallel_attention(q, k, v, self.phi_q(q), self.phi_k(k), self.gamma, spec, SCALE)

    def mixer(self, spec: AttentionSpec, softcap: float | None = None) -> Mixer:
        return Mixer(self.phi_q, self.phi_k, self.gamma, spec, SCALE, softcap)

    def empty(self, spec: AttentionSpec) -> AttentionState:
        return AttentionState.empty(self.k, self.v, G * self.groups, self.phi_k.num_features, spec)

    def move(self, state: AttentionState, spec: AttentionSpec, rows: slice, use_step: bool = False,
             mask: Tensor | None = None) -> tuple[Tensor, AttentionState]:  # fmt: skip
        tensors = (x[:, :, rows] for x in (self.q, self.k, self.v))
        mixer = self.mixer(spec)
        return step(state, *tensors, mixer) if use_step else extend(state, *tensors, mixer, mask)

    def in_pieces(self, spec: AttentionSpec, cuts: Sequence[int], use_step: bool) -> tuple[Tensor, AttentionState]:
        """Outputs of all pieces, concatenated, and the final state."""
        state, outputs = self.empty(spec), []
        for start, stop in itertools.pairwise(cuts):
            y, state = self.move(state, spec, slice(start, stop), use_step and stop - start == 1)
            outputs.append(y)
        return torch.cat(outputs, 2), state


def compare_with_gradients(
    spec: AttentionSpec, problem: Problem, softcap: float | None = None, attend: Any = chunked_attention
) -> None:
    leaves = problem.leaves()
    y = parallel_attention(*problem.tensors(), spec, SCALE, softcap)
    z, _, _ = attend(problem.q, problem.k, problem.v, problem.mixer(spec, softcap))
    torch.testing.assert_close(z, y, atol=2e-5, rtol=1e-4)
    direction = torch.randn_like(y)
    pairs = zip(*(torch.autograd.grad(out, list(leaves.values()), direction, allow_unused=True) for out in (y, z)),
                strict=True)  # fmt: skip
    for name, (expected, actual) in zip(leaves, pairs, strict=True):
        if expected is None:
            assert actual is None, name
        else:
            torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("maps", MAPS)
def test_chunked_equals_reference(length: int, window: str, sinks: int, maps: str) -> None:
    for kind in KINDS if length < 1000 else ("hybrid", "linear"):
        compare_with_gradients(AttentionSpec(kind, window, 64, sinks), Problem(length, maps))


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r", "exp", "elu"])
@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_feature_maps(feature_map: str, maps: str, length: int) -> None:
    problem = Problem(length, maps, feature_map)
    assert (problem.phi_q(problem.q) >= 1e-12).all()
    for window in WINDOWS:
        compare_with_gradients(AttentionSpec("hybrid", window, 16, 4), problem)
        compare_with_gradients(AttentionSpec("linear", window, 16, 4), problem)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 100])
@pytest.mark.parametrize("window", WINDOWS)
def test_any_window_size(size: int, window: str) -> None:
    compare_with_gradients(AttentionSpec("hybrid", window, size, min(size, 3)), Problem(67))


def test_softcap() -> None:
    compare_with_gradients(AttentionSpec("hybrid", "terraced", 16, 2), Problem(70), softcap=1.5)


@pytest.mark.parametrize(("kind", "window", "sinks", "maps"), VARIANTS)
def test_recurrent_equals_parallel(kind: str, window: str, sinks: int, maps: str) -> None:
    problem, spec = Problem(75, maps), AttentionSpec(kind, window, 16, sinks)
    tensors = problem.tensors()
    expected = parallel_attention(*tensors, spec, SCALE)
    torch.testing.assert_close(recurrent_attention(*tensors, spec, SCALE), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "window", "sinks", "maps"), VARIANTS)
def test_prefill_in_pieces_and_decode(kind: str, window: str, sinks: int, maps: str) -> None:
    length, spec = 101, AttentionSpec(kind, window, 16, sinks)
    problem = Problem(length, maps)
    expected = problem.reference(spec)
    for cuts in ([0, 101], [0, 1, 101], [0, 3, 15, 16, 17, 50, 101], list(range(102)), [0, 40, *range(41, 102)]):
        for use_step in (False, True):
            y, state = problem.in_pieces(spec, cuts, use_step)
            torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)
            assert (state.seen.rows == length).all()


@pytest.mark.parametrize(("kind", "window", "sinks", "maps"), VARIANTS)
def test_padded_rows_equal_rows_alone(kind: str, window: str, sinks: int, maps: str) -> None:
    """Left, right and scattered padding, whole and in pieces, then decoding at different positions."""
    length, spec = 90, AttentionSpec(kind, window, 16, sinks)
    generator = torch.Generator().manual_seed(3)
    for left, cut in itertools.product((0, 1, 16, 37), (90, 50, 20)):
        problem = Problem(length, maps)
        mask = torch.ones(B, length, dtype=torch.bool)
        mask[0, :left] = False
        mask[1, :80] = torch.rand(80, generator=generator) > 0.4
        state, outputs = problem.empty(spec), []
        for rows in (slice(0, cut), slice(cut, 85)):
            if rows.start < rows.stop:
                y, state = problem.move(state, spec, rows, mask=mask[:, rows])
                outputs.append(y)
        for n in range(max(cut, 85), length):
            y, state = problem.move(state, spec, slice(n, n + 1), use_step=True)
            outputs.append(y)
        y = torch.cat(outputs, 2)
        for b in range(B):
            alone = problem.reference(spec, mask[b], slice(b, b + 1))
            torch.testing.assert_close(y[b : b + 1, :, mask[b]], alone, atol=2e-5, rtol=1e-4)
            assert (y[b, :, ~mask[b]] == 0).all()


@pytest.mark.parametrize(("kind", "window", "sinks", "maps"), VARIANTS)
def test_steps_in_place_at_positions_that_the_host_knows(kind: str, window: str, sinks: int, maps: str) -> None:
    """As the engine decodes: rows at different positions, from a sink on."""
    length, spec = 75, AttentionSpec(kind, window, 16, sinks)
    problem, mask = Problem(length, maps), torch.ones(B, length, dtype=torch.bool)
    mask[0, 2:21] = False
    with torch.no_grad():
        _, state = problem.move(problem.empty(spec), spec, slice(0, 21), mask=mask[:, :21])
        state, outputs = SlotState.of(state.map(torch.clone)), []
        for n in range(21, length):
            y, after = problem.move(state.at((n - 19, n)), spec, slice(n, n + 1), use_step=True)
            assert after.seen.known is None  # known for one step
            outputs.append(y)
        for b in range(B):
            alone = problem.reference(spec, mask[b], slice(b, b + 1))
            torch.testing.assert_close(torch.cat(outputs, 2)[b], alone[0, :, -len(outputs) :], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "window", "sinks", "maps"), VARIANTS)
def test_segments_and_their_gradients(
    kind: str, window: str, sinks: int, maps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long inputs are processed in recomputed segments: outputs, and gradients including those of feature maps."""
    monkeypatch.setattr(advance_module, "SEGMENT", 40)
    problem, spec = Problem(150, maps), AttentionSpec(kind, window, 16, sinks)
    leaves = {"q": problem.q, "k": problem.k, "v": problem.v, "gamma": problem.gamma}
    leaves |= {f"phi_{n}": phi.weight for n, phi in (("q", problem.phi_q), ("k", problem.phi_k))}
    for leaf in leaves.values():
        leaf.requires_grad_()
    direction = torch.randn(B, H, 150, D)
    gradients = []
    for y in (problem.reference(spec), problem.move(problem.empty(spec), spec, slice(0, 150))[0]):
        gradients.append(torch.autograd.grad((y * direction).sum(), list(leaves.values()), allow_unused=True))
    for name, expected, actual in zip(leaves, *gradients, strict=True):
        if expected is None:
            assert actual is None, name
        else:
            torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-3, msg=name)


def test_layer_beyond_one_segment() -> None:
    from lolcats.config import AttentionConfig
    from lolcats.modeling.layer import Geometry, LinearizedAttention

    problem, spec = Problem(2 * advance_module.SEGMENT + 77), AttentionSpec("hybrid", "terraced", 64, 4)
    layer = LinearizedAttention(Geometry(0, H, G, D, D), AttentionConfig(feature_dim=F_COLUMNS), spec, "sdpa")
    q, k, v = problem.q, problem.k, problem.v
    expected = parallel_attention(q, k, v, layer.phi_q(q), layer.phi_k(k), layer.gamma, spec, SCALE)
    torch.testing.assert_close(layer(q, k, v, SCALE), expected, atol=2e-5, rtol=1e-4)


def test_state_has_fixed_size() -> None:
    spec = AttentionSpec("hybrid", "terraced", 16, 4)
    problem = Problem(400)
    state = problem.empty(spec)
    sizes = set()
    for n in range(0, 400, 40):
        _, state = problem.move(state, spec, slice(n, n + 40))
        sizes.add(state.nbytes)
    assert len(sizes) == 1


def test_not_a_log_sum_exp_merge() -> None:
    """Only window logits are shifted by their maximum: scaling q changes the share of the linear term."""
    problem, spec = Problem(60), AttentionSpec("hybrid", "terraced", 8, 0)
    q, k, *others = problem.tensors()
    base = parallel_attention(q, k, *others, spec, SCALE)
    shifted = k + 5 * torch.ones(D)  # moves every logit of a query by the same amount
    assert torch.allclose(base, parallel_attention(q, shifted, *others, spec, SCALE), atol=1e-4)


def test_key_map_starts_as_copy_of_query_map() -> None:
    from lolcats.config import AttentionConfig
    from lolcats.modeling.layer import Geometry, LinearizedAttention

    for maps in MAPS:
        config = AttentionConfig(feature_dim=6, key_maps=maps)
        layer = LinearizedAttention(Geometry(0, H, G, D, D), config, AttentionSpec(), "sdpa")
        key_maps = layer.phi_k.weight.repeat_interleave(H // layer.maps, 0)
        assert torch.equal(layer.phi_q.weight, key_maps)
        assert layer.phi_q.weight.abs().max() <= (6 / (D * 6)) ** 0.5
        torch.testing.assert_close(layer.gamma, torch.full((H,), 0.1), atol=1e-5, rtol=0)
