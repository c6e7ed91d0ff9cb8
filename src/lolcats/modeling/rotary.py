"""Queries and keys as they were before rotary embedding, for feature maps that know no positions.

Families rotate before the attention interface is called. What they rotated by reaches their attention modules as
``position_embeddings``; rotating by the negative angle, with their own function, takes it out again.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lolcats.errors import LolcatsError
from lolcats.modeling.layer import LinearizedAttention, linearized_layers, override

SHIFT = 7  # positions by which the check moves its tokens


def keep_rotation(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: what this call is rotated by."""
    module.lolcats.rotation = kwargs.get("position_embeddings")


def as_attended(module: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, D) and k (B, G, T, D) as the layer of ``module`` takes them: as they are, or (..., 2D) with what they
    were in front of RoPE behind them.

    Raises:
        LolcatsError: the family does not rotate, or not by cosines and sines that its attention modules are given.
    """
    layer = module.lolcats
    if not layer.spec.unrotated:
        return q, k
    rotation, layer.rotation = layer.rotation, None
    rotate = _rotate(sys.modules[type(module).__module__])
    if rotate is None or not isinstance(rotation, tuple) or len(rotation) != 2:
        raise LolcatsError(
            f"{type(module).__name__} shows no rotary embedding that could be taken out: it cannot have "
            "attention.feature_inputs=unrotated."
        )
    cos, sin = (x.to(q.device).float() for x in rotation)
    size = cos.square() + sin.square()  # of a rotation that also scales, as YaRN's does, the square of its factor
    turned = cos.shape[-1]
    back = rotate(q[..., :turned].float(), k[..., :turned].float(), cos / size, -sin / size)
    parts = (torch.cat([x, part.to(x.dtype), x[..., turned:]], -1) for part, x in zip(back, (q, k), strict=True))
    return next(parts), next(parts)


def _rotate(family: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """A family's own function, of q and k (B, heads, T, D), cosines and sines (B, T, D)."""
    rotate: Any = getattr(family, "apply_rotary_pos_emb", None)
    if rotate is None or list(inspect.signature(rotate).parameters)[:2] == ["q", "k"]:
        return rotate  # type: ignore[no-any-return]
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


@torch.no_grad()
def check_rotation(model: Any) -> None:
    """LolcatsError unless every linearized layer's queries and keys come out the same wherever a text stands.

    Attention gives 0 meanwhile, so that what goes into a layer does not depend on positions either.
    """
    found: list[dict[int, tuple[Tensor, ...]]] = []
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config(decoder=True).vocab_size
    for shift in (0, SHIFT):
        seen: dict[int, tuple[Tensor, ...]] = {}

        def observe(layer: LinearizedAttention, call: Any, seen: dict[int, tuple[Tensor, ...]] = seen) -> None:
            (turned, q), (_, k) = call.q.float().chunk(2, -1), call.k.float().chunk(2, -1)
            seen[layer.geometry.layer] = q, k, turned
            call.target.zero_()

        with override(model, mode="transfer", observer=observe):
            positions = torch.arange(4, device=model.device)[None] + shift
            model(input_ids=ids, position_ids=positions, use_cache=False)
        found.append(seen)
    for layer in linearized_layers(model):
        (q, k, turned), (q_moved, k_moved, turned_moved) = (seen[layer.geometry.layer] for seen in found)
        if _far(q, q_moved) or _far(k, k_moved) or not _far(turned, turned_moved):
            raise LolcatsError(
                f"The rotary embedding of layer {layer.geometry.layer} cannot be taken out (there is none, or it is "
                "applied in another way): attention.feature_inputs=unrotated is not for this model."
            )


def _far(x: Tensor, y: Tensor) -> bool:
    """Whether they differ by more than rounding to bf16 does."""
    return float((x - y).norm()) > 0.02 * float(x.norm()) + 1e-9
