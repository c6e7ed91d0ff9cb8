"""Attention of teacher and student on one row: errors and effective lengths of all heads, weights of some heads.

Shapes: H query heads, T tokens, D head dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.attention.reference import softmax_weights
from lolcats.files import write_tensors
from lolcats.modeling.install import decoder
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers, override

FILE = "attention.safetensors"
TOKENS = 512  # maximum length: weights grow with its square
RANKS = {"lowest": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "highest": 1.0}
"""Heads whose weights are saved, by the rank of their error among all heads of all layers."""


@torch.no_grad()
def measure_attention(model: PreTrainedModel, row: Tensor, path: Path, of: str) -> dict[str, Any]:
    """Compare softmax and linearized attention on the queries and keys of the model's softmax forward pass.

    Args:
        row: (T,) token ids; only the first TOKENS are used.
        path: file to write the weights of the chosen heads to, as ``teacher`` and ``student`` (heads, T, T).
        of: the model that the queries and keys come from, ``teacher`` or (with LoRA) ``student``; returned unchanged.

    Returns:
        ``layers``, the layer indices; ``errors`` (layers, H), the mean squared error of each head's output; ``lengths``
        (layers, H), the effective sequence lengths of the softmax attention; ``heads``, {rank, layer, head} in the
        order of the file; ``tokens``; ``of``.
    """
    ids = row[None, :TOKENS].to(model.device)
    errors: list[Tensor] = []
    lengths: list[Tensor] = []

    def all_heads(layer: LinearizedAttention, call: AttentionCall) -> None:
        y = layer(call.q, call.k, call.v, call.scale, call.softcap).float()
        errors.append((y - call.target.float().transpose(1, 2)).square().mean((0, 2, 3)).cpu())
        lengths.append(effective_length(_teacher_weights(layer, call)).mean(0).cpu())

    _observe(model, ids, all_heads)
    chosen = _chosen(errors)
    kept = {index: [head for at, head in chosen.values() if at == index] for index, _ in chosen.values()}
    maps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    numbers = {layer: number for number, layer in enumerate(linearized_layers(model))}

    def some_heads(layer: LinearizedAttention, call: AttentionCall) -> None:
        number = numbers[layer]
        if heads := kept.get(number):
            teacher = _teacher_weights(layer, call)[0]
            student = layer.weights(call.q, call.k, call.scale, call.softcap)[0]
            maps.update({(number, head): (teacher[head].half().cpu(), student[head].half().cpu()) for head in heads})

    _observe(model, ids, some_heads)
    pairs = [maps[place] for place in chosen.values()]
    write_tensors({"teacher": torch.stack([t for t, _ in pairs]), "student": torch.stack([s for _, s in pairs])}, path)
    layers = [layer.geometry.layer for layer in numbers]
    return {
        "tokens": ids.shape[1], "of": of, "layers": layers, "errors": [e.tolist() for e in errors],
        "lengths": [n.tolist() for n in lengths],
        "heads": [{"rank": rank, "layer": layers[at], "head": head} for rank, (at, head) in chosen.items()],
    }  # fmt: skip


def effective_length(weights: Tensor) -> Tensor:
    """Effective sequence length of causal weights (..., T, T) -> (...): how far back attention looks, in tokens.

    ESL = mean over queries n of Σ_{i ≤ n} a_ni · (n − i + 1): the attention-weighted distance from a query to its keys,
    where the query's own token counts as 1 (LoLCATs, Eq. 9). Uniform attention over T tokens gives about T / 4.
    """
    length = weights.shape[-1]
    positions = torch.arange(length, device=weights.device)
    distance = (positions[:, None] - positions[None, :] + 1).clamp_min(0)
    return (weights * distance).sum(-1).mean(-1)


def _teacher_weights(layer: LinearizedAttention, call: AttentionCall) -> Tensor:
    return softmax_weights(layer.spec.rotated(call.q), layer.spec.rotated(call.k), call.scale, call.softcap)


def _observe(model: PreTrainedModel, ids: Tensor, observer: Any) -> None:
    model.eval()
    with override(model, mode="transfer", observer=observer):
        decoder(model)(input_ids=ids, use_cache=False)


def _chosen(errors: list[Tensor]) -> dict[str, tuple[int, int]]:
    """(position of the layer, head) for each rank."""
    places = [(at, head) for at, layer in enumerate(errors) for head in range(len(layer))]
    ranked = sorted(places, key=lambda place: errors[place[0]][place[1]].item())
    return {rank: ranked[round(share * (len(ranked) - 1))] for rank, share in RANKS.items()}
