"""Window dropout in attention transfer: what rows with a hidden window learn, and which rows these are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import interrupt_at, tiny_model
from torch import Tensor

import lolcats
from lolcats.attention import AttentionSpec, Documents, use_backend
from lolcats.config import AttentionConfig, TransferConfig, load_config
from lolcats.data.rows import Data
from lolcats.errors import Interrupted, LolcatsError
from lolcats.modeling.checkpoint import feature_map_state
from lolcats.modeling.layer import AttentionCall, Geometry, LinearizedAttention, layer_spec
from lolcats.stages.transfer.loss import attention_loss, attention_losses, older_attention, older_error
from lolcats.stages.transfer.stage import layer_losses, transfer
from lolcats.stages.transfer.visits import hidden_windows

B, H, G, T, D, SCALE = 4, 4, 2, 70, 8, 0.4
PLAIN = TransferConfig(mse_weight=1.0)


def make_call(documents: Documents | None = None) -> AttentionCall:
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D) for heads in (H, G, G))
    return AttentionCall(2 * q, 2 * k, v, torch.randn(B, T, H, D), SCALE, None, None, documents)


def make_layer(kind: str = "hybrid", window: str = "terraced", sinks: int = 3) -> LinearizedAttention:
    torch.manual_seed(1)
    config = AttentionConfig(kind, window=window, window_size=8, sinks=sinks, feature_dim=6)
    return LinearizedAttention(Geometry(0, H, G, D, D), config, layer_spec(config, kind), "sdpa")


def naive_error(layer: LinearizedAttention, call: AttentionCall, row: int) -> Tensor:
    """Of one row, query by query."""
    spec, fq, fk = layer.spec, layer.phi_q(call.q), layer.phi_k(call.k)
    total = torch.zeros(())
    for h, n in itertools.product(range(H), range(T)):
        older = [i for i in range(n + 1) if spec.sinks <= i < spec.window_start(n)]
        if older:
            k, v = call.k[row, h // (H // G), older], call.v[row, h // (H // G), older]
            target = torch.softmax(SCALE * k @ call.q[row, h, n], 0) @ v
            features = fk[row, h, older] @ fq[row, h, n]
            total = total + (features @ v / features.sum() - target).square().sum()
    return total / (H * T * D)


@pytest.mark.parametrize("window", ["terraced", "sliding"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_hidden_rows_match_softmax_over_the_keys_of_the_linear_term(window: str, sinks: int) -> None:
    layer, call = make_layer(window=window, sinks=sinks), make_call()
    expected = torch.stack([naive_error(layer, call, row) for row in range(B)])
    torch.testing.assert_close(older_error(layer, call), expected.mean(), atol=1e-6, rtol=1e-4)
    shown = attention_loss(layer, call.rows([0, 2]), PLAIN)
    mixed = attention_loss(layer, call, PLAIN, hidden=[1, 3])
    torch.testing.assert_close(mixed, (expected[1] + expected[3]) / 4 + shown / 2, atol=1e-6, rtol=1e-4)
    every = attention_losses(layer, call, PLAIN, hidden=range(B))
    torch.testing.assert_close(every[0], expected.mean(), atol=1e-6, rtol=1e-4)
    assert layer.spec == AttentionSpec("hybrid", window, 8, sinks)


def test_gradients() -> None:
    """Those of the naive loss for both maps; the gate gets none in hidden rows."""
    layer, call = make_layer(), make_call()
    weights = [layer.phi_q.weight, layer.phi_k.weight]
    naive = torch.stack([naive_error(layer, call, row) for row in range(B)]).mean()
    expected = torch.autograd.grad(naive, weights)
    actual = torch.autograd.grad(older_error(layer, call), [*weights, layer.gate], allow_unused=True)
    assert actual[2] is None or not actual[2].any()
    for one, other in zip(expected, actual, strict=False):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-3)
    gate = torch.autograd.grad(attention_loss(layer, call, PLAIN, hidden=[0]), layer.gate)[0]
    assert gate.abs().min() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_kernels_give_the_same() -> None:
    pytest.importorskip("triton")
    config, whole = AttentionConfig(window_size=8, sinks=3, feature_dim=6), make_call()
    layer = LinearizedAttention(Geometry(0, 1, 1, D, D), config, layer_spec(config, "hybrid"), "sdpa")
    q, k, v = (x[:2, :1, :30] for x in (whole.q, whole.k, whole.v))
    call, results = AttentionCall(q, k, v, whole.target[:2, :30, :1], SCALE, None, None), []
    for backend in ("chunked", "triton"):
        with use_backend(backend):
            loss = attention_loss(layer, call, PLAIN, hidden=[1])
            results.append([loss, *torch.autograd.grad(loss, [layer.phi_q.weight, layer.phi_k.weight, layer.gate])])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3)


def test_softmax_over_older_keys_with_a_cap() -> None:
    call, spec = make_call(), AttentionSpec("hybrid", "sliding", 8, 2)
    y = older_attention(call.q, call.k, call.v, spec, SCALE, softcap=1.5)
    assert (y[:, :, :10] == 0).all()
    logits = 1.5 * torch.tanh(SCALE * call.k[1, 1, 2:62] @ call.q[1, 2, 69] / 1.5)
    torch.testing.assert_close(y[1, 2, 69], torch.softmax(logits, 0) @ call.v[1, 1, 2:62])


def test_documents_are_kept_apart() -> None:
    documents = Documents(((30, 40), (70,), (5, 65), (41, 29)), torch.device("cpu"))
    layer, call = make_layer(), make_call(documents)
    total = torch.zeros(())
    for row, lengths in enumerate(documents.lengths):
        starts = itertools.accumulate(lengths, initial=0)
        for start, length in zip(starts, lengths, strict=False):
            part = slice(start, start + length)
            q, k, v = (x[row : row + 1, :, part] for x in (call.q, call.k, call.v))
            alone = AttentionCall(q, k, v, call.target[row : row + 1, part], SCALE, None, None)
            total = total + older_error(layer, alone) * length / (B * T)
    torch.testing.assert_close(older_error(layer, call), total, atol=1e-6, rtol=1e-4)


def test_only_hybrid_layers_and_unpadded_rows() -> None:
    call, linear = make_call(), make_layer("linear")
    assert torch.equal(attention_loss(linear, call, PLAIN, hidden=[1]), attention_loss(linear, call, PLAIN))
    with pytest.raises(LolcatsError, match="without padding"):
        older_error(make_layer(), replace(call, padding=torch.ones(B, T, dtype=torch.bool)))
    with pytest.raises(LolcatsError, match=r"must be between 0 and 1, not 1\.5"):
        load_config("default", ["transfer.window_dropout=1.5"])
    with pytest.raises(LolcatsError, match=r"hybrid layers, but with attention\.kind=linear there are none"):
        load_config("default", ["transfer.window_dropout=0.5", "attention.kind=linear"])


def test_which_rows_are_hidden() -> None:
    """Each visit has its own draw: the same in any batch, another in another epoch or with another seed."""
    assert hidden_windows(range(9), 0.0, 0) == []
    assert hidden_windows(range(9), 1.0, 0) == list(range(9))
    every = hidden_windows(range(2000), 0.3, 5)
    assert 500 < len(every) < 700
    pieces = [range(i, i + 7) for i in range(0, 2000, 7)]
    assert [p.start + i for p in pieces for i in hidden_windows(p, 0.3, 5) if p.start + i < 2000] == every
    assert every != hidden_windows(range(2000), 0.3, 6)
    assert every[:20] != hidden_windows(range(2000, 4000), 0.3, 5)[:20]


@pytest.fixture
def data() -> Data:
    rows = torch.randint(6, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    return Data(rows[8:], rows[:4], rows[4:8], "", {})


def trained(settings: list[str], data: Data, out: Path, *changes: str) -> tuple[dict[str, Tensor], Any]:
    config = load_config("default", [*settings, "seed=1", *changes])
    torch.manual_seed(1)
    model = lolcats.convert(tiny_model(), config)
    result = transfer(model, data, config, out)
    return {name: tensor.clone() for name, tensor in feature_map_state(model).items()}, (result, model)


def test_training_uses_it_and_validation_does_not(settings: list[str], data: Data, tmp_path: Path) -> None:
    plain, _ = trained(settings, data, tmp_path / "plain")
    hidden, (result, model) = trained(settings, data, tmp_path / "hidden", "transfer.window_dropout=1")
    assert all(not torch.equal(plain[name], hidden[name]) for name in plain)
    gates = [tensor for name, tensor in hidden.items() if name.endswith("gate")]
    assert all((gate == gate[0]).all() for gate in gates)  # not trained, because every row is hidden
    loss = layer_losses(model, data.validation, TransferConfig()).mean()
    assert result.best_loss == pytest.approx(loss.item(), rel=1e-4)


def test_the_linear_term_learns_what_the_window_hides(settings: list[str], data: Data, tmp_path: Path) -> None:
    """With window dropout, the linear term is closer to softmax over the same keys."""
    errors = {}
    more = ["transfer.max_steps=30", "transfer.eval_steps=30", "transfer.save_steps=30", "attention.window_size=4"]
    for p in (0, 0.5):
        _, (_, model) = trained(settings, data, tmp_path / str(p), *more, f"transfer.window_dropout={p}")
        found: list[Tensor] = []
        with (
            torch.no_grad(),
            lolcats.override(
                model, mode="transfer", observer=lambda layer, call, found=found: found.append(older_error(layer, call))
            ),
        ):
            model(data.test, use_cache=False)
        errors[p] = torch.stack(found)
    assert (errors[0.5] < errors[0]).all()


@pytest.mark.parametrize("step", [1, 3])
def test_continues_bit_for_bit(
    step: int, settings: list[str], data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = trained(settings, data, tmp_path / "a", "transfer.window_dropout=0.5")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(Interrupted):
            trained(settings, data, tmp_path / "b", "transfer.window_dropout=0.5")
    torch.manual_seed(step)  # no draw comes from the global generator
    resumed, _ = trained(settings, data, tmp_path / "b", "transfer.window_dropout=0.5")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
