"""Which keys a query sees through softmax and which through the linear term.

Every path (reference, chunked, prefill, decode) derives its masks from :class:`AttentionSpec` alone. For the query at
position n (counted from its own sequence's first token):

    sinks    i < sinks                    softmax, always
    recent   window_start(n) <= i <= n    softmax
    older    sinks <= i < window_start(n) linear
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

Position = TypeVar("Position", int, torch.Tensor)


@dataclass(frozen=True)
class AttentionSpec:
    """The variant of one layer's attention; a value, so that variants are data and not copies of code.

    kind:
        ``hybrid``  softmax over sinks and window plus the linear term, under one denominator (the paper's Eq. 7);
        ``linear``  the linear term over all keys;
        ``window``  sinks and window alone: the control without linear term;
        ``remote``  the linear term of a hybrid alone, over the keys older than its window (a branch ablation; zero
        where there are none).
    decay, normalizer:
        of kind ``linear`` alone, as SUPRA has them (Mercat et al. 2024, arXiv 2405.06640): ``decay="retnet"`` weighs
        what is m tokens old by γ^m, see :meth:`log_decay`; with ``normalizer="group_norm"`` nothing is divided by the
        sum of weights, for a group norm over each head's channels follows. Other kinds do without both.
    unrotated:
        feature maps see q and k as they are in front of RoPE: every path then takes both side by side, (…, 2D), see
        :meth:`rotated`, and softmax the first half alone.
    """

    kind: Literal["hybrid", "linear", "window", "remote"] = "hybrid"
    window: Literal["terraced", "sliding"] = "terraced"
    window_size: int = 64
    sinks: int = 0
    decay: Literal["none", "retnet"] = "none"
    normalizer: Literal["sum", "group_norm"] = "sum"
    unrotated: bool = False

    @property
    def decays(self) -> bool:
        return self.kind == "linear" and self.decay != "none"

    @property
    def divides(self) -> bool:
        """Whether outputs are divided by the sum of their weights."""
        return self.kind != "linear" or self.normalizer == "sum"

    def log_decay(self, maps: int, device: torch.device) -> Tensor:
        """(maps,) fp32 log γ_h, fixed, one a state: γ_h = 1 − 2^(−5−h) (RetNet, Sun et al. 2023, arXiv 2307.08621).

        0 where nothing decays.
        """
        if not self.decays:
            return torch.zeros(maps, device=device)
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(maps, device=device)))

    def channels(self, head_dim: int) -> int:
        """Of q and k of heads with D = ``head_dim``, as every path takes them."""
        return 2 * head_dim if self.unrotated else head_dim

    def rotated(self, x: Tensor) -> Tensor:
        """(..., D): of queries or keys as every path takes them, what softmax sees."""
        return x[..., : x.shape[-1] // 2] if self.unrotated else x

    @property
    def has_softmax(self) -> bool:
        return self.kind in ("hybrid", "window")

    @property
    def has_linear(self) -> bool:
        return self.kind != "window"

    @property
    def softmax_sinks(self) -> int:
        """Tokens excluded from the linear term; the linear kind has no softmax part to hold them."""
        return 0 if self.kind == "linear" else self.sinks

    @property
    def chunk(self) -> int:
        """Block length of the chunked form: two blocks hold every key that is not strictly older than the window."""
        return 64 if self.kind == "linear" else self.window_size

    @property
    def span(self) -> int:
        """Most keys ever kept as they are for a later query: the length of the ring buffer of keys and values."""
        if self.kind == "linear":
            return 0
        return 2 * self.window_size if self.window == "terraced" else self.window_size

    @property
    def stride(self) -> int:
        """How many keys leave the window when it moves."""
        return self.window_size if self.window == "terraced" else 1

    def window_start(self, n: Position) -> Position:
        """First position inside the window of the query at ``n`` (may be negative; ``n + 1``: no window at all)."""
        if self.kind == "linear":
            return n + 1
        if self.window == "terraced":
            return (n // self.window_size - 1) * self.window_size
        return n - self.window_size + 1
