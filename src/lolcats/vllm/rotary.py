"""Queries and keys before RoPE, for feature maps that do not depend on positions.

vLLM's decoders rotate before they call attention. Our layer undoes it at the positions of the step's tokens, with the
rotary module that the attention module has. :mod:`lolcats.modeling.rotary` is the same for transformers' models.

Shapes: N tokens, H query heads, G key/value heads, D head dim, R channels that RoPE turns, in pairs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase
from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

from lolcats.errors import LolcatsError
from lolcats.modeling.rotary import SAME, SHIFT, append_by_family

ROTARY = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding)
TOKENS = 4  # of the check


class Rotation:
    """The RoPE of one of vLLM's attention modules, or of several of one class that share a rotary module.

    Args:
        owner: the attention module.
        rotary: its rotary module.
        channels: of the hidden states that it gets.
        dtype: of those.
    """

    def __init__(self, owner: nn.Module, rotary: Any, channels: int, dtype: torch.dtype) -> None:
        self.owner, self.channels, self.dtype = owner, channels, dtype
        self.head_dim, self.turned = rotary.head_size, rotary.rotary_dim
        self.halves = getattr(rotary, "is_neox_style", True)  # channel i turns with i + R / 2, else with its neighbour
        # not CustomOp's forward: it may work in place, or compile itself when it is called
        self.rotate: Callable[..., tuple[Tensor, Tensor]] = getattr(rotary, "forward_native", rotary.forward)
        self.checked = False
        self.observed: list[Tensor] | None = None
        """While the check runs: q (N, H, D) and k (N, G, D) that the layer gets. It computes nothing then."""

    def cos_sin(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """fp32 cosines and sines (N, R / 2), with the values that they have in ``dtype``: what (1, 0) is turned to."""
        units = torch.zeros(len(positions), self.head_dim, dtype=dtype, device=positions.device)
        self._pairs(units)[0].fill_(1)
        cos, sin = self._pairs(self.rotate(positions, units, units.clone())[0].float())
        return cos, sin

    def beside(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q (N, H, D) and k (N, G, D) -> (..., 2D), with their values before RoPE appended."""

        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k = (ApplyRotaryEmb.forward_static(x, cos, sin, self.halves) for x in (q, k))
            return q, k

        return append_by_family(q, k, cos, sin, rotate, self.turned)

    @torch.inference_mode()
    def check(self, device: torch.device) -> None:
        """Once, when weights are there: q and k without RoPE must be the same wherever a sequence begins, whatever the
        module does between RoPE and attention.

        Raises:
            LolcatsError: they are not.
        """
        if self.checked:
            return
        self.checked = True
        hidden = torch.randn(TOKENS, self.channels, generator=torch.Generator().manual_seed(0)).to(device, self.dtype)
        first, second = (self._before_rope(hidden, start) for start in (0, SHIFT))
        if not (first - second).norm() <= SAME * first.norm():
            raise cannot_undo(self.owner)

    def _before_rope(self, hidden: Tensor, start: int) -> Tensor:
        """q and k before RoPE, fp32, of tokens with these hidden states from position ``start`` on."""
        positions = torch.arange(start, start + TOKENS, device=hidden.device)
        self.observed = []
        try:
            self.owner(positions=positions, hidden_states=hidden)
            q, k = self.observed
        finally:
            self.observed = None
        q, k = self.beside(q, k, *self.cos_sin(positions, q.dtype))
        return torch.cat([q, k], 1)[..., self.head_dim :].float()

    def _pairs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The first channels of all pairs and the second ones, (N, R / 2) views of x (N, D)."""
        x = x[..., : self.turned]
        return x.chunk(2, -1) if self.halves else (x[..., ::2], x[..., 1::2])


def find_rotations(owners: Mapping[str, nn.Module], head_dim: int, vllm_config: Any) -> dict[str, Rotation]:
    """The RoPE of each of vLLM's attention modules.

    Raises:
        LolcatsError: a module does not have just one rotary module, for its heads, or is not called with positions and
            hidden states.
    """
    config, made, result = vllm_config.model_config, dict[Any, Rotation](), dict[str, Rotation]()
    for name, owner in owners.items():
        rotaries = [module for module in owner.modules() if isinstance(module, ROTARY)]
        takes = inspect.signature(owner.forward).parameters
        if [x.head_size for x in rotaries] != [head_dim] or not {"positions", "hidden_states"} <= set(takes):
            raise cannot_undo(owner)
        alike = type(owner), rotaries[0]
        if alike not in made:
            made[alike] = Rotation(owner, rotaries[0], config.get_hidden_size(), config.dtype)
        result[name] = made[alike]
    return result


def cannot_undo(owner: nn.Module) -> LolcatsError:
    return LolcatsError(
        "Feature maps of this model see queries and keys before RoPE (attention.feature_inputs=unrotated), and lolcats "
        f"cannot undo RoPE in vLLM's {type(owner).__name__}: use lolcats serve."
    )
