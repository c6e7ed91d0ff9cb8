#!/usr/bin/env bash
# Packages: liger-kernel 0.8.5 with transformers 5.17.0, torch 2.13.0, triton 3.6.0 (in the interpreter, which needs no GPU).
# Expected: liger-kernel's RoPE gives what transformers' function gives, however queries lie in memory.
# What happens: with several rows of one token each, as in a step of generation, it depends on that. The kernel finds rows by
#   the stride of the dimension of tokens, which of a single token says nothing. Queries whose tokens come before heads are
#   right. Those of Gemma 3 are not: it normalizes queries that are transposed already, and liger-kernel's norm, which makes
#   one matrix of them, gives them back with heads first. (Triton's interpreter does not run that norm, so the script lays
#   out the queries so itself.) With several tokens a row both layouts are right.
set -euo pipefail
changed() {
    echo "Changed: liger-kernel's RoPE of single tokens does not depend on their layout, or differs otherwise."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.17.0 &&
    "$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check --no-deps triton==3.6.0 liger-kernel==0.8.5 ||
    { echo "The packages could not be installed."; exit 2; }
cat > "$folder/rope.py" <<'PYTHON'
import torch
from liger_kernel.ops.rope import rope_forward
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, apply_rotary_pos_emb

ROWS, HEADS, DIM = 3, 4, 16
torch.manual_seed(0)
config = Gemma3TextConfig(
    hidden_size=64, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=DIM, num_hidden_layers=1,
    layer_types=["full_attention"],
)
attention = Gemma3Attention(config, 0).eval()


def normalized(tokens):
    """Queries before RoPE (rows, heads, tokens, head dim), normalized as rows of one matrix."""
    queries = attention.q_proj(torch.randn(ROWS, tokens, 64)).view(ROWS, tokens, HEADS, DIM).transpose(1, 2)
    return attention.q_norm(queries.reshape(-1, DIM)).view(queries.shape)


def tokens_first(x):
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


found = {}
with torch.no_grad():
    for tokens in (1, 2):
        q = normalized(tokens)
        cos, sin = (torch.randn(ROWS, tokens, DIM // 2).repeat(1, 1, 2) for _ in range(2))
        right, _ = apply_rotary_pos_emb(q, q, cos, sin)
        for layout, given in (("heads before tokens", q), ("tokens before heads", tokens_first(q))):
            turned = rope_forward(given.clone(), given.clone(), cos, sin)[0]
            found[tokens, layout] = torch.allclose(turned, right, atol=1e-5)
            print(f"{tokens} tokens a row, {layout}: {'right' if found[tokens, layout] else 'wrong'}")
assert found == {
    (1, "heads before tokens"): False, (1, "tokens before heads"): True,
    (2, "heads before tokens"): True, (2, "tokens before heads"): True,
}
PYTHON
HF_HUB_OFFLINE=1 TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/rope.py" || changed
