"""Queries and keys before RoPE, for feature maps that do not depend on positions.

Families rotate before they call the attention interface. Their attention modules receive the cosines and sines as
``position_embeddings``; rotating by the negative angle, with the family's own function, undoes RoPE.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache

from lolcats.attention.path import choose_rotary_path
from lolcats.attention.turning import Turning, inverse_rotation
from lolcats.errors import LolcatsError
from lolcats.modeling.call import Call
from lolcats.modeling.layer import AttentionCall, LinearizedAttention, attached, linearized_layers, override
from lolcats.modeling.masks import MaskRequest

Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
SHIFT = 7  # positions by which the check moves its tokens
SAME = 0.05  # relative difference of q and k without RoPE between positions that 16 bits may cause


def carry_rotation(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention module: let its mask carry the cosines and sines of this call."""
    rotation = kwargs.get("position_embeddings")

    def carrying(x: Any) -> Any:
        return x.with_rotation(rotation) if isinstance(x, MaskRequest) else x

    return tuple(map(carrying, args)), {name: carrying(x) for name, x in kwargs.items()}


def as_attended(
    module: Any, q: Tensor, k: Tensor, rotation: Any, backend: str | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, H, T, D) and k (B, G, T, D) as the layer of ``module`` takes them: unchanged, or (..., 2D) with their
    values before RoPE appended. Partial RoPE rotates the first channels.

    rotation: RoPE's cos and sin (B or 1, T, channels) of this call. backend: the attention backend of this call.

    Raises:
        LolcatsError: if the family does not rotate by cosines and sines that its attention modules receive.
    """
    layer: Any = attached(module)
    if not layer.spec.unrotated:
        return q, k
    rotate = _rotate(sys.modules[type(module).__module__])
    if rotate is None or not isinstance(rotation, tuple):
        raise no_rotation(module, layer.geometry.layer)
    cos, sin = (x.to(q.device) for x in rotation)
    if choose_rotary_path(q, backend) == "kernels" and (form := _form(rotate)) and _fits(q, k, cos, sin):
        from lolcats.attention.kernels.unrotate import RotaryForm, append_unrotated

        return append_unrotated(q, k, cos, sin, RotaryForm(*form))
    return append_by_family(q, k, cos, sin, rotate)


def turning_of(module: Any, q: Tensor, k: Tensor, rotation: Any, call: Call) -> Turning | None:
    """What the kernels need to turn q and k back for feature maps, so that whole rows stay (B, heads, T, D); None if
    the call, the maps or the family's RoPE do not allow it, and :func:`as_attended` has to prepare q and k.

    Arguments as for :func:`as_attended`.
    """
    layer: Any = attached(module)
    if not layer.spec.unrotated or not layer.spec.has_linear or layer.phi_q.name != "hedgehog":
        return None
    if choose_rotary_path(q, call.backend) != "kernels" or not isinstance(rotation, tuple):
        return None
    rotate, (cos, sin) = _rotate(sys.modules[type(module).__module__]), rotation
    if rotate is None or _form(rotate) != (False, False) or not _fits(q, k, cos, sin) or cos.shape[-1] < q.shape[-1]:
        return None
    return call.turning(cos, sin, q)


def append_by_family(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotate: Rotate, turned: int = 0
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``append_unrotated`` by the family's own function. turned: channels that RoPE turns, if not as many as ``cos``
    has."""
    cos, sin = inverse_rotation(cos.float(), sin.float())  # also of a scale of both (YaRN) and of what rounding lost
    turned = turned or cos.shape[-1]
    back = rotate(q[..., :turned].float(), k[..., :turned].float(), cos, -sin)
    beside = [torch.cat([x, y.to(x.dtype), x[..., turned:]], -1) for x, y in zip((q, k), back, strict=True)]
    return beside[0], beside[1]


def _rotate(family: Any) -> Rotate | None:
    """A family's own RoPE function of q and k (B, heads, T, D), cosines and sines (B, T, D); None if it has none."""
    rotate: Any = getattr(family, "apply_rotary_pos_emb", None)
    return None if rotate is None else _of_both(rotate)


@lru_cache(maxsize=64)
def _of_both(rotate: Callable[..., Any]) -> Rotate:
    """A function of q and k, from one that may take them one by one."""
    if list(inspect.signature(rotate).parameters)[:2] == ["q", "k"]:
        return rotate
    return lambda q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


@lru_cache(maxsize=64)
@torch.no_grad()
def _form(rotate: Rotate) -> tuple[bool, bool] | None:
    """The fields of the :class:`RotaryForm` that gives the same as ``rotate`` for small random tensors; None if no form
    does. All columns of cos and sin differ."""
    generator, shapes = torch.Generator().manual_seed(0), ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8), (1, 3, 8))
    q, k, cos, sin = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
    try:
        results = rotate(q.clone(), k.clone(), cos, sin)
    except Exception:  # whatever a family's function does not like about these tensors
        return None
    for interleaved, first_half in itertools.product((False, True), repeat=2):
        expected = [_rotated(x, cos[:, None], sin[:, None], interleaved, first_half) for x in (q, k)]
        if all(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in zip(expected, results, strict=True)):
            return interleaved, first_half
    return None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first_half: bool) -> Tensor:
    """x (..., R) after RoPE of this form."""
    pairs = x.shape[-1] // 2
    if first_half:
        cos, sin = (
            y[..., :pairs].repeat_interleave(2, -1) if interleaved else torch.cat([y[..., :pairs]] * 2, -1)
            for y in (cos, sin)
        )
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        turned = torch.cat([-x[..., pairs:], x[..., :pairs]], -1)
    return x * cos + turned * sin


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernel takes these tensors."""
    tables = cos.ndim == 3 and cos.shape == sin.shape and not (cos.requires_grad or sin.requires_grad)
    return (
        tables and q.dtype == k.dtype and q.shape[2:] == k.shape[2:] and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[2] and cos.shape[2] % 2 == 0 and cos.shape[2] <= q.shape[3] and q.numel() > 0
    )  # fmt: skip


@torch.inference_mode(False)
@torch.enable_grad()
def check_rotates(model: Any) -> None:
    """Raise LolcatsError unless every layer's output depends on the cosines it receives: some families rotate only in
    some layers. Needs no weights, and cannot see what happens to q and k after RoPE."""
    given: dict[Any, Tensor] = {}

    def give(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rotation = kwargs.get("position_embeddings")
        if not isinstance(rotation, tuple):
            raise no_rotation(model, module.lolcats.geometry.layer)
        given[module] = rotation[0].detach().requires_grad_()
        return args, {**kwargs, "position_embeddings": (given[module], *rotation[1:])}

    def look(module: Any, args: Any, output: Any) -> None:
        total = output[0].sum()
        if not total.requires_grad or torch.autograd.grad(total, given[module], allow_unused=True)[0] is None:
            raise no_rotation(model, module.lolcats.geometry.layer)

    modules = [m for m in model.modules() if isinstance(getattr(m, "lolcats", None), LinearizedAttention)]
    if none := [m for m in modules if _rotate(sys.modules[type(m).__module__]) is None]:
        raise no_rotation(model, none[0].lolcats.geometry.layer)
    hooks = [module.register_forward_pre_hook(give, with_kwargs=True) for module in modules]
    hooks += [module.register_forward_hook(look) for module in modules]
    tensors: dict[str, Tensor] = {}
    if any(weight.is_inference() for weight in model.parameters()):  # autograd does not take these
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        tensors = {name: torch.empty_like(x, device="meta") for name, x in named}
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta" if tensors else model.device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # else families look at positions
    try:
        with override(model, mode="teacher"):
            functional_call(model, tensors, kwargs={"input_ids": ids, "past_key_values": cache})
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def check_rotation(model: Any) -> None:
    """Raise LolcatsError unless q and k without RoPE can be recovered and are the same wherever a sequence begins.

    Attention outputs are set to 0 meanwhile, so that the input of a layer does not depend on positions either.
    """
    found: list[list[Tensor]] = []

    def observe(layer: LinearizedAttention, call: AttentionCall) -> None:
        if layer.spec.unrotated:
            found[-1].append(torch.cat([x[..., x.shape[-1] // 2 :] for x in call.queries_and_keys()], 1).float())
        call.target.zero_()

    layers, training = [layer for layer in linearized_layers(model) if layer.spec.unrotated], model.training
    ids = torch.arange(1, 5, device=model.device)[None]
    try:
        with override(model, mode="transfer", observer=observe):
            for start in (0, SHIFT):
                found.append([])
                positions = torch.arange(start, start + 4, device=model.device)[None]
                model.eval()(input_ids=ids, position_ids=positions, use_cache=False)
    except (AttributeError, TypeError, ValueError) as error:
        raise no_rotation(model, layers[len(found[-1])].geometry.layer) from error
    finally:
        model.train(training)
    for layer, first, second in zip(layers, *found, strict=True):
        if (first - second).norm() > SAME * first.norm():
            raise no_rotation(model, layer.geometry.layer)


def no_rotation(owner: Any, layer: int) -> LolcatsError:
    """The error for ``owner``, which is the model or one of its attention modules."""
    return LolcatsError(
        f"Layer {layer} of {type(owner).__name__.removeprefix('Lolcats')} does not apply RoPE the way transformers' "
        "models do, so lolcats cannot get its queries and keys before RoPE. Set attention.feature_inputs=rotated, or "
        "keep such layers as softmax (attention.layers)."
    )
