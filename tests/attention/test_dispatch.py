"""Which path computes attention, and that the kernels (here in Triton's interpreter) stand in for the chunked path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from conftest import tiny_model
from support.interpreted import interpreted
from torch import Tensor

import lolcats
from lolcats.attention import AttentionSpec, FeatureMap, Mixer, choose_path, use_backend
from lolcats.attention import path as path_module
from lolcats.config import AttentionConfig
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import Geometry, LinearizedAttention, linearized_layers

SPEC = AttentionSpec("hybrid", "terraced", 16, 2)
Q = torch.zeros(1, 2, 3, 16)


def test_default_on_a_cpu_is_the_chunked_path() -> None:
    assert choose_path(Q, SPEC) == "chunked"
    assert choose_path(Q.bfloat16(), SPEC) == "chunked"


@interpreted
def test_switch() -> None:
    pytest.importorskip("triton")
    with use_backend("triton"):
        assert choose_path(Q, SPEC) == "kernels"
        with use_backend("chunked"):
            assert choose_path(Q, SPEC) == "chunked"
        assert choose_path(Q, SPEC) == "kernels"
        assert choose_path(Q, SPEC, final=True) == "chunked"  # states carry no gradient there
        with torch.no_grad():
            assert choose_path(Q, SPEC, final=True) == "kernels"
    assert choose_path(Q, SPEC) == "chunked"


def test_what_cannot_be_forced_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LolcatsError, match="expected one of auto, triton, chunked, got 'cuda'"), use_backend("cuda"):
        pass
    with use_backend("triton"):
        with monkeypatch.context() as patch:
            patch.setattr(path_module, "_has_triton", lambda: False)
            with pytest.raises(LolcatsError, match="pip install triton"):
                choose_path(Q, SPEC)
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(LolcatsError, match="at most 16 sinks"):
            choose_path(Q, AttentionSpec("hybrid", "terraced", 32, 17))
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(LolcatsError, match="tensors are on cpu"):
            choose_path(Q, SPEC)


PHI = FeatureMap("hedgehog", 2, 16, 16)
CHOICES: dict[str, Callable[[Tensor], str]] = {
    "prefill": lambda q: choose_path(q, SPEC),
    "decode": lambda q: path_module.choose_decode_path(q, Mixer(PHI, PHI, torch.ones(2), SPEC, 0.25)),
    "kept keys": path_module.choose_paged_path,
    "RoPE undone": path_module.choose_rotary_path,
}


@pytest.mark.parametrize("name", CHOICES)
@torch.no_grad()
def test_kernels_that_cannot_run_are_refused_only_if_they_are_forced(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = CHOICES[name]
    with monkeypatch.context() as patch, use_backend("triton"):
        patch.setattr(path_module, "_has_triton", lambda: False)
        with pytest.raises(LolcatsError, match="pip install triton"):
            choose(Q)
    monkeypatch.setattr(path_module, "_has_triton", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(LolcatsError, match="tensors are on cpu"):
        choose(Q)
    for backend in ("auto", "chunked"):
        with use_backend(backend):
            assert choose(Q) == choose(Q.bfloat16()) == "chunked"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        assert choose(Q) == "kernels"


@pytest.mark.parametrize("name", ["decode", "kept keys", "RoPE undone"])
@torch.no_grad()
def test_what_no_kernel_computes_needs_no_interpreter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"):
        assert CHOICES[name](Q.double()) == "chunked"


def test_environment_sets_the_switch_and_triton_is_imported_late() -> None:
    code = (
        "import os, sys; os.environ['LOLCATS_ATTENTION'] = 'chunked'; import lolcats.modeling.layer; "
        "from lolcats.attention.path import backend; assert backend() == 'chunked'; "
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    misspelt = subprocess.run(
        [sys.executable, "-c", code.replace("'chunked'", "'chunkd'")], check=False, capture_output=True
    )
    assert b"LOLCATS_ATTENTION: expected one of auto, triton, chunked" in misspelt.stderr


def make_layer(**config: object) -> LinearizedAttention:
    torch.manual_seed(0)
    attention = AttentionConfig(feature_dim=16, window_size=16, sinks=2, **config)
    return LinearizedAttention(Geometry(0, 4, 2, 16, 16), attention, SPEC, "sdpa")


def tokens(length: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, length, heads, 16).transpose(1, 2) for heads in (4, 2, 2))
    return 2 * q, 2 * k, v


@pytest.mark.parametrize("window", ["terraced", "sliding"])
@torch.no_grad()
def test_nothing_waits_for_the_device_without_padding(window: str) -> None:
    """On meta tensors, where reading a value on the host is an error."""
    layer = make_layer().to("meta")
    layer.spec = AttentionSpec("hybrid", window, 16, 2)
    q, k, v = (x.to("meta") for x in tokens(70))
    layer(q, k, v, 0.25)
    state = layer.empty_state(k, v)
    for a, b in ((0, 40), (40, 54), *((n, n + 1) for n in range(54, 70))):
        _, state = layer.advance(state, *(x[:, :, a:b] for x in (q, k, v)), 0.25)
    assert state.seen.same == 70


@interpreted
@pytest.mark.parametrize("maps", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("padded", [False, True])
def test_layer_and_its_gradients(maps: str, padded: bool) -> None:
    pytest.importorskip("triton")
    layer, inputs = make_layer(key_maps=maps), tokens(50)
    padding = torch.ones(2, 50, dtype=torch.bool)
    padding[0, :7] = padding[1, 20:23] = False
    results = []
    for backend in ("chunked", "triton"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with use_backend(backend):
            y = layer(*leaves, 0.25, padding=padding if padded else None)
            y.square().sum().backward()
        results.append([y.detach(), *(x.grad for x in leaves), *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@interpreted
@pytest.mark.parametrize(
    ("kind", "window"), [("hybrid", "terraced"), ("hybrid", "sliding"), ("linear", "terraced"), ("remote", "terraced")]
)
@torch.no_grad()
def test_prefill_in_pieces_then_decode(kind: str, window: str) -> None:
    """Outputs and every tensor of the state, rows padded differently and not at all."""
    pytest.importorskip("triton")
    layer, (q, k, v) = make_layer(), tokens(55)
    layer.spec = AttentionSpec(kind, window, 16, 2)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    for padding in (mask, None):
        results = []
        for backend in ("chunked", "triton"):
            state, outputs = layer.empty_state(k, v), []
            with use_backend(backend):
                for a, b in ((0, 40), (40, 54), (54, 55)):
                    given = padding if a == 0 else None
                    counts = None if given is None else given.sum(1).tolist()
                    part = (x[:, :, a:b] for x in (q, k, v))
                    y, state = layer.advance(state, *part, 0.25, None, given, counts)
                    outputs.append(y)
            results.append([torch.cat(outputs, 2), *state.tensors().values()])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@interpreted
def test_gradients_through_a_returned_state_take_the_chunked_path() -> None:
    pytest.importorskip("triton")
    layer, (q, k, v) = make_layer(), tokens(50)
    results = []
    for backend in ("chunked", "triton"):
        values, outputs, state = v.clone().requires_grad_(), [], layer.empty_state(k, v)
        with use_backend(backend):
            for a, b in ((0, 40), (40, 50)):
                part = (x[:, :, a:b] for x in (q, k, values))
                y, state = layer.advance(state, *part, 0.25)
                outputs.append(y)
        results.append(torch.autograd.grad(outputs[1].square().sum(), values)[0])
    assert results[0][:, :, :16].abs().sum() > 0  # tokens that the second call sees through the state alone
    assert torch.equal(*results)


@interpreted
def test_interpreter_takes_half_precision_and_answers_as_a_gpu_would() -> None:
    pytest.importorskip("triton")
    layer, inputs = make_layer(), tokens(20)
    with torch.no_grad(), use_backend("triton"):
        expected = layer(*inputs, 0.25)
        assert layer(*(x.half() for x in inputs), 0.25).dtype == torch.float32
        y = layer(*(x.bfloat16() for x in inputs), 0.25)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=5e-2)


@interpreted
def test_whole_model_loss_and_gradients() -> None:
    pytest.importorskip("triton")
    model = lolcats.convert(tiny_model(), AttentionConfig(window_size=16, sinks=2, feature_dim=16))
    for layer in linearized_layers(model):
        layer.requires_grad_(False)
    ids = torch.randint(6, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("chunked", "triton"):
        model.zero_grad()
        with use_backend(backend):
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
