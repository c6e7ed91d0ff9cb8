"""Save and load linearized models, in safetensors only.

*Adapter*: feature maps, gates and LoRA, with a reference to the unchanged base model.
    DIR/config.json  DIR/feature_maps.safetensors  DIR/lora/
*Merged*: a self-contained model directory with LoRA folded into the weights, written by ``model.save_pretrained``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats.errors import LolcatsError, first_line, out_of_memory
from lolcats.files import hash_file, whole_directory, write_text
from lolcats.modeling.arguments import Arguments
from lolcats.modeling.code import may_run_code
from lolcats.modeling.layer import linearized_layers
from lolcats.modeling.parts import FEATURE_MAPS as FEATURE_MAPS
from lolcats.modeling.parts import LORA as LORA
from lolcats.modeling.parts import LORA_CONFIG, check_parts
from lolcats.modeling.parts import LORA_WEIGHTS as LORA_WEIGHTS
from lolcats.modeling.record import MODEL_TYPE, sealed
from lolcats.modeling.record import is_linearized as is_linearized
from lolcats.tensors import compare_keys, load_strictly, read_checksums, read_tensors, write_tensors
from lolcats.weights.base import (
    Base,
    Quantize,
    check_quantized,
    find_again,
    load_model,
    nf4,
    with_content,
)

ConvertAs = Callable[[PreTrainedModel, dict[str, Any]], PreTrainedModel]


def load(
    directory: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu", trust: bool = False,
    base: str | Path = "", quantize: Quantize = "none",
) -> PreTrainedModel:  # fmt: skip
    """Load a linearized model (adapter or merged form) in evaluation mode.

    Args:
        dtype: dtype of the weights; ``auto``: as saved. Feature maps and gates are always fp32.
        trust: run Python code that comes with the base model.
        base: where the base model of an adapter is now, if it has moved: hub id, directory or .gguf file.
        quantize: ``nf4``: the weights of linear layers in 4 bits (bitsandbytes), each quantized as it is read. LoRA
            then stays beside them, in ``dtype``.

    Raises:
        LolcatsError: if there is no linearized model, files are damaged, or the base model has changed since.
    """
    check_linearized(directory)
    with readable(directory):
        kwargs: dict[str, Any] = {"base": str(base)} if base else {}
        if may_run_code(directory, trust):
            kwargs |= {"trust_remote_code": True, "config": _config_with_code(directory, base)}
        if quantize != "none":
            config = kwargs.get("config") or AutoConfig.from_pretrained(str(directory))
            if "base" not in config.lolcats:  # else the base model is checked
                check_quantized(Base(str(directory), "directory", ""), torch.device(device), trust)
            kwargs |= {"quantization_config": nf4(_dtype(config, dtype)), "device_map": {"": torch.device(device)}}
        model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, **kwargs)
        return (model.to(device) if quantize == "none" else model).eval()


def check_linearized(directory: str | Path) -> None:
    if not is_linearized(directory):
        raise LolcatsError(f"{directory} is not a linearized model (no config.json with model_type lolcats).")


@contextmanager
def readable(directory: str | Path) -> Iterator[None]:
    """Turn errors of loading a linearized model into a LolcatsError that names it."""
    try:
        yield
    except Exception as error:  # damaged files cause any error of transformers or safetensors
        if isinstance(error, LolcatsError) or out_of_memory(error):
            raise
        raise LolcatsError(f"Cannot load {directory}: it is damaged or incomplete ({first_line(error)}).") from error


def _config_with_code(directory: str | Path, base: str | Path) -> Any:
    ours: Any = CONFIG_MAPPING[MODEL_TYPE]
    return ours.with_code(str(directory), **({"base": str(base)} if base else {}))


def feature_map_state(model: nn.Module) -> dict[str, Tensor]:
    """Feature maps and gates by their names in the unwrapped model."""
    return {
        name.removeprefix("base_model.model."): p.detach()
        for name, p in model.named_parameters()
        if ".lolcats." in name
    }


def save_feature_maps(model: nn.Module, path: Path) -> None:
    write_tensors(feature_map_state(model), path)


def load_feature_maps(model: nn.Module, path: Path) -> None:
    load_strictly(feature_map_state(model), read_tensors(path), path)


def save_adapter_config(
    model: PreTrainedModel, base: Base, directory: Path, kind: str = "", parts: dict[str, str] | None = None
) -> None:
    """Write DIR/config.json of the adapter form: the family's configuration, our record, and where the base is. Other
    ranks may read it meanwhile: they see the old file or the new one.

    Args:
        kind: the kind that every linearized layer gets when the adapter is loaded (default: its own).
        parts: the files that belong to the adapter so far, see :mod:`lolcats.modeling.parts`.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    record = copy.deepcopy(config.lolcats)
    if kind:
        record["attention"]["kind"] = kind
        for layer in record["layers"]:
            layer["kind"] = kind if layer["kind"] != "softmax" else "softmax"
    listed = {} if parts is None else {"parts": parts}
    config.lolcats = sealed({**record, "form": "adapter", "base": with_content(base).record, **listed})
    config.dtype = model.dtype
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".config-", dir=directory) as partial:
        config.save_pretrained(partial)
        for file in Path(partial).iterdir():
            file.replace(directory / file.name)


def load_adapter(directory: str | Path, config: Any, convert_as: ConvertAs, arguments: Arguments) -> PreTrainedModel:
    """Base model + feature maps + LoRA (merged in memory; beside the weights of a base model in 4 bits).

    Args:
        directory: the adapter, or its name on the hub.
        convert_as: linearizes a model as a record says.

    Raises:
        LolcatsError: a part of the adapter is missing or damaged, or the base has changed since.
    """
    dtype, quantization, placement = arguments.dtype, arguments.quantization, arguments.placement
    hub, subfolder = arguments.hub, arguments.subfolder
    adapter = open_adapter(directory, config, dtype, arguments.trust, arguments.moved, hub, subfolder)
    settings = arguments.settings(directory, config, adapter.directory)
    if quantization is not None and placement.several:
        raise LolcatsError(f'{directory}: an adapter in 4 bits is loaded to one device, such as device_map={{"": 0}}.')
    quantize: Quantize = "none" if quantization is None else _known(quantization)
    attention = arguments.attention
    model = load_model(adapter.base, adapter.dtype, placement.first, adapter.trust, quantize, attention)
    convert_as(model, adapter.config.lolcats)
    adapter.load_maps(model)
    if adapter.lora is not None:
        model = (merge_lora if quantization is None else attach_lora)(model, adapter.lora)
    _name(model, str(directory))
    for name, value in settings.items():
        setattr(model.config, name, value)
    return placement.spread(model) if placement.several else model


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk whose parts and base model have been checked. known: the base model when it was trained;
    base: where it is now."""

    directory: Path
    config: Any
    known: Base
    base: Base
    dtype: torch.dtype
    trust: bool

    @property
    def lora(self) -> Path | None:
        return self.directory / LORA if (self.directory / LORA).is_dir() else None

    def load_maps(self, model: PreTrainedModel) -> None:
        """Load feature maps and gates into the base model, linearized as the adapter says."""
        model.config.lolcats["base"] = self.known.record
        path = self.directory / FEATURE_MAPS
        if any(layer.spec.has_linear for layer in linearized_layers(model)) or path.exists():
            load_feature_maps(model, path)


def open_adapter(
    directory: str | Path, config: Any = None, dtype: torch.dtype | str = "auto", trust: bool = False, moved: str = "",
    hub: Mapping[str, Any] | None = None, subfolder: str = "",
) -> Adapter:  # fmt: skip
    """The adapter in ``directory``, or on the hub; arguments as of :class:`Arguments`, errors of
    :func:`load_adapter`."""
    given, hub = directory, hub or {}
    directory = Path(directory if Path(directory).is_dir() else snapshot_download(str(directory), **hub)) / subfolder
    if config is None:
        with_code = may_run_code(directory, trust)
        config = _config_with_code(directory, moved) if with_code else AutoConfig.from_pretrained(str(directory))
    check_parts(directory, config.lolcats.get("parts"))
    trust = trust and getattr(config, "own_model", None) is not None  # else it was trained on transformers' own classes
    known = Base(**config.lolcats["base"])
    base = find_again(known, given, moved, trust, hub)
    return Adapter(directory, config, known, base, _dtype(config, dtype), trust)


def _dtype(config: Any, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype that ``dtype`` stands for when a model with this configuration is loaded."""
    dtype = config.dtype or torch.float32 if dtype in ("auto", None) else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _known(quantization: Any) -> Quantize:
    """The name of transformers' configuration of quantized weights.

    Raises:
        LolcatsError: adapters are not loaded with it.
    """
    if getattr(quantization, "load_in_4bit", False) and quantization.bnb_4bit_quant_type == "nf4":
        return "nf4"
    raise LolcatsError("An adapter's base model is quantized to 4 bits in NF4 (bitsandbytes) or not at all.")


def _name(model: PreTrainedModel, given: str) -> None:
    """Say that the model was loaded from ``given``: PEFT writes this into adapters that are trained on top of it.

    The path of the base model would make PEFT load that with softmax attention.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = module.config.name_or_path = given


def save_lora(model: Any, base: Base, directory: Path) -> None:
    """Write the LoRA of a PEFT model atomically in PEFT's format; only the first rank writes."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    model.peft_config["default"].base_model_name_or_path = base.path
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}  # FSDP2 reshards at state_dict()
    with whole_directory(directory) as unfinished:
        model.save_pretrained(unfinished, save_embedding_layers=False, state_dict=weights)
        seal_lora(unfinished, read_tensors(unfinished / LORA_WEIGHTS))


def seal_lora(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write LoRA matrices next to their adapter_config.json, with a checksum of both.

    PEFT keeps the names of the layers as a set; they are sorted here, so that equal runs write equal files.
    """
    path = directory / LORA_CONFIG
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_text(path, json.dumps(config, indent=2, sort_keys=True))
    write_tensors(tensors, directory / LORA_WEIGHTS, hash_file(path))


def merge_lora(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Fold the LoRA saved in ``directory`` (PEFT format) into the weights of ``model``."""
    return with_lora(model, directory).merge_and_unload().eval()


def attach_lora(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Put the LoRA saved in ``directory`` beside the weights of ``model``, in its dtype."""
    from peft.tuners.lora import LoraLayer

    wrapped = with_lora(model, directory)
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.to(model.dtype)
    adapted: PreTrainedModel = wrapped.get_base_model().requires_grad_(False).eval()
    return adapted


@contextmanager
def merged_lora(model: PreTrainedModel, directory: Path) -> Iterator[PreTrainedModel]:
    """Like :func:`merge_lora`, but the weights of ``model`` are restored bit for bit after the block."""
    from peft.tuners.lora import LoraLayer

    wrapped = with_lora(model, directory)
    changed = [m.get_base_layer().weight for m in wrapped.modules() if isinstance(m, LoraLayer)]
    before = [weight.detach().clone() for weight in changed]
    try:
        yield wrapped.merge_and_unload().eval()
    finally:
        for weight, old in zip(changed, before, strict=True):
            weight.data.copy_(old)


def with_lora(model: PreTrainedModel, directory: Path) -> Any:
    """``model`` with the LoRA saved in ``directory`` beside its weights, as a PEFT model."""
    from peft import PeftModel, get_peft_model_state_dict

    saved = read_tensors(directory / LORA_WEIGHTS)
    _, known = read_checksums(directory / LORA_WEIGHTS)
    if known and known != hash_file(directory / LORA_CONFIG):
        raise LolcatsError(f"{directory / 'adapter_config.json'} is damaged: its checksum does not match.")
    wrapped = PeftModel.from_pretrained(model, str(directory))
    compare_keys(set(get_peft_model_state_dict(wrapped, save_embedding_layers=False)), set(saved), directory)
    return wrapped


def verify_loading(info: dict[str, Any], path: Any) -> None:
    """Raise LolcatsError if transformers' loading report lists a mis-shaped, missing or unexpected tensor."""
    if shapes := sorted(info.get("mismatched_keys") or [], key=str):
        name, found, expected = shapes[0]
        raise LolcatsError(
            f"{path}: tensor {name} has shape {tuple(found)}, but the model needs {tuple(expected)} (mismatched "
            f"tensors: {len(shapes)})."
        )
    compare_keys(set(map(str, info.get("missing_keys") or [])), set(map(str, info.get("unexpected_keys") or [])), path)
