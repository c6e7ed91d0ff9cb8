#!/usr/bin/env bash
# Packages: peft 0.21.2, torch 2.13.0, transformers 5.23.0. No GPU needed.
# Expected: `with model.disable_adapter():` switches an adapter off for a block and leaves the model as it was, so that a frozen
#   LoRA stays frozen; a loss against the base model (distillation, preference optimization) uses it in every step.
# What happens: at the end of the block all matrices of the active adapter become trainable, also those that were frozen. Only
#   another module is trained here: after one such block its gradient is clipped by the norm of LoRA's gradients as well, so it
#   learns at a fraction of its rate. The weights of LoRA stay as they are, since no optimizer has them, and nothing is said.
set -euo pipefail
changed() { echo "Changed: a frozen adapter stays frozen after disable_adapter(), or the figures differ."; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    peft==0.21.2 torch==2.13.0 transformers==5.23.0 numpy==2.3.5 || { echo "The packages could not be installed."; exit 2; }
cat > "$folder/frozen.py" <<'PYTHON'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.body(x) * self.scale


def step(reference):
    """One step that trains only ``scale``: trainable matrices of LoRA, and how much of its gradient clipping leaves."""
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(r=4, target_modules=["body"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".scale"))
    x = 10 * torch.randn(16, 8)
    target = torch.zeros(16, 8)
    if reference:
        with torch.no_grad(), model.disable_adapter():
            model(x)
    (model(x) - target).square().mean().backward()
    scale = model.base_model.model.scale
    before = scale.grad.norm().item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), before)  # does nothing if only scale has a gradient
    return sum(p.requires_grad for n, p in model.named_parameters() if "lora_" in n), scale.grad.norm().item() / before


plain, after = step(False), step(True)
for name, (count, share) in {"without the block": plain, "after the block": after}.items():
    print(f"{name}: {count} trainable matrices of LoRA; clipping leaves {100 * share:.0f} % of the gradient")
sys.exit(not (plain[0] == 0 and plain[1] > 0.999 and after[0] == 2 and after[1] < 0.9))
PYTHON
"$folder/venv/bin/python" "$folder/frozen.py" || changed
