"""Memory of one sequence during generation: the teacher's growing cache, the student's fixed-size state."""

from __future__ import annotations

import math
from typing import Any

import torch

from lolcats.modeling.cache import sliding_windows
from lolcats.modeling.layer import linearized_layers


def cache_bytes(model: Any, tokens: int) -> tuple[int, int]:
    """(teacher, student) bytes for one sequence of ``tokens`` tokens, in the model's dtype (S and z are fp32).

    Layers that slide a window count with at most that window in the teacher, and in the student if they stay softmax.
    """
    record, width, windows = model.config.lolcats, model.dtype.itemsize, sliding_windows(model.config)
    layers = {layer.geometry.layer: layer for layer in linearized_layers(model)}
    teacher = student = 0
    for entry in record["layers"]:
        one = entry["kv_heads"] * (entry["head_dim"] + entry["value_dim"]) * width
        in_window = min(tokens, windows.get(entry["layer"], tokens)) * one
        teacher += in_window
        if entry["kind"] == "softmax":
            student += in_window
            continue
        layer, kept = layers[entry["layer"]], len(entry.get("softmax_heads", ()))
        student += tokens * one * kept // entry["kv_heads"]
        channels = layer.spec.channels(entry["head_dim"])
        k = torch.empty(1, entry["kv_heads"] - kept, 0, channels, dtype=model.dtype, device="meta")
        student += layer.empty_state(k, k[..., : entry["value_dim"]]).nbytes
    return teacher, student


def readable(count: float) -> str:
    """Format a number of bytes in binary units."""
    power = min(4, int(math.log(max(count, 1), 1024)))
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
