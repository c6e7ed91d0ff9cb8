"""What the engine asks of a model: that it can run it, how its weights lie in memory, which tokens end a sequence."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lolcats.attention.path import choose_decode_path
from lolcats.errors import LolcatsError, out_of_memory
from lolcats.inference.engine.projections import joint_projections
from lolcats.modeling.layer import LinearizedAttention, constant_gates
from lolcats.modeling.liger import fused_layers

log = logging.getLogger(__name__)


def check_model(model: PreTrainedModel) -> None:
    """Refuse what the engine cannot run, in a sentence."""
    if not hasattr(model.config, "lolcats"):
        raise LolcatsError("The engine runs linearized models; convert this one first: lolcats linearize.")
    cache = DynamicCache(config=model.config).layers
    if others := [str(i) for i, layer in enumerate(cache) if isinstance(layer, LinearAttentionCacheLayerMixin)]:
        raise LolcatsError(
            f"Layers {', '.join(others)} have a recurrence or convolution of the base model's own, whose state the "
            "engine does not hold. Use lolcats generate for this model."
        )
    if hasattr(model, "get_base_model"):
        raise LolcatsError(
            f"The engine runs models, and {type(model).__name__} is a wrapper of PEFT. Merge its adapter first "
            "(merge_and_unload()), or pass get_base_model(), which has the adapter in its layers."
        )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise LolcatsError(f"{type(model).__name__} takes no position_ids, which rows of different lengths need.")


def lay_out_for_vectors(model: PreTrainedModel) -> None:
    """Store the weights of plain linear layers column by column: values and shapes stay.

    Layers of other classes, such as those of quantized models, decide themselves how their weights lie in memory.

    For a single row BLAS then adds columns on all cores, where dot products with rows ran on one: a third less time for
    batch 1 and 2 on two cores, up to 12 % more for batch 16 (benchmarks/LOG.md).
    """
    for module in model.modules():
        if type(module) is torch.nn.Linear and type(x := module.weight.data) is torch.Tensor and x.is_floating_point():
            module.weight.data = x.t().contiguous().t()


def prepare(owner: object, model: PreTrainedModel, layers: Iterable[LinearizedAttention]) -> ExitStack:
    """Until the result is closed: constant gates and, on a GPU, joint projections and liger-kernel's layers, or a
    warning if these cannot be used. It is closed at the latest when ``owner``'s life or Python ends."""
    resources = ExitStack()
    weakref.finalize(owner, resources.close)
    resources.enter_context(constant_gates(layers))
    if model.device.type == "cuda":
        resources.enter_context(joint_projections(model))
        torch.cuda.empty_cache()  # where the weights were
    try:
        resources.enter_context(fused_layers(model, True))
    except LolcatsError as error:
        log.warning("Generating without liger-kernel, which cannot patch this model: %s", error.__cause__ or error)
    return resources


def has_kernels(model: PreTrainedModel, layers: Iterable[LinearizedAttention]) -> bool:
    """Whether the decode kernel takes every linearized layer."""

    def has(layer: LinearizedAttention) -> bool:
        shape = (0, 0, 1, layer.spec.channels(layer.geometry.head_dim))
        q = torch.empty(shape, dtype=model.dtype, device=model.device)
        return choose_decode_path(q, layer.mixer(1.0)) == "kernels"

    with torch.inference_mode():
        return all(map(has, layers))


def end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    """The end-of-sequence tokens of the model's generation settings and of the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def broke_the_device(error: BaseException) -> bool:
    """Whether a GPU is unusable until the process ends, as it is after an illegal access, but not without memory."""
    accelerator = getattr(torch, "AcceleratorError", ())
    named = isinstance(error, accelerator) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
    return named and not out_of_memory(error)
