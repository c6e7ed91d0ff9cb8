"""Check whether a plan fits the current machine."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from transformers import AutoConfig

from lolcats.config import Config
from lolcats.errors import LolcatsError
from lolcats.memory import free_host_memory
from lolcats.plan.costs import Machine, Work, checked, lora
from lolcats.plan.size import size_of
from lolcats.ranks import ranks
from lolcats.stages.distributed import any_rank, own_device
from lolcats.weights.base import Base


def shards(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether stage 2 shards the base model across the current ranks; the answer is the same on every rank.

    With ``finetune.sharding=auto``, it does if ``lolcats plan`` finds that the whole model does not fit on some rank's
    device, or that its host lacks the memory to load it.
    """
    asked = config.finetune.sharding
    if ranks().size == 1 or asked != "auto":
        return ranks().size > 1 and asked == "always"
    return any_rank(not _holds_whole(base, config, device, dtype), own_device(device))


def _holds_whole(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    path, keywords = base.arguments
    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **keywords)
        size = size_of(found, config)
    except (LolcatsError, OSError, ValueError):  # the model cannot be counted
        return False
    plan = lora(size, config, here(device), Work(), sharded=False)
    wide = dtype.itemsize / 2  # a plan assumes 16-bit weights
    plan = replace(plan, gpu={name: wide * n for name, n in plan.gpu.items()},
                   host={name: wide * n for name, n in plan.host.items()})  # fmt: skip
    return not checked(plan, here(device)).problems


def here(device: torch.device) -> Machine:
    """The machine of these ranks. On CPU, ranks share the memory equally and load the model into it."""
    local, free = int(os.environ.get("LOCAL_WORLD_SIZE", ranks().size)), free_host_memory()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machine(ranks().size, memory, free, gpus_per_node=local)
    return Machine(ranks().size, free / local, math.inf, gpus_per_node=local)
