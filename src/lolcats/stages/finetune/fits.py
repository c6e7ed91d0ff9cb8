"""Whether every rank can hold the whole base model in stage 2, or it must be sharded."""

from __future__ import annotations

import os

import torch

from lolcats.config import Config
from lolcats.errors import LolcatsError
from lolcats.memory import free_host_memory
from lolcats.modeling.convert import convert
from lolcats.modeling.layer import decoder_layers
from lolcats.ranks import ranks
from lolcats.stages.distributed import any_rank, own_device
from lolcats.weights.base import Base, empty_model

ALLOWANCE = 2 * 2**30  # bytes of a process for everything else: CUDA context, NCCL, LoRA with gradients and Adam
USABLE = 0.95  # share of a GPU's memory; the rest is lost to fragmentation


def shards(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether stage 2 shards the base model across the current ranks; the answer is the same on every rank.

    With ``finetune.sharding=auto``, it does if the whole model does not fit on some rank's device, or if its host lacks
    the memory to load it.
    """
    asked = config.finetune.sharding
    if ranks().size == 1 or asked != "auto":
        return ranks().size > 1 and asked == "always"
    return any_rank(not _fits(base, config, device, dtype), own_device(device))


def _fits(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights, activations and ``ALLOWANCE`` fit into this rank's device, and the weights into its share of the
    host's free memory, where they are loaded first."""
    try:
        weights, activations = (dtype.itemsize * n for n in _elements(base, config))
    except LolcatsError:  # the model cannot be counted
        return False
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks().size))
    host = free_host_memory() / local
    if device.type != "cuda":
        return weights + activations + ALLOWANCE <= host
    memory = torch.cuda.get_device_properties(device).total_memory
    return weights + activations + ALLOWANCE <= USABLE * memory and weights + ALLOWANCE <= host


def _elements(base: Base, config: Config) -> tuple[int, int]:
    """Numbers of the base model's parameters and of the activations that are kept for backward.

    For every token of a micro-batch, these are about as many as the longer side of each weight matrix; with gradient
    checkpointing, those of one layer and the input of each.
    """
    model = empty_model(base, config.trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        layers = decoder_layers(convert(model, config))
    widths = [sum(max(p.shape[-2:]) for p in layer.parameters() if p.ndim > 1) for layer in layers]
    hidden = model.get_input_embeddings().weight.shape[1]
    kept = max(widths) + len(layers) * hidden if config.finetune.gradient_checkpointing else sum(widths)
    rows = 1 if config.finetune.micro_batch_size == "auto" else config.finetune.micro_batch_size
    return parameters, rows * config.data.sequence_length * kept
