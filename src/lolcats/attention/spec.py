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
    """

    kind: Literal["hybrid", "linear", "window", "remote"] = "hybrid"
    window: Literal["terraced", "sliding"] = "terraced"
    window_size: int = 64
    sinks: int = 0

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
