"""Stage 2 on several GPUs: every rank holds all trained parameters, and all of the frozen base model or an FSDP2 shard.

LoRA and feature maps are below 1 % of the parameters: their gradients are summed once per optimizer step, and a
checkpoint is the same as with one process. If the base model is sharded, every rank holds a slice of each weight, and
a layer is gathered when it computes. torchrun starts the ranks; the same code runs on CPUs (gloo) and GPUs (nccl).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from lolcats.modeling.install import decoder
from lolcats.modeling.layer import decoder_layers, linearized_layers
from lolcats.ranks import ranks
from lolcats.weights.shards import Shards


def own_device(device: torch.device) -> torch.device:
    """This rank's own device of the type of ``device``. Creates the process group under torchrun."""
    ranks()
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def shard(
    model: PreTrainedModel, device: torch.device, mesh: DeviceMesh | None = None, layers_per_unit: int = 1
) -> PreTrainedModel:  # fmt: skip
    """Shard the frozen parameters of a converted model across all ranks, in place. The others stay whole.

    Feature maps and tied embeddings also stay whole. Units, each of which is gathered at once: every
    ``layers_per_unit`` decoder layers, the embedding, the output layer, the rest of the decoder. The roots are
    the decoder and the output layer, because the trainers call these and not the model.
    Parameters may be on the meta device: see :func:`materialize`.
    """
    mesh = mesh if mesh is not None else init_device_mesh(device.type, (ranks().size,))
    kept = {p for layer in linearized_layers(model) for p in layer.parameters()}
    kept |= {p for p in model.parameters() if p.requires_grad}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        kept.add(embedding.weight)
    layers = list(decoder_layers(model))
    units = [layers[i : i + layers_per_unit] for i in range(0, len(layers), layers_per_unit)]
    for unit in (*units, [embedding], [head]):
        if any(p not in kept for module in unit for p in module.parameters()):
            fully_shard(unit, mesh=mesh, ignored_params=kept)
    fully_shard(decoder(model), mesh=mesh, ignored_params=kept)
    _order_gathers(embedding, [unit[0] for unit in units])
    return model


def _order_gathers(embedding: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Start to gather each unit before the previous one is launched, as launching takes the host long.

    ``layers``: the first decoder layer of each unit.

    Also avoid needless gathers: by default, FSDP2 gathers the frozen embedding for a backward pass that does nothing
    there, and the last layer twice in a row.
    """
    units = [unit for unit in (embedding, *layers) if isinstance(unit, FSDPModule)]
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    units[-1].set_reshard_after_forward(False, recurse=False)
    if isinstance(embedding, FSDPModule):
        embedding.set_unshard_in_backward(False)


def materialize(model: nn.Module, device: torch.device, fill: Callable[[str, Tensor], None]) -> None:
    """Move a sharded model to ``device``, and allocate and fill the parameters that are on the meta device.

    Args:
        fill: called with name and parameter to set the values of a parameter that was on the meta device. The parameter
            is a tensor, or a DTensor of which this rank holds a part.
    """
    names = [name for name, p in model.named_parameters() if p.is_meta]
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            fill(name, parameters[name])


def fill_part(parameter: Tensor, source: Shards, name: str) -> None:
    """Read this rank's part of a parameter from ``source``."""
    cut = [p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)]
    if not isinstance(parameter, DTensor) or not cut:
        parameter.copy_(source.read({name: parameter}, torch.device("cpu"))[name])
        return
    each = -(-parameter.shape[cut[0]] // ranks().size)
    start = min(ranks().rank * each, parameter.shape[cut[0]])
    stop = min(start + each, parameter.shape[cut[0]])
    if stop > start:
        parameter.to_local().copy_(source.read_part(name, cut[0], start, stop))


def is_sharded(model: nn.Module) -> bool:
    """Whether any of the model's parameters are sharded."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks."""
    if ranks().size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    ranks().sum(gradients)
    for gradient in gradients:
        gradient /= ranks().size


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether ``value`` is true on at least one rank."""
    if ranks().size == 1:
        return value
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
