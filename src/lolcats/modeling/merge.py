"""Write an adapter as a merged model, shard by shard: host memory holds one file's tensors, not the model's.

A model on the meta device says which tensors ``save_pretrained`` would write. Each is read from the base model's
safetensors files, and PEFT merges the LoRA of its layer into it. What cannot be read so is merged in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from lolcats.files import give_usual_mode, hash_file, partial_path, whole_directory, write_text
from lolcats.modeling.checkpoint import Adapter, check_linearized, load, open_adapter, readable, with_lora
from lolcats.modeling.classes import convert_as
from lolcats.modeling.parts import CONFIG, find_parts
from lolcats.modeling.record import read_record
from lolcats.modeling.skeleton import empty_model, light_weights
from lolcats.weights.shards import INDEX, SINGLE, OtherNames, shards_of

FILE_BYTES = 4 * 2**30
"""Size of the files of a merged model, unless a single tensor is larger."""
PROGRESS = "merging.json"
"""In an unfinished directory: what is being merged there, so that a merge that was killed is continued."""


def merge_adapter(
    directory: Path, out: Path, tokenizer: Any, dtype: torch.dtype | str = "auto", base: str = "", trust: bool = False,
    file_bytes: int = FILE_BYTES,
) -> None:  # fmt: skip
    """Write the merged model of ``directory`` to ``out``, completely or not at all. If it is killed, the next call
    goes on with the file where it stopped.

    Args:
        directory: an adapter, or a merged model, which is copied.
        dtype, base, trust: as of :func:`lolcats.modeling.checkpoint.load`.
        file_bytes: size of a file.

    Raises:
        LolcatsError: ``directory`` is damaged, or the base model has changed or is missing.
    """
    check_linearized(directory)
    merge = _streamed(directory, dtype, base, trust)
    if merge is None:
        save_whole(load(directory, dtype, trust=trust, base=base), tokenizer, out, file_bytes)
    else:
        merge.write(out, tokenizer, file_bytes)


def _streamed(directory: Path, dtype: torch.dtype | str, base: str, trust: bool) -> Merge | None:
    """None for what is merged in memory."""
    with readable(directory):
        if read_record(directory).get("form") != "adapter":
            return None
        try:
            return Merge(open_adapter(directory, None, dtype, trust, base))
        except OtherNames:
            return None


def save_whole(model: PreTrainedModel, tokenizer: Any, directory: Path, file_bytes: int = FILE_BYTES) -> None:
    """Write a model that is in memory as a self-contained directory, completely or not at all."""
    with whole_directory(directory) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=file_bytes)
        tokenizer.save_pretrained(unfinished)


class Merge:
    """The merged model of an adapter: names and shapes of its tensors, and where they come from.

    Raises:
        OtherNames: a tensor of the merged model is not one of the base model's files, with or without LoRA.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.model = adapter, _on_meta(adapter)
        self.tensors, self.parameters = saved_tensors(self.model), self.model.num_parameters()
        self.source = shards_of(adapter.base, self.model.base_model_prefix)
        self.source.check({name: like for name, like in self.tensors.items() if not _is_ours(name)})
        self.lora = _lora_layers(self.model, adapter, self.tensors)

    def write(self, out: Path, tokenizer: Any, file_bytes: int) -> None:
        split = split_torch_state_dict_into_shards(
            self.tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=file_bytes
        )
        unfinished = out.with_name(f"{out.name}.partial")
        self._begin(unfinished, tokenizer, {"bytes": file_bytes, "files": split.filename_to_tensors})
        for file, names in split.filename_to_tensors.items():
            if not (unfinished / file).exists():
                _write_file(unfinished / file, {name: self.tensor(name) for name in names})
        if split.is_sharded:
            total = {"total_parameters": self.parameters, **split.metadata}
            index = {"metadata": total, "weight_map": split.tensor_to_filename}
            write_text(unfinished / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        (unfinished / PROGRESS).unlink()
        shutil.rmtree(out, ignore_errors=True)
        unfinished.rename(out)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the merged model, in host memory."""
        like = self.tensors[name]
        if _is_ours(name):
            return like.contiguous()
        read = self.source.read({name: like}, torch.device("cpu"))[name]
        return _merged(self.lora[name], read) if name in self.lora else read

    def _begin(self, unfinished: Path, tokenizer: Any, plan: Mapping[str, Any]) -> None:
        """Write what is beside the weights, unless an earlier call began the same merge here."""
        adapter = self.adapter
        parts, config = find_parts(adapter.directory), hash_file(adapter.directory / CONFIG)
        task = {"base": adapter.base.record, "config": config, "parts": parts, "dtype": str(adapter.dtype), **plan}
        text, progress = json.dumps(task, sort_keys=True), unfinished / PROGRESS
        if progress.is_file() and progress.read_text() == text:
            return
        shutil.rmtree(unfinished, ignore_errors=True)
        self.model.save_pretrained(unfinished, state_dict={})
        for path in unfinished.glob("model*"):
            if path.name in (SINGLE, INDEX):
                path.unlink()
        tokenizer.save_pretrained(unfinished)
        write_text(progress, text)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that ``model.save_pretrained`` would write, by their names in its files."""
    state = {name: t for name, t in model.state_dict().items() if name not in (model._keys_to_ignore_on_save or ())}
    stored = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return {name: t if _is_ours(name) else t.new_empty(t.shape, device="meta") for name, t in stored.items()}


def _on_meta(adapter: Adapter) -> PreTrainedModel:
    """The linearized model; only its feature maps and gates are in memory."""
    path, kwargs = adapter.base.arguments
    config = AutoConfig.from_pretrained(path, trust_remote_code=adapter.trust, **kwargs)
    if kwargs or getattr(config, "quantization_config", None) is not None:
        raise OtherNames(f"{adapter.base.path} holds quantized weights.")
    model = empty_model(config, adapter.dtype, adapter.trust)
    model.tie_weights()
    if model.can_generate():
        with suppress(OSError):  # most models have none of their own
            model.generation_config = GenerationConfig.from_pretrained(path)
    convert_as(model, adapter.config.lolcats)
    adapter.load_maps(model)
    return model


def _lora_layers(model: PreTrainedModel, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """PEFT's layer for each tensor with LoRA, by the tensor's name in files."""
    if adapter.lora is None:
        return {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with light_weights(model):
        wrapped = with_lora(model, adapter.lora)
    found: dict[str, Any] = {}
    for layer_name, layer in wrapped.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weight = parameters[f"{layer_name}.weight"]
            stored = list(revert_weight_conversion(model, {f"{layer_name}.weight": weight}))
            one = len(stored) == 1 and sum(p is weight for p in parameters.values()) == 1
            if not one or stored[0] not in tensors or tensors[stored[0]].shape != weight.shape:
                raise OtherNames(f"{layer_name}.weight is not one tensor in the files of {adapter.base.path}.")
            found[stored[0]] = layer
    return found


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """``weight`` with the LoRA of PEFT's ``layer``, whose own weight takes no memory."""
    base = layer.get_base_layer()
    empty, base.weight = base.weight, nn.Parameter(weight, requires_grad=False)
    layer.merge()
    merged, base.weight = base.weight.detach(), empty
    layer.merged_adapters.clear()
    return merged


def _is_ours(name: str) -> bool:
    return ".lolcats." in name


def _write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = partial_path(path)
    save_file(tensors, partial, metadata={"format": "pt"})
    give_usual_mode(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
