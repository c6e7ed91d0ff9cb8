"""Tiny linearized models in DIR, each with prompts and what ``generate`` continues them with: make_models.py DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import lolcats
from lolcats.config import AttentionConfig
from lolcats.modeling.checkpoint import load
from lolcats.modeling.merge import merge_adapter

VOCABULARY, NEW, LENGTHS = 320, 24, (100, 37, 64, 5, 1, 150, 16, 33, 120)
WITH_HEADS = (*LENGTHS, 300)
"""Prompts for models with kept heads, whose keys lie in longer blocks: only whole blocks are found again."""
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
GEMMA = {
    "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5, 2.0, 4.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 512,
}  # fmt: skip
FOUR = {**COMMON, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
TERRACED = {"window_size": 16, "sinks": 4, "feature_dim": 8}
SLIDING = {**TERRACED, "window": "sliding"}
UNROTATED: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig(**COMMON, rope_parameters=YARN), SLIDING),
    "qwen2": (Qwen2Config(**COMMON), TERRACED),
    "qwen3": (Qwen3Config(**COMMON, head_dim=16), {**TERRACED, "key_maps": "per_kv_head"}),
    "gemma3": (Gemma3TextConfig(**COMMON, **GEMMA), SLIDING),
    "phi3": (Phi3Config(**COMMON, rope_parameters=LONG), TERRACED),
    "glm4": (Glm4Config(**COMMON, head_dim=16), SLIDING),
    "mistral": (MistralConfig(**COMMON, sliding_window=None), {"kind": "linear"}),
    "heads": (LlamaConfig(**FOUR), {**TERRACED, "softmax_heads": {"0": [1, 3], "2": [0, 2]}}),
    "kinds": (LlamaConfig(**COMMON), {**TERRACED, "layers": {"0": "window", "2": "linear"}}),
}
"""Feature maps before RoPE. RoPE turns neighbours and half of the channels in Glm4; sines are scaled in YaRN."""
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig(**COMMON), TERRACED),
    "sliding": (LlamaConfig(**COMMON), {"window": "sliding", "window_size": 16, "sinks": 0, "feature_dim": 8}),
    "kept": (LlamaConfig(**COMMON, head_dim=32), {**TERRACED, "layers": {"1": "softmax"}}),
    "kinds": (LlamaConfig(**COMMON), {**TERRACED, "layers": {"0": "linear", "2": "window"}}),
    "heads": (LlamaConfig(**FOUR), {**TERRACED, "softmax_heads": {"0": [1, 2], "1": [0, 3]}}),
    "heads and layers": (
        LlamaConfig(**FOUR),
        {**SLIDING, "softmax_heads": {"0": [0, 1, 3], "1": [2]}, "layers": {"2": "softmax"}},
    ),
    "heads gemma3": (Gemma3TextConfig(**COMMON, **GEMMA), {**TERRACED, "softmax_heads": {"1": [0]}}),
    "qwen2": (Qwen2Config(**COMMON), TERRACED),
    "qwen3": (Qwen3Config(**COMMON, head_dim=16), {**TERRACED, "key_maps": "per_kv_head", "feature_map": "t2r"}),
    "gemma3": (Gemma3TextConfig(**COMMON, **GEMMA), TERRACED),
    "phi3": (Phi3Config(**COMMON), TERRACED),
    "granite": (GraniteConfig(**COMMON, **GRANITE), TERRACED),
    "mistral": (MistralConfig(**COMMON, sliding_window=None), {"kind": "linear", "feature_map": "elu"}),
    **{f"unrotated {name}": (x, {**y, "feature_inputs": "unrotated"}) for name, (x, y) in UNROTATED.items()},
}
"""Name to base configuration and attention. vLLM's softmax attention on CPUs takes heads of 32 dimensions or more."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Token 17 is the word ``t17``, so a text says which tokens it is made of."""
    words = {f"t{i}": i for i in range(VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="t3"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="t1", eos_token="t2", pad_token="t0")


def base(config: Any) -> Any:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.12)
    return model


def made(config: Any, attention: dict[str, Any]) -> Any:
    model = base(config)
    with torch.no_grad():
        model = lolcats.convert(model, AttentionConfig(**attention)).eval()
        for name, parameter in model.named_parameters():
            if ".lolcats." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def merged(directory: Path) -> None:
    """An adapter with LoRA, merged: its tokens are those of the adapter."""
    sys.path.append(str(Path(__file__).parents[1]))
    from support.adapters import adapter

    (directory / "lora").mkdir()
    saved = adapter(directory / "lora", base(LlamaConfig(**COMMON)), torch.float32, AttentionConfig(**TERRACED))
    merge_adapter(saved, directory / "merged", tokenizer(), torch.float32)
    cases = references(load(saved, torch.float32), LENGTHS)
    (directory / "merged" / "references.json").write_text(json.dumps(cases))


def references(model: Any, lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    generator, result = torch.Generator().manual_seed(0), []
    for length in lengths:
        ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
        model.generation_config.eos_token_id = None
        y = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        result.append({"prompt": ids[0].tolist(), "output": y[0, length:].tolist()})
    return result


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    for name, (config, attention) in MODELS.items():
        model = made(config, attention)
        model.save_pretrained(directory / name)
        tokenizer().save_pretrained(directory / name)
        cases = references(model, WITH_HEADS if "heads" in name else LENGTHS)
        (directory / name / "references.json").write_text(json.dumps(cases))
    merged(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
