#!/usr/bin/env bash
# Package: bitsandbytes 0.50.2 with torch 2.13.0. No GPU needed.
# Expected: copy.deepcopy of a model with 4-bit layers makes a second model that shares nothing with the first one.
# What happens: a quantized Linear4bit refers to itself (weight.module) and to its quantization state (quant_state, also as
#   weight.quant_state). In the copy, weight.module is still the *original* layer, and the two quant_state, one object before,
#   have become two. Results are right at first, but what is set through one of them does not reach the other.
set -euo pipefail
changed() {
    echo "Changed: a copied Linear4bit refers to itself, or its quantization state is one object."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 numpy==2.3.5 packaging==26.3 &&
    "$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check --no-deps bitsandbytes==0.50.2 ||
    { echo "The packages could not be installed."; exit 2; }
cat > "$folder/copied.py" <<'PYTHON'
import copy
import sys

import bitsandbytes
import torch

layer = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
other = copy.deepcopy(layer)
x = torch.randn(2, 64)
found = {
    "the layer's weight belongs to it": layer.weight.module is layer,
    "its quantization state is one object": layer.weight.quant_state is layer.quant_state,
    "both compute the same": torch.equal(layer(x), other(x)),
    "the copy's weight belongs to the copy": other.weight.module is other,
    "the copy's weight belongs to the original": other.weight.module is layer,
    "the copy's quantization state is one object": other.weight.quant_state is other.quant_state,
}
for what, holds in found.items():
    print(f"{what}: {holds}")
sys.exit(list(found.values()) != [True, True, True, False, True, False])
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/copied.py" 2> "$folder/errors" || { tail -3 "$folder/errors"; changed; }
