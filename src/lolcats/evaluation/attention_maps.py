"""Attention of teacher and student on one row: errors and effective lengths of all heads, weights of some heads.

Shapes: H query heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.attention.reference import softmax_weights
from lolcats.evaluation.effective_length import QUANTILES, lengths_of_call
from lolcats.evaluation.layers import head_errors
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, linearized_layers
from lolcats.modeling.observe import watch_layers
from lolcats.tensors import write_tensors

FILE = "attention.safetensors"
TOKENS = 512  # maximum length: weights grow with its square


def measure_attention(model: PreTrainedModel, row: Tensor, path: Path, of: str) -> dict[str, Any]:
    """Compare softmax and linearized attention on the queries and keys of the model's softmax forward pass.

    Args:
        row: (T,) token ids; only the first TOKENS are used.
        path: file to write the weights of the chosen heads to, as ``teacher`` and ``student`` (heads, T, T).
        of: the model that the queries and keys come from, ``teacher`` or (with LoRA) ``student``; returned unchanged.

    Returns:
        ``layers``, the layer indices; ``errors`` (layers, H), the mean squared error of each head's output; ``lengths``
        (layers, H), the effective sequence lengths of the softmax attention, both None for heads that stay softmax;
        ``heads``, {rank, layer, head} in the order of the file; ``tokens``; ``of``.
    """
    ids, layers = row[None, :TOKENS], linearized_layers(model)

    def all_heads(layer: LinearizedAttention, call: AttentionCall) -> tuple[list[Any], list[Any]]:
        measured = head_errors(layer, call)[0], lengths_of_call(layer, call)[0]
        return layer.over_heads(measured[0].tolist()), layer.over_heads(measured[1].tolist())

    errors, lengths = zip(*watch_layers(model, ids, all_heads), strict=True)
    chosen = _chosen(errors)

    def some_heads(layer: LinearizedAttention, call: AttentionCall) -> dict[int, list[Tensor]]:
        heads = [head for at, head in chosen.values() if layers[at] is layer]
        if not heads:
            return {}
        q, k = call.queries_and_keys()
        teacher = softmax_weights(layer.spec.rotated(q), layer.spec.rotated(k), call.scale, call.softcap)
        student = layer.weights(q, k, call.scale, call.softcap)
        own = layer.over_heads(range(q.shape[1]))
        return {head: [weights[0, own[head]].half().cpu() for weights in (teacher, student)] for head in heads}

    maps = watch_layers(model, ids, some_heads)
    teacher, student = zip(*(maps[at][head] for at, head in chosen.values()), strict=True)
    write_tensors({"teacher": torch.stack(teacher), "student": torch.stack(student)}, path)
    indices = [layer.geometry.layer for layer in layers]
    return {
        "tokens": ids.shape[1], "of": of, "layers": indices, "errors": list(errors), "lengths": list(lengths),
        "heads": [{"rank": rank, "layer": indices[at], "head": head} for rank, (at, head) in chosen.items()],
    }  # fmt: skip


def _chosen(errors: Sequence[list[Any]]) -> dict[str, tuple[int, int]]:
    """(position of the layer, head) of each head whose weights are saved, by the rank of its error."""
    places = [(at, head) for at, layer in enumerate(errors) for head, error in enumerate(layer) if error is not None]
    ranked = sorted(places, key=lambda place: errors[place[0]][place[1]])
    return {rank: ranked[round(share * (len(ranked) - 1))] for rank, share in QUANTILES.items()}
