"""Which keys a query sees through softmax and which through the linear term.

Every path (reference, chunked, prefill, decode) derives its masks only from :class:`AttentionSpec`. For the query at
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
    """The attention variant of one layer. Variants are data, not copies of code.

    kind:
        ``hybrid``  softmax over sinks and window plus the linear term, under one denominator (the paper's Eq. 7);
        ``linear``  the linear term over all keys;
        ``window``  only sinks and window: the control without a linear term;
        ``remote``  only the linear term of a hybrid, over the keys older than its window (a branch ablation; zero if
        there are none).
    decay, normalizer:
        only for kind ``linear``, as in SUPRA (Mercat et al. 2024, arXiv 2405.06640); other kinds ignore both.
        ``decay="retnet"`` weights a key that is m tokens old by γ^m, see :meth:`log_decay`. With
        ``normalizer="group_norm"`` outputs are not divided by the sum of weights, since a group norm over each head's
        channels follows.
    unrotated:
        feature maps see q and k before RoPE. Every path then takes both versions side by side, (…, 2D), see
        :meth:`rotated`; softmax uses only the first half.
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

    @property
    def is_supra(self) -> bool:
        """Whether decay or the group norm make this the attention of :mod:`.supra`."""
        return self.decays or not self.divides

    def log_decay(self, maps: int, device: torch.device) -> Tensor:
        """(maps,) fp32 log γ_h, fixed, one per state: γ_h = 1 − 2^(−5−h) (RetNet, Sun et al. 2023, arXiv 2307.08621).

        0 without decay.
        """
        if not self.decays:
            return torch.zeros(maps, device=device)
        return torch.log1p(-torch.exp2(-5.0 - torch.arange(maps, device=device)))

    def channels(self, head_dim: int) -> int:
        """Channels of q and k as every path takes them, for heads with D = ``head_dim``."""
        return 2 * head_dim if self.unrotated else head_dim

    def rotated(self, x: Tensor) -> Tensor:
        """The part (..., D) of queries or keys that softmax sees."""
        return x[..., : x.shape[-1] // 2] if self.unrotated else x

    @property
    def has_softmax(self) -> bool:
        return self.kind in ("hybrid", "window")

    @property
    def has_linear(self) -> bool:
        return self.kind != "window"

    @property
    def softmax_sinks(self) -> int:
        """Number of tokens excluded from the linear term; 0 for kind ``linear``, which has no softmax part."""
        return 0 if self.kind == "linear" else self.sinks

    @property
    def chunk(self) -> int:
        """Block length of the chunked form: two blocks hold every key of a window."""
        return 64 if self.kind == "linear" else self.window_size

    @property
    def span(self) -> int:
        """Length of the ring buffer: maximum number of keys and values kept for later queries."""
        if self.kind == "linear":
            return 0
        return 2 * self.window_size if self.window == "terraced" else self.window_size

    @property
    def stride(self) -> int:
        """How many keys leave the window when it moves."""
        return self.window_size if self.window == "terraced" else 1

    @property
    def linear_from(self) -> int:
        """The first position whose query has keys for the linear term; before it, sinks and window cover all keys."""
        if self.kind == "linear":
            return 0
        if self.window == "terraced":
            return (self.sinks // self.window_size + 2) * self.window_size
        return self.window_size + self.sinks

    def window_start(self, n: Position) -> Position:
        """First position inside the window of the query at ``n`` (may be negative; ``n + 1`` without a window)."""
        if self.kind == "linear":
            return n + 1
        if self.window == "terraced":
            return (n // self.window_size - 1) * self.window_size
        return n - self.window_size + 1
