"""The families that are tested end to end, as data: add one by adding a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A model type of transformers and the settings of its tiny configuration beyond the rules of tiny.py."""

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    """Goes through the whole pipeline in the quick tests, too."""


LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
QUARTER_ROPE = {**HALF_ROPE, "partial_rotary_factor": 0.25}

FAMILIES = {
    "AFMoE": Family("afmoe"),
    "Apertus": Family("apertus"),
    "Arcee": Family("arcee"),
    "Cohere": Family("cohere"),
    "Cohere 2": Family("cohere2"),
    "dots.llm1": Family("dots1"),
    "ERNIE 4.5": Family("ernie4_5"),
    "EXAONE 4": Family("exaone4"),
    "Falcon-3": Family("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "Falcon-H1": Family("falcon_h1", quick=True),
    "Gemma": Family("gemma"),
    # The oldest transformers' SDPA leaves the cap out.
    "Gemma 2": Family("gemma2", {"attn_logit_softcapping": 2.0, "attn_implementation": "eager"}, quick=True),
    "Gemma 3": Family("gemma3_text", {"head_dim": 256}, quick=True),
    "Gemma 3 with vision": Family("gemma3"),
    "Gemma 4": Family("gemma4_text", {"num_kv_shared_layers": 0}),
    "GLM-4": Family("glm4"),
    "GPT-2": Family("gpt2", {"scale_attn_by_inverse_layer_idx": True}, quick=True),
    "GPT-NeoX, Pythia": Family("gpt_neox", {"rope_parameters": QUARTER_ROPE}, quick=True),
    "Granite": Family("granite"),
    "Granite MoE": Family("granitemoe"),
    "Granite 4 hybrid": Family("granitemoehybrid"),
    "Helium": Family("helium"),
    "Hunyuan": Family("hunyuan_v1_dense"),
    "Jamba": Family("jamba"),
    "LFM2": Family("lfm2"),
    "Llama 3": Family("llama", {"rope_parameters": LLAMA3_ROPE}, quick=True),
    "Llama 4": Family("llama4_text"),
    "MiniMax M2": Family("minimax_m2"),
    "Ministral": Family("ministral"),
    "Mistral v0.1": Family("mistral", {"sliding_window": 24}, quick=True),
    "Mixtral": Family("mixtral", quick=True),
    "Nemotron": Family("nemotron"),
    "OLMo": Family("olmo"),
    "OLMo-2": Family("olmo2"),
    "OLMo-3": Family("olmo3"),
    "OLMoE": Family("olmoe"),
    "OPT": Family("opt", quick=True),
    "Persimmon": Family("persimmon"),
    "Phi-2": Family("phi"),
    "Phi-3": Family("phi3", quick=True),
    "Phi-4-mini": Family("phi3", {"rope_parameters": HALF_ROPE, "num_key_value_heads": 2}),
    "Phi-3.5-MoE": Family("phimoe"),
    "Qwen2": Family("qwen2"),
    "Qwen2-MoE": Family("qwen2_moe"),
    "Qwen3": Family("qwen3", quick=True),
    "Qwen3-MoE": Family("qwen3_moe"),
    "Qwen3-Next": Family("qwen3_next"),
    "Seed-OSS": Family("seed_oss"),
    "SmolLM3": Family("smollm3", {"no_rope_layers": [1, 0]}, quick=True),
    "StableLM": Family("stablelm", {"rope_parameters": QUARTER_ROPE}),
    "StarCoder 2": Family("starcoder2"),
}  # fmt: skip

REFUSED = {
    "BLOOM": (Family("bloom"), "computes with its attention mask itself"),
    "DeepSeek-V3": (Family("deepseek_v3"), "queries and values of different size"),
    "DiffLlama": (Family("diffllama"), "more than once with the same module"),
    "Falcon": (Family("falcon"), "computes with its attention mask itself"),
    "Falcon with ALiBi": (Family("falcon", {"alibi": True}), "computes with its attention mask itself"),
    "Gemma 3n": (Family("gemma3n_text"), "shares its keys and values"),
    "Gemma 4 E": (Family("gemma4_text"), "shares its keys and values"),
    "GLM-5": (Family("glm_moe_dsa"), "computes with its attention mask itself"),
    "gpt-oss": (Family("gpt_oss"), "learned sink logits"),
    "JetMoE": (Family("jetmoe"), "do not come from transformers' cache"),
    "Mamba": (Family("mamba"), "does not call transformers' attention interface"),
    "MiniMax": (Family("minimax"), "uses cache of its own"),
    "MPT": (Family("mpt"), "computes with its attention mask itself"),
    "Inkling": (Family("inkling_text"), "position bias"),
}
"""And the reason that is given."""
