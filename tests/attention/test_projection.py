"""x·W for the kernels, and its gradients: on a GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from support.interpreted import add_bf16_products

from lolcats.attention import AttentionSpec, FeatureMap, Mixer, parallel_attention
from lolcats.attention.kernels import triton_attention
from lolcats.attention.kernels.function import TENSORS
from lolcats.attention.kernels.launcher import find_launcher
from lolcats.attention.kernels.projection import project, project_back

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYBRID = AttentionSpec("hybrid", "terraced", 16, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maps", [2, 6])
@pytest.mark.parametrize(("dim", "width"), [(16, 8), (80, 24), (128, 64)])
def test_products_keep_sixteen_bits(
    dtype: torch.dtype, maps: int, dim: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bits as two bf16 numbers hold."""
    if DEVICE == "cpu":
        add_bf16_products(monkeypatch)
    torch.manual_seed(0)
    tolerance = 2**-16
    x = torch.randn(2, 70, 2, 2 * dim, device=DEVICE, dtype=dtype)[..., dim:].transpose(1, 2)  # as a model lays it out
    weight = torch.randn(maps, dim, width, device=DEVICE)
    dy = torch.randn(2, maps, 70, width, device=DEVICE, dtype=dtype)
    tensors = dict.fromkeys(TENSORS) | {"q": x, "k": x, "v": x, "x_q": x, "wq": weight, "wk": weight}
    launcher = find_launcher(HYBRID, "projected", False, None, False, tensors)
    heads = x.double().repeat_interleave(maps // 2, 1)
    expected = torch.einsum("bmtd,mdf->bmtf", heads, weight.double())
    y = project(launcher, "x_q", x, weight)
    assert y.dtype == torch.float32
    assert (y - expected).abs().max() < tolerance * expected.abs().max()
    expected = torch.einsum("bmtf,mdf->bmtd", dy.double(), weight.double()).unflatten(1, (2, -1)).sum(2)
    dx = project_back(launcher, "x_q", dy, weight, x)
    assert dx.dtype == dtype
    rounding = 0 if dtype == torch.float32 else 2**-7 if DEVICE == "cpu" else 2**-8  # the interpreter cuts bits off
    assert (dx - expected).abs().max() < (tolerance + rounding) * expected.abs().max()


@pytest.mark.parametrize("maps", [4, 2])
@pytest.mark.parametrize("learned", [False, True])
def test_gradients_of_other_queries_and_keys(maps: int, learned: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, heads, 52, 16) for heads in (4, 2, 2, 4, 2))
    leaves = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    q, k, v, x_q, x_k = leaves
    phi_q, phi_k = (FeatureMap("hedgehog", count, 16, 8).to(DEVICE).requires_grad_(learned) for count in (4, maps))
    gamma = torch.full((4,), 0.2, device=DEVICE)
    expected = parallel_attention(q, k, v, phi_q(x_q), phi_k(x_k), gamma, HYBRID, 0.4)
    y, _, _ = triton_attention(q, k, v, Mixer(phi_q, phi_k, gamma, HYBRID, 0.4), seen=(x_q, x_k))
    direction = torch.randn_like(y)
    leaves += [*phi_q.parameters(), *phi_k.parameters()] if learned else []
    wanted, found = (torch.autograd.grad(out, leaves, direction) for out in (expected, y))
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


def test_gradients_of_maps_alone() -> None:
    """As in stage 1."""
    torch.manual_seed(0)
    q, k, v, x = (torch.randn(1, 2, 40, 16, device=DEVICE) for _ in range(4))
    phi, gamma = FeatureMap("hedgehog", 2, 16, 8).to(DEVICE), torch.full((2,), 0.2, device=DEVICE)
    expected = parallel_attention(q, k, v, phi(x), phi(x), gamma, HYBRID, 0.4)
    y, _, _ = triton_attention(q, k, v, Mixer(phi, phi, gamma, HYBRID, 0.4), seen=(x, x))
    (a,), (b,) = (torch.autograd.grad(out.square().sum(), phi.parameters()) for out in (y, expected))
    assert (a - b).norm() < 1e-4 * b.norm()
