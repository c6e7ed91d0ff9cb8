"""When a stage replays its steps as a CUDA graph: one launch instead of the thousands that small models wait for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from lolcats.attention import choose_path
from lolcats.errors import first_line
from lolcats.modeling.cuda_graph import record
from lolcats.modeling.layer import LinearizedAttention
from lolcats.ranks import Ranks

log = logging.getLogger(__name__)
T = TypeVar("T")

Asked = bool | Literal["auto"]
"""Whether there may be a graph. With ``auto``, nobody is warned if it cannot be recorded, and it is given up if it
leaves too little memory."""
WORTH = 20
"""Optimizer steps from which on a graph pays off."""


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def in_one_place(model: PreTrainedModel, ranks: Ranks) -> bool:
    """Whether one process computes ``model`` on one device, without experts, whose work depends on the batch."""
    parameters = dict(model.named_parameters())
    devices = {p.device for p in parameters.values()}
    return ranks.size == 1 and len(devices) == 1 and all("experts." not in name for name in parameters)


def by_kernels(layer: LinearizedAttention, model: PreTrainedModel) -> bool:
    """Whether the kernels compute what is linearized of ``layer``."""
    shape = (0, 0, 1, layer.spec.channels(layer.geometry.head_dim))
    return choose_path(torch.empty(shape, dtype=model.dtype, device=model.device), layer.spec) == "kernels"


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Record ``run`` as a CUDA graph, and return what replays it. It runs once before that, and other threads may go on
    copying batches."""
    return record(run, errors="thread_local")[0].replay


def recorded(stage: str, asked: Asked, device: torch.device, make: Callable[[], T]) -> T | None:
    """What ``make`` records; None, with a line in the log, if it cannot be or takes too much memory."""
    before = _reserved(device)
    try:
        graph: T | None = make()
        problem = "" if asked is True or has_room(device, before) else "it leaves too little memory"
    except RuntimeError as error:
        graph, problem = None, first_line(error)
    if problem:
        level = logging.WARNING if asked is True else logging.INFO
        log.log(level, "%s goes on without a CUDA graph: %s.", stage, problem)
        return None
    log.info("%s has recorded a CUDA graph, which it replays from now on.", stage)
    return graph


def _reserved(device: torch.device) -> int:
    """Bytes that PyTorch holds on a GPU, without those that nothing uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def has_room(device: torch.device, before: int) -> bool:
    """Whether as much memory is free as a graph took that was recorded when ``before`` bytes were reserved. Validation
    and uneven batches, which go without the graph, need it beside the graph's own."""
    return torch.cuda.mem_get_info(device)[0] >= torch.cuda.memory_reserved(device) - before
