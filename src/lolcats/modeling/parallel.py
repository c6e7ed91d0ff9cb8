"""A converted model on several devices: tensor parallelism, or layers on different ones (``device_map``).

Feature maps and gates are per head, so tensor parallelism splits them with the heads, along their first dimension. They
are only 0.2 % of the parameters: if layers are offloaded to host memory or disk, they stay on the compute device.

Ranks hold as many key/value heads each, but of a layer with kept heads not as many linearized ones. Its maps and gates
are loaded whole, and each rank then keeps those of its heads.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations import tensor_parallel as styles

from lolcats.errors import LolcatsError
from lolcats.modeling.layer import LinearizedAttention, linearized_layers

STYLE = "lolcats_heads"
COLUMNS = "colwise"  # the style of projections whose outputs, and so heads, are split over the ranks
ROWS = "rowwise"  # the style of those whose inputs are split and outputs summed


class HeadsParallel(styles.TensorParallelLayer):  # type: ignore[misc]
    """transformers' style for :class:`LinearizedAttention` and its feature maps: each rank keeps those of its heads."""

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole = module._parameters[param]
        if whole is not None and not hasattr(module, "is_uneven"):
            part = distribute_tensor(whole.data, mesh, [Shard(0)], src_data_rank=None)
            module._parameters[param] = nn.Parameter(part, whole.requires_grad)

    def install_forward(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, LinearizedAttention):
            module.split_heads(mesh.size())
        return module


styles.ALL_PARALLEL_STYLES.register(STYLE, HeadsParallel())


def add_plan(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Add the modules that ``record`` lists to the model's tensor-parallel plan, for layers whose heads it splits."""
    plan = dict(model._tp_plan or {})
    for entry in record["layers"]:
        name = styles.replace_layer_number_by_wildcard(entry["name"])
        if entry["kind"] != "softmax" and plan.get(f"{name}.k_proj") == COLUMNS:
            norm = [".norm"] if record["attention"].get("normalizer") == "group_norm" else []
            plan |= {f"{name}.lolcats{part}": STYLE for part in ("", ".phi_q", ".phi_k", *norm)}
    model._tp_plan = plan


def tensor_parallel(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Split a converted model over the ranks of ``mesh``, in place; every rank must hold the same whole model before.

    Parameters may be on the meta device, to be filled by the caller. ``from_pretrained(DIR, tp_plan="auto")`` reads
    each rank's part of a merged model instead.
    """
    if not model._tp_plan:
        raise LolcatsError(f"transformers has no tensor-parallel plan for {type(model).__name__}.")
    if "tp_plan" in inspect.signature(styles.apply_tensor_parallelism).parameters:
        styles.apply_tensor_parallelism(model, mesh, model._expand_parallel_plan(model.tp_plan))
    else:  # before transformers 5.20
        styles.apply_tensor_parallelism(model, mesh)
    return settle(model)


def settle(model: PreTrainedModel) -> PreTrainedModel:
    """Turn feature maps and gates into plain tensors on the device that computes with them, after any loading.

    With tensor parallelism these are this rank's parts. With accelerate's hooks they are whole, since the hooks would
    fetch them only for a module's ``forward``, which the kernels do not call.
    """
    for attention in model.modules():
        layer, split = getattr(attention, "lolcats", None), getattr(attention, "k_proj", None)
        weight = getattr(split, "weight", None)
        if isinstance(layer, LinearizedAttention) and layer.kept and isinstance(weight, DTensor):
            _take_own_heads(layer, weight.device_mesh)
    for layer in linearized_layers(model):
        for module in layer.modules():
            hook = getattr(module, "_hf_hook", None)
            for name, parameter in list(module._parameters.items()):
                if isinstance(parameter, DTensor):
                    module._parameters[name] = nn.Parameter(parameter.to_local(), parameter.requires_grad)
                elif hook is not None and parameter is not None and parameter.is_meta:
                    value = hook.weights_map[name].to(hook.execution_device)
                    module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
            if hook is not None:
                from accelerate.hooks import remove_hook_from_module

                remove_hook_from_module(module)
    _plain_inference(model)
    return model


def _take_own_heads(layer: LinearizedAttention, mesh: DeviceMesh) -> None:
    """Keep only what belongs to this rank's linearized heads of a layer that has kept ones."""
    whole = layer.kept
    own = whole.on_rank(mesh.get_local_rank(), mesh.size())
    before = sum(len(whole.on_rank(rank, mesh.size()).linearized) for rank in range(mesh.get_local_rank()))
    share = slice(before, before + len(own.linearized))
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                part = parameter.data.unflatten(0, (len(whole.linearized), -1))[share].flatten(0, 1).clone()
                module._parameters[name] = nn.Parameter(part, parameter.requires_grad)
    layer.maps = layer.phi_k.heads = layer.maps // len(whole.linearized) * len(own.linearized)
    layer.phi_q.heads = whole.group * len(own.linearized)
    layer.kept = own if own.kept else None


def _plain_inference(model: PreTrainedModel) -> None:
    """Without gradients, let split linear layers compute directly with this rank's part.

    transformers' wrapper looks up and swaps every parameter at every call, which took the host a fifth of a decode
    step.
    """
    for name, module in model.named_modules():
        style = (model._tp_plan or {}).get(styles.replace_layer_number_by_wildcard(name))
        if type(module) is nn.Linear and style in (COLUMNS, ROWS) and isinstance(module.weight, DTensor):
            group = module.weight.device_mesh.get_group() if style == ROWS else None
            module.forward = partial(_split_linear, module, module.forward, group)  # type: ignore[method-assign]


def _split_linear(module: nn.Linear, wrapped: Any, group: dist.ProcessGroup | None, x: Tensor) -> Tensor:
    """``wrapped``: transformers' forward, for gradients; ``group``: ranks over which outputs are summed."""
    if torch.is_grad_enabled() or isinstance(x, DTensor):
        return wrapped(x)
    weight, bias = (p.to_local() if isinstance(p, DTensor) else p for p in (module.weight, module.bias))
    if group is None:
        return linear(x, weight, bias)
    y = linear(x, weight)
    dist.all_reduce(y, group=group)
    return y if bias is None else y + bias


def is_split(model: PreTrainedModel) -> bool:
    """Whether this rank holds only some of the heads."""
    return dist.is_initialized() and any(layer.ranks > 1 for layer in linearized_layers(model))
