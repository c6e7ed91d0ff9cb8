"""Run a model with liger-kernel's fused norms, gated MLPs and rotary embeddings while it trains or generates."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.install import decoder
from lolcats.modeling.loss import has_liger

LOSSES = ("cross_entropy", "fused_linear_cross_entropy")  # parts of a patch that we leave out: we have our own loss


@contextmanager
def fused_layers(model: PreTrainedModel, wanted: bool, device: torch.device | None = None) -> Iterator[None]:
    """Inside the block, a converted ``model`` runs the fused layers that liger-kernel has for its family.

    Does nothing unless ``wanted``, the model is on CUDA, and liger-kernel is installed (the extra ``gpu``) and knows
    the family. After the block, model and family are restored.

    ``device``: where the model's layers compute, if their weights are not always there.
    """
    with ExitStack() as undo:
        if wanted and (device or model.device).type == "cuda" and has_liger():
            _patch(model, undo)
        yield


def _patch(model: PreTrainedModel, undo: ExitStack) -> None:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES

    family = getattr(model.config, "base_model_type", model.config.model_type)
    if family not in PATCHES:
        return
    # Liger changes attributes of the model's modules and names in the family's file, where RoPE is a function.
    files = [vars(sys.modules[cls.__module__]) for cls in type(model).__mro__ if ".models." in cls.__module__]
    places = [vars(module) for module in decoder(model).modules()] + files
    before = [dict(place) for place in places]
    left_out = {name: False for name in LOSSES if name in inspect.signature(PATCHES[family]).parameters}
    try:
        PATCHES[family](model=model, **left_out)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise LolcatsError(
            f"liger-kernel cannot patch this {family} model ({error}). Turn it off: --set transfer.liger=off "
            "--set finetune.liger=off."
        ) from error
    finally:
        for place, old in zip(places, before, strict=True):
            undo.callback(_restore, place, old, [k for k in place if k not in old or place[k] is not old[k]])
    for file, old in zip(files, before[len(places) - len(files) :], strict=True):
        _spare_others(file, old)


def _spare_others(file: dict[str, Any], old: dict[str, Any]) -> None:
    """Leave other models of the family as they are: restore its classes, and let its functions choose by device."""
    for name in [name for name in old if file[name] is not old[name]]:
        plain, fused = old[name], file[name]
        file[name] = plain if isinstance(plain, type) else _by_device(fused, plain)


def _by_device(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def function(*args: Any, **kwargs: Any) -> Any:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if not tensor.is_cuda:
            return plain(*args, **kwargs)
        return fused(*map(one_token_rows, args), **{name: one_token_rows(x) for name, x in kwargs.items()})

    return function


def one_token_rows(x: Any) -> Any:
    """Queries or keys (B, H, 1, D) as a view whose tokens lie H · D numbers apart; anything else as it is.

    Liger's RoPE takes the stride of the tokens for that of the rows. With one token PyTorch may give that dimension any
    stride, such as D where a family (Gemma 3) normalizes heads that are transposed already.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[2] != 1:
        return x
    return x.squeeze(2).unsqueeze(1).transpose(1, 2)


def _restore(place: dict[str, Any], old: dict[str, Any], changed: list[str]) -> None:
    for key in changed:
        place.pop(key)
        if key in old:
            place[key] = old[key]
