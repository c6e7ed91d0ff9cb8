#!/usr/bin/env bash
# Package: transformers 5.23.0 (accelerate 1.15.0, torch 2.13.0).
# Expected: with TrainingArguments(label_smoothing_factor=0.1) a causal language model is trained to predict the next token,
#   whatever its class is called.
# What happens: Trainer shifts the labels only if the class name is in its table of causal language models. An empty subclass
#   of LlamaForCausalLM, or a class of custom code, is trained to predict the token that it is given, without a word: on
#   the same weights and batch its loss differs from the original class's, and equals the smoothed loss of unshifted labels.
#   Without label smoothing both classes have the same loss.
set -euo pipefail
changed() {
    echo "Changed: the subclass has the loss of its base class."
    exit 1
}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -qq --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 ||
    { echo "The packages could not be installed."; exit 2; }
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON' || changed
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


class OwnForCausalLM(LlamaForCausalLM):
    pass


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
)
torch.manual_seed(0)
weights = LlamaForCausalLM(config).state_dict()
ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(1))


def loss(kind, smoothing):
    model = kind(config)
    model.load_state_dict(weights)
    arguments = TrainingArguments("out", label_smoothing_factor=smoothing, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model=model, args=arguments)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    with torch.no_grad():
        return trainer.compute_loss(model, batch).item()


def smoothed(shift):
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(ids).logits
    labels = ids
    if shift:
        logits, labels = logits[:, :-1], ids[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1).item()


plain = [loss(kind, 0.0) for kind in (LlamaForCausalLM, OwnForCausalLM)]
smooth = [loss(kind, 0.1) for kind in (LlamaForCausalLM, OwnForCausalLM)]
shifted, unshifted = smoothed(True), smoothed(False)
print(f"without smoothing: LlamaForCausalLM {plain[0]:.4f}, its subclass {plain[1]:.4f}")
print(f"with smoothing:    LlamaForCausalLM {smooth[0]:.4f}, its subclass {smooth[1]:.4f}")
print(f"smoothed cross-entropy of the next token {shifted:.4f}, of the token itself {unshifted:.4f}")
same = abs(plain[0] - plain[1]) < 1e-5
seen = abs(smooth[0] - shifted) < 1e-3 and abs(smooth[1] - unshifted) < 1e-3 and abs(shifted - unshifted) > 1e-3
sys.exit(not (same and seen))
PYTHON
