"""Training with maps before RoPE by kernels that turn q and k back themselves: the same as by the chunked path."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton", reason="triton is not installed")

from conftest import tiny_model

import lolcats
from lolcats.attention import dispatch, use_backend
from lolcats.attention import kernels as kernel_functions
from lolcats.attention.kernels import triton_attention, unrotate
from lolcats.attention.turning import Turning
from lolcats.config import AttentionConfig, TransferConfig
from lolcats.evaluation.effective_length import lengths_of_call
from lolcats.modeling import rotary
from lolcats.modeling.call import KINDS, Call
from lolcats.modeling.layer import AttentionCall, linearized_layers
from lolcats.modeling.observe import watch_layers
from lolcats.stages.transfer.stage import layer_losses

IDS = torch.randint(6, 300, (2, 13), generator=torch.Generator().manual_seed(0))
PADDING = torch.ones(2, 13, dtype=torch.long)
PADDING[0, :4] = PADDING[1, 10:] = 0
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ((3, 10), (6, 7))])

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="models of these tests are on the CPU")


class Seen:
    """Calls of the kernels while a test runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kernels: list[tuple[int, Turning | None]] = []
        self.appended = 0
        append = unrotate.append_unrotated

        def attending(q: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.kernels.append((q.shape[3], kwargs.get("turning")))
            return triton_attention(q, *args, **kwargs)

        def appending(*args: Any) -> Any:
            self.appended += 1
            return append(*args)

        patch.setattr(kernel_functions, "triton_attention", attending)
        patch.setattr(unrotate, "append_unrotated", appending)

    def check(self, model: Any) -> None:
        """Every layer took narrow q and k, once, and nothing was turned back before."""
        channels = linearized_layers(model)[0].geometry.head_dim
        assert [width for width, _ in self.kernels] == [channels] * len(linearized_layers(model))
        assert all(turning is not None for _, turning in self.kernels)
        assert self.appended == 0


def converted(layers: int = 1, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = AttentionConfig(window_size=2, sinks=1, feature_dim=8, feature_inputs="unrotated", **changes)
    return lolcats.convert(tiny_model(num_hidden_layers=layers), config).train()


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm() + 1e-6


def loss_and_gradients(model: Any, **inputs: Any) -> list[Tensor]:
    model.zero_grad()
    labels = IDS if "attention_mask" not in inputs else IDS.where(PADDING == 1, -100)
    loss = model(IDS, labels=labels, use_cache=False, **inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("inputs", "changes"),
    [
        ({}, {}),
        ({"attention_mask": PADDING}, {"key_maps": "per_kv_head"}),
        ({"position_ids": POSITIONS}, {}),
        ({}, {"layers": 2, "softmax_heads": {"0": [1], "1": [0]}}),
    ],
    ids=["rows", "padding", "documents", "kept heads"],
)
def test_stage_2(inputs: Any, changes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(**changes)
    expected = loss_and_gradients(model, **inputs)
    seen = Seen(monkeypatch)
    with use_backend("triton"):
        actual = loss_and_gradients(model, **inputs)
    seen.check(model)
    close(actual, expected)


def test_recomputed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradient checkpointing, layers run again in backward, after the call has ended. One table serves all."""
    model = converted(layers=2)
    expected = loss_and_gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    seen = Seen(monkeypatch)
    with use_backend("triton"):
        actual = loss_and_gradients(model)
    assert len({id(turning) for _, turning in seen.kernels}) == 1
    assert len(seen.kernels) == 2 * len(linearized_layers(model))
    assert seen.appended == 0
    close(actual, expected)


@pytest.mark.parametrize("positions", [None, POSITIONS], ids=["rows", "documents"])
def test_stage_1(positions: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of maps and gates."""
    model, config = converted(), TransferConfig()

    def run() -> list[Tensor]:
        model.zero_grad()
        losses = layer_losses(model, IDS, config, backward_scale=1.0, positions=positions)
        return [losses, *(p.grad for layer in linearized_layers(model) for p in layer.parameters())]

    expected = run()
    seen = Seen(monkeypatch)
    with use_backend("triton"):
        actual = run()
    seen.check(model)
    close(actual, expected)


def observed(model: Any, function: Callable[[Any, AttentionCall], Any], backend: str) -> list[Any]:
    with use_backend(backend):
        return watch_layers(model, IDS, function)


def test_what_observers_get() -> None:
    """q and k with their values before RoPE, whatever the layer takes; outputs also with another backend."""
    model = converted()

    def look(layer: Any, call: AttentionCall) -> Any:
        with use_backend("chunked"):
            answer = layer.answer(call)
        return *call.queries_and_keys(), lengths_of_call(layer, call), answer

    expected, actual = (observed(model, look, backend) for backend in ("chunked", "triton"))
    assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert all(observed(model, lambda _, call: call.turning is not None, "triton"))
    assert not any(observed(model, lambda _, call: call.turning is not None, "chunked"))


def test_prefill_and_decode_take_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state holds keys before RoPE beside the rotated ones."""
    model = converted().eval()
    results = []
    for backend in ("chunked", "triton"):
        if backend == "triton":
            seen = Seen(monkeypatch)
        with use_backend(backend), torch.no_grad():
            first = model(IDS[:, :12], use_cache=True)
            results.append((first.logits, model(IDS[:, 12:], past_key_values=first.past_key_values).logits))
    assert_close(results[1], results[0], atol=1e-4, rtol=1e-3)
    assert all(turning is None for _, turning in seen.kernels)


def test_which_calls_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of distant channels, all of them turned, and maps that the kernels know."""
    q, k, cos = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.rand(1, 5, 8)
    with use_backend("triton"):
        call = Call()

    def turns(
        name: str = "hedgehog", linear: bool = True, form: Any = (False, False), channels: int = 8, own: Any = call
    ) -> bool:
        spec = SimpleNamespace(unrotated=True, has_linear=linear)
        monkeypatch.setattr(rotary, "attached", lambda _: SimpleNamespace(spec=spec, phi_q=SimpleNamespace(name=name)))
        monkeypatch.setattr(rotary, "_rotate", lambda _: object)
        monkeypatch.setattr(rotary, "_form", lambda _: form)
        rotation = cos[..., :channels], cos[..., :channels]
        return rotary.turning_of(torch.nn.Linear(1, 1), q, k, rotation, own) is not None

    assert turns()
    assert not any(
        [turns("exp"), turns(linear=False), turns(form=(True, False)), turns(form=None), turns(channels=4),
         turns(own=Call())]
    )  # fmt: skip


def test_a_table_per_call() -> None:
    """Made once for all layers that get the same cosines and sines."""
    cos, sin, call = torch.rand(1, 5, 8), torch.rand(1, 5, 8), Call()
    first, other = call.turning(cos, sin, cos), call.turning(cos, sin, cos.bfloat16())
    assert call.turning(cos, sin, sin) is first
    assert call.turning(cos.clone(), sin, cos) is not first
    assert (first.table.dtype, other.table.dtype) == (torch.float32, torch.float16)


def test_only_the_kernels_turn() -> None:
    layer = linearized_layers(converted())[0]
    q = torch.randn(1, layer.geometry.heads, 5, layer.geometry.head_dim)
    turning = Turning.of(torch.rand(1, 5, q.shape[3]), torch.rand(1, 5, q.shape[3]), q.dtype)
    with pytest.raises(AssertionError):
        dispatch.attention(q, q, q, layer.mixer(1.0), "chunked", turning=turning)


def test_a_call_keeps_few_tables() -> None:
    """Not one for each layer where each gets its own copy of the cosines; the last ones are still the same objects."""
    call, q = Call(), torch.zeros(1, 1, 3, 4)
    tables = [(torch.rand(1, 3, 4), torch.rand(1, 3, 4)) for _ in range(10)]
    made = [call.turning(cos, sin, q) for cos, sin in tables]
    assert len(call._turnings) <= KINDS
    assert call.turning(*tables[-1], q) is made[-1]
    assert torch.equal(call.turning(*tables[0], q).table, made[0].table)


def test_padding_in_a_table_stays_finite() -> None:
    cos, sin = torch.rand(2, 1, 3, 4) + 0.1
    cos[:, 2], sin[:, 2] = 0, 0
    turning, q = Turning.of(cos, sin, torch.float32), torch.ones(1, 1, 3, 4)
    assert turning.table[0, :2].abs().min() > 0
    assert all(x.isfinite().all() for x in (turning.table, *turning.beside(q, q)))
