"""Memory of one sequence during generation: the teacher's growing cache, the student's fixed-size state."""

from __future__ import annotations

import math
from typing import Any

import torch

from lolcats.modeling.layer import linearized_layers


def cache_bytes(model: Any, tokens: int) -> tuple[int, int]:
    """(teacher, student) bytes for one sequence of ``tokens`` tokens, in the model's dtype (S and z are fp32).

    Layers and heads that stay softmax count with a full cache for both, even if they slide a window.
    """
    record, width = model.config.lolcats, model.dtype.itemsize
    layers = {layer.geometry.layer: layer for layer in linearized_layers(model)}
    teacher = student = 0
    for entry in record["layers"]:
        kv = tokens * entry["kv_heads"] * (entry["head_dim"] + entry["value_dim"]) * width
        teacher += kv
        if entry["kind"] == "softmax":
            student += kv
            continue
        layer, kept = layers[entry["layer"]], len(entry.get("softmax_heads", ()))
        student += kv * kept // entry["kv_heads"]
        channels = layer.spec.channels(entry["head_dim"])
        k = torch.empty(1, entry["kv_heads"] - kept, 0, channels, dtype=model.dtype, device="meta")
        student += layer.empty_state(k, k[..., : entry["value_dim"]]).nbytes
    return teacher, student


def readable(count: float) -> str:
    """Format a number of bytes in binary units."""
    power = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
