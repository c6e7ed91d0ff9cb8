"""The kernel that appends q and k before RoPE, in Triton's interpreter or on a GPU, against families' own functions."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("triton", reason="triton is not installed")

from conftest import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode

import lolcats
from lolcats.attention import use_backend
from lolcats.attention.kernels import unrotate
from lolcats.attention.kernels.unrotate import RotaryForm, append_unrotated
from lolcats.attention.path import choose_rotary_path
from lolcats.config import AttentionConfig
from lolcats.modeling import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {  # interleaved, first half: families whose RoPE has them
    (False, False): ["llama", "qwen2", "gemma3", "phi"],
    (True, False): ["cohere", "cohere2"],
    (True, True): ["glm4", "helium"],
}


def family_function(family: str) -> Any:
    found = rotary._rotate(importlib.import_module(f"transformers.models.{family}.modeling_{family}"))
    assert found is not None
    return found


def tensors(channels: int, form: RotaryForm, batches: int = 2, scale: float = 1.0) -> list[Tensor]:
    """q, k, cos and sin of angles that differ from channel to channel wherever the form allows it."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 12, device=DEVICE).transpose(1, 2) for heads in (3, 1))
    angles = 3 * torch.randn(batches, 5, channels, device=DEVICE)
    if form.first_half:  # the family's function reads only this
        angles[..., channels // 2 :] = torch.nan
    return [q, k, scale * angles.cos(), scale * angles.sin()]


def with_gradients(function: Any, q: Tensor, k: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outputs = function(*leaves)
    directions = [torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape).sin() for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, directions)]


@pytest.mark.parametrize(("form", "family"), [(form, names[0]) for form, names in FORMS.items()])
@pytest.mark.parametrize(("channels", "batches", "scale"), [(12, 2, 1.0), (8, 1, 1.3), (4, 2, 0.7)])
def test_is_what_the_family_gives(form: Any, family: str, channels: int, batches: int, scale: float) -> None:
    """Outputs and gradients: of whole and of partial RoPE, of scaled cos and sin, and of one rotation for all rows."""
    q, k, cos, sin = tensors(channels, RotaryForm(*form), batches, scale)
    expected = with_gradients(lambda q, k: rotary.append_by_family(q, k, cos, sin, family_function(family)), q, k)
    actual = with_gradients(lambda q, k: append_unrotated(q, k, cos, sin, RotaryForm(*form)), q, k)
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_undoes_rope() -> None:
    q, k, cos, sin = tensors(12, RotaryForm(False, False))
    cos, sin = (torch.cat([x[..., :6]] * 2, -1) for x in (cos, sin))
    turned = family_function("llama")(q, k, cos, sin)
    for wide, before, after in zip(
        append_unrotated(*turned, cos, sin, RotaryForm(False, False)), (q, k), turned, strict=True
    ):
        assert_close(wide, torch.cat([after, before], -1), atol=1e-5, rtol=1e-5)


def test_strides() -> None:
    """Tensors may lie in memory in any way; results lie token by token, as projections leave theirs."""
    form = RotaryForm(False, False)
    q, k, cos, sin = tensors(8, form)
    apart = torch.empty(12, 2, 3, 5, device=DEVICE).permute(1, 2, 3, 0).copy_(q)
    expected, actual = append_unrotated(q, k, cos, sin, form), append_unrotated(apart, k.contiguous(), cos, sin, form)
    assert_close(actual, expected, atol=0, rtol=0)
    assert all(x.transpose(1, 2).is_contiguous() for x in (*expected, *actual))


@pytest.mark.parametrize(("form", "families"), FORMS.items())
def test_the_form_of_a_family_is_found_by_trying(form: Any, families: list[str]) -> None:
    assert [rotary._form(family_function(name)) for name in families] == [form] * len(families)


def test_functions_of_another_form_take_the_usual_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE the other way round (nanochat), tables of another width (gpt_oss), and whatever raises an error."""
    assert [rotary._form(family_function(name)) for name in ("nanochat", "gpt_oss")] == [None, None]
    monkeypatch.setattr(unrotate, "append_unrotated", None)
    q, k, cos, sin = tensors(12, RotaryForm(False, False))
    module, family = SimpleNamespace(lolcats=SimpleNamespace()), family_function("nanochat")
    monkeypatch.setattr(rotary, "attached", lambda _: SimpleNamespace(spec=SimpleNamespace(unrotated=True)))
    monkeypatch.setattr(rotary, "_rotate", lambda _: family)
    wide = rotary.as_attended(module, q, k, (cos, sin), "triton")
    assert_close(wide, rotary.append_by_family(q, k, cos, sin, family), atol=0, rtol=0)


def test_which_tensors_it_takes() -> None:
    q, k, cos, sin = tensors(12, RotaryForm(False, False))
    assert rotary._fits(q, k, cos, sin)
    wrong = [
        (q, k.half(), cos, sin), (q, k, cos[None], sin[None]), (q, k, cos[:, :1], sin[:, :1]),
        (q, k, cos[..., :3], sin[..., :3]), (q[..., :8], k[..., :8], cos, sin), (q, k, cos.requires_grad_(), sin),
        (q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0]),
    ]  # fmt: skip
    assert not any(rotary._fits(*case) for case in wrong)


def test_where_it_is_used() -> None:
    """For 16-bit tensors on a GPU; where the kernels are asked for, also for fp32, which a CPU interprets."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    with FakeTensorMode():
        on_gpu = [torch.empty(1, device="cuda", dtype=x) for x in dtypes]
        assert [choose_rotary_path(x) for x in on_gpu] == ["kernels", "kernels", "chunked", "chunked"]
        assert [choose_rotary_path(x, "triton") for x in on_gpu] == ["kernels", "kernels", "kernels", "chunked"]
        assert {choose_rotary_path(x, "chunked") for x in on_gpu} == {"chunked"}
    with use_backend("triton"):
        assert choose_rotary_path(torch.empty(1, device=DEVICE)) == "kernels"
    assert choose_rotary_path(torch.empty(1)) == choose_rotary_path(torch.empty(1).half(), "triton") == "chunked"


def test_compiled_calls_keep_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        assert choose_rotary_path(torch.empty(1, device="cuda").half()) == "chunked"


@pytest.mark.skipif(DEVICE == "cuda", reason="models of this test are on the CPU")
def test_models_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, prefill and decode, with the same results as by the family's function."""
    calls: list[tuple[int, int]] = []
    kernel = append_unrotated

    def counting(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append((q.shape[0], q.shape[2]))
        return kernel(q, *rest)

    monkeypatch.setattr(unrotate, "append_unrotated", counting)
    torch.manual_seed(1)
    config = AttentionConfig(window_size=4, sinks=1, feature_dim=8, feature_inputs="unrotated")
    model, ids = lolcats.convert(tiny_model(), config), torch.arange(6, 24).view(2, 9)
    layers = model.config.num_hidden_layers
    results = []
    for path in ("chunked", "kernels"):
        monkeypatch.setattr(rotary, "choose_rotary_path", lambda q, backend, path=path: path if backend else None)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        parameters = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            first = model(ids[:, :8], use_cache=True)
            last = model(ids[:, 8:], past_key_values=first.past_key_values)
        results.append([loss, *parameters, first.logits, last.logits])
        assert calls == ([] if path == "chunked" else [(2, 9)] * layers + [(2, 8)] * layers + [(2, 1)] * layers)
    assert_close(results[1], results[0], atol=1e-5, rtol=1e-4)
