"""What a call of the kernels asks for."""

from __future__ import annotations

from dataclasses import dataclass

from lolcats.attention.chunked import Context
from lolcats.attention.kernels.layout import Phi, Rows, Tiling
from lolcats.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Call:
    """Everything about a call except the tensors to differentiate. train: gradients may be wanted; learned: also those
    of the maps' weights."""

    spec: AttentionSpec
    scale: float
    softcap: float | None
    rows: Rows
    context: Context | None = None
    final: bool = False
    tiling: Tiling | None = None
    train: bool = True
    phi: Phi = "inside"
    learned: bool = False
