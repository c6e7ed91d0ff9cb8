"""Adapters of tiny models whose LoRA changes a lot, and how much memory PyTorch takes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import lolcats
from lolcats.config import AttentionConfig, FinetuneConfig
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, save_adapter_config, save_feature_maps, save_lora
from lolcats.modeling.parts import find_parts
from lolcats.stages.finetune.stage import add_lora
from lolcats.weights.base import find_base, load_model

SMALL = AttentionConfig(window_size=8, sinks=2, feature_dim=8)


def stir(wrapped: Any) -> None:
    """Move LoRA far from its initial values, which change nothing."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))


def adapter(
    directory: Path, model: Any, dtype: torch.dtype = torch.bfloat16, attention: AttentionConfig = SMALL, **lora: Any
) -> Path:
    """An adapter of ``model`` with LoRA far from its initial values, in ``directory``, its base beside it."""
    model.save_pretrained(directory / "base")
    base, out = find_base(str(directory / "base")), directory / "adapter"
    out.mkdir()
    wrapped = add_lora(lolcats.convert(load_model(base, dtype), attention), FinetuneConfig(rank=4, **lora))
    stir(wrapped)
    student = wrapped.get_base_model()
    save_feature_maps(student, out / FEATURE_MAPS)
    save_lora(wrapped, base, out / LORA)
    save_adapter_config(student, base, out, parts=find_parts(out))
    return out


def peak(function: Callable[[], Any], mapped: set[int]) -> int:
    """The most bytes that PyTorch held on the CPU at once for ``function``. Files of these sizes are mapped, which
    counts as allocated, but takes no memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        function()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(size for size in sizes if abs(size) not in mapped))
