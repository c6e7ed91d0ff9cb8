"""What ``lolcats info`` reports about a model, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolcats.modeling.probe import probe
from lolcats.modeling.record import is_linearized
from lolcats.modeling.saved import describe_saved
from lolcats.weights.base import empty_model, find_base


def describe(model: str, trust: bool = False) -> dict[str, Any]:
    """Facts by name, from the config.json of a linearized model or from the configuration of a base model."""
    return describe_saved(Path(model)) if is_linearized(model) else _base(model, trust)


def _base(model: str, trust: bool) -> dict[str, Any]:
    base = find_base(model, trust)
    empty = empty_model(base, trust)
    layers = probe(empty)
    first = layers[0].geometry
    return {
        "form": f"base model ({base.form})",
        "family": empty.config.model_type,
        "fingerprint": base.fingerprint,
        "parameters": f"{sum(p.numel() for p in empty.parameters()):,}",
        "attention layers": len(layers),
        "sliding already": sum(layer.sliding_window is not None for layer in layers),
        "query heads, key/value heads, head dim": f"{first.heads}, {first.kv_heads}, {first.head_dim}",
        "obstacles": next((layer.obstacle for layer in layers if layer.obstacle), None) or "none: can be linearized",
    }
