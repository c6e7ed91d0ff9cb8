"""Stage 2 on several GPUs: FSDP2 shards the base model and LoRA; checkpoints that any number of ranks continues.

Every rank holds a slice of each base weight and of LoRA with its optimizer state; a layer is gathered when it computes.
Feature maps are 0.2 % of the parameters and lie whole on every rank. torchrun starts the ranks; the same code runs on
CPUs (gloo) and GPUs (nccl).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.files import copy_whole, whole
from lolcats.modeling.convert import decoder
from lolcats.modeling.layer import decoder_layers, linearized_layers
from lolcats.modeling.weights import Shards
from lolcats.ranks import ranks

SHARDED = "sharded"  # directory of a checkpoint that torch.distributed.checkpoint wrote


def own_device(device: torch.device) -> torch.device:
    """The device of this rank, whose process group is made if it is not there; ``device`` where there is one rank."""
    ranks()
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device


def shard(model: PreTrainedModel, device: torch.device, mesh: DeviceMesh | None = None) -> PreTrainedModel:
    """Shard a converted model (with the LoRA it may carry) over all ranks, in place.

    Units: each decoder layer, the embedding, the output layer, the rest of the decoder. The trainers call the decoder
    and the output layer themselves, so those two are the roots, not the model. Tied embeddings stay whole. Parameters
    may be on the meta device: see :func:`materialize`.
    """
    mesh = mesh if mesh is not None else init_device_mesh(device.type, (ranks().size,))
    maps = {p for layer in linearized_layers(model) for p in layer.parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight is head.weight:
        maps.add(embedding.weight)
    for unit in (*decoder_layers(model), embedding, head):
        if any(p not in maps for p in unit.parameters()):
            fully_shard(unit, mesh=mesh, ignored_params=maps)
    fully_shard(decoder(model), mesh=mesh, ignored_params=maps)
    return model


def materialize(model: nn.Module, device: torch.device, fill: Callable[[str, Tensor], None]) -> None:
    """Bring a sharded model to ``device``, with memory for what was on the meta device.

    Args:
        fill: gives a parameter that was on the meta device its values, by name: (name, parameter), the parameter a
            DTensor of which this rank has a part, or a tensor.
    """
    names = [name for name, p in model.named_parameters() if p.is_meta]
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            fill(name, parameters[name])


def fill_part(parameter: Tensor, source: Shards, name: str) -> None:
    """Read this rank's part of a parameter."""
    cut = [p.dim for p in getattr(parameter, "placements", ()) if isinstance(p, Shard)]
    if not isinstance(parameter, DTensor) or not cut:
        parameter.copy_(source.read({name: parameter}, torch.device("cpu"))[name])
        return
    each = -(-parameter.shape[cut[0]] // ranks().size)
    start = min(ranks().rank * each, parameter.shape[cut[0]])
    stop = min(start + each, parameter.shape[cut[0]])
    if stop > start:
        parameter.to_local().copy_(source.read_part(name, cut[0], start, stop))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds parts of the model's parameters."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all ranks; those of sharded parameters are that already."""
    if ranks().size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    ranks().sum(gradients)
    for gradient in gradients:
        gradient /= ranks().size


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Norm of all gradients together, to which they are clipped; some may be sharded and some whole."""
    with_gradient = [p for p in parameters if p.grad is not None]
    sharded = [p for p in with_gradient if isinstance(p.grad, DTensor)]
    others = [p for p in with_gradient if not isinstance(p.grad, DTensor)]
    norms = [get_total_norm([p.grad for p in part if p.grad is not None]) for part in (sharded, others) if part]
    total = torch.linalg.vector_norm(torch.stack([whole(norm) for norm in norms]))
    if max_norm > 0:
        for part in (sharded, others):
            clip_grads_with_norm_(part, max_norm, total)
    return total


def save_sharded(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what trains and its optimizer state, each rank its own part. All ranks call it together."""
    state_dict_saver.save(_state(model, optimizer), checkpoint_id=directory)


def load_sharded(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint that any number of ranks wrote into the ranks there are; LolcatsError if it is damaged."""
    state = _state(model, optimizer)
    try:
        state_dict_loader.load(state, checkpoint_id=directory)
    except (CheckpointException, RuntimeError, OSError, KeyError, ValueError) as error:
        raise LolcatsError(f"{directory} is damaged, or not of this model ({str(error).splitlines()[0]}).") from error
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimizer over sharded parameters the ``state_dict`` that one process saved."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if value.shape == parameters[index].shape and isinstance(parameters[index], DTensor):
                entries[name] = torch.zeros_like(parameters[index])
                copy_whole(entries[name], value)
    optimizer.load_state_dict(state)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether ``value`` holds on one rank at least."""
    if ranks().size == 1:
        return value
    flag = torch.tensor(float(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
