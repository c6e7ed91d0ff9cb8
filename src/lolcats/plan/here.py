"""Whether the machine that this runs on holds what a plan counts."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from transformers import AutoConfig

from lolcats.config import Config
from lolcats.errors import LolcatsError
from lolcats.memory import free_host_memory
from lolcats.modeling.base import Base
from lolcats.plan.costs import Machine, Work, checked, lora
from lolcats.plan.size import size_of
from lolcats.ranks import ranks
from lolcats.training.distributed import any_rank, own_device


def shards(base: Base, config: Config, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether stage 2 shards the base model over the ranks there are: where the configuration says so; or leaves it
    open, and one rank's device is too small for the whole model, or its host while ranks load it, by ``lolcats plan``.

    The same answer on every rank.
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
    except (LolcatsError, OSError, ValueError):  # nothing that could be counted
        return False
    plan = lora(size, config, here(device), Work(), sharded=False)
    wide = dtype.itemsize / 2  # a plan is of 16-bit weights
    plan = replace(plan, gpu={name: wide * n for name, n in plan.gpu.items()},
                   host={name: wide * n for name, n in plan.host.items()})  # fmt: skip
    return not checked(plan, here(device)).problems


def here(device: torch.device) -> Machine:
    """The machine of these ranks. Of a CPU's memory each has its part, into which the model is loaded."""
    local, free = int(os.environ.get("LOCAL_WORLD_SIZE", ranks().size)), free_host_memory()
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machine(ranks().size, memory, free, gpus_per_node=local)
    return Machine(ranks().size, free / local, math.inf, gpus_per_node=local)
