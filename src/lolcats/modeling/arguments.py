"""Arguments of ``from_pretrained`` as they apply to an adapter. None is ignored silently."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from lolcats.errors import LolcatsError
from lolcats.modeling.interface import IMPLEMENTATION
from lolcats.modeling.parallel import settle

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of ``device_map`` by which accelerate finds a device for each layer."""
DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")
"""Options for the files of an adapter on the hub."""
WITHOUT_EFFECT = frozenset(
    {
        "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "disable_mmap", "from_flax",
        "from_tf", "low_cpu_mem_usage", "max_length", "mirror", "offload_state_dict", "resume_download", "tqdm_class",
        "use_safetensors", "weights_only",
    }
)  # fmt: skip
"""What transformers adds by itself, no longer uses, or only reads weights by."""
OF_CALLS = (
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "pad_token_id", "bos_token_id",
    "eos_token_id",
)  # fmt: skip
"""Fields of a configuration that do not belong to the model, but are the defaults of its calls."""
OWN = ("_name_or_path", "dtype", "quantization_config", "transformers_version")
"""Fields that an argument of their own decides, or none."""


@dataclass(frozen=True)
class Placement:
    """Where weights go, as of transformers' arguments of these names."""

    device_map: Any = None
    max_memory: Any = None
    offload_folder: Any = None
    offload_buffers: bool = False

    @property
    def _device(self) -> Any:
        return self.device_map.get("") if isinstance(self.device_map, dict) else self.device_map

    @property
    def several(self) -> bool:
        """Whether layers may go to several devices."""
        return isinstance(self.device_map, str | dict) and self._device in (None, "disk", *STRATEGIES)

    @property
    def first(self) -> Any:
        """The device that the whole model is loaded to."""
        return "cpu" if self.several or self._device is None else self._device

    def _own_folder(self) -> str:
        """A new folder in ``offload_folder``: accelerate takes the weights that a folder already holds."""
        if self.offload_folder is None:
            raise LolcatsError("device_map puts layers of an adapter on disk: say where with offload_folder=DIR.")
        os.makedirs(self.offload_folder, exist_ok=True)
        return tempfile.mkdtemp(dir=self.offload_folder)

    def spread(self, model: PreTrainedModel) -> PreTrainedModel:
        """Move the layers of a model in host memory to their devices, or to disk."""
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory, get_max_memory

        places, whole = self.device_map, list(model._no_split_modules or ())
        if places == "sequential":
            places = infer_auto_device_map(model, get_max_memory(self.max_memory), no_split_module_classes=whole)
        elif isinstance(places, str):
            memory = get_balanced_memory(
                model, self.max_memory, no_split_module_classes=whole, low_zero=places == "balanced_low_0"
            )
            places = infer_auto_device_map(model, memory, no_split_module_classes=whole)
        if places == {"": "disk"}:  # accelerate writes only parts that have names
            places = {name: "disk" for name, _ in model.named_children()}
        folder = self._own_folder() if "disk" in places.values() else None
        return settle(
            dispatch_model(
                model, places, offload_dir=folder, offload_buffers=self.offload_buffers,
                skip_keys=model._skip_keys_device_placement,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """How to load an adapter.

    trust: run Python code that comes with the base model. moved: where the base model is now, if it is not where the
    adapter found it. attention: the base model's attention implementation; None: its own choice. quantization:
    transformers' configuration of a base model in 4 bits. hub: options for files on the hub. subfolder: of the
    directory or repository, in which the adapter lies.
    """

    dtype: torch.dtype | str
    trust: bool
    moved: str
    attention: Any
    quantization: Any
    placement: Placement
    hub: Mapping[str, Any]
    subfolder: str

    @classmethod
    def of(cls, path: Any, config: Any, base: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """From what ``from_pretrained`` was given for the adapter ``path``, whose configuration is ``config``.

        Raises:
            LolcatsError: an argument does not apply to adapters.
        """
        left = {name: value for name, value in kwargs.items() if value is not None and name not in WITHOUT_EFFECT}
        hub = {name: left.pop(name) for name in DOWNLOAD if name in left}
        left = {name: value for name, value in left.items() if value is not False}  # what is switched off
        places = {name: left.pop(name) for name in Placement.__dataclass_fields__ if name in left}
        implementation = left.pop("attn_implementation", config.get_text_config(decoder=True)._attn_implementation)
        old = left.pop("torch_dtype", "auto")
        found = cls(
            left.pop("dtype", old), bool(left.pop("trust_remote_code", False)), base,
            None if implementation == IMPLEMENTATION else implementation, left.pop("quantization_config", None),
            Placement(**places), hub, str(left.pop("subfolder", "")),
        )  # fmt: skip
        for name in ("config", "tp_plan", "distributed_config"):  # looked at before
            left.pop(name, None)
        if args or left:
            raise _inapplicable(path, [*map(repr, args), *left])
        return found

    def settings(self, path: Any, config: Any, folder: Path) -> dict[str, Any]:
        """What ``config`` says otherwise than config.json in ``folder``, and calls of the adapter ``path`` may use.

        Raises:
            LolcatsError: ``config`` has other values than config.json that belong to the model.
        """
        saved, _ = type(config).get_config_dict(str(folder))
        known = type(config).from_dict({k: v for k, v in saved.items() if k != "model_type"}).to_dict()
        given = config.to_dict()
        other = [k for k in sorted(known | given) if k not in OWN and known.get(k) != given.get(k)]
        if changes := [name for name in other if name not in OF_CALLS]:
            raise _inapplicable(path, changes)
        return {name: given[name] for name in other}


def _inapplicable(path: Any, names: list[str]) -> LolcatsError:
    """The error for arguments that do not apply to the adapter ``path``."""
    return LolcatsError(
        f"{path} is an adapter, and from_pretrained does not take {', '.join(names)} for adapters. If transformers "
        f"knows {'it' if len(names) == 1 else 'them'}, merge the adapter first: lolcats export {path} --merge --out "
        "MERGED."
    )
