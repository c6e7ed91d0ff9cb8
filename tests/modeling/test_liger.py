"""What liger-kernel's functions are given. Its kernels need a GPU, or Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lolcats.modeling.liger import one_token_rows

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": lambda x: x.clone(memory_format=torch.contiguous_format),
    "tokens first": lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2),
    "part of a wider product": lambda x: LAYOUTS["tokens first"](torch.cat([x, x], 1))[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 4, 1, 8), (1, 4, 1, 8), (3, 1, 1, 8)])
def test_rows_of_one_token_lie_a_token_apart(layout: str, shape: tuple[int, ...]) -> None:
    """Liger's RoPE finds row n at n times the stride of tokens, once these come before heads."""
    x = torch.randn(shape)
    given = LAYOUTS[layout](x)
    seen = one_token_rows(given)
    assert torch.equal(seen, x)
    assert seen.data_ptr() == given.data_ptr()
    physical = seen.transpose(1, 2).contiguous()
    assert physical.stride(1) == shape[1] * shape[3]
    assert torch.equal(physical.as_strided((shape[0], shape[1] * shape[3]), (physical.stride(1), 1)), x.flatten(1))


def test_what_has_several_tokens_or_is_no_tensor_stays() -> None:
    x = torch.randn(2, 4, 3, 8)
    assert one_token_rows(x) is x
    assert one_token_rows(cos := torch.randn(2, 1, 8)) is cos
    assert one_token_rows(None) is None
    assert one_token_rows(1) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_liger_turns_as_transformers_does(layout: str, tokens: int) -> None:
    rope = pytest.importorskip("liger_kernel.ops.rope")
    if not torch.cuda.is_available() and not rope.triton.knobs.runtime.interpret:
        pytest.skip("liger-kernel was imported without Triton's interpreter, and there is no GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k = (torch.randn(3, heads, tokens, 8, device=device) for heads in (4, 2))
    cos, sin = (torch.randn(3, tokens, 4, device=device).repeat(1, 1, 2) for _ in range(2))
    found = rope.rope_forward(*(one_token_rows(LAYOUTS[layout](x)) for x in (q, k)), cos, sin)[:2]
    for actual, expected in zip(found, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(actual, expected)
