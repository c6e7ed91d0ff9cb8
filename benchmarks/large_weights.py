"""Models for ``large.py``: their shapes, and random weights, in 4 bits or layer by layer in host memory."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

KEPT = 0.125  # of the key/value heads


@dataclass(frozen=True)
class Model:
    """A model of which ``layers`` are run; the rest of its shape is that of ``benchmarks/scale.py``."""

    scale: str
    layers: int
    stage_1_layers: int
    lengths: tuple[int, ...]
    """Of the prompts of a search."""
    length: int = 1024
    batch: int = 8
    steps: int = 3
    settings: tuple[str, ...] = ()
    """Other than those of the recipe paper-70b."""


MODELS = {
    "70B": Model("Llama 3.1 70B", 80, 8, (1024, 2048)),
    "405B": Model("Llama 3.1 405B", 8, 8, (1024, 2048)),
    "tiny": Model("tiny", 2, 2, (512,), 64, 8, 1, ("attention.feature_dim=16", "attention.window_size=16")),
}


def geometry(model: Model) -> Any:
    """That of ``benchmarks/scale.py``."""
    import scale

    return {**scale.GEOMETRIES, **scale.TINY}[model.scale]


def shape(model: Model) -> Any:
    """The configuration of the layers that are run."""
    from transformers import LlamaConfig

    g = geometry(model)
    return LlamaConfig(
        hidden_size=g.hidden, intermediate_size=max(g.intermediate, 128), num_hidden_layers=model.layers,
        num_attention_heads=g.heads, num_key_value_heads=g.kv_heads, vocab_size=g.vocabulary, rope_theta=500_000.0,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def quantized_model(config: Any, device: torch.device, in_4_bits: bool = True) -> Any:
    """A model with random weights whose decoder layers are in NF4, as if transformers had loaded it in 4 bits.

    One layer is quantized, and the others get copies. ``in_4_bits``: False on a CPU, where bitsandbytes may have no
    gradients.
    """
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(one, dtype=dtype)
    layers: Any = model.model.layers
    if in_4_bits:
        quantize(layers[0], dtype, device)
        model.is_loaded_in_4bit = True
    layers.extend(copy.deepcopy(layers[0]) for _ in range(1, config.num_hidden_layers))
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config = model.config  # not a copy, which would not follow its changes
            if hasattr(getattr(module, "weight", None), "module"):  # what a copied Params4bit belongs to
                module.weight.module, module.quant_state = module, module.weight.quant_state
    model.config.num_hidden_layers = config.num_hidden_layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[0]] * config.num_hidden_layers
    return model.requires_grad_(False).eval()


def quantize(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Its linear layers in NF4, as ``lolcats.weights.base.nf4`` has them."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            new = Linear4bit(
                module.in_features, module.out_features, module.bias is not None, dtype, compress_statistics=True,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            new.weight = type(new.weight)(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
            ).to(device)
            new.bias = module.bias
            layer.set_submodule(name, new)


def kept_heads(config: Any) -> dict[str, list[int]]:
    """An eighth of the heads, spread over all layers."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    kept: dict[str, list[int]] = {}
    for number in range(max(1, int(KEPT * layers * heads))):
        kept.setdefault(str(number % layers), []).append(number // layers)
    return kept


class Repeated:
    """Random weights in host memory, the same for every layer."""

    ahead = True

    def __init__(self) -> None:
        self.known: dict[str, torch.Tensor] = {}

    def check(self, wanted: Any) -> None:
        """Nothing can be missing."""

    def read(self, wanted: Any, device: torch.device) -> dict[str, torch.Tensor]:
        return {name: self._one(re.sub(r"\.\d+\.", ".", name), like, device) for name, like in wanted.items()}

    def _one(self, name: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        if name not in self.known:
            drawn = torch.empty(like.shape, dtype=like.dtype, device=device)
            drawn = drawn.normal_(0, 0.02) if drawn.ndim > 1 else drawn.fill_(1)
            self.known[name] = drawn.cpu().pin_memory() if device.type == "cuda" else drawn
        return self.known[name]
