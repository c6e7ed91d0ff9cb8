"""A tiny random model of any decoder class of transformers; its configuration is shrunk by the names of its fields."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY, LAYERS = 320, 2
SIZES: list[tuple[str, Any]] = [
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
    (r"\w+_token_(id|index)", 310),
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"(num_|n_|decoder_|encoder_)+(hidden_|decoder_|encoder_)?layers?|(decoder|encoder)_layers|n_layers?", LAYERS),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"n_group|topk_group|n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"(num_|moe_num_|n_)?shared_experts|n_shared_experts|moe_num_shared_experts|num_shared_experts", 1),
    (r"(num|n|moe_num)_(local_|routed_)?experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"(linear_num_key|linear_num)_heads", 2),
    (r"(\w*num_)?(attention_|swa_num_attention_|index_n_|decoder_|encoder_|linear_num_value_)heads|\w*attention_heads"
     r"|n_heads?|num_heads|index_n_heads", 4),
    (r"(mamba_n|mamba_num|n_mamba)_heads", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 16),
    (r"mamba_(d_head|head_dim)", 16),
    (r"mamba_d_ssm", 128),
    (r"(num|swa_num|global_num)_(key_value|global_key_value)_heads|num_kv_heads", 2),
    (r"qk_rope_head_dim", 8),
    (r"\w*head_dim|kv_channels|dim_head|d_head|attention_head_size", 16),
    (r"\w+_lora_rank|adapter_rank|laurel_rank", 16),
    (r"query_pre_attn_scalar", 24),
    (r"hidden_size_per_layer_input|moe_latent_size", 16),
    (r"hidden_size|d_model|n_embd|dim_model|emb_dim|word_embed_proj_dim|embedding_size|input_embedding_size"
     r"|output_embedding_size|lru_width|backbone_hidden_size|router_hidden_size", 64),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|ffn_hidden_size|expert_ffn_hidden_size|dff|dim_ff|feed_forward_size|d_inner"
     r"|n_inner|block_multiple_of", 64),
    (r"(local_)?sliding_window(_size)?|window_size|attention_window_size|local_attention", 16),
    (r"attention_chunk_size|keep_window_size", 16),
    (r"index_topk|index_block_size", 8),
    (r"index_topk_blocks|index_local_blocks", 1),
]  # fmt: skip
"""Value of an integer field by the first pattern that its whole name fits."""
OTHERS = {
    "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
    "use_mamba_kernels": False, "is_decoder": True,
}  # fmt: skip
"""Away from neutral defaults, so that a factor that gets lost shows; classes that can be either are decoders."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR, FULL, SLIDING, BOTH = "linear_attention", "full_attention", "sliding_attention", "hybrid"
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {FULL: {**ROPE, "mrope_section": [4, 2, 2]}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {},
        "rope_parameters": ROPE,
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", FULL]},
    "lfm2_moe": {"layer_types": ["conv", FULL]},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": [FULL, "minimax_m3_sparse"]},
    "ministral": {"head_dim": 16},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 8),
        "attn_layers": ("local", "lsh"),
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, BOTH, LINEAR, BOTH]},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, BOTH, LINEAR, BOTH]},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}
"""What the rules above miss, by model type."""


def shrunk(config_class: Any, **changes: Any) -> Any:
    """A configuration of the class with small sizes; ``changes`` are fields set as they are (of parts: their own)."""
    changes = {**CHANGES.get(config_class.model_type, {}), **changes}
    fields = {f.name: f.default for f in dataclasses.fields(config_class) if f.init and not f.name.startswith("_")}
    small: dict[str, Any] = {}
    for name, default in fields.items():
        if name in getattr(config_class, "sub_configs", {}):
            small[name] = _part(config_class, name, changes.pop(name, {}))
        elif name in OTHERS:
            small[name] = OTHERS[name]
        elif isinstance(default, int) and not isinstance(default, bool):
            value = next((v for pattern, v in SIZES if re.fullmatch(pattern, name)), default)
            small[name] = value if name != "num_key_value_heads" or not _is_latent(fields) else 4
    small.update(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if "num_key_value_heads" in fields and fields["num_key_value_heads"] is None:
        small["num_key_value_heads"] = 2
    small.update(layer_pattern(config_class, fields))
    return config_class(**{**small, **changes})


def _part(config_class: Any, name: str, changes: dict[str, Any]) -> Any:
    """A tiny configuration of a part (text, vision, ...); None if the default configuration has no such part."""
    if getattr(config_class(), name, None) is None or changes is None:
        return None
    return shrunk(type(getattr(config_class(), name)), **changes)


def _is_latent(fields: dict[str, Any]) -> bool:
    return "kv_lora_rank" in fields


def layer_pattern(config_class: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of each type that the default configuration mixes, and at least two layers."""
    types = getattr(config_class(), "layer_types", None) if "layer_types" in fields else None
    if not types:
        return {}
    kinds = list(dict.fromkeys(types))
    kinds = kinds if len(kinds) > 1 else kinds * LAYERS
    return {"layer_types": kinds, "num_hidden_layers": len(kinds)}


@torch.no_grad()
def tiny(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose attention is far from uniform, so that mistakes show."""
    config = shrunk(CONFIG_MAPPING[model_type], **changes)
    return randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "embed" in name:
            parameter.copy_(noise * 0.5)
        elif parameter.ndim >= 2:
            parameter.copy_(
                noise * (1.5 if re.search(r"q|k", name.rsplit(".", 2)[-2]) else 0.7) * parameter.shape[-1] ** -0.5
            )
        elif parameter.ndim == 1:
            parameter.add_(noise * 0.1)
    return model.eval()
