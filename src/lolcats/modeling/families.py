"""What differs between families, as data. A new family needs one row here, or none at all."""

from __future__ import annotations

HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic", "dropout", "is_causal", "logits_to_keep",
    "max_length_k", "max_length_q", "output_attentions", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "scaling", "sliding_window", "softcap", "use_cache",
}  # fmt: skip
"""Keywords of an attention call that need no further handling. Attention dropout is not applied."""

OBSTACLES = {
    "s_aux": "has learned sink logits of its own (s_aux), which the hybrid attention does not model",
    "sinks": "has learned sink logits of its own (sinks), which the hybrid attention does not model",
    "position_bias": "adds a position bias to its attention logits, which the hybrid attention does not model",
}
"""Keywords of an attention call that change its function. Such a layer can stay softmax."""

SPARSE = {"indices", "block_indices"}
"""Keywords of families whose indexer selects keys. They pass the selection in a mask only to implementations they know,
so under another name even their softmax layers would be wrong. Unknown keywords are treated the same way."""

PROJECTIONS = {
    "q_proj": ("q_proj", "query", "Wq"),
    "k_proj": ("k_proj", "key", "Wk"),
    "v_proj": ("v_proj", "value", "Wv"),
    "o_proj": ("o_proj", "out_proj", "dense", "c_proj", "Wo"),
}
"""Names in families of the linear layers of an attention module that compute q, k, v and its output."""

FUSED = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
"""Layers that compute q, k and v at once."""

GROUPED = ("query_key_value",)
"""Those that compute queries, key and value of one key/value head after another. The others compute all queries, then
all keys, then all values."""

MLP = (
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "c_proj", "w1", "w2",
    "w3", "dense_h_to_4h", "dense_4h_to_h", "input_linear", "output_linear",
)  # fmt: skip
"""Names in families of the linear layers of an MLP."""
