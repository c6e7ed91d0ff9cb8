"""Queries, keys and values of a decode step by one product instead of three, which reads the weights faster.

A family's attention module calls its projections one after the other with the same hidden states. The first call
computes all three, and the others find theirs. Weights and values stay where state dicts and gradients look for them:
each weight becomes a view of one that holds all three.

Shapes: B rows, N outputs, K inputs of a projection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lolcats.modeling.families import PROJECTIONS
from lolcats.modeling.layer import attached

log = logging.getLogger(__name__)


@contextmanager
def joint_projections(model: nn.Module) -> Iterator[None]:
    """Inside the block, the model's attention modules compute decode steps so. Where a projection is not a plain linear
    layer (LoRA, quantized, split over ranks, with hooks), nothing changes."""
    joints = []
    try:
        for found in filter(None, map(projections_of, model.modules())):
            joints.append(JointProjections(found))
    except torch.OutOfMemoryError:
        log.warning("Too little memory is free to compute queries, keys and values together in every layer.")
    try:
        yield
    finally:
        for joint in joints:
            for each in joint.projections:
                del each.forward


def projections_of(module: nn.Module) -> list[nn.Linear] | None:
    """The projections q, k and v of an attention module, if they can be computed together."""
    if attached(module) is None:
        return None
    roles = (PROJECTIONS[role] for role in ("q_proj", "k_proj", "v_proj"))
    found: Any = [next((x for x in map(vars(module)["_modules"].get, names) if x is not None), None) for names in roles]
    if not all(map(_is_plain, found)):
        return None
    alike = {(x.in_features, x.weight.dtype, x.weight.device, x.bias is None) for x in found}
    return found if len(alike) == 1 and len({id(x.weight) for x in found}) == 3 else None


def _is_plain(x: Any) -> bool:
    if type(x) is not nn.Linear or "forward" in vars(x) or x._forward_hooks or x._forward_pre_hooks:
        return False
    own = (parameter for parameter in (x.weight, x.bias) if parameter is not None)
    return all(type(p.data) is Tensor and p.is_contiguous() and not p.is_meta and not p.is_inference() for p in own)


class JointProjections:
    """Takes the place of three linear layers' ``forward``."""

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        self.projections, self.sizes = projections, [x.out_features for x in projections]
        self.weight = _joined([x.weight for x in projections])
        self.bias = None if projections[0].bias is None else _joined([x.bias for x in projections])
        self.places = self._places()
        self.input: Tensor | None = None
        self.rest: dict[int, Tensor] = {}
        for number, each in enumerate(projections):
            each.forward = partial(self.output, number)  # type: ignore[method-assign]

    def output(self, number: int, x: Tensor) -> Tensor:
        """(B, T, K) -> (B, T, N) of one projection."""
        if number == 0:
            self.input, self.rest = None, {}
            if self._takes(x):
                first, *rest = parted(linear(x, self.weight, self.bias), self.sizes)
                self.input, self.rest = x, dict(enumerate(rest, 1))
                return first
        elif x is self.input and number in self.rest:
            y = self.rest.pop(number)
            if not self.rest:
                self.input = None
            return y
        own = self.projections[number]
        return linear(x, own.weight, own.bias)

    def _takes(self, x: Tensor) -> bool:
        one = x.dim() == 3 and x.shape[1] == 1 and not torch.is_grad_enabled()
        return one and self._places() == self.places  # nobody has put other weights in

    def _places(self) -> list[int]:
        return [p.data_ptr() for x in self.projections for p in (x.weight, x.bias) if p is not None]


def parted(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """(B, 1, all N) as contiguous (B, 1, N) of each projection."""
    parts = x.split(list(sizes), -1)
    if len(x) > 1 and x.is_cuda:
        try:
            from lolcats.attention.kernels.columns import columns
        except ImportError:  # without triton
            return [part.contiguous() for part in parts]
        return columns(x, sizes)
    return [part.contiguous() for part in parts]


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """All of them along the first dimension; they become views of it."""
    with torch.inference_mode(False), torch.no_grad():
        first, shape = parameters[0].data, (sum(map(len, parameters)), *parameters[0].shape[1:])
        ends = [p.data_ptr() + p.nbytes for p in parameters]
        room = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
        if ends[:-1] == [p.data_ptr() for p in parameters[1:]] and room >= sum(p.nbytes for p in parameters):
            return first.as_strided(shape, first.stride())  # by an earlier engine
        whole = torch.cat([p.data for p in parameters])
        for parameter, part in zip(parameters, whole.split([len(p) for p in parameters]), strict=True):
            parameter.data = part
    return whole
