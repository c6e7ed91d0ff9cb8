"""What a call of the kernels asks for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lolcats.attention.chunked import Context
from lolcats.attention.feature_maps import FeatureMap
from lolcats.attention.kernels.layout import Phi, Rows, Tiling
from lolcats.attention.mixer import KeyMap
from lolcats.attention.spec import AttentionSpec
from lolcats.attention.turning import Turning


@dataclass(frozen=True)
class Call:
    """Everything about a call except the tensors to differentiate. train: gradients may be wanted; learned: also those
    of the maps' weights; turning: how maps get q and k before RoPE, if the kernels turn them back."""

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
    turning: Turning | None = None

    @property
    def rotation(self) -> tuple[Tensor | None, int | None]:
        """The table that turns q and k back and its stride from row to row, for kernels; Nones if there is none."""
        if self.turning is None:
            return None, None
        table = self.turning.table
        return table, 0 if table.shape[0] == 1 else table.stride(0)


def hedgehog_weights(*maps: KeyMap) -> list[Tensor] | None:
    """Weights of the feature maps if all of them are Hedgehog, else None."""
    found = [phi.weight for phi in maps if isinstance(phi, FeatureMap) and phi.name == "hedgehog"]
    return [w for w in found if w is not None] if len(found) == len(maps) else None
