"""Which parameters a stage trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from lolcats.modeling.layer import linearized_layers


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of everything that requires a gradient."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> None:
    """Freeze everything but the parameters whose name ``wanted`` accepts, and of these the ones that the kind of their
    layer does not use."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    for layer in linearized_layers(model):
        layer.freeze_unused()
