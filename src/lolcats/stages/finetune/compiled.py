"""``finetune.compile``: decoder layers compiled by torch.compile while stage 2 trains; evaluation stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from lolcats.config import Config, FinetuneConfig
from lolcats.data.rows import Data
from lolcats.errors import LolcatsError
from lolcats.modeling.layer import decoder_layers, linearized_layers
from lolcats.stages.distributed import is_sharded

BACKEND = "inductor"
LONG = 500  # optimizer steps of a run that compiling is worth its time for


def compiles(model: PreTrainedModel, config: Config, data: Data) -> bool:
    """Whether stage 2 compiles the model's layers.

    Raises:
        LolcatsError: ``finetune.compile=true`` with something that does not support it.
    """
    stage = config.finetune
    if stage.compile is False:
        return False
    obstacle = _obstacle(model, config, data)
    if stage.compile == "auto":
        steps = stage.max_steps if stage.max_steps > 0 else int(stage.epochs * len(data.train) / stage.batch_size)
        return not obstacle and model.device.type == "cuda" and steps >= LONG
    if obstacle:
        raise LolcatsError(f"finetune.compile does not support {obstacle}: set finetune.compile=false.")
    return True


def _obstacle(model: PreTrainedModel, config: Config, data: Data) -> str:
    if data.positions:
        return "data.reset_at_documents=true, where each batch has documents of other lengths"
    if is_sharded(model):
        return "a sharded base model"
    if config.finetune.gradient_checkpointing:
        return "finetune.gradient_checkpointing=true"
    if config.finetune.quantize_base != "none":
        return f"finetune.quantize_base={config.finetune.quantize_base}"
    if config.finetune.feature_map_learning_rate > 0:
        return "finetune.feature_map_learning_rate above 0"
    layers = linearized_layers(model)
    if not layers:
        return "a model without linearized layers"
    maps = {layer.phi_q.name for layer in layers if layer.spec.has_linear}
    return "" if maps <= {"hedgehog"} else f"attention.feature_map={', '.join(sorted(maps))}"


@contextmanager
def compiled_layers(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Inside the block, each decoder layer of ``model`` is compiled when it is first called, for the shapes it gets."""
    layers = list(decoder_layers(model)) if wanted else []
    for layer in layers:
        layer.compile(dynamic=False, backend=BACKEND)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def eagerly(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """:func:`uncompiled`, if any of ``modules`` is compiled."""
    compiled = any(module._compiled_call_impl is not None for module in modules)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # type: ignore[return-value]


def uncompiled(stage: FinetuneConfig) -> AbstractContextManager[None]:
    """Inside the block, compiled layers run as if they were not: what is called once or rarely need not be compiled."""
    if stage.compile is False:
        return nullcontext()  # without the import of torch's compiler
    return torch.compiler.set_stance("force_eager")  # type: ignore[return-value]
