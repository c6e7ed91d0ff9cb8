"""What turns q, k and v into the outputs of one layer, apart from these tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lolcats.attention.spec import AttentionSpec

KeyMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Mixer:
    """One layer's attention as a value: its feature maps, the window's weight, the variant and the logits' scale.

    Every path takes it together with q (B, H, T, D) and k, v (B, G, T, D).

    phi_q, phi_k: feature maps of (B, H, T, D) and (B, G, T, D), with H and with H or G heads.
    gamma: (H,) fp32, the window's weight γ.
    scale: factor of the logits, usually D^(−1/2).
    softcap: bound to which logits are squashed before masking, as in Gemma 2; None if they are not.
    norm: (B, H, T, D) -> the same, applied to the outputs of a spec that does not divide them (see :mod:`.supra`).
    """

    phi_q: KeyMap
    phi_k: KeyMap
    gamma: Tensor
    spec: AttentionSpec
    scale: float
    softcap: float | None = None
    norm: Callable[[Tensor], Tensor] | None = None
