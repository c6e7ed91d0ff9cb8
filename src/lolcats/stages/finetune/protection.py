"""Layers and heads that stay softmax attention keep the queries and keys of the base model: no LoRA in their rows.

Shapes: H query heads, G key/value heads; a projection's rows are its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lolcats.errors import LolcatsError
from lolcats.modeling.cache import sliding_windows
from lolcats.modeling.convert import named_layers
from lolcats.modeling.families import FUSED, GROUPED, PROJECTIONS


def kept_rows(model: nn.Module, layers: list[dict[str, Any]], targets: Iterable[str]) -> dict[str, Tensor]:
    """Name of a target of LoRA -> (rows,) bool, true for queries and keys of heads that stay softmax attention.

    Args:
        model: a converted model, with or without LoRA.
        layers: the layers of its record, see :func:`kept_layers`.
        targets: full names of linear layers.
    """
    found, targets = dict[str, Tensor](), list(targets)
    for entry in layers:
        heads = range(entry["kv_heads"]) if entry["kind"] == "softmax" else entry.get("softmax_heads") or ()
        for name in targets if heads else ():
            role = name.rpartition(".")[2]
            if not name.startswith(f"{entry['name']}.") or role in UNROUTED:
                continue
            module = model.get_submodule(name)
            count = _outputs(module)
            found[name] = torch.zeros(count, dtype=torch.bool, device="cpu")  # also on the meta device
            found[name][_rows(name, module, count, entry, list(heads))] = True
    return found


def kept_layers(model: Any) -> list[dict[str, Any]]:
    """The layers of a converted model's record, for :func:`kept_rows`.

    Where no layer is linearized (``attention.kind: softmax``), those that ``attention.layers`` and
    ``attention.softmax_heads`` name are kept, and layers with a sliding window among others; if nothing is named, all.
    """
    attention, layers = model.config.lolcats["attention"], model.config.lolcats["layers"]
    heads = attention.get("softmax_heads") or {}
    whole = {number for text in attention["layers"] for number in named_layers(text)}
    if not (heads or whole) or any(entry["kind"] != "softmax" for entry in layers):
        return list(layers)
    local = sliding_windows(model.config)
    whole |= set(local) if len(local) < len(layers) else set()
    return [
        entry if entry["layer"] in whole
        else {**entry, "kind": "none", "softmax_heads": heads.get(str(entry["layer"]), ())}
        for entry in layers
    ]  # fmt: skip


UNROUTED = (*PROJECTIONS["v_proj"], *PROJECTIONS["o_proj"])
"""Projections that have no part in where a head attends to."""


def _outputs(module: Any) -> int:
    """The number of a projection's outputs: of nn.Linear, of the transposed Conv1D, with or without LoRA."""
    return int(module.nf if hasattr(module, "nf") else getattr(module, "out_features", 0))


def _rows(name: str, module: Any, count: int, entry: dict[str, Any], heads: list[int]) -> list[int]:
    """Rows of ``count`` that are queries or keys of the key/value heads ``heads``."""
    called, (all_heads, kv_heads) = name.rpartition(".")[2], (entry["heads"], entry["kv_heads"])
    group, wide, narrow = all_heads // kv_heads, entry["head_dim"], entry["value_dim"]
    queries = [head * group + i for head in heads for i in range(group)]
    if called in PROJECTIONS["q_proj"]:
        blocks, fits = _blocks(queries, count // all_heads), count % all_heads == 0
    elif called in PROJECTIONS["k_proj"]:
        blocks, fits = _blocks(heads, count // kv_heads), count % kv_heads == 0
    elif called not in FUSED:
        blocks, fits = [], False
    else:
        each = (group + 1) * wide + narrow
        fits = count == kv_heads * each
        if called in GROUPED or (called == "c_attn" and not hasattr(_base(module), "nf")):
            blocks = [range(head * each, (head + 1) * each - narrow) for head in heads]
        else:
            blocks = [*_blocks(queries, wide), *_blocks([all_heads + head for head in heads], wide)]
    if not fits:
        raise LolcatsError(
            f"finetune.protect_kept cannot tell which of the {count} outputs of {name} are queries and keys of "
            f"{all_heads} and {kv_heads} heads. Set finetune.protect_kept=false."
        )
    return [row for block in blocks for row in block]


def _blocks(heads: list[int], width: int) -> list[range]:
    return [range(head * width, (head + 1) * width) for head in heads]


def _base(module: Any) -> Any:
    """The layer that PEFT wraps."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


@contextmanager
def protected(wrapped: PeftModel, wanted: bool) -> Iterator[None]:
    """For the block's duration, the rows of LoRA's B that :func:`kept_rows` names get no gradient.

    They start as zeros, so they stay zeros under any optimizer whose decay and update of a zero are zero.
    """
    model: Any = wrapped.get_base_model()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)} if wanted else {}
    hooks = [
        part.weight.register_hook(_without(rows[:, None].to(part.weight.device)))
        for name, rows in kept_rows(model, kept_layers(model), layers).items()
        for part in layers[name].lora_B.values()
        if part.weight.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _without(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(rows, 0)
