"""Import checkpoints of the paper's own code (github.com/HazyResearch/lolcats) as a lolcats adapter.

That code saves what a stage trained with ``torch.save``: ``{"model_state_dict": {name: tensor}, "step": ...}``; it also
reads just the inner dictionary. Settings that the files lack (window, kind of feature map, LoRA's α) come from the
configuration, by default the paper's. What its tensors mean, from reading the code:

    feature_map_q.mlp.layer  (H, D, f)     y = x · layer for every query head, softmax(y) ⊕ softmax(−y): our weight
    feature_map_q.mlp.bias   (1, H, 1, 1 or f)  only with t2r: our bias
    window_factors           (1, H, 1, 1)  γ = sigmoid of it, against a linear term of weight 1: our gate
    q_proj.lora_A.default.weight           PEFT's own names, scaled by α / r as in PEFT

Its models keep no heads. If the configuration does (``attention.softmax_heads``, ``attention.layers``), the feature
maps and window factors of those heads are left out; LoRA is of all layers.

Its ``affine_attention_factors`` (linear term weighted 1 − γ) is off in every configuration it ships, and not supported.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel

from lolcats.config import AttentionConfig, Config, to_yaml
from lolcats.errors import LolcatsError
from lolcats.files import is_empty, whole_directory, write_text
from lolcats.modeling.checkpoint import FEATURE_MAPS, LORA, feature_map_state, save_adapter_config, seal_lora
from lolcats.modeling.convert import convert, named_layers
from lolcats.modeling.heads import KeptHeads
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.parts import find_parts
from lolcats.tensors import compare_keys, write_tensors
from lolcats.weights.base import empty_model, find_base, load_tokenizer

NAME = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.self_attn\.(.+)")
KEYS = {
    "feature_map_q.mlp.layer": "lolcats.phi_q.weight", "feature_map_q.mlp.bias": "lolcats.phi_q.bias",
    "feature_map_k.mlp.layer": "lolcats.phi_k.weight", "feature_map_k.mlp.bias": "lolcats.phi_k.bias",
    "window_factors": "lolcats.gate",
}  # fmt: skip
LORA_KEY = re.compile(r"(\w+)\.lora_([AB])\.default\.weight")


def import_reference(base: str, transfer: Path, lora: Path | None, out: Path, config: Config) -> None:
    """Write the adapter directory ``out`` from the files of the two stages. The base model's weights are not read.

    Args:
        transfer: feature maps and window factors.
        lora: LoRA matrices, and feature maps if stage 2 trained them too; these replace the ones in ``transfer``.
        config: ``attention`` and ``finetune.alpha`` are used; feature dim, rank and targets are read from the files.

    Raises:
        LolcatsError: if a file is not such a checkpoint, or a tensor is missing, unexpected or mis-shaped; it is named
            as in the file.
    """
    if out.is_dir() and not is_empty(out):
        raise LolcatsError(f"{out} is not empty; choose another --out.")
    if config.attention.softmax_budget:
        raise LolcatsError(
            "attention.softmax_budget: lolcats import does not search for heads. Run lolcats select on the base model, "
            "and pass its file with --selection."
        )
    trust = config.trust_remote_code
    known = find_base(base, trust)
    tokenizer = load_tokenizer(known, trust)
    maps, adapters = _sorted(read_state_dict(transfer), transfer)
    if adapters:
        raise LolcatsError(f"{transfer} contains LoRA ({_full(next(iter(adapters)))}): pass this file as --lora.")
    if lora is not None:
        later, adapters = _sorted(read_state_dict(lora), lora)
        if not adapters:
            raise LolcatsError(f"{lora} has no LoRA matrices (such as self_attn.q_proj.lora_A.default.weight).")
        maps |= later
    columns = {tensor.shape[-1] for (_, key), tensor in maps.items() if key.endswith("mlp.layer")}
    if config.attention.feature_map != "t2r" and len(columns) == 1:
        config = replace(config, attention=replace(config.attention, feature_dim=columns.pop()))
    model = convert(empty_model(known, trust), config)
    names = {entry["layer"]: entry["name"] for entry in model.config.lolcats["layers"]}
    stay = _kept_by_choice(model, config.attention)
    maps = {place: tensor for place, tensor in maps.items() if place[0] not in stay}
    tensors = _feature_maps(model, names, maps, transfer)
    with whole_directory(out) as unfinished:
        unfinished.mkdir(parents=True)
        write_tensors(tensors, unfinished / FEATURE_MAPS)
        if lora is not None:
            config = _save_lora(model, names, adapters, config, known.path, unfinished / LORA, lora)
        save_adapter_config(model, known, unfinished, parts=find_parts(unfinished))
        tokenizer.save_pretrained(unfinished)
        write_text(unfinished / "config.yaml", to_yaml(config))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file by name. Only tensors and plain containers are unpickled."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LolcatsError(f"{path} does not exist.") from None
    except Exception as error:  # damaged archives raise many errors, weights_only an UnpicklingError
        raise LolcatsError(f"{path} is damaged, or contains more than tensors, which is not unpickled.") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()) or not state:
        raise LolcatsError(f"{path}: expected a dictionary of tensors, or one under model_state_dict.")
    return {str(name): tensor.detach() for name, tensor in state.items()}


Keyed = dict[tuple[int, str], Tensor]  # by layer and the name inside its self_attn


def _sorted(state: dict[str, Tensor], path: Path) -> tuple[Keyed, Keyed]:
    """Split tensors into those of the attentions and those of LoRA; an unknown name is an error."""
    maps: Keyed = {}
    lora: Keyed = {}
    for name, tensor in state.items():
        match = NAME.fullmatch(name)
        known = match and (maps if match[2] in KEYS else lora if LORA_KEY.fullmatch(match[2]) else None)
        if match is None or known is None:
            raise LolcatsError(
                f"{path}: unexpected tensor {name}; expected only feature maps, window factors and LoRA of self_attn."
            )
        known[int(match[1]), match[2]] = tensor
    return maps, lora


def _kept_by_choice(model: PreTrainedModel, attention: AttentionConfig) -> set[int]:
    """The layers that stay softmax attention because the configuration says so."""
    named = {i for text, kind in attention.layers.items() if kind == "softmax" for i in named_layers(text)}
    named |= {int(text) for text in attention.softmax_heads}
    return {x["layer"] for x in model.config.lolcats["layers"] if x["kind"] == "softmax" and x["layer"] in named}


def _feature_maps(model: PreTrainedModel, names: dict[int, str], maps: Keyed, path: Path) -> dict[str, Tensor]:
    """Our tensors by name: exactly those that the converted model has."""
    state = feature_map_state(model)
    ours = {
        (layer.geometry.layer, key): f"{names[layer.geometry.layer]}.{name}"
        for layer in linearized_layers(model) for key, name in KEYS.items()
        if key != "window_factors" or layer.spec.has_softmax
    }  # fmt: skip
    ours = {place: name for place, name in ours.items() if name in state}
    _compare(set(ours), set(maps), path)
    unread = {name: torch.zeros(x.shape) for name, x in state.items() if name not in ours.values()}  # gates of linear
    kept = {layer.geometry.layer: layer.kept for layer in linearized_layers(model)}
    return {
        name: _linearized(maps[place], state[name].shape, kept[place[0]], place, path) for place, name in ours.items()
    } | unread


def _linearized(
    tensor: Tensor, shape: torch.Size, kept: KeptHeads | None, place: tuple[int, str], path: Path
) -> Tensor:
    """Their tensor of all heads in our shape, which is that of the linearized heads."""
    if kept is None:
        return _fitting(tensor, shape, place, path)
    heads, group = kept.linearized, shape[0] // len(kept.linearized)  # 1 for key maps of key/value heads
    whole = _fitting(tensor, torch.Size((kept.geometry.kv_heads * group, *shape[1:])), place, path)
    return whole.unflatten(0, (-1, group))[list(heads)].flatten(0, 1).contiguous()


def _fitting(tensor: Tensor, shape: torch.Size, place: tuple[int, str], path: Path) -> Tensor:
    """Their tensor in our shape: window factors (1, H, 1, 1) -> (H,), biases (1, H, 1, 1 or f) -> (H, f)."""
    theirs = tuple(tensor.shape)
    if tensor.ndim == 4 and theirs[::2] == (1, 1) and theirs[1] == shape[0] and theirs[3] in (1, shape[-1]):
        tensor = tensor[0, :, 0].expand(shape[0], shape[-1]) if len(shape) == 2 else tensor[0, :, 0, 0]
    if tensor.shape != shape:
        raise LolcatsError(
            f"{path}: tensor {_full(place)} has shape {theirs}; this base model and configuration need {tuple(shape)}."
        )
    return tensor.float().contiguous()


def _save_lora(
    model: PreTrainedModel, names: dict[int, str], lora: Keyed, config: Config, base: str, directory: Path, path: Path
) -> Config:
    """Write LoRA in PEFT's format; return the configuration with the rank and targets found in the file."""
    parts = {place: LORA_KEY.fullmatch(place[1]) for place in lora}
    targets = sorted({match[1] for match in parts.values() if match})
    _compare({(n, f"{t}.lora_{m}.default.weight") for n in names for t in targets for m in "AB"}, set(lora), path)
    rank = next(tensor.shape[0] for (_, key), tensor in lora.items() if ".lora_A." in key)
    tensors = {}
    for (layer, key), tensor in lora.items():
        target, matrix = LORA_KEY.fullmatch(key).groups()  # type: ignore[union-attr]
        linear = model.get_submodule(f"{names[layer]}.{target}")
        shape = (rank, linear.in_features) if matrix == "A" else (linear.out_features, rank)
        fitting = _fitting(tensor, torch.Size(shape), (layer, key), path)
        tensors[f"base_model.model.{names[layer]}.{target}.lora_{matrix}.weight"] = fitting
    settings = replace(config.finetune, rank=rank, targets=targets)
    peft = LoraConfig(
        r=rank, lora_alpha=settings.alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM",
        inference_mode=True, base_model_name_or_path=base,
    )  # fmt: skip
    peft.save_pretrained(str(directory))
    seal_lora(directory, tensors)
    return replace(config, finetune=settings)


def _compare(expected: set[tuple[int, str]], found: set[tuple[int, str]], path: Path) -> None:
    compare_keys(set(map(_full, expected)), set(map(_full, found)), path)


def _full(place: tuple[int, str]) -> str:
    return f"layers.{place[0]}.self_attn.{place[1]}"
