#!/usr/bin/env bash
# Package: transformers 5.23.0 with torch 2.13.0. No GPU needed.
# Expected: a forward pass over whole rows, without mask, positions or cache, reads no values back to the host, and asks SDPA for
#   plain causal attention.
# What happens: the mask code looks for packed sequences in the positions that the model has just made itself. Eagerly that reads
#   one value on the host, so on a GPU every training call first waits for all work before it. Where values cannot be read (fake
#   tensors here; torch.compile and a CUDA graph that is being recorded take the same branch), attention gets a dense mask (batch,
#   1, tokens, tokens) instead of none. With a cache, neither happens.
set -euo pipefail
changed() {
    echo "Changed: such a call reads nothing back, or gets no mask with fake tensors, or does the same with a cache."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 transformers==5.23.0 ||
    { echo "The packages could not be installed."; exit 2; }
cat > "$folder/calls.py" <<'PYTHON'
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

masks = []


def noting(module, query, key, value, attention_mask, **kwargs):
    masks.append(None if attention_mask is None else tuple(attention_mask.shape))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("noting", noting)
AttentionMaskInterface.register("noting", sdpa_mask)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def call(use_cache):
    """Values read on the host, and the mask that attention got."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="noting")
    ids = torch.zeros(2, 16, dtype=torch.long)
    with Reads() as reads:
        model(ids, use_cache=use_cache)
    return reads.count, masks[-1]


found = {"eager": call(False), "eager, with a cache": call(True)}
with FakeTensorMode():
    found |= {"fake tensors": call(False), "fake tensors, with a cache": call(True)}
for name, (reads, mask) in found.items():
    print(f"{name}: {reads} values read, mask {mask}")
sys.exit(list(found.values()) != [(1, None), (0, None), (0, (2, 1, 16, 16)), (0, None)])
PYTHON
"$folder/venv/bin/python" "$folder/calls.py" || changed
