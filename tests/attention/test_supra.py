"""Linear attention with fixed decay, and a group norm in place of its denominator: every path."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from support.interpreted import DEVICE
from test_paths import F_COLUMNS, SCALE, B, D, G, H, Problem, compare_with_gradients
from torch import Tensor, nn

import lolcats.attention.advance as advance_module
from lolcats.attention import (
    AttentionSpec,
    HeadNorm,
    SlotState,
    choose_path,
    parallel_attention,
    recurrent_attention,
    use_backend,
)
from lolcats.attention.path import choose_decode_path
from lolcats.attention.supra import supra_attention
from lolcats.config import AttentionConfig, load_config
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import Geometry, LinearizedAttention, layer_spec

MAPS = ("per_query_head", "per_kv_head")
SUPRA = ("retnet", "group_norm")
KINDS = (SUPRA, ("retnet", "sum"), ("none", "group_norm"))


def spec_of(decay: str, normalizer: str) -> AttentionSpec:
    return AttentionSpec("linear", decay=decay, normalizer=normalizer)


def make_layer(maps: str = "per_query_head") -> LinearizedAttention:
    torch.manual_seed(3)
    config = AttentionConfig("linear", feature_map="t2r", key_maps=maps, decay="retnet", normalizer="group_norm")
    layer = LinearizedAttention(Geometry(0, H, G, D, D), config, layer_spec(config, "linear"), "sdpa")
    with torch.no_grad():
        for phi in (layer.phi_q, layer.phi_k):
            phi.bias.fill_(1.0)
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.bias.normal_()
    return layer


def expected_output(layer: LinearizedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """From the reference and torch's own group norm, token by token."""
    y = parallel_attention(q, k, v, layer.phi_q(q), layer.phi_k(k), layer.gamma, layer.spec, SCALE)
    norm = nn.GroupNorm(H, H * D)
    tokens = norm(y.transpose(1, 2).reshape(-1, H * D)) - norm.bias
    shape = (q.shape[0], q.shape[2], H, D)
    return (tokens.view(shape) * layer.norm.weight + layer.norm.bias).transpose(1, 2)


@pytest.mark.parametrize("maps", MAPS)
def test_the_reference_is_the_equation(maps: str) -> None:
    """y_n = Σ_{i ≤ n} γ_h^(n−i) φ(q_n)ᵀφ(k_i) v_i with γ_h = 1 − 2^(−5−h), where h is the index of the state."""
    problem = Problem(7, maps, "t2r")
    fq, fk = problem.phi_q(problem.q), problem.phi_k(problem.k)
    y = parallel_attention(problem.q, problem.k, problem.v, fq, fk, problem.gamma, spec_of(*SUPRA), SCALE)
    for b, h, n in itertools.product(range(B), range(H), range(7)):
        state = h // (H // fk.shape[1])
        terms = [
            (1 - 2 ** (-5 - state)) ** (n - i) * (fq[b, h, n] @ fk[b, state, i]) * problem.v[b, h // (H // G), i]
            for i in range(n + 1)
        ]
        torch.testing.assert_close(y[b, h, n], sum(terms))


def test_decay_is_exact_for_many_heads() -> None:
    wanted = torch.log1p(-(2.0 ** (-5 - torch.arange(40, dtype=torch.float64))))
    found = spec_of(*SUPRA).log_decay(40, torch.device("cpu"))
    torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=0)
    assert (found < 0).all()  # 1 − 2^(−44) is 1 in fp32, its logarithm is not 0
    assert (AttentionSpec("linear").log_decay(3, torch.device("cpu")) == 0).all()


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("maps", MAPS)
def test_chunked_equals_reference(length: int, maps: str) -> None:
    for kind in KINDS if length < 1000 else (SUPRA,):
        problem = Problem(length, maps, "t2r")
        scale = 1 / (length * D)
        for phi in (problem.phi_q, problem.phi_k):  # outputs about 1, as the tolerance expects
            phi.weight.data *= scale**0.5
            phi.bias.data *= scale**0.5
        compare_with_gradients(spec_of(*kind), problem, attend=supra_attention)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maps", MAPS)
def test_recurrent_equals_parallel(kind: tuple[str, str], maps: str) -> None:
    tensors = Problem(75, maps).tensors()
    expected = parallel_attention(*tensors, spec_of(*kind), SCALE)
    torch.testing.assert_close(recurrent_attention(*tensors, spec_of(*kind), SCALE), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("maps", MAPS)
def test_prefill_in_pieces_and_decode(kind: tuple[str, str], maps: str) -> None:
    length, spec = 150, spec_of(*kind)
    problem = Problem(length, maps)
    expected = problem.reference(spec)
    for cuts in ([0, 150], [0, 1, 150], [0, 64, 65, 130, 150], list(range(151)), [0, 70, *range(71, 151)]):
        for use_step in (False, True):
            y, _ = problem.in_pieces(spec, cuts, use_step)
            torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("maps", MAPS)
def test_padded_rows_equal_rows_alone(maps: str) -> None:
    """Through the layer, its norm included: left and scattered padding in pieces, then decode."""
    layer, problem = make_layer(maps), Problem(90, maps)
    q, k, v = problem.q, problem.k, problem.v
    mask = torch.ones(B, 90, dtype=torch.bool)
    mask[0, :37] = False
    mask[1, :80] = torch.rand(80, generator=torch.Generator().manual_seed(3)) > 0.4
    state, outputs = layer.empty_state(k, v), []
    for a, b in ((0, 50), (50, 85)):
        part = (x[:, :, a:b] for x in (q, k, v))
        y, state = layer.advance(state, *part, SCALE, padding=mask[:, a:b])
        outputs.append(y)
    for n in range(85, 90):
        y, state = layer.advance(state, *(x[:, :, n : n + 1] for x in (q, k, v)), SCALE)
        outputs.append(y)
    y = torch.cat(outputs, 2)
    for row in range(B):
        alone = expected_output(layer, *(x[row : row + 1, :, mask[row]] for x in (q, k, v)))
        torch.testing.assert_close(y[row : row + 1, :, mask[row]], alone, atol=1e-4, rtol=1e-4)
        assert (y[row, :, ~mask[row]] == 0).all()


@pytest.mark.parametrize("maps", MAPS)
@pytest.mark.parametrize("length", [50, 150])
def test_layer_and_its_gradients(maps: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter and input, in one piece and in recomputed segments."""
    monkeypatch.setattr(advance_module, "SEGMENT", 60)
    monkeypatch.setattr("lolcats.modeling.layer.SEGMENT", 60)
    layer, problem, direction = make_layer(maps), Problem(length, maps), torch.randn(B, H, length, D)
    leaves = {name: getattr(problem, name).requires_grad_() for name in "qkv"}
    leaves |= {name: p for name, p in layer.named_parameters() if name != "gate"}
    assert {"norm.weight", "norm.bias", "phi_q.bias", "phi_k.weight"} < leaves.keys()
    results = []
    for attend in (lambda *x: expected_output(layer, *x), lambda *x: layer(*x, SCALE)):
        y = attend(problem.q, problem.k, problem.v)
        results.append([y, *torch.autograd.grad((y * direction).sum(), list(leaves.values()))])
    for name, expected, actual in zip(["y", *leaves], *results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3, msg=name)


def test_norm_is_torch_group_norm() -> None:
    norm, peer = HeadNorm(H, D), nn.GroupNorm(H, H * D)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        peer.weight.copy_(norm.weight.flatten())
        peer.bias.copy_(norm.bias.flatten())
    y = torch.randn(B, H, 5, D)
    expected = peer(y.transpose(1, 2).reshape(-1, H * D)).view(B, 5, H, D).transpose(1, 2)
    torch.testing.assert_close(norm(y), expected)
    assert norm(y.bfloat16()).dtype == torch.float32
    assert torch.isfinite(norm(torch.zeros(1, H, 1, D))).all()


@torch.no_grad()
def test_states_in_place_and_in_bf16() -> None:
    """As the engine keeps them: in the same memory, with S rounded stochastically and without bias."""
    problem, spec = Problem(80), spec_of(*SUPRA)
    expected = problem.reference(spec)
    for dtype in (torch.float32, torch.bfloat16):
        state = problem.empty(spec)
        state = SlotState.of(replace(state, sums=state.sums._replace(S=state.sums.S.to(dtype))))
        places, outputs = {n: x.data_ptr() for n, x in state.tensors().items()}, []
        for n in range(80):
            y, state = problem.move(state, spec, slice(n, n + 1), use_step=True)
            outputs.append(y)
        assert {n: x.data_ptr() for n, x in state.tensors().items()} == places
        error = (torch.cat(outputs, 2) - expected).norm() / expected.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_kernels_leave_it_to_the_chunked_path() -> None:
    q, layer = torch.zeros(1, H, 3, D), make_layer()
    for kind in KINDS:
        assert choose_path(q, spec_of(*kind)) == "supra"
        with torch.no_grad(), use_backend("triton"):
            assert choose_decode_path(q, layer.mixer(SCALE)) == "supra"
    pytest.importorskip("triton")
    q, layer = q.to(DEVICE), layer.to(DEVICE)
    with use_backend("triton"), pytest.raises(LolcatsError, match=r"only attention\.decay=none with .*normalizer=sum"):
        layer(q, q[:, :G], q[:, :G], SCALE)


def test_other_kinds_do_without_both() -> None:
    """Ablations and controls change the layer as they change any other."""
    layer, problem = make_layer(), Problem(40)
    window = AttentionSpec("window", decay="retnet", normalizer="group_norm")
    layer.spec = window
    assert window.divides
    assert not window.decays
    expected = problem.reference(AttentionSpec("window"))
    torch.testing.assert_close(layer(problem.q, problem.k, problem.v, SCALE), expected, atol=1e-5, rtol=1e-4)


def test_tensor_parallel_is_refused() -> None:
    with pytest.raises(LolcatsError, match=r"Tensor parallelism does not support attention\.decay"):
        make_layer().split_heads(2)


@pytest.mark.parametrize("setting", ["attention.decay=retnet", "attention.normalizer=group_norm"])
def test_hybrid_layers_have_neither(setting: str) -> None:
    with pytest.raises(LolcatsError, match=r"only works with linear attention: set attention\.kind=linear"):
        load_config("paper-sinks", [setting])
    with pytest.raises(LolcatsError, match=r"only works with linear attention: set attention\.kind=linear"):
        load_config("paper-sinks", [setting, "attention.kind=linear", "attention.layers={'1': hybrid}"])
    load_config("paper-sinks", [setting, "attention.kind=linear", "attention.layers={'1': softmax}"])


def test_weights_are_shares() -> None:
    layer, problem = make_layer(), Problem(40)
    weights = layer.weights(problem.q, problem.k, SCALE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, 40))
    assert F_COLUMNS < layer.phi_k.num_features == D
