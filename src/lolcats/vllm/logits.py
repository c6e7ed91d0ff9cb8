"""Feature maps must see the queries that they were trained on, so vLLM has to scale logits where transformers does."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention

from lolcats.errors import LolcatsError
from lolcats.modeling.probe import probe
from lolcats.modeling.skeleton import empty_model, without_values
from lolcats.vllm.record import Linearized

log = logging.getLogger(__name__)


def check_logits(
    attentions: Mapping[str, Attention], placed: Mapping[str, Linearized], config: Any, trust: bool = False
) -> None:  # fmt: skip
    """Compare vLLM's layers with those of transformers' model of the family, which is built without memory.

    A model that transformers cannot build here is not compared, and a warning says so.

    Args:
        config: the family's own configuration.
        trust: run Python code that comes with the model.

    Raises:
        LolcatsError: scale or softcap differ, so vLLM or transformers computes one of them in the queries.
    """
    try:
        there = of_transformers(config, trust)
    except Exception as error:  # whatever a model's own code does not like
        log.warning("Scales of vLLM's %s were not compared with transformers': %s", type(config).__name__, error)
        return
    for name, layer in placed.items():
        here, saved = of_vllm(attentions[name]), there[layer.geometry.layer]
        if not all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(here, saved, strict=True)):
            raise LolcatsError(
                f"Scale and softcap of vLLM's {name} are {here[0]:g} and {here[1]:g}, and those of transformers "
                f"{saved[0]:g} and {saved[1]:g}, so feature maps would see other queries. Use lolcats serve."
            )


def of_vllm(attention: Attention) -> tuple[float, float]:
    """Scale and softcap (0 = none)."""
    return attention.impl.scale, getattr(attention.impl, "logits_soft_cap", None) or 0.0


def of_transformers(config: Any, trust: bool = False) -> dict[int, tuple[float, float]]:
    """The same for each layer."""
    if getattr(config, "sliding_window", 0) is None:  # vLLM puts None for 0; some families need a number
        config = copy.copy(config)
        config.sliding_window = 0
    with torch.device("cpu"):
        model = empty_model(config, torch.bfloat16, trust)
        layers = without_values(model, lambda: probe(model))
    return {layer.geometry.layer: (layer.scale, layer.softcap or 0.0) for layer in layers}
